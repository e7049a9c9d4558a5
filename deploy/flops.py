"""FLOPs of the operations that the usual counters leave out: one table, for torch's counter and for fvcore."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..kernels.flops import Formula, Shape, kernel_flops


def attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scaled dot-product attention on (..., L, E), (..., S, E), (..., S, V): the scores, then their mean of values.

    >>> attention_flops((1, 2, 64, 8), (1, 2, 64, 8), (1, 2, 64, 8))
    262144
    """
    return 2 * torch.Size(query[:-1]).numel() * key[-2] * (query[-1] + value[-1])


def bilinear_flops(*_: Any, out_shape: Shape, **__: Any) -> int:
    """Bilinear interpolation: 4 products and sums for each output element."""
    return 8 * torch.Size(out_shape).numel()


def bicubic_flops(*_: Any, out_shape: Shape, **__: Any) -> int:
    """Bicubic interpolation: 16 products and sums for each output element."""
    return 32 * torch.Size(out_shape).numel()


def real_fourier_flops(x: Shape, dim: Sequence[int], *_: Any, out_shape: Shape, **__: Any) -> int:
    """A Fourier transform of real numbers, or back to them: 2.5 n log2 n for n of them.

    >>> real_fourier_flops((1, 8, 8), [1, 2], out_shape=(1, 8, 5))
    960
    """
    longer = x if x[dim[-1]] > out_shape[dim[-1]] else out_shape
    points = math.prod(longer[axis] for axis in dim)
    return round(2.5 * math.prod(longer) * math.log2(points))


def complex_fourier_flops(x: Shape, dim: Sequence[int], *_: Any, **__: Any) -> int:
    """A Fourier transform of complex numbers: 5 n log2 n.

    >>> complex_fourier_flops((1, 8, 8), [1, 2])
    1920
    """
    return round(5 * math.prod(x) * math.log2(math.prod(x[axis] for axis in dim)))


def matmul_flops(a: Shape, b: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    """A product of matrices or vectors, or of stacks of them: a product and a sum for each term.

    >>> matmul_flops((2, 5, 3), (3,), out_shape=(2, 5))
    60
    """
    return 2 * math.prod(out_shape) * a[-1]


def flop_formulas() -> dict[Any, Formula]:
    """The table, for `torch.utils.flop_counter.FlopCounterMode(custom_mapping=...)`.

    >>> flop_formulas()[torch.ops.aten.upsample_bicubic2d](out_shape=(1, 3, 8, 8))
    6144
    """
    aten = torch.ops.aten
    return {
        aten.scaled_dot_product_attention: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten.upsample_bilinear2d: bilinear_flops,
        aten.grid_sampler_2d: bilinear_flops,
        aten.upsample_bicubic2d: bicubic_flops,
        aten._fft_r2c: real_fourier_flops,
        aten._fft_c2r: real_fourier_flops,
        aten._fft_c2c: complex_fourier_flops,
        **kernel_flops(),
    }


def fvcore_handles() -> dict[str, Callable[[Iterable[Any], Iterable[Any]], int]]:
    """The same table for fvcore: `FlopCountAnalysis(...).set_op_handle(**fvcore_handles())` counts multiply-adds.

    It traces a net, and then routers leave nothing out.

    >>> "aten::upsample_bicubic2d" in fvcore_handles()
    True
    """
    # What torch's counter sees in parts is one operation in a trace; fvcore's own count of products takes no vector.
    whole = {
        "aten::matmul": matmul_flops,
        **dict.fromkeys(["aten::fft_rfft2", "aten::fft_irfft2", "aten::fft_irfft"], _of_signal(real_fourier_flops)),
        "aten::fft_ifft": _of_signal(complex_fourier_flops),
    }

    def handle(formula: Formula) -> Callable[[Iterable[Any], Iterable[Any]], int]:
        def count(inputs: Iterable[Any], outputs: Iterable[Any]) -> int:
            return formula(*map(_argument, inputs), out_shape=_argument(next(iter(outputs)))) // 2

        return count

    named = {packet._qualified_op_name: formula for packet, formula in flop_formulas().items()} | whole
    return {name: handle(formula) for name, formula in named.items()}


def _of_signal(formula: Formula) -> Formula:
    """A formula of what `torch.fft` takes: a signal, its length if another, and one axis or several."""

    def count(x: Shape, length: Any, dim: Any, *_: Any, out_shape: Shape, **__: Any) -> int:
        return formula(x, [dim] if isinstance(dim, int) else dim, out_shape=out_shape)

    return count


def _argument(value: Any) -> Any:
    """What a formula takes for a value of a traced graph: the shape of a tensor, and of all else what it is."""
    if value.type().kind() == "TensorType":
        return tuple(value.type().sizes())
    if value.node().kind() == "prim::ListConstruct":
        return [_argument(item) for item in value.node().inputs()]
    return value.toIValue()
