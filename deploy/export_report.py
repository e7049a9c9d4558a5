"""What is known of an exported file: how far it is from the net, what may change, and what it asks of a runtime."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

# How far a file may be from the net in float32, relative to the largest value that the net gives.
TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class SizeCheck:
    """How far the file is from the net for an image of one size; the relative error is one of the largest value."""

    size: tuple[int, ...]
    max_error: float
    relative_error: float

    def __str__(self) -> str:
        size = " x ".join(map(str, self.size))
        return f"{size}: largest error {self.max_error:.1e}, relative {self.relative_error:.1e}"


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote; `str()` gives it in a line per fact.

    Args:
        path: the file.
        format: "onnx", "torch", "safetensors" or "tensorrt".
        dtype: of the weights, the image and the result.
        checks: how far the file is from the net in its training form, size by size.
        dynamic: which sizes of the image may change, each with its bounds.
        static: which may not, each with the reason.
        file_size: bytes, those of weights in a file beside it included.
        opset: of ONNX.
        ops: how many operators of each kind there are.
        notes: what a runtime must know or have, and what to do where it has not.
        command: what builds the engine where TensorRT is installed; None where that was done, or is not needed.

    >>> check = SizeCheck((1, 3, 8, 8), 1e-7, 2e-7)
    >>> print(ExportReport(Path("net.onnx"), "onnx", "float32", (check,), {"height": "2 and up"}, {}, 1000, 18))
    net.onnx
      format      onnx, opset 18, float32, 1,000 bytes
      dynamic     height 2 and up
      static      nothing
      checked     1 x 3 x 8 x 8: largest error 1.0e-07, relative 2.0e-07
    """

    path: Path
    format: str
    dtype: str
    checks: tuple[SizeCheck, ...]
    dynamic: Mapping[str, str]
    static: Mapping[str, str]
    file_size: int
    opset: int | None = None
    ops: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()
    command: str | None = None

    def __str__(self) -> str:
        opset = f"opset {self.opset}, " if self.opset else ""
        rows = [("format", f"{self.format}, {opset}{self.dtype}, {self.file_size:,} bytes")]
        rows += [("dynamic", ", ".join(f"{name} {bounds}" for name, bounds in self.dynamic.items()) or "nothing")]
        rows += [("static", f"{name}: {reason}") for name, reason in self.static.items()] or [("static", "nothing")]
        rows += [("checked", str(check)) for check in self.checks]
        if self.ops:
            rows += [("operators", ", ".join(f"{name} {count}" for name, count in self.ops.items()))]
        rows += [("note", note) for note in self.notes]
        rows += [("to build", self.command)] if self.command else []
        return "\n".join([str(self.path), *(f"  {name:<12}{text}" for name, text in rows)])


def compared(actual: Tensor, expected: Tensor) -> SizeCheck:
    """Hold what a file gives against what the net gives; the size is for the caller to put in.

    >>> compared(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])).relative_error
    0.25
    """
    if actual.shape != expected.shape:
        return SizeCheck((), math.inf, math.inf)
    error = (actual.double() - expected.double()).abs().max().item()
    largest = expected.abs().max().item()
    return SizeCheck((), error, error / largest if largest else error)
