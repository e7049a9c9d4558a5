"""RSFMoENet: what it knows of the degradation, and what that steers."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from claritycore.blocks import MoE2d
from claritycore.nets import Aux
from claritycore.nets.busyness import busyness
from claritycore.nets.rsfmoe_parts import ModulatedBlock, RSFMoEContext, SteeredBlock
from claritycore.nets.rsfmoe_prompt import DegradationPrompt, ResidualGate, faults
from claritycore.training import Recipe, degrade, supervise
from claritycore.training.blur_stage import Blur
from claritycore.training.stages import Downsample, Jpeg, Noise
from tests.nets.test_learning import photograph
from tests.nets.test_rsfmoe import perturbed
from tests.strategies import normal


def routes(net: nn.Module, *arguments, **keywords) -> dict[str, torch.Tensor]:
    """What the gates and the routers say, by the name of the mixture."""
    found = {}

    def note(name):
        def hook(module, inputs, output):
            found[name] = output[1].probabilities

        return hook

    mixtures = {name: part for name, part in net.named_modules() if isinstance(part, MoE2d)}
    handles = [part.register_forward_hook(note(name)) for name, part in mixtures.items()]
    net(*arguments, **keywords)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("condition", ["prompt", "code"])
def test_prompt_and_code_change_routing_attention_and_large_kernels(condition):
    net = perturbed(0.3, kernel_prior=True, bypass=0.0)
    image, scales = normal((1, 3, 16, 16)), []
    steered = [part.steer for part in net.modules() if isinstance(part, SteeredBlock)]
    steered += [part.film.linear for part in net.modules() if isinstance(part, ModulatedBlock)]
    for part in steered:
        part.register_forward_hook(lambda module, inputs, output: scales.append(output))
    if condition == "prompt":
        before, after = (routes(net, image, prompt=torch.full((1, 4), value)) for value in (0.0, 1.0))
    else:
        prompt = torch.zeros(1, 4)
        before = routes(net, image, prompt=prompt)
        with torch.no_grad():
            net.encoder[0].blocks[0].blocks[0].prior.to_code.bias.add_(1.0)
        after = routes(net, image, prompt=prompt)
    first, second = scales[: len(steered)], scales[len(steered) :]
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(first, second, strict=True))
    assert all((before[name] - after[name]).abs().max() > 1e-3 for name in before)


def test_attention_is_steered_within_bounds():
    net = perturbed(0.3, kernel_prior=True)
    (block, *_) = (part for part in net.modules() if isinstance(part, SteeredBlock))
    x, code, prompt = normal((2, 8, 6, 6)), normal((2, 8, 3, 3), seed=1), 20 * normal((2, 4), seed=2)
    context = RSFMoEContext(1, Aux(), prompt, code)
    scale = torch.cat([prompt, code.mean((2, 3))], dim=1) @ block.steer.weight.T
    scale = scale.tanh().exp()
    assert scale.min() < 0.5
    assert scale.max() > 2
    torch.testing.assert_close(block(x, context), block.block(x, scale))
    assert not torch.allclose(block(x, context), block.block(x), atol=1e-3)


def test_large_kernels_are_scaled_and_shifted():
    net = perturbed(0.3, kernel_prior=True)
    (block, *_) = (part for part in net.modules() if isinstance(part, ModulatedBlock))
    x, code, prompt = normal((2, 4, 6, 6)), normal((2, 8, 3, 3), seed=1), normal((2, 4), seed=2)
    told = torch.cat([prompt, code.mean((2, 3))], dim=1)
    scale, shift = (told.sigmoid() * told @ block.film.linear.weight.T + block.film.linear.bias).chunk(2, dim=1)
    expected = block.block(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(block(x, RSFMoEContext(1, Aux(), prompt, code)), expected)
    assert (expected - block.block(x)).abs().amax((1, 2, 3)).min() > 0.1
    plain = ModulatedBlock(block.block, condition_channels=0)
    assert plain(x, RSFMoEContext(1, Aux())).equal(block.block(x))


def test_the_last_map_is_held_back_image_by_image():
    """By what prompt and code say; afresh as little as the bias of 2 says."""
    net = perturbed(0.3, kernel_prior=True)
    (gate,) = (part for part in net.modules() if isinstance(part, ResidualGate))
    x, code, prompt = normal((2, 4, 6, 6)), normal((2, 8, 3, 3), seed=1), normal((2, 4), seed=2)
    context = RSFMoEContext(1, Aux(), prompt, code)
    told = torch.cat([prompt, code.mean((2, 3))], dim=1)
    open_by = (told @ gate.linear.weight.T + gate.linear.bias).sigmoid()
    torch.testing.assert_close(gate(x, context), x * open_by[:, :, None, None])
    assert (open_by[0] - open_by[1]).abs() > 0.01
    fresh = ResidualGate(12)(x, context)
    torch.testing.assert_close(fresh, x / (1 + math.exp(-2)))


def test_a_closed_gate_leaves_the_image_alone_and_nets_without_a_prompt_have_none():
    net = perturbed()
    (gate,) = (part for part in net.modules() if isinstance(part, ResidualGate))
    image = torch.rand(1, 3, 20, 16, dtype=next(net.parameters()).dtype)
    assert (net(image) - image).abs().max() > 0.01
    with torch.no_grad():
        gate.linear.weight.zero_()
        gate.linear.bias.fill_(-60.0)
        net.head.conv.bias.zero_()
    torch.testing.assert_close(net(image), image)
    assert not any(isinstance(part, ResidualGate) for part in perturbed(prompt_channels=0).modules())


def test_busyness_is_the_deviation_of_grey_around_a_pixel():
    image = torch.rand(2, 3, 5, 6, dtype=torch.float64, generator=torch.manual_seed(0))
    grey, expected = 255 * image.mean(1), torch.zeros(2, 1, 5, 6, dtype=torch.float64)
    for row, column in itertools.product(range(5), range(6)):
        around = grey[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
        expected[:, 0, row, column] = 0.5 * (1 + around.flatten(1).var(1, correction=0)).log()
    torch.testing.assert_close(busyness(image), expected, rtol=1e-6, atol=0)


def test_the_prompt_learns_of_noise_which_means_do_not_tell():
    torch.manual_seed(0)
    part = DegradationPrompt(3, prompt_channels=8, prior=None, severe_blur=2.0)
    optimizer, losses = torch.optim.Adam(part.parameters(), lr=2e-2), []
    recipe = Recipe("noisy", (Downsample(), Noise(sigma=(0.0, 0.2))))
    for step in range(120):
        plain, seeds = torch.rand(16, 3, 1, 1).expand(-1, -1, 12, 12), range(16 * step, 16 * step + 16)
        image, report = degrade(plain, recipe, seeds)
        context = RSFMoEContext(1, Aux())
        part(image, context)
        supervise(context.aux, report)
        optimizer.zero_grad()
        context.aux.total().backward()
        optimizer.step()
        losses.append(context.aux.losses["degradation.noise"].item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_the_prompt_reads_what_is_wrong_with_the_image():
    """Blur widens edges, JPEG shows its blocks; what the generator reads ends with both, unless a prompt is given."""
    image, recipes = photograph(64), {"blur": Blur(sigma=(2.0, 2.0)), "jpeg": Jpeg(quality=(20, 20))}
    degraded = {name: degrade(image, Recipe(name, (Downsample(), fault)), [0])[0] for name, fault in recipes.items()}
    clean, blurred, blocky = (faults(x).flatten().tolist() for x in (image, *degraded.values()))
    assert blurred[0] > clean[0] + 1
    assert blocky[1] > clean[1] + 1
    net, read = perturbed(), []
    net.encoder[0].blocks[0].blocks[0].generator.register_forward_pre_hook(lambda m, inputs: read.append(inputs[0]))
    for x in degraded.values():
        net(x)
        assert torch.equal(read.pop()[:, -2:], faults(x))
    net.train()(image, prompt=torch.zeros(1, 4))
    assert not read.pop()[:, -2:].any()


def test_tiles_of_a_net_with_a_prompt_begin_at_blocks_of_jpeg():
    assert perturbed(depths=(1,)).tile_multiple % 8 == 0
    assert perturbed(depths=(1,), prompt_channels=0).tile_multiple % 8 != 0


def test_local_variance_changes_routing():
    net = perturbed(0.3, bypass=0.0, moe_window=4, depths=(1,))
    mixture = net.encoder[0].blocks[0].blocks[-1].separation.texture
    high, prompt = normal((1, 4, 8, 8)), torch.zeros(1, 4)
    context = RSFMoEContext(1, net(high[:, :3], return_aux=True).aux, prompt)
    seen = [
        routes(mixture, high, replace(context, busyness=torch.full((1, 1, 8, 8), value)))["moe"] for value in (0.0, 3.0)
    ]
    assert (seen[0] - seen[1]).abs().max() > 1e-3


def test_the_prompt_that_the_net_makes_may_be_given():
    net, image = perturbed(), normal((2, 3, 12, 12))
    made = []
    net.encoder[0].blocks[0].blocks[0].generator.register_forward_hook(lambda m, i, output: made.append(output))
    restored = net(image)
    assert torch.equal(net(image, prompt=made[0]), restored)
    assert not torch.equal(net(image, prompt=made[0] + 1), restored)
    net.train()(image, prompt=made[0]).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_kernels_and_estimates_are_there_for_training_to_supervise():
    net = perturbed(kernel_prior=True, blur_kernel=5, noise=True)
    aux = net(normal((2, 3, 12, 12)), return_aux=True).aux
    assert tuple(aux.kernels.shape) == (2, 5, 5)
    assert tuple(aux.degradation.blur.shape) == (2,)


def test_what_does_not_fit_is_refused():
    image = normal((2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"prompt must be \(B, 4\) = \(2, 4\), got shape \(1, 4\)"):
        perturbed()(image, prompt=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="noise_seed must be None for a net without noise in its config"):
        perturbed()(image, noise_seed=0)
