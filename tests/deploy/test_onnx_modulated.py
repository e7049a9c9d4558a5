"""ONNX of the modulated blocks, noise by coordinate included, at several sizes."""

import pytest
import torch
from torch import nn

from claritycore.blocks import ModulatedConv2d, ModulatedNoiseConv2d, NoiseField, NoiseInjection, TextureHead
from tests.strategies import normal

pytest.importorskip("onnxruntime")
pytest.importorskip("claritycore.deploy.onnx_ops")

from tests.deploy.test_onnx import DYNAMIC, check
from tests.deploy.test_onnx_frequency import stirred

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIZES = [(2, 10, 13), (1, 9, 16), (3, 17, 12)]
ANY_SIZE = dict.fromkeys((0, 2, 3), DYNAMIC)


class Noisy(nn.Module):
    """A block with the noise of a seed."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs):
        return self.block(*inputs, NoiseField(5, layer=1, offset=(2, 3)))


def map_and_style(size):
    return normal((size[0], 4, *size[1:])), normal((size[0], 3), seed=1)


@pytest.mark.parametrize("resample", ["down"])
def test_the_convolution(resample):
    block = stirred(ModulatedConv2d(4, 5, style_channels=3, resample=resample))
    check(block, map_and_style, SIZES, (ANY_SIZE, {0: DYNAMIC}))


@pytest.mark.parametrize("resample", ["up"])
def test_the_layer_with_noise(resample):
    block = stirred(ModulatedNoiseConv2d(4, 5, style_channels=3, resample=resample, clamp=8.0))
    check(Noisy(block), map_and_style, SIZES, ((ANY_SIZE, {0: DYNAMIC}),))


def test_noise_and_texture():
    check(Noisy(stirred(NoiseInjection(4))), lambda size: map_and_style(size)[:1], SIZES[:2], ((ANY_SIZE,),))

    def features_and_image(size):
        return normal((size[0], 4, *size[1:])), torch.sigmoid(normal((size[0], 3, *size[1:]), seed=1))

    check(Noisy(stirred(TextureHead(4))), features_and_image, SIZES, ((ANY_SIZE, ANY_SIZE),))
