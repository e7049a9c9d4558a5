"""The verbs of the command line that make files of files; each parses its arguments and calls one function."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from . import deploy
from .deploy import RestoreOptions, RestoreReport, restore_files
from .deploy.export import Format
from .deploy.progress import ProgressLine, one_line
from .deploy.restore_options import DType
from .nets import AutoConfig, AutoModel, inspect_checkpoint, list_models
from .nets.base import scales_of, stated
from .nets.shipped import located, shipped_for
from .parsing import parse
from .training.degrade_files import DegradeOptions, degrade_files


def restore(arguments: Sequence[str]) -> None:
    """Restore picture files: claritycore restore -i INPUT ... -o OUTPUT [--model CHECKPOINT] [options]."""
    told = "the net: a file, the folder of a run, or a shipped name; by default the one shipped for the scale, or x4"
    model = Annotated[str | None, _flag("-m", "CHECKPOINT", told)]
    given = parse(_on_files(RestoreOptions, model=(model, None)), "restore", restore, arguments)
    scale = given.further.scale
    net = _load(given.model or shipped_for(scale or DEFAULT_SCALE), scale)
    _follow(given, lambda *places, **told: restore_files(net, *places, **told), "restored")


def degrade(arguments: Sequence[str]) -> None:
    """Degrade picture files by a recipe: claritycore degrade -i INPUT ... -o OUTPUT [options]."""
    _follow(parse(_on_files(DegradeOptions), "degrade", degrade, arguments), degrade_files, "degraded")


def export(arguments: Sequence[str]) -> None:
    """Write a net for other runtimes, and check it: claritycore export --model CHECKPOINT -o NET.onnx [options]."""
    told = "the net: a file, the folder of a run, a shipped name, or the name of a net, whose weights are then fresh"
    model = Annotated[str, _flag("-m", "CHECKPOINT", told)]
    scale = Annotated[int | None, tyro.conf.arg(help="of a net that a file or name leaves open, or has several of")]
    output = Annotated[str, _flag("-o", "FILE", "ends in .onnx, .pt2 (torch), .safetensors or .engine (TensorRT)")]
    flags = ("further", tyro.conf.OmitArgPrefixes[ExportFlags], ExportFlags())
    places = ("model", model), ("output", output), ("scale", scale, None)
    given = parse(make_dataclass("Export", [*places, flags], kw_only=True), "export", export, arguments)
    print(deploy.export(_made_or_loaded(given.model, given.scale), given.output, **vars(given.further)))


DEFAULT_SCALE = 4
VERBS = {"restore": restore, "degrade": degrade, "export": export}


def _flag(alias: str, metavar: str, told: str) -> Any:
    return tyro.conf.arg(aliases=(alias,), metavar=metavar, help=told)


def _on_files(options: type, **more: Any) -> type:
    """The options of a verb on files: where these are, where the results go, and its own."""
    paths = Annotated[
        tuple[tuple[str, ...], ...],
        tyro.conf.UseAppendAction,
        _flag("-i", "INPUT [INPUT ...]", "files, folders, and patterns with *, ?, [...] and **"),
    ]
    place = Annotated[str, _flag("-o", "OUTPUT", "a folder, made if it is missing; for one file also a file")]
    own = ("further", tyro.conf.OmitArgPrefixes[options], options())
    further = [(name, *kind) for name, kind in more.items()]
    return make_dataclass("Files", [("input", paths), ("output", place), *further, own], kw_only=True)


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """The keywords of `deploy.export`.

    Args:
        format: onnx, torch, safetensors or tensorrt; by default what the ending of the file says.
        size: height and width of the traced image, at which a static file stays, and at which an engine is fastest.
        dtype: of weights, image and result.
        static: fix batch (at 1), height and width.
        tolerance: largest error relative to the largest value of the result; by default 1e-4, in float16 2e-2 and in
            bfloat16 1e-1.
        overwrite: replace files that exist.
    """

    format: Format | None = None
    size: tuple[int, int] | None = None
    dtype: DType = "float32"
    static: bool = False
    tolerance: float | None = None
    overwrite: bool = False


def _follow(given: Any, work: Callable[..., RestoreReport], done: str) -> None:
    """Do the work, tell each file as it is done, and raise if one could not be."""
    line = ProgressLine(sys.stderr)

    def say(text: str, stream: str) -> None:
        line.clear()
        print(one_line(text), file=getattr(sys, stream))

    try:
        report = work(
            [path for paths in given.input for path in paths],
            given.output,
            given.further,
            tell=lambda text: say(text, "stdout"),
            note=lambda text: say(text, "stderr"),
            progress=lambda text: line.show(one_line(text)),
        )
    finally:
        line.clear()
    if report.failed:
        raise ValueError(f"{len(report.failed)} picture(s) not {done}, {len(report.written)} file(s) written")


def _made_or_loaded(name: str, scale: int | None) -> nn.Module:
    """Load a net, or make the one of that name where nothing is stored under it: then one to be timed, not used."""
    if located(name).exists() or name not in list_models():
        net = _load(name, scale)
    else:
        net = AutoModel.from_config(AutoConfig.from_name(name, **({} if scale is None else {"scale": scale})))
        print(f"{name} is a net, not a file of one: its weights are fresh, for timing alone", file=sys.stderr)
    if scale not in (None, stated(net, "scale", 1)):
        raise ValueError(f"--scale must be {stated(net, 'scale', 1)}, by which {name} enlarges, got {scale}")
    return net


def _load(path: str | Path, scale: int | None) -> nn.Module:
    """Load a net, and say what its file leaves open; a scale that it leaves open, or has several of, is ours."""
    info = inspect_checkpoint(path)
    unknown = [clause for clause in info.assumptions if "scale" in clause]
    decided = scale is not None and bool(unknown or (info.config and scale in scales_of(info.config)))
    for clause in info.assumptions:
        if not (decided and clause in unknown):
            print(one_line(f"{path} leaves open {clause}"), file=sys.stderr)
    return AutoModel.from_pretrained(path, scale=scale) if decided else AutoModel.from_pretrained(path)
