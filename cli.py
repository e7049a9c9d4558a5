"""The command line: parses arguments and calls one function a verb."""

import contextlib
import inspect
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, make_dataclass
from typing import Annotated, Any

import torch
import tyro

from . import __version__, blocks
from .deploy import diagnose, summarize
from .nets import AutoConfig, AutoModel, BaseConfig, list_models
from .nets.registry import nearest

# Super-resolution nets are compared at an output of 1280 x 720 pixels.
REPORTED_HEIGHT, REPORTED_WIDTH = 720, 1280
BLOCK_CHANNELS, BLOCK_SIDE = 64, 64


def doctor(arguments: Sequence[str]) -> None:
    """Say what this machine can run, and which form each kernel takes on it."""
    _parse(_no_options, "doctor", arguments)
    print(diagnose())


def list_names(arguments: Sequence[str]) -> None:
    """List the blocks and the nets, a line each."""
    _parse(_no_options, "list", arguments)
    print("blocks")
    for name in blocks.__all__:
        print(f"  {name:<22}{_first_line(getattr(blocks, name))}")
    print("nets")
    for name in list_models():
        with torch.device("meta"):
            net = AutoModel.from_config(AutoConfig.from_name(name))
        parameters = sum(parameter.numel() for parameter in net.parameters())
        print(f"  {name:<22}{_first_line(type(net))} {parameters / 1e6:.2f} M parameters.")


def summary(arguments: Sequence[str]) -> None:
    """Count what a block or a net costs: claritycore summary NAME [options]."""
    known = [*blocks.__all__, *list_models()]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{summary.__doc__}\n\nNAME is one of {', '.join(known)};\nNAME --help lists its options")
        return
    name, *rest = arguments
    if name not in known:
        raise ValueError(f"there is no block or net {name!r}{nearest(name, known)}")
    default = AutoConfig.from_name(name) if name in list_models() else None
    target, *size = _parse_target(name, rest, default)
    if isinstance(target, BaseConfig):
        channels, scale = getattr(target, "in_channels", 3), getattr(target, "scale", 1)
        default_size = REPORTED_HEIGHT // scale, REPORTED_WIDTH // scale
        with torch.device("meta"):
            target = AutoModel.from_config(target)
    else:
        channels, default_size = (
            getattr(target, "in_channels", getattr(target, "channels", 3)),
            (BLOCK_SIDE, BLOCK_SIDE),
        )
    height, width = (given or default for given, default in zip(size, default_size, strict=True))
    print(summarize(target, (1, channels, height, width)))


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"doctor": doctor, "list": list_names, "summary": summary}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 2 after bad input, with one line on stderr that says what to do."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "--version":
        print(__version__)
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: claritycore VERB [options]\n")
        for verb, function in VERBS.items():
            print(f"  {verb:<10}{_first_line(function)}")
        return 0
    verb, *rest = arguments
    try:
        if verb not in VERBS:
            raise ValueError(f"there is no verb {verb!r}{nearest(verb, VERBS)}")
        VERBS[verb](rest)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"claritycore: {error}", file=sys.stderr)
        return 2
    return 0


def _parse_target(
    name: str, arguments: Sequence[str], default: BaseConfig | None
) -> tuple[Any, int | None, int | None]:
    """Read a net's config or a block's arguments, and the size of the input that is to be counted."""
    kind = type(default) if default else getattr(blocks, name)
    if default is None:
        first, parameter = next(iter(inspect.signature(kind).parameters.items()))
        if parameter.default is inspect.Parameter.empty:
            arguments = [f"--{first.replace('_', '-')}", str(BLOCK_CHANNELS), *arguments]
    size = Annotated[int | None, tyro.conf.arg(help="size of the input in pixels")]
    options = make_dataclass(
        "Options",
        [
            ("target", tyro.conf.OmitArgPrefixes[kind], field(default=default or MISSING)),
            ("height", size, None),
            ("width", size, None),
        ],
        kw_only=True,
    )
    parsed = _parse(options, f"summary {name}", arguments)
    for side in ("height", "width"):
        given = getattr(parsed, side)
        if given is not None and given < 1:
            raise ValueError(f"--{side} must be at least 1, got {given}")
    return parsed.target, parsed.height, parsed.width


def _parse(options: Callable[..., Any], verb: str, arguments: Sequence[str]) -> Any:
    """Read the options of a verb; what tyro says of bad ones comes as one line."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            description = VERBS[verb.partition(" ")[0]].__doc__
            return tyro.cli(options, prog=f"claritycore {verb}", description=description, args=arguments)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        unframed = re.sub(r"[╭╮╰╯─+]|-{3,}|^ *[│|]|[│|] *$", " ", told.getvalue(), flags=re.MULTILINE)
        message = " ".join(unframed.split("For full helptext")[0].split())
        message = re.sub(r"^((Value|Parsing) error|(Unrecognized|Required) options(?= \w)) ?", "", message)
        message = message.replace("Error parsing target: ", "")
        raise ValueError(f"{message}; see claritycore {verb} --help") from None


def _no_options() -> None:
    pass


def _first_line(documented: Any) -> str:
    return inspect.cleandoc(documented.__doc__ or "").split("\n")[0]
