"""Modules with our kernels in them as ONNX. Needs the extra `export`.

A selective scan becomes ONNX's Scan, one step a turn, so that lengths, heights and widths may stay dynamic; it is
computed in float32. A depthwise convolution becomes Conv and its activation, in float32 too, window attention gathers
and a masked softmax (`onnx_attention`). The other kernels become operators of torch first: `onnx_forms` says how.
"""

from collections.abc import Callable
from typing import Any

import torch
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op
from torch import nn

from ..kernels.activations import LEAKY_SLOPE
from .onnx_attention import window_attention
from .onnx_forms import torch_forms

OPSET = 18
FLOAT32 = 1  # in ONNX's numbering of dtypes
FROM_THE_END = torch.iinfo(torch.int64).min


def to_onnx(module: nn.Module, arguments: tuple[Any, ...], *, dynamic_shapes: Any = None) -> torch.onnx.ONNXProgram:
    """Export a module by torch's dynamo exporter, our kernels included.

    Args:
        module: in eval mode.
        arguments: of one call, as `torch.export.export` takes them.
        dynamic_shapes: which sizes may change, as `torch.export.export` takes them.

    Returns:
        The program; its `save(path)` writes the file.

    Raises:
        ValueError: if the module is in training mode.
    """
    if module.training:
        raise ValueError(f"{type(module).__name__} must be in eval mode to be exported: call eval() first")
    return translated(torch.export.export(module, arguments, dynamic_shapes=dynamic_shapes))


def translated(program: torch.export.ExportedProgram, **options: Any) -> torch.onnx.ONNXProgram:
    """Bring an exported program to ONNX, our kernels included.

    Args:
        program: what `torch.export.export` gives.
        options: further ones of `torch.onnx.export`, such as the names of what comes out.

    Raises:
        RuntimeError: if torch gives no program.
    """
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.sort.stable: _stable_sort,
        torch.ops.claritycore.depthwise_conv2d.default: _depthwise_conv2d,
        torch.ops.claritycore.selective_scan.default: _selective_scan,
        torch.ops.claritycore.window_attention.default: window_attention,
    }
    forms = torch_forms()
    parts = (part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule))
    if any(node.target in forms for part in parts for node in part.graph.nodes):  # else the pass is seconds for nothing
        program = program.run_decompositions(forms)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        custom_translation_table=table,
        opset_version=OPSET,
        verbose=False,
        **options,
    )
    if exported is None:
        raise RuntimeError("torch.onnx.export gave no program")
    return exported


@script()
def _steps(
    state: FLOAT[...], A: FLOAT[...], delta: FLOAT[...], values: FLOAT[...], B: FLOAT[...], C: FLOAT[...]
) -> tuple[FLOAT[...], FLOAT[...]]:
    """State (B, G, D/G, N), A (G, D/G, N), delta and values (L, B, G, D/G), B and C (L, B or 1, G, N)."""

    @graph()
    def step(
        before: FLOAT[...], delta_l: FLOAT[...], value_l: FLOAT[...], B_l: FLOAT[...], C_l: FLOAT[...]
    ) -> tuple[FLOAT[...], FLOAT[...]]:
        last = op.Constant(value_ints=[-1])
        channels = op.Constant(value_ints=[-2])
        decay = op.Exp(op.Mul(op.Unsqueeze(delta_l, last), A))
        entering = op.Mul(op.Unsqueeze(op.Mul(delta_l, value_l), last), op.Unsqueeze(B_l, channels))
        after = op.Add(op.Mul(decay, before), entering)
        y_l = op.ReduceSum(op.Mul(after, op.Unsqueeze(C_l, channels)), last, keepdims=0)
        return after, y_l

    last_state, y = op.Scan(state, delta, values, B, C, body=step, num_scan_inputs=4)
    return last_state, y


