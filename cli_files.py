"""The verbs of the command line that work on picture files; each parses its arguments and calls one function."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import nn

from .deploy import RestoreOptions, RestoreReport, restore_files
from .deploy.progress import ProgressLine, one_line
from .nets import AutoModel, inspect_checkpoint
from .nets.shipped import shipped_for
from .parsing import parse
from .training.degrade_files import DegradeOptions, degrade_files


def restore(arguments: Sequence[str]) -> None:
    """Restore picture files: claritycore restore -i INPUT ... -o OUTPUT [--model CHECKPOINT] [options]."""
    told = "the net: a file, the folder of a run, or a shipped name; by default the one shipped for the scale, or x4"
    model = Annotated[str | None, _flag("-m", "CHECKPOINT", told)]
    given = parse(_on_files(RestoreOptions, model=(model, None)), "restore", restore, arguments)
    scale = given.options.scale
    net = _load(given.model or shipped_for(scale or DEFAULT_SCALE), scale)
    _follow(given, lambda *places, **told: restore_files(net, *places, **told), "restored")


def degrade(arguments: Sequence[str]) -> None:
    """Degrade picture files by a recipe: claritycore degrade -i INPUT ... -o OUTPUT [options]."""
    _follow(parse(_on_files(DegradeOptions), "degrade", degrade, arguments), degrade_files, "degraded")


DEFAULT_SCALE = 4
VERBS = {"restore": restore, "degrade": degrade}


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
    own = ("options", tyro.conf.OmitArgPrefixes[options], options())
    further = [(name, *kind) for name, kind in more.items()]
    return make_dataclass("Files", [("input", paths), ("output", place), *further, own], kw_only=True)


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
            given.options,
            tell=lambda text: say(text, "stdout"),
            note=lambda text: say(text, "stderr"),
            progress=lambda text: line.show(one_line(text)),
        )
    finally:
        line.clear()
    if report.failed:
        raise ValueError(f"{len(report.failed)} picture(s) not {done}, {len(report.written)} file(s) written")


def _load(path: str | Path, scale: int | None) -> nn.Module:
    """Load a net, and say what its file leaves open; the scale, where it is that, is the one that was asked for."""
    assumptions = inspect_checkpoint(path).assumptions
    decided = scale is not None and any("scale" in clause for clause in assumptions)
    for clause in assumptions:
        if not (decided and "scale" in clause):
            print(one_line(f"{path} leaves open {clause}"), file=sys.stderr)
    return AutoModel.from_pretrained(path, scale=scale) if decided else AutoModel.from_pretrained(path)
