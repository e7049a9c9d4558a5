"""Small folders of images, and runs that take a moment."""

import pytest
import torch
from torch.nn import functional as F

from claritycore.images import Picture, write_image
from claritycore.nets import AutoConfig
from claritycore.training.settings import TrainingSettings


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Eight smooth images with edges, 48 x 56."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(8):
        generator = torch.Generator().manual_seed(number)
        coarse = torch.rand(1, 3, 7, 8, generator=generator)
        image = F.interpolate(coarse, size=(48, 56), mode="bicubic").clamp(0, 1)
        image[..., :, 20 + number :] = 1 - image[..., :, 20 + number :]
        write_image(folder / f"{number}.png", Picture(image))
    return folder


@pytest.fixture
def make_settings(photos, tmp_path):
    """Settings of a short run on the CPU in float32."""

    def make(**fields) -> TrainingSettings:
        short = {
            **{"data": str(photos), "runs": str(tmp_path / "runs"), "name": "run", "device": "cpu", "amp": False},
            **{"steps": 6, "batch_size": 4, "patch_size": 16, "lr": 1e-3, "workers": 0},
            **{"log_every": 1, "save_every": 2},
        }
        return TrainingSettings(**{**short, **fields})

    return make


@pytest.fixture
def config():
    """A tiny x2 net with dropout, which draws random numbers in training."""
    return AutoConfig.from_name("plksr", scale=2, num_feat=8, num_block=1, kernel_size=5, dropout=0.1)