def _selective_scan(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    initial_state: Any = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    out_dtype: int | None = None,
    form: str = "torch",
) -> tuple[Any, Any, Any]:
    """Return y, the last state and, in the place of the operator's checkpoints, the last state once more."""
    channels, state = A.shape
    # A constant B or C differs from channel to channel: then each channel is a group.
    groups = channels if 2 in (len(B.shape), len(C.shape)) else B.shape[1]
    turn = _flipped if reverse else op.Identity
    A, D, delta_bias, initial_state = (
        None if x is None else op.Cast(x, to=FLOAT32) for x in (A, D, delta_bias, initial_state)
    )
    values, delta = (turn(_by_step(x, groups, channels // groups)) for x in (u, delta))
    B, C = (turn(_projection(x, u, groups, state)) for x in (B, C))
    if delta_bias is not None:
        delta = op.Add(delta, _reshaped(delta_bias, groups, -1))
    if delta_softplus:
        delta = op.Softplus(delta)
    if initial_state is None:
        shape = op.Concat(op.Shape(u, start=0, end=1), _ints(groups, channels // groups, state), axis=0)
        initial_state = op.Expand(op.Constant(value_float=0.0), shape)
    last_state, y = _steps(
        _reshaped(initial_state, 0, groups, -1, state), _reshaped(A, groups, -1, state), delta, values, B, C
    )
    if D is not None:
        y = op.Add(y, op.Mul(_reshaped(D, groups, -1), values))
    y = _reshaped(op.Transpose(turn(y), perm=[1, 2, 3, 0]), 0, channels, -1)
    if z is not None:
        gate = op.Cast(z, to=FLOAT32)
        y = op.Mul(y, op.Mul(gate, op.Sigmoid(gate)))
    last_state = _reshaped(last_state, 0, channels, state)
    y = op.CastLike(y, u) if out_dtype is None else op.Cast(y, to=out_dtype)
    return y, last_state, op.Unsqueeze(last_state, _ints(1))


def _depthwise_conv2d(x: Any, weight: Any, bias: Any = None, activation: str | None = None, form: str = "torch") -> Any:
    channels, _, *sides = weight.shape
    x32, weight, bias = (None if v is None else op.Cast(v, to=FLOAT32) for v in (x, weight, bias))
    y = op.Conv(x32, weight, bias, group=channels, pads=[side // 2 for side in sides] * 2)
    if activation == "relu":
        y = op.Relu(y)
    elif activation == "leaky_relu":
        y = op.LeakyRelu(y, alpha=LEAKY_SLOPE)
    elif activation == "gelu":
        half, one, scale = (op.Constant(value_float=v) for v in (0.5, 1.0, 0.5**0.5))
        y = op.Mul(op.Mul(half, y), op.Add(one, op.Erf(op.Mul(y, scale))))
    elif activation == "silu":
        y = op.Mul(y, op.Sigmoid(y))
    return op.CastLike(y, x)


def _stable_sort(x: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Of equal numbers ONNX's TopK puts the first ones first, whichever way it sorts."""
    length = op.Gather(op.Shape(x), _ints(dim))
    return op.TopK(x, length, axis=dim, largest=int(descending), sorted=1)


def _by_step(x: Any, groups: int, each: int) -> Any:
    """(B, D, L) or (B, G, D/G, L) -> (L, B, G, D/G)."""
    return op.Transpose(_reshaped(op.Cast(x, to=FLOAT32), 0, groups, each, -1), perm=[3, 0, 1, 2])


def _projection(x: Any, u: Any, groups: int, state: int) -> Any:
    """Bring B or C, (D, N) or (B, G', N, L), to (L, B or 1, groups, N)."""
    if len(x.shape) == 2:
        shape = op.Concat(op.Shape(u, start=2, end=3), _ints(1, groups, state), axis=0)
        return op.Expand(op.Cast(x, to=FLOAT32), shape)
    if x.shape[1] != groups:
        x = op.Expand(op.Unsqueeze(x, _ints(2)), _ints(1, 1, groups // x.shape[1], 1, 1))
    return _by_step(x, groups, state)


def _flipped(x: Any) -> Any:
    """The first axis from its end."""
    return op.Slice(x, _ints(-1), _ints(FROM_THE_END), _ints(0), _ints(-1))


def _reshaped(x: Any, *shape: int) -> Any:
    return op.Reshape(x, _ints(*shape))


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))
