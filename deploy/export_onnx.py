"""Writing a net as ONNX, running the file, and reading what it says of itself. Needs the extra `export`."""

import importlib
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .export_facts import PREFIX, facts_of
from .export_limits import limits
from .export_report import ExportReport
from .export_trace import Run, Subject, Trace, first_line, quiet, traced

# A protobuf file ends at 2 GiB: weights of more bytes than this lie in a file of their own beside it.
MOST_INSIDE = 1536 * 2**20
INPUT, OUTPUT = "image", "restored"


def needed(package: str) -> ModuleType:
    """Import a package of the extra `export`.

    Raises:
        ImportError: if it is not installed; it says what installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"ONNX needs {package}, which is missing: pip install 'claritycore[export]'") from error


def write_onnx(subject: Subject, path: Path) -> ExportReport:
    """Write a net as ONNX and check the file by onnxruntime.

    Raises:
        ImportError: if a package of the extra `export` is missing.
        ValueError: if the dtype is one that onnxruntime cannot run on a CPU.
        RuntimeError: if the net cannot be exported, or the file is not the net.
    """
    if subject.dtype == torch.bfloat16:
        raise ValueError("dtype must be float32 or float16 for ONNX: on a CPU onnxruntime runs no bfloat16")
    onnx, *_ = map(needed, ("onnx", "onnxscript", "onnxruntime"))
    with quiet():
        trace = traced(subject)
        program = _translated(trace, subject)
    model = program.model
    model.metadata_props.update({PREFIX + key: value for key, value in facts_of(subject, trace.dynamic).items()})
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    program.save(str(path), external_data=size > MOST_INSIDE)
    onnx.checker.check_model(str(path))
    files = [file for file in (path, weights_of(path)) if file.exists()]
    beside = tuple(f"its weights are in {file.name}, beside it" for file in files[1:])
    ops = Counter(node.op_type for node in model.graph.all_nodes())
    return ExportReport(
        path=path,
        format="onnx",
        dtype=str(subject.dtype).removeprefix("torch."),
        checks=subject.check(_runner(path), trace.sizes),
        dynamic=trace.dynamic,
        static=trace.static,
        file_size=sum(file.stat().st_size for file in files),
        opset=model.opset_imports[""],
        ops=dict(ops.most_common()),
        notes=(*trace.notes, *limits(ops, subject.shipped), *beside),
    )


def weights_of(path: Path) -> Path:
    """The file beside an ONNX file in which large weights are."""
    return path.with_name(f"{path.name}.data")


def read_facts(path: Path) -> dict[str, str]:
    """What an ONNX file of ours says of itself; empty for one of another program.

    Raises:
        ImportError: if `onnx` is missing.
        OSError: if it cannot be read.
        ValueError: if it is damaged.
    """
    onnx, data = needed("onnx"), path.read_bytes()
    try:
        entries = onnx.load_model_from_string(data).metadata_props
    except Exception as error:  # protobuf's own
        raise ValueError(f"{path} is damaged or no ONNX file") from error
    return {entry.key.removeprefix(PREFIX): entry.value for entry in entries if entry.key.startswith(PREFIX)}


def _translated(trace: Trace, subject: Subject) -> torch.onnx.ONNXProgram:
    """Translate a program; its open sizes have names there."""
    from .onnx_ops import translated

    names: Any = (trace.names,) if trace.names else None
    try:
        return translated(trace.program, output_names=[OUTPUT], dynamic_shapes=names)
    except Exception as error:  # torch.onnx raises many kinds
        raise RuntimeError(f"{subject.name} cannot be written as ONNX: {first_line(error)}") from error


def _runner(path: Path) -> Run:
    """Load an ONNX file for onnxruntime on the CPU."""
    try:
        session = needed("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own
        raise RuntimeError(f"onnxruntime cannot load the file: {first_line(error)}; nothing was written") from error
    return lambda image: torch.from_numpy(session.run([OUTPUT], {session.get_inputs()[0].name: image.numpy()})[0])
