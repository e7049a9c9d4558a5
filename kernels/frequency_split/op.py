"""The blur and the Haar transform as operators: their contracts, and what torch needs to know of them.

Each is a linear map, and its gradient is the adjoint map, an operator too, whose gradient is the first again: nothing
is kept for backward, and they can be differentiated any number of times.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Backend, Kernel
from ..operand_rules import fold, unfold
from ..registration import operator
from .operands import check_bands, check_map, deviations, empty_map, radius_of
from .reference import blur_split_reference, haar_merge_reference, haar_split_reference

KERNEL = Kernel("frequency_split")

Bands = tuple[Tensor, Tensor, Tensor, Tensor]


def blur_split(
    x: Tensor, sigma: float | Sequence[float] | Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    r"""Split a map by a Gaussian blur into what passes and what is left.

    .. math::
        \mathrm{low}_{h,w} = \sum_{i,j} g_i g_j \, x_{h+i,w+j}, \qquad \mathrm{high} = x - \mathrm{low},

    where :math:`g_i` falls as :math:`e^{-i^2 / 2 \sigma^2}` up to three deviations and sums to 1. Borders are mirrors;
    where a map has fewer pixels than the blur would see, the last one repeats. The response is that of `fft_split` with
    its Gaussian mask and the cutoff `gaussian_sigma(sigma)`.

    Arithmetic is float64 where `x` is, else float32, also under autocast; `low + high` equals `x` to the last bit or
    the next. Results repeat bit for bit, gradients included. Memory format kept. The choice of backend is fixed when a
    call is traced or exported. With "torch" a NaN or an infinite pixel is seen further than the blur reaches.

    Shape:
        - x: ``(B, C, H, W)``, any H and W from 1 up
        - sigma: a number, or C of them, or ``(C,)``
        - returns: low and high, each ``(B, C, H, W)`` in the dtype of x

    Args:
        x: the feature map.
        sigma: the deviation in pixels, above 0, for all channels or for each. A tensor is read on the host: give
            numbers where a call is compiled or exported.
        backend: "triton", "torch" or "reference"; "auto" takes Triton on CUDA tensors.

    Raises:
        TypeError: if x is not a real, floating-point tensor, or sigma is none of those.
        ValueError: if sigma is not above 0, has another shape or requires a gradient, or no backend has that name.
        RuntimeError: if the named backend cannot run here.

    Source: Burt and Adelson, The Laplacian Pyramid as a Compact Image Code (IEEE Transactions on Communications 31,
        1983): a map as its blur and the rest.

    >>> x = torch.randn(1, 3, 31, 17)
    >>> low, high = blur_split(x, sigma=1.5)
    >>> low.shape, bool((low + high - x).abs().max() < 1e-6)
    (torch.Size([1, 3, 31, 17]), True)
    """
    check_map(x)
    values = deviations(sigma, x.shape[1])
    form = KERNEL.choose(backend, x)
    return blur_split_reference(x, values) if form == "reference" else _blur(x, values, form)


def haar_split(x: Tensor, *, backend: Backend = "auto") -> tuple[Bands, tuple[int, int]]:
    r"""Transform a map by the orthonormal Haar wavelet: sums and differences of 2 x 2 pixels.

    With the pixels a, b above c, d,

    .. math::
        LL &= (a + b + c + d) / 2, & LH &= (a + b - c - d) / 2, \\
        HL &= (a - b + c - d) / 2, & HH &= (a - b - c + d) / 2.

    The names are those of PyWavelets, (cA, (cH, cV, cD)) of `dwt2(x, "haar")`: LH is low along a row and high down a
    column, and so shows horizontal edges; HL shows vertical ones. The last row or column of an odd side is repeated.
    At even sides the bands have together the energy of `x`.

    Arithmetic is float64 where `x` is, else float32, also under autocast; float16 holds no LL of pixels above 32,752,
    since LL is twice their mean. Memory format kept.

    Shape:
        - x: ``(B, C, H, W)``, any H and W from 1 up
        - returns: the four bands, each ``(B, C, ceil(H / 2), ceil(W / 2))`` in the dtype of x, and ``(H, W)``

    Args:
        x: the feature map.
        backend: "triton", "torch" or "reference"; "auto" takes Triton on CUDA tensors.

    Raises:
        TypeError: if x is not a real, floating-point tensor.
        ValueError: if x has another shape, or no backend has that name.
        RuntimeError: if the named backend cannot run here.

    Source: Mallat, A Theory for Multiresolution Signal Decomposition (IEEE TPAMI 11, 1989), section IV.

    >>> x = torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]])
    >>> bands, size = haar_split(x)
    >>> [band.item() for band in bands]
    [5.5, -2.5, -1.5, 0.5]
    >>> haar_merge(bands, size).equal(x)
    True
    """
    check_map(x)
    form = KERNEL.choose(backend, x)
    bands = haar_split_reference(x) if form == "reference" else _split(x, True, form)
    return bands, (x.shape[2], x.shape[3])


def haar_merge(bands: Sequence[Tensor], size: Sequence[int], *, backend: Backend = "auto") -> Tensor:
    r"""Put the bands of `haar_split` together again; changed bands too, of which a map is made all the same.

    Shape:
        - bands: LL, LH, HL and HH, each ``(B, C, ceil(H / 2), ceil(W / 2))``
        - size: ``(H, W)``
        - returns: ``(B, C, H, W)`` in the dtype of the bands

    Args:
        bands: the four, in the order of `haar_split`.
        size: of the map; pixels beyond an odd side are dropped.
        backend: as for `haar_split`.

    Raises:
        TypeError: if a band is not a real, floating-point tensor.
        ValueError: if bands and size do not fit each other, or no backend has that name.
        RuntimeError: if the named backend cannot run here.

    Source: as for `haar_split`.

    >>> bands, size = haar_split(torch.ones(1, 8, 5, 7))
    >>> haar_merge(bands, size).shape
    torch.Size([1, 8, 5, 7])
    """
    check_bands(bands, size)
    form = KERNEL.choose(backend, *bands)
    if form == "reference":
        return haar_merge_reference(bands, size)
    return _merge(*bands, list(size), False, form)


def blur_split_flops(batch: int, channels: int, height: int, width: int, *, sigma: float) -> int:
    """Count the floating-point operations of one forward blur: 2 for each tap along each side, and a difference."""
    return batch * channels * height * width * (4 * (2 * radius_of([sigma]) + 1) + 1)


def haar_split_flops(batch: int, channels: int, height: int, width: int) -> int:
    """Count the floating-point operations of one Haar transform, forward or back: 8 sums and 4 halves for 4 pixels."""
    return 12 * batch * channels * ((height + 1) // 2) * ((width + 1) // 2)


def frequency_split_bytes(
    batch: int, channels: int, height: int, width: int, *, itemsize: int = 4, backward: bool = False, maps: int = 3
) -> int:
    """Count the bytes that no split can avoid to move: x and both bands, and with `backward` their gradients too.

    The bands of a Haar transform are together as large as `x`: `maps` is 2.
    """
    return itemsize * batch * channels * height * width * maps * (2 if backward else 1)


@operator("blur_split")
def _blur(x: Tensor, sigma: Sequence[float], form: str) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return torch.empty_like(x), torch.empty_like(x)
    return KERNEL.form(form).blur_split(x, sigma)


@operator("blur_split_adjoint")
def _blur_adjoint(low: Tensor, high: Tensor, sigma: Sequence[float], form: str) -> Tensor:
    if low.numel() == 0:
        return torch.empty_like(low)
    return KERNEL.form(form).blur_split_adjoint(low, high, sigma)


@operator("haar_split")
def _split(x: Tensor, repeat: bool, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty_bands(x) if x.numel() == 0 else KERNEL.form(form).haar_split(x, repeat)


@operator("haar_merge")
def _merge(ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor, size: Sequence[int], fold: bool, form: str) -> Tensor:
    return empty_map(ll, *size) if ll.numel() == 0 else KERNEL.form(form).haar_merge((ll, lh, hl, hh), size, fold)


def _empty_bands(x: Tensor) -> Bands:
    ll, lh, hl, hh = (empty_map(x, (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2) for _ in range(4))
    return ll, lh, hl, hh


_blur.register_fake(lambda x, *_: (torch.empty_like(x), torch.empty_like(x)))
_blur_adjoint.register_fake(lambda low, *_: torch.empty_like(low))
_split.register_fake(lambda x, *_: _empty_bands(x))
_merge.register_fake(lambda ll, lh, hl, hh, size, *_: empty_map(ll, *size))


def _keep(count: int) -> Callable[..., None]:
    """Remember what follows the first `count` inputs, which are tensors that no gradient needs."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.options = inputs[count:]
        ctx.size = inputs[0].shape[2:]

    return setup


