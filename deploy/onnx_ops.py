"""Modules with our kernels in them as ONNX. Needs the extra `export`.

A selective scan becomes ONNX's Scan, one step a turn, so that lengths, heights and widths may stay dynamic; it is
computed in float32. A scan over images becomes one scan whose groups of channels are the directions. A depthwise
convolution becomes Conv and its activation, in float32 too. Window attention becomes the gathers and the masked
softmax of its reference; a blur becomes a padded Conv along each side, a Haar transform the sums of its reference. The
choice of experts becomes that of its reference; the experts are all computed for all tokens, and masked: products of
matrices are what every runtime is fast at, and numbers of tokens stay dynamic.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from onnxscript import FLOAT, graph, script
from onnxscript import opset18 as op
from torch import Tensor, nn

from ..kernels.depthwise_conv2d.operands import ACTIVATIONS, LEAKY_SLOPE
from ..kernels.expert_routing.operands import Operands as ExpertOperands
from ..kernels.expert_routing.reference import route_top_k_reference
from ..kernels.frequency_split.operands import mirror, radius_of, taps_of
from ..kernels.frequency_split.reference import haar_merge_reference, haar_split_reference
from ..kernels.modulated_conv.operands import Operands as Epilogue
from ..kernels.modulated_conv.reference import noise_bias_act_reference
from ..kernels.noise_field.reference import noise_field_reference
from ..kernels.operand_rules import compute_dtype
from ..kernels.selective_scan_2d.operands import pixels_of_steps
from ..kernels.window_attention.operands import Layout, Operands
from ..kernels.window_attention.reference import attend

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
    program = torch.export.export(module, arguments, dynamic_shapes=dynamic_shapes)
    program = program.run_decompositions(
        {
            torch.ops.claritycore.blur_split.default: _by_convolutions,
            torch.ops.claritycore.expert_mlp.default: _by_all_experts,
            torch.ops.claritycore.haar_merge.default: _by_merging,
            torch.ops.claritycore.haar_split.default: _by_sums,
            torch.ops.claritycore.route_top_k.default: lambda logits, bias, k, _: route_top_k_reference(
                logits, k, bias
            ),
            torch.ops.claritycore.noise_bias_act.default: _by_steps,
            torch.ops.claritycore.noise_field.default: lambda *inputs: noise_field_reference(*inputs[:-1]),
            torch.ops.claritycore.selective_scan_2d.default: _by_one_scan,
            torch.ops.claritycore.window_attention.default: _by_gathers,
        }
    )
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.sort.stable: _stable_sort,
        torch.ops.claritycore.depthwise_conv2d.default: _depthwise_conv2d,
        torch.ops.claritycore.selective_scan.default: _selective_scan,
    }
    exported = torch.onnx.export(
        program, dynamo=True, custom_translation_table=table, opset_version=OPSET, verbose=False
    )
    if exported is None:
        raise RuntimeError(f"torch.onnx.export gave no program for {type(module).__name__}")
    return exported


def _by_convolutions(x: Tensor, sigma: Sequence[float], form: str) -> tuple[Tensor, Tensor]:
    """Write `claritycore::blur_split` as convolutions along each side of a padded map."""
    wide, radius, channels = x.to(compute_dtype(x)), radius_of(sigma), x.shape[1]
    taps = taps_of(sigma, wide.dtype, x.device).expand(channels, -1)[:, None, None]
    low = F.conv2d(mirror(wide, radius, radius, radius, radius), taps.mT, groups=channels)
    low = F.conv2d(low, taps, groups=channels)
    return low.to(x.dtype), (wide - low).to(x.dtype)


def _by_sums(x: Tensor, repeat: bool, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write `claritycore::haar_split` by its reference."""
    return haar_split_reference(x, repeat)


def _by_merging(ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor, size: Sequence[int], fold: bool, form: str) -> Tensor:
    """Write `claritycore::haar_merge` by its reference."""
    return haar_merge_reference((ll, lh, hl, hh), size, fold)


