"""Window attention in the operators of ONNX, its windows counted when it runs: any map, of one file.

What `claritycore.kernels.window_attention.reference` says, in gathers of flat maps. Written out here and not traced: a
trace would reason about each of its hundred operators in terms of the height and the width, for seconds an attention.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from onnxscript import ir
from onnxscript import opset18 as op

from ..kernels.window_attention.operands import EPSILON, Axis
from ..kernels.window_attention.operands_pixels import offsets

FLOAT32, FLOAT64, BOOL = 1, 11, 9  # in ONNX's numbering of dtypes


class _Cut(NamedTuple):
    """How windows cut one axis: what is known beforehand, and tensors of one."""

    axis: Axis
    dilation: Any
    length: Any
    windows: Any


def window_attention(
    qkv: Any,
    kv: Any,
    bias_table: Any,
    logit_scale: Any,
    tokens: Any,
    window: Sequence[int],
    key_window: Sequence[int],
    shift: Sequence[int],
    dilation: Sequence[Any],
    num_heads: int,
    scale: float,
    cosine: bool,
    zero_border: bool,
    form: str = "torch",
) -> tuple[Any, Any]:
    """Return y and, in the place of sums of exponentials, which backward alone reads, nothing."""
    wide = FLOAT64 if qkv.dtype == ir.DataType.DOUBLE else FLOAT32
    channels = qkv.shape[-1] // (3 if kv is None else 1)
    cuts = [_cut(qkv, dim, *numbers) for dim, *numbers in zip((1, 2), window, key_window, shift, dilation, strict=True)]
    operands = op.Split(qkv, axis=-1, num_outputs=3) if kv is None else (qkv, *op.Split(kv, axis=-1, num_outputs=2))
    own, others = ([_pixels(cut, keys) for cut in cuts] for keys in (False, True))
    q, k, v = (
        _windows(op.Cast(x, to=wide), at, cuts, (size, num_heads, channels // num_heads))
        for x, at, size in zip(operands, (own, others, others), (window, key_window, key_window), strict=True)
    )
    seen = _seen(others, cuts)  # (windows, keys)
    if cosine:
        q, k = _directions(q), _directions(k)
    k, v = (op.Where(op.Unsqueeze(seen, _ints(1, 3)), x, op.CastLike(0.0, x)) for x in (k, v))
    if tokens is not None:
        k, v, seen = _with_tokens(op.Cast(tokens, to=wide), k, v, seen, num_heads, cosine)
    logits = op.Mul(op.MatMul(q, op.Transpose(k, perm=[0, 1, 2, 4, 3])), op.CastLike(scale, q))
    if logit_scale is not None:
        logits = op.Mul(logits, op.Unsqueeze(op.Cast(logit_scale, to=wide), _ints(1, 3, 4)))
    if bias_table is not None:
        logits = op.Add(logits, _bias(op.Cast(bias_table, to=wide), cuts, tokens))
    if not zero_border:
        some = op.Cast(op.ReduceMax(op.Cast(seen, to=FLOAT32), _ints(-1), keepdims=1), to=BOOL)
        seen = op.Or(seen, op.Not(some))  # no window is left without keys; nothing reads those beyond the map
        logits = op.Where(op.Unsqueeze(seen, _ints(1, 2)), logits, op.CastLike(float("-inf"), logits))
    y = _put_back(op.MatMul(op.Softmax(logits, axis=-1), v), cuts, channels)
    y = op.CastLike(op.Reshape(y, op.Concat(op.Shape(qkv, start=0, end=3), _ints(channels), axis=0)), qkv)
    return y, op.Cast(op.ConstantOfShape(_ints(0)), to=wide)


def _cut(x: Any, dim: int, window: int, key_window: int, shift: int, dilation: Any) -> _Cut:
    dilation = _ints(dilation) if isinstance(dilation, int) else op.Reshape(dilation, _ints(1))  # a grid has the map's
    axis, length = Axis(0, window, key_window, shift, 1), op.Shape(x, start=dim, end=dim + 1)
    among = op.Div(op.Sub(op.Add(length, dilation), _ints(1)), dilation)
    windows = op.Mul(op.Div(op.Add(among, _ints(axis.origin + window - 1)), _ints(window)), dilation)
    return _Cut(axis, dilation, length, windows)


def _pixels(cut: _Cut, keys: bool) -> Any:
    """The pixels of each window along an axis, outside the map too: (windows, pixels)."""
    axis = cut.axis
    size, before = (axis.key_window, axis.origin + axis.margin) if keys else (axis.window, axis.origin)
    among, residue = _divided(_count(cut.windows), cut.dilation)
    first = op.Unsqueeze(op.Sub(op.Mul(among, _ints(axis.window)), _ints(before)), _ints(1))
    return op.Add(op.Mul(op.Add(first, _ints(*range(size))), cut.dilation), op.Unsqueeze(residue, _ints(1)))


def _crossed(down: Any, across: Any) -> tuple[Any, Any]:
    """Of (windows, pixels) down and across: (windows, 1, pixels, 1) and (1, windows, 1, pixels)."""
    return op.Unsqueeze(down, _ints(1, 3)), op.Unsqueeze(across, _ints(0, 2))


def _seen(at: Sequence[Any], cuts: Sequence[_Cut]) -> Any:
    """Which pixels of each window are in the map: (windows, pixels)."""
    inside = (op.And(op.GreaterOrEqual(x, _ints(0)), op.Less(x, cut.length)) for x, cut in zip(at, cuts, strict=True))
    return op.Reshape(op.And(*_crossed(*inside)), _ints(-1, math.prod(cut.axis.key_window for cut in cuts)))


def _windows(x: Any, at: Sequence[Any], cuts: Sequence[_Cut], sizes: tuple[Sequence[int], int, int]) -> Any:
    """Gather (B, H, W, heads * d) to (B, windows, heads, pixels, d); pixels outside repeat the border."""
    size, heads, width = sizes
    last = (op.Sub(cut.length, _ints(1)) for cut in cuts)
    down, across = _crossed(*(op.Max(op.Min(pixels, end), _ints(0)) for pixels, end in zip(at, last, strict=True)))
    places = op.Reshape(op.Add(op.Mul(down, cuts[1].length), across), _ints(-1))
    x = op.Gather(op.Reshape(x, _ints(0, -1, heads * width)), places, axis=1)
    return op.Transpose(op.Reshape(x, _ints(0, -1, math.prod(size), heads, width)), perm=[0, 1, 3, 2, 4])


def _directions(x: Any) -> Any:
    return op.Div(x, op.Max(op.ReduceL2(x, _ints(-1), keepdims=1), op.CastLike(EPSILON, x)))


def _with_tokens(tokens: Any, k: Any, v: Any, seen: Any, heads: int, cosine: bool) -> tuple[Any, Any, Any]:
    """Keys, values and what is seen with tokens (B, G, 2C), which every window sees, after those of the map."""
    windows = op.Shape(seen, start=0, end=1)
    tokens = op.Transpose(op.Reshape(tokens, _ints(0, 0, 2, heads, -1)), perm=[2, 0, 3, 1, 4])  # (2, B, heads, G, d)
    token_k, token_v = (op.Unsqueeze(op.Gather(tokens, op.Constant(value_int=part)), _ints(1)) for part in (0, 1))
    token_k = _directions(token_k) if cosine else token_k
    everywhere = op.Concat(_ints(1), windows, _ints(1, 1, 1), axis=0)
    k, v = (op.Concat(x, op.Expand(token, everywhere), axis=3) for x, token in ((k, token_k), (v, token_v)))
    true = op.Cast(op.Expand(_ints(1), op.Concat(windows, op.Shape(token_k, start=3, end=4), axis=0)), to=BOOL)
    return k, v, op.Concat(seen, true, axis=1)


def _bias(table: Any, cuts: Sequence[_Cut], tokens: Any) -> Any:
    """(offsets, heads) -> (heads, queries, keys), zero for tokens."""
    places = offsets(cuts[0].axis, cuts[1].axis, torch.device("cpu"))
    at = op.Reshape(_ints(*places.flatten().tolist()), _ints(*places.shape))
    bias = op.Transpose(op.Gather(table, at, axis=0), perm=[2, 0, 1])
    if tokens is None:
        return bias
    none = op.Concat(op.Shape(bias, start=0, end=2), op.Shape(tokens, start=1, end=2), axis=0)
    return op.Concat(bias, op.Expand(op.CastLike(0.0, bias), none), axis=2)


def _put_back(y: Any, cuts: Sequence[_Cut], channels: int) -> Any:
    """Return each query of (B, windows, heads, queries, d) to its pixel: (B, H * W, C)."""
    (down, row), (across, column) = map(_places, cuts)
    down, row = (op.Unsqueeze(x, _ints(1)) for x in (down, row))
    rows, columns = (cut.axis.window for cut in cuts)
    windows = op.Add(op.Mul(down, cuts[1].windows), across)
    places = op.Add(op.Mul(windows, _ints(rows * columns)), op.Add(op.Mul(row, _ints(columns)), column))
    y = op.Reshape(op.Transpose(y, perm=[0, 1, 3, 2, 4]), _ints(0, -1, channels))
    return op.Gather(y, op.Reshape(places, _ints(-1)), axis=1)


def _places(cut: _Cut) -> tuple[Any, Any]:
    """The window of each pixel along an axis, and its place there."""
    token, residue = _divided(_count(cut.length), cut.dilation)
    among, place = _divided(op.Add(token, _ints(cut.axis.origin)), _ints(cut.axis.window))
    return op.Add(op.Mul(among, cut.dilation), residue), place


def _count(number: Any) -> Any:
    """0, 1, ... of a tensor of one."""
    return op.Range(op.Constant(value_int=0), op.Squeeze(number), op.Constant(value_int=1))


def _divided(x: Any, n: Any) -> tuple[Any, Any]:
    """Quotient and remainder."""
    quotient = op.Div(x, n)
    return quotient, op.Sub(x, op.Mul(quotient, n))


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))
