"""ONNX of the blocks for frequencies, by its own Fourier transform and by the export forms, at several sizes."""

import pytest
import torch
from torch import nn

from claritycore.blocks import (
    FreqFuse,
    FreqSep,
    FreqSplit2d,
    FrequencyCrossAttention,
    HighPass,
    SpectralMix2d,
)
from tests.strategies import normal

pytest.importorskip("onnxruntime")
pytest.importorskip("claritycore.deploy.onnx_ops")

from tests.deploy.test_onnx import DYNAMIC, check

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

# The exported size first: odd and even sides, and a prime one.
SIZES = [(2, 10, 13), (1, 9, 16), (3, 17, 12)]
ANY_SIZE = dict.fromkeys((0, 2, 3), DYNAMIC)


def stirred(block: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return block


class Bands(nn.Module):
    """Two outputs, without the pyramid."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs):
        return self.block(*inputs)[:2]


def maps(size):
    return (normal((size[0], 4, *size[1:])),)


@pytest.mark.parametrize("kind", ["fft", "blur", "haar", "avgpool", "dct", "laplacian"])
def test_the_kinds_of_a_split(kind):
    # With its sizes left open the transform is of another size than in eager mode: what a mask sees beyond the mirrored
    # pixels differs.
    check(Bands(stirred(FreqSplit2d(4, kind=kind))), maps, SIZES, ((ANY_SIZE,),), 2e-4 if kind == "fft" else 1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [FreqSplit2d(4), FreqSplit2d(4, mask="butterworth"), SpectralMix2d(4, expansion=2)])
def test_fourier_transforms_of_one_size(block, size):
    check(Bands(stirred(block)) if isinstance(block, FreqSplit2d) else stirred(block), maps, [size], None)


@pytest.mark.parametrize("form", ["dct", "blur"])
def test_the_export_forms(form):
    made = stirred(FreqSplit2d(4, cutoff=[0.2, 0.25, 0.3, 0.5])).export_form(form)
    check(Bands(made), maps, SIZES, ((ANY_SIZE,),))


@pytest.mark.parametrize("form", ["fft", "dct"])
def test_cutoffs_that_follow_a_condition(form):
    split = stirred(FreqSplit2d(4, condition_channels=3))
    split = split if form == "fft" else split.export_form(form)
    shapes = ((ANY_SIZE, {0: DYNAMIC}),)
    check(
        Bands(split),
        lambda size: (*maps(size), normal((size[0], 3), seed=1)),
        SIZES,
        shapes,
        2e-4 if form == "fft" else 1e-5,
    )


@pytest.mark.parametrize(
    "block",
    [
        FreqSep(4),
        FreqSep(4, split=FreqSplit2d(4).export_form("dct"), structure=nn.Conv2d(4, 4, 3, padding=1)),
        SpectralMix2d(4, expansion=2),
        HighPass(4),
        HighPass(4, kind="laplacian"),
        HighPass(4, kind="learned", kernel_size=5),
    ],
)
def test_the_blocks(block):
    check(stirred(block), maps, SIZES, (ANY_SIZE,))


class Fused(nn.Module):
    """`FreqFuse` with its bands as inputs of their own."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x, low, high):
        return self.block(x, (low, high))


class Crossed(Fused):
    def forward(self, low, high):
        return self.block((low, high))[:2]


def several(count):
    return lambda size: tuple(normal((size[0], 4, *size[1:]), seed=seed) for seed in range(count))


@pytest.mark.parametrize("gate", ["conv", None, FrequencyCrossAttention(4, 2, window_size=3, shift=1)])
def test_the_fusion(gate):
    check(Fused(stirred(FreqFuse(4, gate=gate))), several(3), SIZES, (ANY_SIZE,) * 3)


def test_the_cross_attention():
    block = stirred(FrequencyCrossAttention(4, 2, window_size=3, shift=1))
    check(Crossed(block), several(2), SIZES, (ANY_SIZE,) * 2)
