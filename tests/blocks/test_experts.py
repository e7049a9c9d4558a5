"""Experts: the formula of each, and that a window with its halo gives what the whole map gives there."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from claritycore.blocks import (
    ArtifactExpert,
    AttentionExpert,
    ConvExpert,
    DeblurExpert,
    DenoiseExpert,
    DetailExpert,
    Expert,
    FrequencyExpert,
    PointwiseExpert,
    TextureExpert,
)
from tests.strategies import normal

C = 4
EXPERTS = {
    "PointwiseExpert": lambda: PointwiseExpert(C),
    "ConvExpert": lambda: ConvExpert(C, kernel_size=5),
    "DetailExpert": lambda: DetailExpert(C),
    "TextureExpert": lambda: TextureExpert(C),
    "DeblurExpert": lambda: DeblurExpert(C, kernel_size=3, dilation=3),
    "DenoiseExpert": lambda: DenoiseExpert(C),
    "ArtifactExpert": lambda: ArtifactExpert(C),
    "AttentionExpert": lambda: AttentionExpert(C, 2, window_size=4),
    "FrequencyExpert": lambda: FrequencyExpert(C, window_size=4),
}


def made(name: str) -> Expert:
    torch.manual_seed(0)
    expert = EXPERTS[name]().double()
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return expert


@pytest.mark.parametrize("name", EXPERTS)
def test_a_window_with_its_halo_gives_what_the_whole_map_gives_there(name):
    expert = made(name)
    x = normal((2, C, 32, 36), dtype=torch.float64)
    whole, halo = expert(x), expert.halo
    window = x[..., 12 - halo : 20 + halo, 16 - halo : 24 + halo]
    torch.testing.assert_close(expert.valid(window), whole[..., 12:20, 16:24], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", EXPERTS)
def test_no_window_is_computed_as_no_window(name):
    expert = made(name)
    side = 8 + 2 * expert.halo
    y = expert.valid(torch.zeros(0, C, side, side, dtype=torch.float64))
    assert y.shape == (0, C, 8, 8)
    y.sum().backward()
    assert all(not parameter.grad.any() for parameter in expert.parameters())


def padded(x, radius):
    return F.pad(x, (radius,) * 4, mode="reflect")


def dw(conv, x):
    """A depthwise convolution by shifted copies."""
    kernel, spread = conv.kernel_size[0], conv.dilation[0]
    height, width = (side - spread * (kernel - 1) for side in x.shape[2:])
    y = conv.bias[:, None, None].expand(len(x), -1, height, width)
    for i in range(kernel):
        for j in range(kernel):
            moved = x[..., i * spread : i * spread + height, j * spread : j * spread + width]
            y = y + conv.weight[:, 0, i, j, None, None] * moved
    return y


def pw(conv, x):
    weight = conv.weight.flatten(1)
    return torch.einsum("oc,nchw->nohw", weight, x) + conv.bias[:, None, None]


def formula(name: str, expert, x):
    if name == "PointwiseExpert":
        return pw(expert.fc2, F.gelu(pw(expert.fc1, x)))
    if name == "ConvExpert":
        return formula("PointwiseExpert", expert.mlp, dw(expert.dwconv, padded(x, 2)))
    if name == "DetailExpert":
        return F.conv2d(F.gelu(F.conv2d(padded(x, 2), expert.conv1.weight, expert.conv1.bias)), *_of(expert.conv2))
    if name == "TextureExpert":
        gate, value = dw(expert.dwconv, pw(expert.project_in, padded(x, 2))).chunk(2, 1)
        return pw(expert.project_out, F.gelu(gate) * value)
    if name == "DeblurExpert":
        return pw(expert.project_out, x * pw(expert.attention, dw(expert.far, dw(expert.near, padded(x, 4)))))
    if name == "ArtifactExpert":
        y = F.gelu(pw(expert.project_in, padded(x, 7)))
        for conv in expert.across:
            y = dw(conv, y)
        return pw(expert.project_out, F.gelu(y))
    if name == "DenoiseExpert":
        weights = F.conv2d(padded(x, 1), *_of(expert.to_weights)).softmax(1)
        neighbours = F.unfold(padded(x, 2), 5).view(len(x), C, 25, *x.shape[2:])
        return pw(expert.project_out, (weights[:, None] * neighbours).sum(2) - x)
    if name == "AttentionExpert":
        return expert.attn(x)
    return _by_cosines(expert, x)


def _of(conv):
    return conv.weight, conv.bias


def _by_cosines(expert, x):
    """The two-dimensional DCT of each cell as a sum over its basis."""
    side, y = expert.tile_multiple, pw(expert.project_in, x)
    places = torch.arange(side).double()
    basis = torch.cos(torch.pi / side * (places + 0.5) * places[:, None]) * (2 / side) ** 0.5
    basis[0] /= 2**0.5
    out = torch.zeros_like(y)
    for i in range(0, y.shape[2], side):
        for j in range(0, y.shape[3], side):
            spectrum = torch.einsum("nchw,ph,qw->ncpq", y[..., i : i + side, j : j + side], basis, basis)
            cell = torch.einsum("ncpq,cpq,ph,qw->nchw", spectrum, expert.gain, basis, basis)
            out[..., i : i + side, j : j + side] = cell
    return pw(expert.project_out, out)


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_is_its_formula(name):
    expert = made(name)
    x = normal((2, C, 12, 16), dtype=torch.float64)
    torch.testing.assert_close(expert(x), formula(name, expert, x), rtol=1e-11, atol=1e-12)


def test_denoising_takes_nothing_from_a_flat_map():
    expert = made("DenoiseExpert")
    flat = torch.full((1, C, 9, 9), 0.7, dtype=torch.float64)
    torch.testing.assert_close(expert(flat), expert.project_out.bias[:, None, None].expand(1, C, 9, 9))


def test_cells_beyond_the_border_are_mirrored():
    expert = made("FrequencyExpert")
    x = normal((1, C, 6, 7), dtype=torch.float64)
    whole = F.pad(x, (0, 1, 0, 2), mode="reflect")
    torch.testing.assert_close(expert(x), expert(whole)[..., :6, :7])


def test_what_an_expert_says_of_itself():
    assert [made(name).halo for name in EXPERTS] == [0, 2, 2, 2, 4, 2, 7, 0, 0]

    class Global(Expert):
        halo = None

    assert not Global(C).tile_safe
    with pytest.raises(NotImplementedError):
        Global(C)(torch.zeros(1, C, 2, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DetailExpert(0), "channels must be an integer of at least 1, got 0"),
        (lambda: PointwiseExpert(C, mlp_ratio=0.1), "mlp_ratio must leave a channel of 4, got 0.1"),
        (lambda: ConvExpert(C, kernel_size=4), "kernel_size must be an odd integer of at least 1, got 4"),
        (lambda: TextureExpert(C, kernel_size=2), "kernel_size must be an odd integer of at least 1, got 2"),
        (lambda: DeblurExpert(C, kernel_size=2), "kernel_size must be an odd integer of at least 1, got 2"),
        (lambda: DeblurExpert(C, dilation=0), "dilation must be an integer of at least 1, got 0"),
        (lambda: DenoiseExpert(C, kernel_size=1), "kernel_size must be at least 3, got 1"),
        (lambda: ArtifactExpert(-1), "channels must be an integer of at least 1, got -1"),
        (lambda: AttentionExpert(C, 3), "num_heads must divide the 4 channels, got 3"),
        (lambda: AttentionExpert(C, 2, window_size=0), "window_size must be an integer of at least 1, got 0"),
        (lambda: FrequencyExpert(C, window_size=0), "window_size must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_an_expert_is_taken_by_any_net():
    net = nn.Sequential(nn.Conv2d(3, C, 3, padding=1), DetailExpert(C))
    assert net(torch.zeros(1, 3, 5, 7)).shape == (1, C, 5, 7)
