"""ONNX of the blocks that condition on the degradation, at sizes other than the exported one."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from claritycore.blocks import (
    CrossAttention2d,
    DegradationEstimator,
    FiLM,
    KernelPrior,
    LocalStatistics,
    PromptGenerator,
)
from tests.strategies import normal

pytest.importorskip("onnxruntime")
pytest.importorskip("claritycore.deploy.onnx_ops")

from tests.deploy.test_onnx import DYNAMIC, check

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIZES = [(2, 10, 13), (1, 17, 11)]
ANY_SIZE = dict.fromkeys((0, 2, 3), DYNAMIC)
ANY_BATCH = {0: DYNAMIC}


class Estimates(DegradationEstimator):
    """As a matrix."""

    def forward(self, image):
        return super().forward(image).condition()


class Kernels(KernelPrior):
    def forward(self, x):
        return self.reconstruct(super().forward(x))


MAPS = {
    "vector": lambda: PromptGenerator(4, 6),
    "grid": lambda: PromptGenerator(4, 6, form="grid", size=3),
    "spatial": lambda: PromptGenerator(4, 6, form="spatial"),
    "statistics": lambda: LocalStatistics(5),
    "estimator": lambda: Estimates(4, widths=(4, 6)),
    "prior": lambda: Kernels(4, cell=4, kernel_size=5),
}


def shaken(build: Callable[[], nn.Module]) -> nn.Module:
    """A block whose parameters are none of the start values, and the same whatever ran before."""
    torch.manual_seed(0)
    block = build()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block


@pytest.mark.slow
@pytest.mark.parametrize("name", MAPS)
def test_of_one_map(name):
    check(shaken(MAPS[name]), lambda size: (normal((size[0], 4, *size[1:])),), SIZES, (ANY_SIZE,))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3,), (3, 2, 5)])
def test_film(shape):
    make = lambda size: (normal((size[0], 4, *size[1:])), normal((size[0], *shape)))  # noqa: E731
    check(shaken(lambda: FiLM(4, 3)), make, SIZES, (ANY_SIZE, ANY_BATCH))


@pytest.mark.slow
def test_cross_attention_with_a_mask():
    def make(size):
        mask = torch.ones(size[0], 5, dtype=torch.bool)
        mask[0, 2:] = False
        return normal((size[0], 4, *size[1:])), normal((size[0], 5, 3)), mask

    check(shaken(lambda: CrossAttention2d(4, 3, num_heads=2)), make, SIZES, (ANY_SIZE, ANY_BATCH, ANY_BATCH))
