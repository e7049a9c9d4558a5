"""ONNX of mixtures of experts: every expert for everything, masked, at sizes other than the exported one."""

import pytest
import torch

from claritycore.blocks import (
    DetailExpert,
    FrequencyExpert,
    MoE2d,
    PointwiseExpert,
    TopKRouter,
)
from tests.strategies import normal

pytest.importorskip("onnxruntime")
pytest.importorskip("claritycore.deploy.onnx_ops")

from tests.deploy.test_onnx import DYNAMIC, check

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIZES = [(2, 10, 13), (1, 9, 16)]
ANY_SIZE = dict.fromkeys((0, 2, 3), DYNAMIC)


class Map(MoE2d):
    """The map alone."""

    def forward(self, x, conditions=()):
        return super().forward(x, conditions)[0]


EXPERTS = {
    "token": lambda: [PointwiseExpert(4) for _ in range(3)],
    "window": lambda: [DetailExpert(4), PointwiseExpert(4), PointwiseExpert(4)],
    "image": lambda: [FrequencyExpert(4, window_size=4), PointwiseExpert(4), PointwiseExpert(4)],
}


@pytest.mark.slow
@pytest.mark.parametrize(("level", "keep"), [("token", 0.3), ("window", 0.5), ("image", 1.0)])
def test_every_level_at_two_sizes(level, keep):
    torch.manual_seed(0)
    router = TopKRouter(4 if level == "token" else 8, 3, k=2, keep=keep)
    moe = Map(4, EXPERTS[level](), level=level, window_size=4, router=router)
    torch.nn.init.normal_(moe.router.linear.weight)
    check(moe, lambda size: (normal((size[0], 4, *size[1:])),), SIZES, (ANY_SIZE,))
