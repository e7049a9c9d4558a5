"""The definition of window attention, in explicit masked form: gather windows, mask, softmax, put back."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import EPSILON, Axis, Layout, Operands
from .operands_pixels import inside, offsets, pixels, places


def attend(x: Operands, layout: Layout) -> Tensor:
    """Compute `window_attention` by its formula; see there for the contract. Differentiable any number of times."""
    rows, columns = layout.axes(x.qkv.shape[1:3])
    q = _windows(x.queries.to(x.dtype), pixels(rows), pixels(columns), layout.num_heads)
    keys = pixels(rows, keys=True), pixels(columns, keys=True)
    k, v = (_windows(part.to(x.dtype), *keys, layout.num_heads) for part in x.keys_and_values.chunk(2, -1))
    seen = inside(keys[0], rows)[:, None, :, None] & inside(keys[1], columns)[None, :, None, :]
    seen = seen.flatten(2).flatten(0, 1).to(x.qkv.device)  # (windows, keys)
    if layout.cosine:  # before the mask: vectors of zeros have no second derivative
        q, k = (F.normalize(part, dim=-1, eps=EPSILON) for part in (q, k))
    k, v = (part.masked_fill(~seen[:, None, :, None], 0) for part in (k, v))
    if x.tokens is not None:
        token_k, token_v = (
            x.tokens.to(x.dtype).unflatten(-1, (2, layout.num_heads, -1)).permute(2, 0, 3, 1, 4)[:, :, None]
        )
        token_k = F.normalize(token_k, dim=-1, eps=EPSILON) if layout.cosine else token_k
        k, v = (torch.cat([a, b.expand(-1, seen.shape[0], -1, -1, -1)], 3) for a, b in ((k, token_k), (v, token_v)))
        seen = F.pad(seen, (0, x.tokens.shape[1]), value=True)
    logits = layout.scale * q @ k.transpose(-2, -1)
    if x.logit_scale is not None:
        logits = logits * x.logit_scale.to(x.dtype)[:, None, :, None, None]
    if x.bias_table is not None:
        bias = x.bias_table.to(x.dtype)[offsets(rows, columns, x.qkv.device)].permute(2, 0, 1)
        logits = logits + F.pad(bias, (0, logits.shape[-1] - bias.shape[-1]))
    if not layout.zero_border:
        seen = seen | ~seen.any(-1, keepdim=True)  # no window is left without keys; nothing reads those beyond the map
        logits = logits.masked_fill(~seen[:, None, None, :], float("-inf"))
    return _put_back(torch.softmax(logits, -1) @ v, rows, columns).to(x.qkv.dtype)


def _windows(x: Tensor, rows: Tensor, columns: Tensor, heads: int) -> Tensor:
    """Gather (B, H, W, heads * d) to (B, windows, heads, pixels, d); pixels outside repeat the border."""
    rows, columns = (at.clamp(0, n - 1).to(x.device) for at, n in ((rows, x.shape[1]), (columns, x.shape[2])))
    windows = x[:, rows][:, :, :, columns].unflatten(-1, (heads, -1))  # (B, rows, pixels, columns, pixels, heads, d)
    return windows.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2)


def _put_back(y: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Return each query to its pixel: (B, H, W, heads * d)."""
    y = y.unflatten(1, (rows.windows, columns.windows)).unflatten(4, (rows.window, columns.window))
    y = y.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
    return y[:, places(rows).to(y.device)][:, :, places(columns).to(y.device)]
