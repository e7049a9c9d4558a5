"""Engines of TensorRT, built from an ONNX file where TensorRT is installed; else the command that builds them."""

import dataclasses
import importlib.util
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from .export_onnx import INPUT, write_onnx
from .export_report import ExportReport
from .export_trace import OPEN, Subject

# TensorRT wants the sizes that may come, and those to be fastest at, which these are unless the caller says.
FASTEST_SIDE = 256
SPAN = 4
LONGEST_MESSAGE = 300


class Profile(NamedTuple):
    """Shapes of the image: the smallest, the one that the engine is made fastest for, and the largest."""

    least: tuple[int, ...]
    best: tuple[int, ...]
    most: tuple[int, ...]


def write_engine(subject: Subject, path: Path, goal: Path, size: tuple[int, int] | None) -> ExportReport:
    """Write the ONNX of a net, which is checked, and build an engine from it; else say what builds it.

    Args:
        subject: the net.
        path: of the engine; that of the ONNX file differs in its ending.
        goal: where the engine will be, for the command.
        size: height and width to be fastest at; None leaves them to this function.

    Raises:
        RuntimeError: besides what `write_onnx` raises, if TensorRT is there and cannot build it.
    """
    report = write_onnx(subject, path.with_suffix(".onnx"))
    open_dims = {dim for dim, name in OPEN.items() if name in report.dynamic}
    fastest = subject.shape[:2] + (size or (FASTEST_SIDE, FASTEST_SIDE))
    shape = tuple(fastest[dim] if dim in open_dims else side for dim, side in enumerate(subject.shape))
    numbers = (bounds.partition(" ")[0] for bounds in report.dynamic.values())  # "5 and up"
    smallest = max((int(number) for number in numbers if number.isdecimal()), default=1)
    profile = profile_for(shape, open_dims, smallest) if open_dims else None
    typed = report.dtype == "float16"
    builder = build_engine(report.path, path, profile, typed=typed)
    if builder is None:
        command = shlex.join(trtexec_command(goal.with_suffix(".onnx"), goal, profile, typed=typed))
        told = "TensorRT is not installed: this is the ONNX that it builds the engine from"
        return dataclasses.replace(report, notes=(*report.notes, told), command=command)
    ranges = ", ".join(" x ".join(map(str, shape)) for shape in profile or (subject.shape,))
    told = f"built by {builder} for {ranges}; {report.path.name} was checked, the engine was not run"
    size_of_engine = path.stat().st_size
    return dataclasses.replace(
        report, path=path, format="tensorrt", file_size=size_of_engine, notes=(*report.notes, told)
    )


def profile_for(shape: tuple[int, ...], open_dims: set[int], smallest: int = 1) -> Profile:
    """From a quarter to four times of each side that may change, of one image; a side is `smallest` at least.

    >>> profile_for((1, 3, 256, 100), {0, 2, 3}).most
    (1, 3, 1024, 400)
    """
    best = tuple(1 if dim == 0 and dim in open_dims else side for dim, side in enumerate(shape))
    least = tuple(max(smallest, side // SPAN) if dim in open_dims and dim else side for dim, side in enumerate(best))
    most = tuple(SPAN * side if dim in open_dims and dim else side for dim, side in enumerate(best))
    return Profile(least, best, most)


def trtexec_command(onnx: Path, engine: Path, profile: Profile | None, *, typed: bool) -> list[str]:
    """The command that builds an engine; `typed` keeps every dtype of the ONNX file (TensorRT 10 and later).

    >>> print(*trtexec_command(Path("net.onnx"), Path("net.engine"), None, typed=True))
    trtexec --onnx=net.onnx --saveEngine=net.engine --stronglyTyped
    """
    shapes = zip(("min", "opt", "max"), profile or (), strict=False)
    return [
        "trtexec",
        f"--onnx={onnx}",
        f"--saveEngine={engine}",
        *(f"--{name}Shapes={INPUT}:{'x'.join(map(str, shape))}" for name, shape in shapes),
        *(["--stronglyTyped"] if typed else []),
    ]


def build_engine(onnx: Path, engine: Path, profile: Profile | None, *, typed: bool) -> str | None:
    """Build an engine by the package `tensorrt`, or by `trtexec`, whichever is installed.

    Returns:
        What built it; None where neither is installed.

    Raises:
        RuntimeError: if it cannot be built; with what TensorRT says.
    """
    if importlib.util.find_spec("tensorrt") is not None:
        _by_package(onnx, engine, profile, typed)
        return "tensorrt"
    if shutil.which("trtexec") is None:
        return None
    command = trtexec_command(onnx, engine, profile, typed=typed)
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if run.returncode or not engine.is_file():
        said = " ".join((run.stderr or run.stdout).split())[-LONGEST_MESSAGE:]
        raise RuntimeError(f"trtexec built no engine (status {run.returncode}): {said}; it was {shlex.join(command)}")
    return "trtexec"


def _by_package(onnx: Path, engine: Path, profile: Profile | None, typed: bool) -> None:
    trt = importlib.import_module("tensorrt")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if typed else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        told = "; ".join(str(parser.get_error(number)) for number in range(parser.num_errors))
        raise RuntimeError(f"TensorRT cannot read the ONNX of the net: {told[:LONGEST_MESSAGE]}")
    config = builder.create_builder_config()
    if profile is not None:
        shapes = builder.create_optimization_profile()
        shapes.set_shape(INPUT, *profile)
        config.add_optimization_profile(shapes)
    built = builder.build_serialized_network(network, config)
    if built is None:
        raise RuntimeError("TensorRT built no engine: its log says why")
    engine.write_bytes(built)
