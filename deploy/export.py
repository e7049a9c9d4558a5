"""A net in a file for other runtimes: fused, written, and proven equal to the net that was trained."""

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from ..blocks.checks import check_choice, check_positive
from ..nets import AutoModel
from .export_onnx import weights_of, write_onnx
from .export_program import write_program, write_weights
from .export_report import TOLERANCES, ExportReport
from .export_tensorrt import write_engine
from .export_trace import subject_of
from .restore_options import DType

Format = Literal["onnx", "torch", "safetensors", "tensorrt"]

ENDINGS: dict[str, Format] = {
    ".onnx": "onnx",
    ".pt2": "torch",
    ".safetensors": "safetensors",
    ".engine": "tensorrt",
    ".plan": "tensorrt",
}
WRITERS = {"onnx": write_onnx, "torch": write_program, "safetensors": write_weights}
TRACED_SIZE = 48, 64


def export(
    net: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,
    size: tuple[int, int] | None = None,
    dtype: DType = "float32",
    static: bool = False,
    tolerance: float | None = None,
    overwrite: bool = False,
) -> ExportReport:
    """Write a net for another runtime, and prove that the file is the net.

    A copy is fused and traced; the given net stays as it is. Batch, height and width stay open as far as the net
    allows, and the report says what does not, and why. The file is then run, or loaded back, at sizes other than the
    traced one, and held against the net in its training form, in float32. Only a file that passes is put in its place.

    Args:
        net: a module that makes one image of one, or a checkpoint or name that `AutoModel.from_pretrained` takes.
        path: the file; for "onnx", weights that are too large for it go into a second file beside it, `.data`.
        format: "onnx" (run by onnxruntime; extra `export`), "torch" (a program of `torch.export`), "safetensors" (fused
            weights with their config, for `AutoModel.from_pretrained`) or "tensorrt" (an engine, and beside it the ONNX
            that it is built from; without TensorRT that ONNX, and the command). By default what the ending says: .onnx,
            .pt2, .safetensors, .engine or .plan.
        size: height and width of the traced image, at which a static program stays, and at which an engine is fastest.
        dtype: of weights, image and result. What blocks compute in float32 whatever they are given stays so.
        static: fix batch (at 1), height and width.
        tolerance: largest error, relative to the largest value of the result; by default 1e-4, 2e-2 in float16 and 0.1
            in bfloat16.
        overwrite: replace files that exist.

    Returns:
        How far the file is from the net, what may change in it, and what it asks of a runtime.

    Raises:
        FileExistsError: if there is a file, and `overwrite` is not set.
        ImportError: if a package of the extra `export` is missing.
        OSError: if the file cannot be written.
        TypeError: if the net does not return an image.
        ValueError: if an argument is none of those named, or the checkpoint is none.
        RuntimeError: if the net cannot be exported, or the file is not the net; no file is left then.

    >>> import tempfile
    >>> from claritycore.nets import AutoConfig
    >>> net = AutoModel.from_config(AutoConfig.from_name("span", num_feat=8, num_block=1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = export(net, f"{folder}/span.safetensors")
    ...     type(AutoModel.from_pretrained(report.path)).__name__
    'SPAN'
    """
    path = Path(path)
    format = _format_of(path, format)
    check_choice("dtype", dtype, get_args(DType))
    height, width = size or TRACED_SIZE
    check_positive(height=height, width=width)
    targets = _targets(path, format)
    _check_places(targets, overwrite)
    model = net if isinstance(net, nn.Module) else AutoModel.from_pretrained(net)
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    subject = subject_of(model, (height, width), getattr(torch, dtype), static=static, tolerance=allowed)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".part", dir=_existing_folder(path)) as folder:
        if format == "tensorrt":
            report = write_engine(subject, Path(folder, path.name), path, size)
        else:
            report = WRITERS[format](subject, Path(folder, path.name))
        path.parent.mkdir(parents=True, exist_ok=True)
        for target in reversed(targets):  # what belongs to the file first: it is whole as soon as it is there
            staged = Path(folder, target.name)
            if staged.exists():
                staged.replace(target)
            else:
                target.unlink(missing_ok=True)  # it belonged to the file that was replaced
    return dataclasses.replace(report, path=path.with_name(report.path.name))


def _format_of(path: Path, format: Format | None) -> Format:
    if format is None:
        if path.suffix.lower() not in ENDINGS:
            raise ValueError(f"{path} must end in {', '.join(ENDINGS)}; or name the format")
        return ENDINGS[path.suffix.lower()]
    check_choice("format", format, get_args(Format))
    if format == "safetensors" and path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors, by which it is known when it is loaded")
    if format == "tensorrt" and path.suffix.lower() == ".onnx":
        raise ValueError(f"{path} must not end in .onnx, as the file does that the engine is built from")
    return format


def _targets(path: Path, format: Format) -> list[Path]:
    """The file, and what may come to lie beside it."""
    onnx = {"onnx": path, "tensorrt": path.with_suffix(".onnx")}.get(format)
    return list(dict.fromkeys([path, *([onnx, weights_of(onnx)] if onnx else [])]))


def _existing_folder(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if os.path.lexists(folder))


def _check_places(targets: list[Path], overwrite: bool) -> None:
    folder = _existing_folder(targets[0])
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: it cannot hold {targets[0].name}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} may not be written to: choose another folder for {targets[0].name}")
    for target in targets:
        if target.is_dir():
            raise ValueError(f"{target} is a folder: give another name for the file")
        if os.path.lexists(target) and not overwrite:
            raise FileExistsError(f"{target} exists: overwrite=True, or --overwrite, replaces it")
