"""The command line: parses arguments and calls one function a verb."""

import importlib
import inspect
import itertools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from . import __version__, blocks, cli_files, cli_training
from .blocks import reparameterize_model
from .blocks.reparam import count_parameters
from .deploy import diagnose, summarize
from .deploy.export_facts import inspect_export
from .deploy.progress import one_line
from .deploy.summary import REPORTED_SIZE
from .nets import AutoConfig, AutoModel, BaseConfig, inspect_checkpoint, list_models
from .nets.base import stated
from .nets.registry import nearest
from .nets.shipped import located, purpose, shipped_weights
from .parsing import first_line, no_options, parse, taken
from .training.presets import preset_names
from .training.recipes import find_recipe, list_recipes

BLOCK_CHANNELS, BLOCK_SIDE = 64, 64
BLOCKS: dict[str, type[nn.Module]] = {
    name: block
    for name, block in vars(blocks).items()
    if name in blocks.__all__ and hasattr(block, "forward") and block not in (blocks.Reparameterizable, blocks.Expert)
}
MAPS = ("x", "image", "skip", "condition")  # as blocks call them; a style or tokens have another shape


def doctor(arguments: Sequence[str]) -> None:
    """Say what this machine can run, and which form each kernel takes on it."""
    parse(no_options, "doctor", doctor, arguments)
    print(diagnose())


def list_names(arguments: Sequence[str]) -> None:
    """List the blocks, the nets, the shipped weights and the recipes of degradations, a line each."""
    parse(no_options, "list", list_names, arguments)
    width = max(map(len, [*BLOCKS, *list_models(), *shipped_weights(), *list_recipes()])) + 2
    print("blocks")
    for name, block in BLOCKS.items():
        print(f"  {name:<{width}}{first_line(block)}")
    print("nets")
    told: dict[BaseConfig, str] = {}  # a net is built once, though two names have its size
    for name in list_models():
        config = AutoConfig.from_name(name)
        if config not in told:
            with torch.device("meta"):
                net = AutoModel.from_config(config)
            parameters = count_parameters(net)
            told[config] = f"{first_line(type(net))} {parameters / 1e6:.2f} M parameters."
        print(f"  {name:<{width}}{told[config]}")
    print("weights")
    for name in shipped_weights():
        net = AutoModel.from_pretrained(name)
        parameters = count_parameters(net)
        print(f"  {name:<{width}}{purpose(name)}: {type(net).__name__}, {parameters / 1e6:.2f} M parameters.")
    print("recipes")
    for name in list_recipes():
        print(f"  {name:<{width}}{', '.join(stage.name for stage in find_recipe(name).stages)}")


def summary(arguments: Sequence[str]) -> None:
    """Count what a block or a net costs: claritycore summary NAME|CHECKPOINT [options]."""
    known = [*(name for name, block in BLOCKS.items() if _takes_maps_alone(block)), *list_models()]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{summary.__doc__}\n\nNAME is one of {', '.join(known)},\nor of weights; NAME --help lists its options")
        return
    name, *rest = arguments
    if name in BLOCKS and not _takes_maps_alone(BLOCKS[name]):
        raise ValueError(f"{name} takes more than numbers and maps: build it in Python, for deploy.summarize")
    default = AutoConfig.from_name(name) if name in list_models() else None
    if name not in known:
        if not located(name).exists():
            raise ValueError(f"there is no block or net {name!r}{nearest(name, [*known, *shipped_weights()])}")
        found = inspect_checkpoint(name)
        if found.config is None:
            raise ValueError(found.refusal)
        default = found.config
    target, deployed, *size = _parse_target(name, rest, default)
    if isinstance(target, BaseConfig):
        channels, scale = stated(target, "in_channels", 3), stated(target, "scale", 1)
        default_size = REPORTED_SIZE[0] // scale, REPORTED_SIZE[1] // scale
        with torch.device("meta"):
            target = AutoModel.from_config(target)
    else:
        channels, default_size = (
            stated(target, "in_channels", stated(target, "channels", 3)) or 3,
            (BLOCK_SIDE, BLOCK_SIDE),
        )
    height, width = (given or default for given, default in zip(size, default_size, strict=True))
    if deployed:
        reparameterize_model(target.eval(), inplace=True)
    maps = len(_required(target.forward))  # some blocks join two
    print(summarize(target, *[(1, channels, height, width)] * maps))


