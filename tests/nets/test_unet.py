"""The skeleton of the U-Nets: what it computes, where it lies, and what it refuses."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from claritycore.blocks import BicubicUp
from claritycore.nets import Aux, Conditioned, Context, Stage, UNet, UNetConfig
from tests.strategies import feature_maps, normal


class Shift(nn.Module):
    """Adds a number: a stage whose work is seen in the map."""

    tile_safe, receptive_radius, tile_multiple = True, 3, 5

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by))

    def forward(self, x):
        return x + self.by


class Note(Conditioned):
    """Leaves a loss under its own name."""

    tile_safe = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, context):
        context.aux.losses[self.path] = self.weight * x.square().mean()
        return x * self.weight


def small(**fields) -> UNet:
    torch.manual_seed(0)
    return UNet(
        UNetConfig(**fields),
        widths=(4, 8, 16),
        encoder=[Shift(1.0), Stage(Shift(2.0), Note())],
        bottleneck=Shift(3.0),
        decoder=[Shift(4.0), Shift(5.0)],
        refinement=Shift(6.0),
    ).eval()


def perturbed(net: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("skip", ["concat", "add", "none"])
def test_it_is_the_figure_written_out(skip):
    net = perturbed(small(skip=skip, scale=2)).double()
    image = normal((2, 3, 8, 12), dtype=torch.float64)

    def joined(level, x, encoded):
        if skip == "none":
            return x
        conv = net.fusions[level].project
        return conv(torch.cat([x, encoded], 1) if skip == "concat" else x + encoded)

    e0 = net.stem(image) + net.encoder[0].blocks[0].by
    e1 = (net.downs[0](e0) + net.encoder[1].blocks[0].blocks[0].by) * net.encoder[1].blocks[0].blocks[1].weight
    b = net.downs[1](e1) + net.bottleneck.blocks[0].by
    d1 = joined(1, net.ups[1](b), e1) + net.decoder[1].blocks[0].by
    d0 = joined(0, net.ups[0](d1), e0) + net.decoder[0].blocks[0].by + net.refinement.blocks[0].by
    upsample, conv = net.head.upsample[0], net.head.conv
    expected = conv(F.gelu(F.pixel_shuffle(upsample.conv(d0), 2))) + BicubicUp(2)(image)
    torch.testing.assert_close(net(image), expected, rtol=0, atol=1e-12)
    for feature, wanted in zip(net.features(image), (d0, d1, b), strict=True):
        torch.testing.assert_close(feature, wanted, rtol=0, atol=1e-12)


@given(image=feature_maps(3, sides=st.integers(1, 80)), scale=st.sampled_from([1, 2, 3, 4, 8]))
def test_a_fresh_net_is_the_image_or_bicubic(image, scale):
    assert torch.equal(small(scale=scale)(image), BicubicUp(scale)(image))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(small(scale=scale)(image), BicubicUp(scale)(image))


def test_without_a_long_skip_the_head_does_not_start_at_zero():
    for fields in ({"long_skip": False}, {"in_channels": 4}):
        net = small(**fields)
        assert not net.adds_image
        assert net.head.conv.weight.abs().min() > 0


@given(image=feature_maps(3, sides=st.integers(1, 20)))
def test_maps_have_the_sizes_that_heads_of_ones_own_expect(image):
    shapes = [tuple(x.shape[1:]) for x in small().features(image)]
    height, width = image.shape[2:]
    assert shapes == [(4, height, width), (8, -(-height // 2), -(-width // 2)), (16, -(-height // 4), -(-width // 4))]


def test_parts_that_ask_are_told_the_context_and_leave_losses_under_their_names():
    output = small()(normal((1, 3, 8, 8)), return_aux=True)
    assert list(output.aux.losses) == ["encoder.1.blocks.0.blocks.1"]
    assert small()(normal((1, 3, 8, 8)), return_aux=True).aux.total() == output.aux.total() > 0


def test_what_tiles_need_to_know_follows_from_the_stages():
    net = small()
    # Gated strided ways: 3 down, 1 up; a cell of 4 pixels; the stem and the head see 1 pixel each.
    coarse = 2 * (3 + 3 + 3) + 4 * 3 + 2 * 1 + 4 * 1
    assert net.receptive_radius == 1 + 3 + 3 + 3 + 3 + coarse + 1 + 3
    assert net.tile_multiple == 20
    assert net.tile_safe
    assert not small(up="dysample").tile_safe
    assert small(upsampler="dysample").tile_safe
    assert not small(upsampler="dysample", scale=2).tile_safe


class TestSeveralScales:
    @pytest.mark.parametrize("head", ["separate", "embedded"])
    def test_each_scale_has_its_size_and_starts_as_bicubic(self, head):
        net, image = small(scale=2, scales=(1, 2, 3, 8), scale_head=head), normal((2, 3, 5, 6))
        assert torch.equal(net(image), BicubicUp(2)(image))
        for scale in (1, 2, 3, 8):
            assert torch.equal(net(image, scale=scale), BicubicUp(scale)(image))

    @pytest.mark.parametrize("head", ["separate", "embedded"])
    def test_scales_share_the_body_and_differ_in_the_head(self, head):
        net = perturbed(small(scale=2, scales=(2, 4), scale_head=head))
        image = normal((1, 3, 8, 8))
        two, four = net(image, scale=2) - BicubicUp(2)(image), net(image, scale=4) - BicubicUp(4)(image)
        assert not torch.allclose(two, F.avg_pool2d(four, 2), atol=1e-4)
        single = perturbed(small(scale=2))
        body = {key for key in single.state_dict() if not key.startswith("head.")}
        assert body == {key for key in net.state_dict() if not key.startswith("head.")}

    def test_a_head_of_its_own_computes_what_a_net_of_one_scale_does(self):
        net, single = perturbed(small(scale=2, scales=(2, 4))), small(scale=4)
        state = {key.replace("head.heads.x4.", "head."): value for key, value in net.state_dict().items()}
        single.load_state_dict({key: value for key, value in state.items() if ".x2." not in key})
        image = normal((1, 3, 7, 5))
        assert torch.equal(net(image, scale=4), single(image))

    @pytest.mark.parametrize("head", ["separate", "embedded"])
    @pytest.mark.parametrize("scale", [1, 2, 4])
    def test_every_parameter_gets_a_gradient_whatever_the_scale(self, head, scale):
        net = perturbed(small(scale=1, scales=(1, 2, 4), scale_head=head)).train()
        net(normal((1, 3, 8, 8)), scale=scale).square().mean().backward()
        missing = [name for name, p in net.named_parameters() if p.grad is None]
        assert missing == []
        if head == "embedded":
            assert [name for name, p in net.named_parameters() if not p.grad.any()] == []

    def test_the_scale_embedding_matters(self):
        net = perturbed(small(scale=2, scales=(2, 4), scale_head="embedded"))
        film = net.head.film.linear
        nn.init.normal_(film.weight)
        x = normal((1, 4, 6, 6))
        base = [net.head(x, scale) for scale in (1, 2)]
        nn.init.zeros_(film.weight)
        assert not torch.allclose(base[0], net.head(x, 1))
        assert not torch.allclose(base[1], net.head(x, 2))

    def test_unknown_scales_are_refused(self):
        with pytest.raises(ValueError, match="scale must be one of 2, 4, got 3"):
            small(scale=2, scales=(2, 4))(normal((1, 3, 4, 4)), scale=3)
        with pytest.raises(ValueError, match="scale must be one of 1, got 2"):
            small()(normal((1, 3, 4, 4)), scale=2)
        with pytest.raises(ValueError, match=r"scales must be different ones, scale = 1 among them, got \(2, 4\)"):
            UNetConfig(scales=(2, 4))
        with pytest.raises(ValueError, match="scales must be one of 1, 2, 3, 4, 8, got 5"):
            UNetConfig(scales=(1, 5))
        with pytest.raises(ValueError, match="down must be one of strided, unshuffle, got 'pool'"):
            UNetConfig(down="pool")


def test_stages_must_be_as_many_as_the_widths():
    with pytest.raises(ValueError, match=r"encoder and decoder must be 1 each, one less than widths, got 0 and 1"):
        UNet(UNetConfig(), widths=(4, 8), encoder=[], bottleneck=Shift(0.0), decoder=[Shift(0.0)])


def test_a_net_of_one_scale_has_no_ways():
    net = UNet(UNetConfig(), widths=(4,), encoder=[], bottleneck=nn.Conv2d(4, 4, 3, padding=1), decoder=[])
    assert net.tile_multiple == 1
    assert net.receptive_radius == 3
    assert len(net.features(normal((1, 3, 5, 5)))) == 1


def test_a_conditioned_part_that_forgets_its_forward_says_so():
    with pytest.raises(NotImplementedError, match="Conditioned does not override forward"):
        Conditioned()(normal((1, 1, 1, 1)), Context(1, Aux()))


def test_a_config_can_be_replaced_field_by_field():
    assert replace(UNetConfig(scale=2), skip="add").skip == "add"