def _of_split(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
    repeat, form = ctx.options
    return _merge(*gradients, ctx.size, repeat, form), None, None


def _of_merge(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    _, fold, form = ctx.options
    return *_split(gradient, fold, form), None, None, None


_blur.register_autograd(lambda ctx, *g: (_blur_adjoint(*g, *ctx.options), None, None), setup_context=_keep(1))
_blur_adjoint.register_autograd(lambda ctx, g: (*_blur(g, *ctx.options), None, None), setup_context=_keep(2))
_split.register_autograd(_of_split, setup_context=_keep(1))
_merge.register_autograd(_of_merge, setup_context=_keep(4))


def _map_over(op: Any, tensors: int) -> None:
    """Let vmap fold its dimension into the batch, of which no sample sees another."""

    def over(info: Any, dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        each = zip(inputs[:tensors], dims[:tensors], strict=True)
        results = op(*(fold(x, dim, 0, info.batch_size) for x, dim in each), *inputs[tensors:])
        if isinstance(results, Tensor):
            return unfold(results, 0, info.batch_size), 0
        return tuple(unfold(y, 0, info.batch_size) for y in results), (0,) * len(results)

    op.register_vmap(over)


for op, tensors in ((_blur, 1), (_blur_adjoint, 2), (_split, 1), (_merge, 4)):
    _map_over(op, tensors)
    op.register_autocast()
