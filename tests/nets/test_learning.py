"""What the U-Nets learn in a few hundred steps: to remove noise, in place, without a pattern."""

import pytest
import torch
from skimage import data
from torch.nn import functional as F

from claritycore.blocks import BicubicUp
from claritycore.images import psnr
from tests.contracts import small_rsfmoe, small_swin_unet

# The U-Nets at sizes that learn on a CPU while one waits.
LEARNERS = {
    "SwinUNet": lambda **fields: small_swin_unet(
        **{"embed_dim": 16, "depths": (2, 2), "head_dim": 8, "window_size": 8, **fields}
    ),
    "RSFMoENet": lambda **fields: small_rsfmoe(
        **{"embed_dim": 8, "head_dim": 8, "window_size": 8, "moe_window": 8, "warm_up": 0, **fields}
    ),
}
DOWN, UP = ("strided", "unshuffle"), ("pixelshuffle", "expand", "dysample")


def photograph(side: int) -> torch.Tensor:
    return torch.from_numpy(data.astronaut()[60 : 60 + side, 180 : 180 + side]).movedim(-1, 0)[None] / 255


def trained(net, degraded, clean, steps: int, lr: float = 2e-3):
    """Train by Adam on one pair; the loss with what the parts of the net ask for."""
    optimizer = torch.optim.Adam(net.train().parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        output = net(degraded, return_aux=True)
        (F.l1_loss(output.image, clean) + output.aux.total()).backward()
        optimizer.step()
    return net.eval()


def denoised(build, steps: int, lr: float = 2e-3) -> float:
    torch.manual_seed(0)
    clean = photograph(64)
    noisy = clean + 25 / 255 * torch.randn(clean.shape)
    assert psnr(noisy, clean, peak=1.0).item() == pytest.approx(20.2, abs=0.3)
    with torch.no_grad():
        net = trained_denoiser(build, noisy, clean, steps, lr)
        return psnr(net(noisy).clamp(0, 1), clean, peak=1.0).item()
