"""What the U-Nets learn in a few hundred steps: to remove noise, in place, without a pattern."""

import itertools
from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import settings
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

from claritycore.images import psnr
from tests.small_nets import LEARNERS

NIGHTLY = settings.get_current_profile_name() == "nightly"
SCALES = (1, 2, 3, 4, 8)
SIDE = 32
WAYS = list(itertools.product(("strided", "unshuffle"), ("pixelshuffle", "expand", "dysample")))
# One of each; the whole table takes a quarter of an hour.
QUICK = [(1, "strided", "pixelshuffle"), (2, "unshuffle", "expand"), (3, "strided", "dysample")]
ALL = [(scale, down, up) for scale in SCALES for down, up in WAYS]
# Steps in which a draw of noise is learned by heart; 300 are allowed.
STEPS = {"SwinUNet": 180, "HERSR": 200, "HARMONIC": 180, "RSFMoENet": 140}
ONE_HEAD = {name: {"head_dim": 16} for name in ("SwinUNet", "HARMONIC")}
# Where few blocks show as well what the ways down and up do; the whole table is of the deeper nets.
SHALLOW = {name: {"depths": (1, 1), "refinement": 0} for name in ("SwinUNet", "HARMONIC")}


def photograph(side: int) -> Tensor:
    return torch.from_numpy(data.astronaut()[60 : 60 + side, 180 : 180 + side]).movedim(-1, 0)[None] / 255


def trained(
    net: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], steps: int, lr: float, *, by_heart: bool = False
) -> nn.Module:
    """Train by Adam, of a shorter memory where one pair is learned by heart; the parts of the net add their losses."""
    optimizer = torch.optim.Adam(net.train().parameters(), lr=lr, betas=(0.9, 0.95 if by_heart else 0.999))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=not by_heart
    )
    for image, target in itertools.islice(pairs, steps):
        optimizer.zero_grad()
        output = net(image, return_aux=True)
        (F.l1_loss(output.image, target) + output.aux.total()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net.eval()


def denoised(name: str, side: int, steps: int, lr: float) -> tuple[float, float]:
    """PSNR in dB of one draw of noise, before and after learning this draw by heart."""
    torch.manual_seed(0)
    clean = photograph(side)
    noisy = clean + 25 / 255 * torch.randn(clean.shape)
    net = LEARNERS[name](**ONE_HEAD.get(name, {}))
    net = trained(net, itertools.repeat((noisy, clean)), steps, lr, by_heart=True)
    with torch.no_grad():
        return psnr(noisy, clean).item(), psnr(net(noisy), clean).item()


@pytest.mark.parametrize("name", LEARNERS)
def test_it_begins_to_learn_one_draw_of_noise_by_heart(name):
    before, after = denoised(name, 24, 100, 4e-3)
    assert 20 < before < 20.7
    assert after > 26


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_it_learns_one_draw_of_noise_by_heart(name):
    before, after = denoised(name, 64, STEPS[name], 6e-3)
    assert 20 < before < 20.7
    assert after >= 32


def smaller_photographs(scale: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of patches, smaller or noisy, and whole ones, turned and mirrored at random: no side is preferred.

    They are as large as the images that are looked at later: in small ones the outer taps of large kernels, which see
    zeros alone, would stay as they were drawn, and push what they see for the first time to a side.
    """
    whole, side = torch.from_numpy(data.astronaut()).movedim(-1, 0)[None] / 255, SIDE * scale
    while True:
        top, left = torch.randint(len(whole[0, 0]) - side + 1, (2,)).tolist()
        target = whole[..., top : top + side, left : left + side].rot90(int(torch.randint(4, ())), (2, 3))
        target = target.flip(3) if torch.rand(()) < 0.5 else target
        # At scale 1 there would be nothing to learn.
        yield (F.avg_pool2d(target, scale) if scale > 1 else target + 0.1 * torch.randn_like(target)), target


def centroid(image: Tensor) -> Tensor:
    """Of the light above a tenth of the peak's, in pixels from the middle of the image."""
    light = image.double().mean((0, 1))
    light = light - light.median()
    light = (light - 0.1 * light.max()).clamp(min=0)
    rows, columns = (torch.arange(side) - (side - 1) / 2 for side in light.shape)
    return torch.stack([(light.sum(1) * rows).sum(), (light.sum(0) * columns).sum()]) / light.sum()


def blob(side: int) -> Tensor:
    place = torch.arange(side) - (side - 1) / 2
    bell = torch.exp(-(place**2) / 8)
    return 0.2 + 0.6 * (bell[:, None] * bell).expand(1, 3, side, side)


def pattern(image: Tensor, scale: int) -> float:
    """The largest difference between the means of the pixels of one place in each cell of scale x scale."""
    if scale == 1:
        return 0.0
    side = image.shape[-1] // scale
    cells = image.unfold(2, scale, scale).unfold(3, scale, scale)[:, :, 2 : side - 2, 2 : side - 2]
    means = cells.mean((2, 3))
    return (means.amax((2, 3)) - means.amin((2, 3))).max().item()


@pytest.mark.parametrize(("scale", "down", "up"), ALL if NIGHTLY else QUICK)
@pytest.mark.parametrize("name", LEARNERS)
def test_what_it_learns_is_in_place_and_has_no_pattern_of_the_scale(name, scale, down, up):
    torch.manual_seed(0)
    upsampler = "dysample" if up == "dysample" else "pixelshuffle"
    depth = {} if NIGHTLY else SHALLOW.get(name, {})
    net = LEARNERS[name](scale=scale, down=down, up=up, upsampler=upsampler, **depth)
    net = trained(net, smaller_photographs(scale), 100, 2e-4)
    with torch.no_grad():
        spot, grey = net(blob(SIDE)), net(torch.full((1, 3, SIDE, SIDE), 0.5))
    assert centroid(spot).abs().max() <= 0.05
    assert pattern(grey, scale) <= 1e-3
