"""What an exported file says of its net, as plain words by name: a program that runs it need not know the net."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from .. import __version__
from ..nets.base import RestorationNet, stated
from .export_trace import Subject

PREFIX = "claritycore."
PROGRAM_ENTRY = "claritycore"


def facts_of(subject: Subject, dynamic: Mapping[str, str]) -> dict[str, str]:
    """Name, config and scale of a net, what tiles must know, and which sizes may change."""
    net = subject.trained
    facts = {
        "version": __version__,
        "net": type(net).__name__,
        "scale": stated(net, "scale", 1),
        "in_channels": subject.shape[1],
        "dtype": str(subject.dtype).removeprefix("torch."),
        "range": "0 to 1",
        "size": " x ".join(map(str, subject.shape)),
        "dynamic": ", ".join(dynamic) or "nothing",
    }
    if isinstance(net, RestorationNet):
        facts |= {"model_type": net.config.model_type, "config": json.dumps(net.config.to_dict())}
    for fact in ("tile_safe", "receptive_radius", "tile_multiple"):
        if hasattr(net, fact):
            facts[fact] = json.dumps(getattr(net, fact))
    return {name: str(value) for name, value in facts.items()}


def inspect_export(path: Path) -> str:
    """Say in a few lines what an exported file, .onnx or .pt2, holds; nothing in it is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if it is ONNX and `onnx` is not installed.
        ValueError: if it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".onnx":
        from .export_onnx import read_facts

        kind, facts = "ONNX", read_facts(path)
    else:
        kind, facts = "a program of torch.export", _of_program(path)
    rows = [("layout", kind if facts else f"{kind}, of another program: it does not say which net it is")]
    rows += [(name.replace("_", " "), value) for name, value in facts.items()]
    return "\n".join([str(path), *(f"  {name:<18}{text}" for name, text in rows)])


def _of_program(path: Path) -> dict[str, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            entry = next((name for name in archive.namelist() if name.endswith(f"/extra/{PROGRAM_ENTRY}")), None)
            return json.loads(archive.read(entry)) if entry else {}
    except (zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged or no program of torch.export") from error