def _by_all_experts(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Write `claritycore::expert_mlp` as products of all tokens with each expert; no groups are formed."""
    x, activation = ExpertOperands(*inputs[:-2]), inputs[-2]
    tokens, weights, w1, b1, w2, b2 = (v.to(x.dtype) for v in x.differentiable.values())
    y = torch.zeros_like(tokens)
    for e in range(len(w1)):
        chosen = x.indices == e
        gate = torch.where(chosen, weights, 0).sum(1, keepdim=True)
        expert = ACTIVATIONS[activation](tokens @ w1[e].T + b1[e]) @ w2[e].T + b2[e]
        y = y + torch.where(chosen.any(1, keepdim=True), gate * expert, 0)
    return y.to(x.x.dtype), x.indices.new_empty(x.indices.numel()), x.indices.new_empty(len(w1) + 1)


def _by_steps(*inputs: Any) -> Tensor:
    """Write `claritycore::noise_bias_act` by its reference."""
    operands, (activation, gain, clamp, _) = Epilogue(*inputs[: len(Epilogue._fields)]), inputs[len(Epilogue._fields) :]
    return noise_bias_act_reference(operands, activation, gain, clamp)


def _by_gathers(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Write `claritycore::window_attention` by its reference, masks and all: the number of windows stays dynamic."""
    operands, layout = Operands(*inputs[: len(Operands._fields)]), Layout(*inputs[len(Operands._fields) : -1])
    return attend(operands, layout), operands.qkv.new_empty(0, dtype=operands.dtype)


def _by_one_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    order: Tensor | None,
    directions: Sequence[int],
    delta_softplus: bool,
    merge: bool,
    form: str,
) -> tuple[Tensor, Tensor]:
    """Write `claritycore::selective_scan_2d` as gathers around `claritycore::selective_scan`."""
    _, height, width, channels = x.shape
    pixels = pixels_of_steps(directions, height, width, x.device, order)
    steps = _steps_of_pixels(directions, height, width, x.device, order)

    def visited(values: Tensor) -> Tensor:
        """(B, H, W, D) or (B, K, H, W, D) -> (B, K, D, L) in the order of the scan."""
        each = values.unbind(1) if values.ndim == 5 else [values] * len(directions)
        return torch.stack([_taken(v.flatten(1, 2), pixels[:, k]) for k, v in enumerate(each)], dim=1).mT

    D, delta_bias = (None if v is None else v.flatten() for v in (D, delta_bias))
    y, _, checkpoints = torch.ops.claritycore.selective_scan(
        *(visited(x).flatten(1, 2), visited(delta).flatten(1, 2), A.flatten(0, 1), visited(B), visited(C)),
        *(D, None, delta_bias, None, delta_softplus, False, None, form),
    )
    rows = y.unflatten(1, (len(directions), channels)).mT
    each = [_taken(v, steps[:, k]).unflatten(1, (height, width)) for k, v in enumerate(rows.unbind(1))]
    return torch.stack(each, dim=1).sum(1) if merge else torch.stack(each, dim=1), checkpoints


def _steps_of_pixels(
    directions: Sequence[int], height: int, width: int, device: torch.device, order: Tensor | None
) -> Tensor:
    """The inverse of `pixels_of_steps`: the step at which each pixel is visited."""
    if order is not None:
        return pixels_of_steps(directions, height, width, device, order).argsort(dim=-1)
    # The way back through columns is the way through the columns of an image with its sides exchanged.
    forward = pixels_of_steps([code & 1 for code in directions], width, height, device).unbind(1)
    last = height * width - 1
    return torch.stack([last - way if code & 2 else way for code, way in zip(directions, forward, strict=True)], dim=1)


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """Take rows of (B, L, D) by (1, L), or by (B, L) for each sample."""
    if index.shape[0] == 1:
        return rows.index_select(1, index[0])
    return rows.gather(1, index[..., None].expand_as(rows))


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