def info(arguments: Sequence[str]) -> None:
    """Say what a file of weights, or one that was exported, is: claritycore info CHECKPOINT."""
    path = parse(_checkpoint, "info", info, arguments)
    print(inspect_export(Path(path)) if Path(path).suffix in (".onnx", ".pt2") else inspect_checkpoint(path))


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "doctor": doctor,
    "list": list_names,
    "summary": summary,
    "info": info,
    **cli_files.VERBS,
    **cli_training.VERBS,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 2 after bad input, with one line on stderr that says what to do."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _run(arguments)
        sys.stdout.flush()  # what is left in it would fail after the end
    except BrokenPipeError:  # whoever reads the output has enough of it, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 128 + getattr(signal, "SIGPIPE", 13)  # Windows has none
    except (ValueError, OSError, RuntimeError, MemoryError, ImportError) as error:
        print(f"claritycore: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return cli_training.interrupted(interrupt)
    return 0


def _run(arguments: Sequence[str]) -> None:
    modules, arguments = taken(arguments, "--import")
    for module in modules:
        _import(module)
    if list(arguments) == ["--version"]:
        print(__version__)
    elif not arguments or arguments[0] in ("-h", "--help"):
        print("usage: claritycore VERB [options]\n")
        width = max(map(len, VERBS)) + 2
        for verb, function in VERBS.items():
            print(f"  {verb:<{width}}{first_line(function)}")
        print(f"\nand the training presets, each with options of its own: {', '.join(preset_names())}")
        print(
            "\nEvery verb takes --import MODULE too: a module or file of yours whose nets and presets are to be known."
        )
    elif arguments[0] in VERBS:
        VERBS[arguments[0]](arguments[1:])
    elif arguments[0] in preset_names():
        cli_training.preset(arguments[0], arguments[1:])
    else:
        raise ValueError(f"there is no verb {arguments[0]!r}{nearest(arguments[0], [*VERBS, *preset_names()])}")


def _import(module: str) -> None:
    """Import a module of the user's, by name or file, which registers nets and presets; its folder comes first."""
    given, file = module, Path(module)
    folder = str(file.parent.resolve()) if file.suffix == ".py" else ""
    if file.suffix == ".py":
        module = file.stem
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {given}: give --import another")
    if not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"--import takes a dotted name, as in my_nets, or a file, as in ./my_nets.py, got {given}")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ImportError(f"--import {given}: {error}") from error  # one that the module itself asks for
        told = f"there is no module {error.name} to import, neither here nor installed"
        raise ValueError(f"{told}: give its dotted name, as in --import my_nets") from error
    if file.suffix == ".py" and not file.samefile(found.__file__ or ""):
        raise ValueError(f"--import {given}: another module is called {module}: give the file another name")


def _parse_target(
    name: str, arguments: Sequence[str], default: BaseConfig | None
) -> tuple[Any, bool, int | None, int | None]:
    """Read a net's config or a block's arguments, whether to deploy it, and the size of the input that is counted."""
    kind = type(default) if default else BLOCKS[name]
    if default is None:
        channels = [(f"--{key.replace('_', '-')}", str(BLOCK_CHANNELS)) for key in _required(kind)]
        arguments = [*itertools.chain(*channels), *arguments]
    size = Annotated[int | None, tyro.conf.arg(help="size of the input in pixels")]
    options = make_dataclass(
        "Options",
        [
            ("target", tyro.conf.OmitArgPrefixes[kind], field(default=default or MISSING)),
            ("deployed", Annotated[bool, tyro.conf.arg(help="count the form that is shipped")], False),
            ("height", size, None),
            ("width", size, None),
        ],
        kw_only=True,
    )
    parsed = parse(options, f"summary {name}", summary, arguments)
    for side in ("height", "width"):
        given = getattr(parsed, side)
        if given is not None and given < 1:
            raise ValueError(f"--{side} must be at least 1, got {given}")
    return parsed.target, parsed.deployed, parsed.height, parsed.width


def _required(function: Callable[..., Any]) -> list[str]:
    """The arguments that must be given."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty]


def _takes_maps_alone(block: type[nn.Module]) -> bool:
    """Whether a block is made of numbers and called with maps, as far as that must be given."""
    for function, kind in ((block, int), (block.forward, Tensor)):
        parameters = inspect.signature(function).parameters
        given = [parameters[name] for name in _required(function) if name != "self"]
        if any(parameter.annotation not in (kind, kind.__name__) for parameter in given):
            return False
        if kind is Tensor and any(parameter.name not in MAPS for parameter in given):
            return False
    return True


_CHECKPOINT = tyro.conf.arg(metavar="CHECKPOINT", help="a file, the folder of a run, a shipped name, or an export")


def _checkpoint(checkpoint: Annotated[str, tyro.conf.Positional, _CHECKPOINT]) -> str:
    return checkpoint
