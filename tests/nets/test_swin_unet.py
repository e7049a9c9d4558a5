"""SwinUNet: its published sizes, what its fields change, and tiles."""

import pytest
import torch

from claritycore.deploy import restore_tiled
from claritycore.nets import AutoConfig, AutoModel, SwinUNet, SwinUNetConfig
from tests.small_nets import made, small_swin_unet
from tests.strategies import normal


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("swin-unet-tiny", 492_315),
        ("swin-unet-small", 1_132_751),
        ("swin-unet-base", 31_430_203),
        ("swin-unet", 31_430_203),
        ("swin-unet-large", 44_003_643),
    ],
)
def test_sizes(name, parameters):
    with torch.device("meta"):
        net = AutoModel.from_config(AutoConfig.from_name(name))
        assert tuple(net(torch.empty(1, 3, 50, 70)).shape) == (1, 3, 50, 70)
    assert sum(p.numel() for p in net.parameters()) == parameters


def closed_form(c: SwinUNetConfig) -> int:
    """Parameters counted from the figure, for the forms of the base size."""

    def block(width):
        heads, hidden = width // c.head_dim, int(c.mlp_ratio * width)
        attention = 4 * width**2 + 4 * width + (2 * c.window_size - 1) ** 2 * heads
        return attention + 4 * width + 2 * width * hidden + hidden + width

    widths = [c.embed_dim * 2**level for level in range(len(c.depths))]
    total = 27 * c.embed_dim + c.refinement * block(c.embed_dim) + c.depths[-1] * block(widths[-1])
    for fine, wide, depth in zip(widths, widths[1:], c.depths, strict=False):
        down, up = 9 * fine * wide // 4 + wide // 4, 9 * wide * 4 * fine + 4 * fine
        total += 2 * depth * block(fine) + down + up + 2 * fine**2 + fine
    return total + 27 * c.embed_dim + 3


@pytest.mark.parametrize("fields", [{}, {"depths": (2, 4), "head_dim": 16, "window_size": 7}, {"mlp_ratio": 4.0}])
def test_parameters_are_those_of_the_figure(fields):
    config = SwinUNetConfig(**fields)
    with torch.device("meta"):
        assert sum(p.numel() for p in SwinUNet(config).parameters()) == closed_form(config)


def test_blocks_alternate_whole_and_shifted_windows():
    net = small_swin_unet(depths=(3, 2), window_size=8)
    shifts = [block.attn.shift for block in net.encoder[0].blocks[0].blocks]
    assert shifts == [(0, 0), (4, 4), (0, 0)]


@pytest.mark.parametrize(
    "fields",
    [
        {"skip": "none"},
        {"skip": "add"},
        {"window_size": 5},
        {"depths": (1, 1)},
        {"residual_scale": 0.1},
        {"refinement": 0},
    ],
)
def test_what_ablations_change_shows(fields):
    def restored(**fields):
        torch.manual_seed(0)
        net = small_swin_unet(**fields)
        torch.nn.init.ones_(net.head.conv.weight)
        return net(image)

    image = normal((1, 3, 12, 12))
    assert not torch.allclose(restored(), restored(**fields), atol=1e-3)


@pytest.mark.parametrize("scale", [1, 2])
def test_tiles_are_the_whole(scale):
    net = small_swin_unet(scale=scale, depths=(1, 1), window_size=2).double()
    torch.nn.init.normal_(net.head.conv.weight, std=0.1)
    image = normal((1, 3, 61, 47), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(restore_tiled(net, image, 24), net.eval()(image), rtol=0, atol=1e-12)


@pytest.mark.parametrize("down", ["strided", "unshuffle"])
@pytest.mark.parametrize(
    "fields",
    [{"scale": 1}, {"scale": 3}, {"scale": 8}, {"scale": 2, "upsampler": "dysample"}]
    + [{"scale": 2, "scales": (2, 4), "scale_head": head} for head in ("separate", "embedded")],
    ids=str,
)
def test_a_constant_image_stays_one_whatever_is_learned(fields, down):
    """Away from the borders, of any period: no way up, and no head, can learn a checkerboard."""
    net = made(small_swin_unet, depths=(1, 1), refinement=0, down=down, **fields).double()
    for parameter in net.parameters():
        parameter.data += 0.3 * normal(tuple(parameter.shape), dtype=torch.float64)
    scale, edge = fields["scale"], net.receptive_radius
    with torch.no_grad():
        grey = net(torch.full((1, 3, 2 * edge + 4, 2 * edge + 4), 0.5, dtype=torch.float64))
    inside = grey[..., scale * edge : -scale * edge, scale * edge : -scale * edge]
    assert (grey.amax() - grey.amin()) > 0.1, "the borders do not show: nothing was learned"
    assert (inside.amax((2, 3)) - inside.amin((2, 3))).max() < 1e-10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 24}, "embed_dim must be a multiple of head_dim 24, got 64"),
        ({"embed_dim": 6, "head_dim": 3}, "embed_dim must be a multiple of 4, got 6"),
        ({"depths": ()}, r"depths and refinement must be integers of at least 0, got \(\) and 4"),
        ({"refinement": -1}, "depths and refinement must be integers of at least 0"),
        ({"window_size": 0}, "window_size must be an integer of at least 1, got 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must leave a channel, and residual_scale be finite, got 0.0 and 1.0"),
        ({"ffn": "conv"}, "ffn must be one of mlp, gated, got 'conv'"),
        ({"scale": 5}, "scale must be one of 1, 2, 3, 4, 8, got 5"),
    ],
)
def test_bad_sizes_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        SwinUNetConfig(**fields)
