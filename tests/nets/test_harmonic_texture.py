"""What HARMONIC makes of high frequencies: experts for what is hard, noise by place, and the same in half precision."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from claritycore.blocks import BicubicUp, ModulatedNoiseConv2d, NoiseField, TextureHead
from claritycore.deploy import flop_formulas
from claritycore.nets import Aux
from claritycore.nets.harmonic_branches import HARMONICContext
from tests.small_nets import made, small_harmonic
from tests.strategies import normal


def noisy(**fields) -> nn.Module:
    """A net in which noise shows."""
    net = made(small_harmonic, **fields)
    for part in net.modules():
        if isinstance(part, ModulatedNoiseConv2d):
            nn.init.ones_(part.noise.weight)
        if isinstance(part, TextureHead):
            nn.init.normal_(part.to_image.weight, std=0.5)
    nn.init.normal_(net.head.conv.weight, std=0.5)
    return net


# Hard regions

FLAT, TEXTURED = torch.full((1, 3, 16, 16), 0.5), torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
HALF = torch.cat([FLAT[..., :8], TEXTURED[..., 8:]], dim=3)


def flops(net: nn.Module, image: torch.Tensor) -> int:
    """What a pass over this image computes, not what one of its size might."""
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter, torch.no_grad():
        net(image)
    return counter.get_total_flops()


@pytest.mark.parametrize("level", ["token", "window"])
def test_an_easy_image_sends_nothing_to_experts_and_costs_less(level):
    net, kept, cost = made(small_harmonic, moe_level=level), {}, {}
    for name, image in {"flat": FLAT, "half": HALF, "textured": TEXTURED}.items():
        statistics = net(image, return_aux=True).aux.statistics
        (kept[name],) = (value.item() for key, value in statistics.items() if key.endswith("kept_share"))
        cost[name] = flops(net, image)
    assert kept["flat"] == 0
    assert 0.5 <= kept["half"] <= 0.75  # with the pixels that the split reaches across the border
    assert kept["textured"] > 0.9
    assert cost["flat"] < 0.97 * cost["textured"]
    saved = [cost["textured"] - cost[name] for name in ("half", "flat")]
    assert saved[0] / saved[1] == pytest.approx(1 - kept["half"] / kept["textured"], rel=0.05)
    everything = made(small_harmonic, moe_level=level, top_k=4, bypass=0.0)
    assert flops(everything, FLAT) == flops(everything, TEXTURED)


def test_what_is_easy_stays_as_it_is_and_gets_no_noise():
    net = noisy().double()
    block, seen = net.high_branch.texture.blocks[0], []
    block.experts.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output[0])))
    with torch.no_grad():
        assert torch.equal(net(FLAT.double(), noise_seed=3), net(FLAT.double()))
        assert not torch.equal(net(HALF.double(), noise_seed=3), net(HALF.double()))
    assert torch.equal(*seen[0])
    changed = (seen[2][1] != seen[2][0]).any(1)[0]
    assert not changed[:, :4].any()
    assert changed[:, 8:].float().mean() > 0.9


def test_an_exported_program_leaves_alone_the_same_places():
    class Texture(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = noisy().high_branch

        def forward(self, high):
            return self.branch(high, HARMONICContext(1, Aux(), NoiseField(3)))[0]

    branch, high = Texture().double(), HALF.double() - 0.5
    program = torch.export.export(branch, (high,))
    torch.testing.assert_close(program.module()(high), branch(high), rtol=0, atol=1e-12)


def test_experts_without_a_pixel_have_gradients_of_zeros():
    net = made(small_harmonic).train()
    output = net(FLAT, return_aux=True)
    (output.image.square().mean() + output.aux.total()).backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if ".experts." in name}
    assert {name.rpartition("experts.")[2] for name in gradients} >= {"w1", "router.linear.weight", "router.gate.bias"}
    assert all(gradient is not None for gradient in gradients.values())
    assert not any(gradient.any() for name, gradient in gradients.items() if ".experts.experts." in name)


# Noise


@pytest.mark.parametrize(
    "fields", [{"bypass": 0.0}, {"fast_path": True}, {"texture_head": True, "noise": False}], ids=str
)
def test_noise_is_off_in_eval_unless_seeded(fields):
    net, image = noisy(**fields), 0.5 + 0.01 * normal((2, 3, 9, 6))
    if net.texture_head is not None:
        nn.init.zeros_(net.head.conv.weight)  # what comes to the head is smooth, so that it adds texture
    with torch.no_grad():
        torch.manual_seed(1)
        plain = net(image)
        torch.manual_seed(2)
        assert torch.equal(net(image), plain)
        seeded = net(image, noise_seed=3)
        assert torch.equal(net(image, noise_seed=3), seeded)
        assert not torch.allclose(seeded, plain, atol=1e-4)
        assert not torch.allclose(net(image, noise_seed=4), seeded, atol=1e-4)
        # The first image's noise is the same alone as in the batch.
        torch.testing.assert_close(net(image[:1], noise_seed=3), seeded[:1], rtol=0, atol=1e-5)
        assert not torch.equal(net.train()(image), net(image))


def test_noise_of_a_seed_is_the_same_whatever_the_tile():
    net = noisy(fast_path=True, kernel_size=3).double()
    margin = net.receptive_radius + net.receptive_radius % 2
    image = normal((1, 3, 2 * margin + 8, 2 * margin + 12), dtype=torch.float64)
    with torch.no_grad():
        whole = net(image, noise_seed=5)[..., 4 + margin : -margin, 6 + margin : -margin]
        tile = net(image[..., 4:, 6:], noise_seed=NoiseField(5, offset=(4, 6)))[..., margin:-margin, margin:-margin]
        moved = net(image[..., 4:, 6:], noise_seed=5)[..., margin:-margin, margin:-margin]
    torch.testing.assert_close(tile, whole, rtol=0, atol=1e-12)
    assert not torch.allclose(moved, whole, atol=1e-4)


def test_each_layer_has_noise_of_its_own_and_larger_maps_their_own_place():
    context = HARMONICContext(2, Aux(), NoiseField(7, layer=1, samples=(4,), offset=(3, 5)))
    assert context.noise_of(2, 2) == NoiseField(7, layer=3, samples=(4,), offset=(6, 10))
    assert HARMONICContext(1, Aux()).noise_of(2) is None
    assert [block.layer for block in small_harmonic(high_depth=3).high_branch.texture.blocks] == [0, 1, 2]


def test_the_share_of_the_texture_expert_lets_noise_through():
    for level in ("token", "window"):
        net, image = noisy(moe_level=level, bypass=0.0), normal((1, 3, 9, 6))
        block = net.high_branch.texture.blocks[0]
        gates = []
        block.noise.register_forward_pre_hook(lambda _, inputs, gates=gates: gates.append(inputs[3]))
        with torch.no_grad():
            route = net(image, return_aux=True)
            block.experts.router.linear.weight.zero_()
            net(image)
        assert [tuple(gate.shape) for gate in gates] == [(1, 1, 10, 6)] * 2, level
        assert gates[0].std() > 0
        assert torch.equal(gates[1], torch.full((1, 1, 10, 6), 0.25))
        assert f"{block.path}.dead_experts" in route.aux.statistics


def test_a_net_without_noise_takes_no_seed():
    with pytest.raises(ValueError, match="noise_seed must be None for a net without noise"):
        small_harmonic(noise=False)(normal((1, 3, 4, 4)), noise_seed=1)


# Half precision


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.003), (torch.bfloat16, 0.025)], ids=str)
@pytest.mark.parametrize(
    "fields",
    [{}, {"moe_level": "window", "mixer": "deformable"}, {"texture_head": True, "scale": 2}, {"fast_path": True}],
    ids=str,
)
def test_half_precision_makes_the_same_corrections(fields, dtype, tolerance):
    net, image = (
        noisy(low_ssm=True, **fields),
        torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(1)).to(dtype),
    )
    plain = BicubicUp(fields.get("scale", 1))(image.float())
    with torch.no_grad():
        exact = net(image.float(), noise_seed=3) - plain
        restored = net.to(dtype)(image, noise_seed=3)
    assert restored.dtype == dtype
    assert exact.abs().max() > 0.5
    assert (restored.float() - plain - exact).norm() <= tolerance * exact.norm()
