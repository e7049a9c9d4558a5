"""Attention a pixel at a time, written from the docstrings: what the blocks of window attention are compared with."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from tests.strategies import normal

Pixel = tuple[int, int]
Key = tuple[Pixel | None, Tensor | float]
"""A pixel that is looked at, None for one of zeros beyond the map, and the bias of each head."""


def stirred(block: nn.Module, strength: float = 0.5, seed: int = 0) -> nn.Module:
    """Give every parameter normal values of its own, far from zero, and return the block in float64."""
    block = block.double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(block.parameters()):
            parameter.copy_(strength * normal(tuple(parameter.shape), dtype=torch.float64, seed=100 * seed + number))
    return block


def attended(
    block: nn.Module,
    x: Tensor,
    keys: Callable[[int, int], Iterator[Key]],
    *,
    scale: Callable[[int, int], float] | None = None,
    cosine: bool = False,
    pooled: Tensor | None = None,
) -> Tensor:
    """Attend from each pixel of (B, C, H, W) to `keys(row, column)` and to the vectors `pooled` (B, C, G).

    `scale(image, head)` multiplies the products of queries and keys; without it they are divided by sqrt(d).
    """
    heads, channels = block.num_heads, block.channels
    d = channels // heads

    def projected(vector: Tensor) -> tuple[Tensor, ...]:
        row = block.qkv.weight @ vector
        row = row if block.qkv.bias is None else row + block.qkv.bias
        return tuple(row.reshape(3, heads, d))

    y = torch.empty_like(x)
    for b, i, j in [(b, i, j) for b in range(len(x)) for i in range(x.shape[2]) for j in range(x.shape[3])]:
        q, rows = projected(x[b, :, i, j])[0], []
        for pixel, bias in keys(i, j):
            zeros = torch.zeros(heads, d, dtype=x.dtype)
            k, v = (zeros, zeros) if pixel is None else projected(x[b, :, pixel[0], pixel[1]])[1:]
            rows.append((k, v, torch.zeros(heads, dtype=x.dtype) + bias))
        if pooled is not None:
            rows += [(*projected(vector)[1:], torch.zeros(heads, dtype=x.dtype)) for vector in pooled[b].T]
        k, v, bias = (torch.stack(each) for each in zip(*rows, strict=True))  # (keys, heads, ...)
        mixed = []
        for h in range(heads):
            products = k[:, h] @ q[h]
            if cosine:
                products = products / (k[:, h].norm(dim=1) * q[h].norm())
            factor = 1 / math.sqrt(d) if scale is None else scale(b, h)
            weights = (factor * products + bias[:, h]).exp()
            mixed.append((weights / weights.sum()) @ v[:, h])
        y[b, :, i, j] = block.proj.weight @ torch.cat(mixed) + block.proj.bias
    return y


def pixels_of(size: Pixel) -> list[Pixel]:
    return [(i, j) for i in range(size[0]) for j in range(size[1])]


def window_keys(
    size: Pixel, window: Pixel, bias: Callable[[int, int], Tensor | float], *, shift: Pixel = (0, 0), dilation=(1, 1)
) -> Callable[[int, int], Iterator[Key]]:
    """The pixels of the same window: windows begin at shift + n * window, among every dilation-th pixel."""

    def place(pixel: Pixel) -> tuple[tuple[int, int], ...]:
        """Of each axis, which of every dilation-th pixels it is one of, and which window of these it lies in."""
        each = zip(pixel, window, shift, dilation, strict=True)
        return tuple((p % n, math.floor((p // n - s) / w)) for p, w, s, n in each)

    def keys(i: int, j: int) -> Iterator[Key]:
        for k, m in pixels_of(size):
            if place((i, j)) == place((k, m)):
                yield (k, m), bias((i - k) // dilation[0], (j - m) // dilation[1])

    return keys


def bias_by_hand(bias: nn.Module | None, window: Pixel, keys: Pixel | None = None) -> Callable[[int, int], Tensor]:
    """The bias of each head by the offset (dy, dx) of a query from a key, around a common middle if windows differ."""
    keys = keys or window
    furthest = [(w + k - 2) // 2 for w, k in zip(window, keys, strict=True)]

    def table(dy: int, dx: int) -> Tensor:
        columns = window[1] + keys[1] - 1
        return bias.relative_position_bias_table[(dy + furthest[0]) * columns + dx + furthest[1]]

    def continuous(dy: int, dx: int) -> Tensor:
        hats = [
            math.copysign(math.log2(1 + 8 * abs(o) / max(f, 1)), o) / 3 for o, f in zip((dy, dx), furthest, strict=True)
        ]
        first, _, last = bias.cpb_mlp
        hidden = (first.weight @ torch.tensor(hats, dtype=torch.float64) + first.bias).clamp(min=0)
        return 16 / (1 + (-(last.weight @ hidden)).exp())

    def dynamic(dy: int, dx: int) -> Tensor:
        vector = bias.pos_proj.weight @ torch.tensor([dy, dx], dtype=torch.float64) + bias.pos_proj.bias
        for norm, _, linear in (bias.pos1, bias.pos2, bias.pos3):
            centred = vector - vector.mean()
            vector = norm.weight * centred / (centred.square().mean() + norm.eps).sqrt() + norm.bias
            vector = linear.weight @ vector.clamp(min=0) + (0 if linear.bias is None else linear.bias)
        return vector

    forms = {"TableBias": table, "ContinuousBias": continuous, "DynamicBias": dynamic}
    return (lambda dy, dx: torch.zeros(1, dtype=torch.float64)) if bias is None else forms[type(bias).__name__]
