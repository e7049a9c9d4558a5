"""Writing a net as a program of torch.export, or as fused weights with their config, and loading either back."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..nets import AutoModel
from ..nets.base import RestorationNet
from .export_facts import PROGRAM_ENTRY, facts_of
from .export_report import ExportReport
from .export_trace import OPEN, Subject, other_sizes, quiet, traced


def write_program(subject: Subject, path: Path) -> ExportReport:
    """Write a net as a program of `torch.export`, and check what `torch.export.load` makes of the file.

    Raises:
        RuntimeError: if the net cannot be exported, or the file is not the net.
    """
    with quiet():
        trace = traced(subject)
        facts = facts_of(subject, trace.dynamic)
        torch.export.save(trace.program, str(path), extra_files={PROGRAM_ENTRY: json.dumps(facts)})
        run = torch.export.load(str(path)).module()
    with _HalfConvolutionsInFloat32():
        checks = subject.check(run, trace.sizes)
    calls = [node.target for node in trace.program.graph.nodes]
    ops = Counter(str(call.overloadpacket) for call in calls if isinstance(call, torch._ops.OpOverload))
    ours = sorted(name for name in ops if name.startswith("claritycore."))
    needs = (f"import claritycore.kernels before it is loaded: it has {', '.join(ours)}",) if ours else ()
    return ExportReport(
        path=path,
        format="torch",
        dtype=str(subject.dtype).removeprefix("torch."),
        checks=checks,
        dynamic=trace.dynamic,
        static=trace.static,
        file_size=path.stat().st_size,
        ops=dict(ops.most_common()),
        notes=(*trace.notes, *needs),
    )


def write_weights(subject: Subject, path: Path) -> ExportReport:
    """Write the fused weights of a net with its config, and check what `AutoModel.from_pretrained` makes of the file.

    Raises:
        ValueError: if the net has no config that could describe it, or the path does not end in .safetensors.
        RuntimeError: if the file is not the net.
    """
    if not isinstance(subject.shipped, RestorationNet):
        raise ValueError(f"{subject.name} must derive from RestorationNet for safetensors: its config says what it is")
    subject.shipped.save_pretrained(path)
    loaded = AutoModel.from_pretrained(path).eval()
    sizes = list(other_sizes(subject.shape))[:2]
    return ExportReport(
        path=path,
        format="safetensors",
        dtype=str(subject.dtype).removeprefix("torch."),
        checks=subject.check(lambda image: loaded(image.float()), sizes),
        dynamic=dict.fromkeys(OPEN.values(), "1 and up"),
        static={},
        file_size=path.stat().st_size,
    )


class _HalfConvolutionsInFloat32(TorchDispatchMode):
    """Compute half-precision convolutions in float32, as GPUs add up: some of torch 2.13's on a CPU never return."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default and args[0].dtype in (torch.float16, torch.bfloat16):
            wide = (value.float() if isinstance(value, Tensor) else value for value in args)
            return func(*wide, **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))
