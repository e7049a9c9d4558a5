"""RSFMoENet: its sizes and parts, where it spends its work, its noise and its early exit."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from claritycore.blocks import (
    ConvExpert,
    FreqSep,
    NoiseField,
    NoiseInjection,
    SSMGlobalMixer,
    reparameterize_model,
)
from claritycore.blocks.deformable_attention import DeformableAttention2d
from claritycore.blocks.window_attention import WindowAttention2d
from claritycore.deploy import flop_formulas
from claritycore.nets import AutoConfig, AutoModel, Aux, RSFMoEConfig, RSFMoENet
from claritycore.nets.busyness import busyness
from claritycore.nets.rsfmoe_exit import ExitConfidence, Skippable
from claritycore.nets.rsfmoe_parts import RSFMoEContext, TextureMixture
from tests.nets.test_learning import photograph, trained
from tests.small_nets import small_rsfmoe
from tests.strategies import normal

TILE_SAFE = {"depths": (1,), "global_mixer": "window", "split": "haar"}
NOISY = {"noise": True, "severe_blur": 1.0, "bypass": 0.0}


def perturbed(std: float = 0.1, seed: int = 0, **fields) -> nn.Module:
    torch.manual_seed(seed)
    net = small_rsfmoe(**fields).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return net


def sure(net: nn.Module) -> nn.Module:
    """Routers that are nearly certain, and noise of a strength that is seen."""
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, TextureMixture):
                part.moe.router.linear.weight.mul_(30)
                if part.noise is not None:
                    part.noise.weight.fill_(1.0)
    return net


def flops(net: nn.Module, image: torch.Tensor) -> int:
    """What a pass over this image computes, not what one of its size might."""
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter, torch.no_grad():
        net(image)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("rsfmoe-tiny", 458_769),
        ("rsfmoe-small", 2_996_891),
        ("rsfmoe-base", 23_424_181),
        ("rsfmoe", 23_424_181),
    ],
)
def test_sizes(name, parameters):
    with torch.device("meta"):
        net = AutoModel.from_config(AutoConfig.from_name(name))
        assert tuple(net(torch.empty(1, 3, 50, 70)).shape) == (1, 3, 50, 70)
    assert isinstance(net, RSFMoENet)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("fields", [{}, {"deformable": True}, {"global_mixer": "window"}])
def test_no_attention_at_full_resolution(fields):
    net, seen = small_rsfmoe(**fields), []
    kinds = (WindowAttention2d, DeformableAttention2d)
    for part in net.modules():
        if isinstance(part, kinds):
            part.register_forward_pre_hook(lambda part, inputs: seen.append((type(part), inputs[0].shape[-1])))
    net(normal((1, 3, 16, 16)))
    assert seen
    assert max(width for _, width in seen) == 8
    assert (DeformableAttention2d in {kind for kind, _ in seen}) == ("deformable" in fields)
    assert any(isinstance(part, SSMGlobalMixer) for part in net.modules()) == ("global_mixer" not in fields)


def test_windows_are_shifted_at_every_other_place_from_the_encoder_to_the_decoder():
    net = small_rsfmoe(depths=(1, 2), window_size=4)
    shifts = [part.shift[0] for part in net.modules() if isinstance(part, WindowAttention2d)]
    assert shifts == [0, 2, 2, 0]


def test_every_mixture_has_the_four_experts_a_structure_expert_and_a_bound_of_its_own():
    net = small_rsfmoe(hf_gain=0.7, decoder_moe=True)
    separations = [part for part in net.modules() if isinstance(part, FreqSep)]
    assert len(separations) == 6  # two of the encoder, two of the bottleneck, two of the decoder
    for part in separations:
        kinds = [type(expert).__name__ for expert in part.texture.moe.experts]
        assert kinds == ["DetailExpert", "TextureExpert", "DeblurExpert", "DenoiseExpert"]
        assert isinstance(part.structure, ConvExpert)
        assert part.fuse.max_gain == 0.7


def test_routers_are_balanced_and_sharpened_and_warm_up():
    net, image = small_rsfmoe(warm_up=2, bypass=0.0, depths=(1,)).train(), normal((1, 3, 8, 8))
    mixtures = [part for part in net.modules() if isinstance(part, TextureMixture)]
    chosen: list[int] = []
    for part in mixtures:
        part.moe.register_forward_hook(lambda module, inputs, output: chosen.append(output[1].indices.shape[1]))
    for step in range(3):
        chosen.clear()
        losses = net(image, return_aux=True).aux.losses
        assert losses.keys() == {f"{part.path}.{name}" for part in mixtures for name in ("balance", "entropy")}
        assert chosen == [4 if step < 2 else 2] * 3
        for part in mixtures:
            part.moe.router.step()


class TestHardRegions:
    FLAT, TEXTURED = torch.full((1, 3, 32, 32), 0.5), torch.rand(1, 3, 32, 32, generator=torch.manual_seed(0))

    def test_an_easy_image_sends_no_window_to_experts_and_costs_less(self):
        net = perturbed(0.01, moe_window=4)
        kept = {}
        for name, image in (("flat", self.FLAT), ("textured", self.TEXTURED)):
            statistics = net(image, return_aux=True).aux.statistics
            shares = [value.item() for key, value in statistics.items() if key.endswith("kept_share")]
            kept[name] = (sum(shares), flops(net, image))
        assert kept["flat"][0] == 0
        assert kept["textured"][0] == 4
        assert kept["flat"][1] < kept["textured"][1]

    def test_half_an_image_costs_half_of_the_experts(self):
        net = perturbed(0.01, moe_window=4)
        half = torch.cat([self.FLAT[..., :16], self.TEXTURED[..., 16:]], dim=3)
        flat, mixed, textured = (flops(net, x) for x in (self.FLAT, half, self.TEXTURED))
        assert flat < mixed < textured
        assert (mixed - flat) / (textured - flat) == pytest.approx(0.5, abs=0.15)

    def test_without_the_gate_all_images_cost_the_same(self):
        net = perturbed(0.01, bypass=0.0, k=4)
        assert flops(net, self.FLAT) == flops(net, self.TEXTURED)

    def test_experts_without_a_window_have_gradients_of_zeros(self):
        net = perturbed(0.01, warm_up=0).train()
        output = net(self.FLAT, return_aux=True)
        (output.image.square().mean() + output.aux.total()).backward()
        experts = {name: p.grad for name, p in net.named_parameters() if ".moe.experts." in name}
        assert experts
        assert all(grad is not None and not grad.any() for grad in experts.values())


class TestNoise:
    def test_there_is_none_in_eval_without_a_seed_and_the_same_for_the_same(self):
        net, image = sure(perturbed(**NOISY)), normal((2, 3, 16, 16))
        plain = net(image)
        assert torch.equal(net(image), plain)
        seeded = net(image, noise_seed=3)
        assert torch.equal(net(image, noise_seed=3), seeded)
        assert not torch.allclose(seeded, plain, atol=1e-4)
        assert not torch.allclose(net(image, noise_seed=4), seeded, atol=1e-4)

    def test_there_is_none_where_the_prompt_tells_of_no_severe_blur(self):
        net, image = sure(perturbed(**{**NOISY, "severe_blur": 50.0})), normal((1, 3, 16, 16))
        assert torch.equal(net(image, noise_seed=3), net(image))
        assert torch.equal(net.train()(image), net(image))

    def test_it_is_as_strong_as_the_router_is_sure(self):
        net, image = sure(perturbed(**NOISY)), normal((1, 3, 16, 16))
        with torch.no_grad():
            for part in net.modules():
                if isinstance(part, TextureMixture):
                    part.moe.router.linear.weight.zero_()
        torch.testing.assert_close(net(image, noise_seed=3), net(image), rtol=0, atol=1e-5)

    def test_each_mixture_has_noise_of_its_own_at_its_place(self):
        net, fields = perturbed(**NOISY, decoder_moe=True), []
        for part in net.modules():
            if isinstance(part, NoiseInjection):
                part.register_forward_pre_hook(lambda module, inputs: fields.append(inputs[1]))
        net(normal((1, 3, 16, 16)), noise_seed=NoiseField(3, layer=2, offset=(8, 16)))
        assert sorted(field.layer for field in fields) == list(range(2, 8))
        assert {field.seed for field in fields} == {3}
        assert [field.offset for field in fields] == [(8 // s, 16 // s) for s in (1, 2, 4, 4, 2, 1)]

    def test_it_is_in_the_high_frequencies_alone_and_clamped(self):
        net, image = sure(perturbed(**NOISY, noise_clamp=0.5)), normal((1, 3, 16, 16))
        paths = {}
        for name, part in net.named_modules():
            if name.endswith(("separation.structure", "separation.texture", "texture.moe")):
                part.register_forward_hook(lambda m, i, output, name=name: paths.setdefault(name, []).append(output))
        net(image)
        net(image, noise_seed=3)
        first = "encoder.0.blocks.0.blocks.3.separation"
        assert torch.equal(*paths[f"{first}.structure"])
        added = paths[f"{first}.texture"][1] - paths[f"{first}.texture.moe"][1][0]
        assert 0 < added.abs().max() <= 0.5 + 1e-6


def test_without_whatever_sees_the_whole_image_tiles_are_exact():
    net = perturbed(0.05, **TILE_SAFE, prompt_channels=0, k=4).double()
    assert net.tile_safe
    assert not small_rsfmoe().tile_safe
    margin = net.receptive_radius + -net.receptive_radius % net.tile_multiple
    size, step = 2 * margin + 8, net.tile_multiple
    image = normal((1, 3, size + step, size + step), dtype=torch.float64)
    inside = slice(margin, margin + 8)
    with torch.no_grad():
        whole, tile = net(image)[..., step:, step:], net(image[..., step:, step:])
    torch.testing.assert_close(tile[..., inside, inside], whole[..., inside, inside], rtol=0, atol=1e-12)


class TestEarlyExit:
    def made(self, confidences, **fields):
        """A net that is as confident of each image of a batch as is said."""
        net = perturbed(**{"early_exit": True, "decoder_moe": fields.get("moe", True), **fields}).double()
        head = net.bottleneck.blocks[0].blocks[-1]
        assert isinstance(head, ExitConfidence)
        logits = torch.tensor(confidences, dtype=torch.float64).logit()[:, None]
        head.linear.register_forward_hook(lambda module, inputs, output: logits[: len(output)])
        return net

    def test_each_image_decides_for_itself(self):
        image = normal((3, 3, 12, 12), dtype=torch.float64)
        all_stay, all_leave = self.made([0.1] * 3)(image), self.made([0.99] * 3)(image)
        assert not torch.allclose(all_stay, all_leave, atol=1e-4)
        mixed = self.made([0.99, 0.1, 0.99])(image)
        expected = torch.stack([all_leave[0], all_stay[1], all_leave[2]])
        torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-12)

    def test_noise_and_prompts_stay_with_their_images(self):
        image, options = normal((3, 3, 12, 12), dtype=torch.float64), {"noise_seed": 3, "prompt": torch.eye(3, 4)}
        all_stay = sure(self.made([0.1] * 3, **NOISY, kernel_prior=True))(image, **options)
        mixed = sure(self.made([0.99, 0.1, 0.1], **NOISY, kernel_prior=True))(image, **options)
        torch.testing.assert_close(mixed[1:], all_stay[1:], rtol=0, atol=1e-12)

    def test_nobody_leaves_in_training_or_for_less_than_the_confidence_asked_for(self):
        image = normal((2, 3, 12, 12), dtype=torch.float64)
        all_stay = self.made([0.1] * 2)(image)
        assert torch.equal(self.made([0.85] * 2)(image), all_stay)
        assert not torch.allclose(self.made([0.85] * 2, exit_confidence=0.8)(image), all_stay, atol=1e-4)
        stay, leave = (self.made(confidences).train()(image) for confidences in ([0.1] * 2, [0.99] * 2))
        assert torch.equal(stay, leave)

    def test_who_leaves_costs_less(self):
        image = normal((2, 3, 12, 12), dtype=torch.float64)
        stay, one, leave = (flops(self.made(c), image) for c in ([0.1] * 2, [0.1, 0.99], [0.99] * 2))
        assert leave < one < stay

    def test_its_losses_are_there_in_training_and_teach_it(self):
        net, image = perturbed(early_exit=True), normal((2, 3, 12, 12))
        assert "exit.confidence" not in net(image, return_aux=True).aux.losses
        losses = net.train()(image, return_aux=True).aux.losses
        assert losses["exit.confidence"] > 0
        assert losses["exit.early"] > 1e-4  # without its blocks the decoder makes another image
        near, far = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
        for early, right in ((near, 5.0), (far, -5.0)):
            losses = [ExitConfidence.losses(torch.tensor([x]), early, near)["confidence"] for x in (right, -right)]
            assert losses[0] < losses[1]

    def test_traced_programs_choose_among_both(self):
        class Decoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.confidence, self.stage = ExitConfidence(4, least=0.9), Skippable([nn.Conv2d(4, 4, 3, padding=1)])
                nn.init.ones_(self.confidence.linear.weight)

            def forward(self, x):
                context = RSFMoEContext(1, Aux())
                return self.stage(self.confidence(x, context), context)

        net, x = Decoder().double().eval(), normal((2, 4, 8, 8), dtype=torch.float64)
        x = x + torch.tensor([3.0, -3.0])[:, None, None, None]
        y = net(x)
        assert torch.equal(y[0], x[0])
        assert not torch.allclose(y[1], x[1], atol=1e-2)
        torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fields", [{}, {"split": "haar", "kernel_form": "depthwise"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_float32(dtype, fields):
    """All four experts for every window: at near ties rounding decides on the choice."""
    more = {"k": 4, "bypass": 0.0, "noise": True, "severe_blur": 1.0, "kernel_prior": True, "kernel_size": 5}
    net, image = sure(perturbed(**more, **fields)), normal((2, 3, 12, 20)).clamp(0, 1)
    exact = net(image, noise_seed=3)
    assert (exact - image).abs().max() > 0.1
    restored = net.to(dtype)(image.to(dtype), noise_seed=3)
    assert restored.dtype == dtype
    torch.testing.assert_close(restored.float(), exact, rtol=0, atol=0.05 * exact.abs().max().item())


@pytest.mark.parametrize(
    "fields",
    [
        {"moe": False},
        {"moe": False, "split": "none"},
        {"split": "haar"},
        {"split": "blur"},
        {"global_mixer": "none"},
        {"global_mixer": "window"},
        {"deformable": True},
        {"decoder_moe": True},
        {"prompt_channels": 0},
        {"kernel_prior": True},
        {"k": 1},
        {"bypass": 0.0},
        {"hf_gain": 2.0},
        {"kernel_form": "depthwise", "kernel_size": 5},
        {"up": "dysample"},
        {"bottleneck": 3},
    ],
    ids=str,
)
def test_ablations_show_and_every_parameter_of_them_learns(fields):
    image = normal((1, 3, 12, 12))
    net = perturbed(**fields)
    assert not torch.allclose(net(image), perturbed()(image), atol=1e-4)
    output = net.train()(image, return_aux=True)
    (output.image.square().mean() + output.aux.total()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


def test_deployed_it_computes_the_same_whatever_it_chooses():
    net, image = perturbed(kernel_size=9).double(), normal((2, 3, 20, 12), dtype=torch.float64)
    deployed = reparameterize_model(net)
    assert sum(p.numel() for p in deployed.parameters()) < sum(p.numel() for p in net.parameters())
    torch.testing.assert_close(deployed(image), net(image), rtol=0, atol=1e-12)


class Alone(nn.Module):
    """A mixture outside of its net, told how busy the image is."""

    def __init__(self, mixture: TextureMixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, high, busy):
        return self.mixture(high, RSFMoEContext(1, Aux(), busyness=busy))


def test_a_traced_mixture_chooses_the_same():
    """Two of four experts for busy windows and none for easy ones, where every expert is computed for every window."""
    net = perturbed(depths=(1,), prompt_channels=0).double()
    mixture = net.encoder[0].blocks[0].blocks[-1].separation.texture
    high, image = normal((2, 4, 8, 16), dtype=torch.float64), normal((2, 3, 8, 16), dtype=torch.float64)
    image[..., :8] = 0.5
    route = mixture.moe(high, [busyness(image)])[1]
    assert 0.4 < route.kept_share() < 0.7
    assert route.indices.shape[1] == 2
    program = torch.export.export(Alone(mixture), (high, busyness(image)))
    traced = program.module()(high, busyness(image))
    torch.testing.assert_close(traced, Alone(mixture)(high, busyness(image)), rtol=0, atol=1e-12)
    assert not torch.allclose(traced[..., 10:], high[..., 10:], atol=1e-3)


def test_after_overfitting_all_experts_are_alive_and_structure_is_nearer():
    torch.manual_seed(0)
    clean = photograph(32)
    noisy = (clean + 25 / 255 * torch.randn(clean.shape)).clamp(0, 1)
    net = small_rsfmoe(embed_dim=8, head_dim=8, window_size=8, warm_up=0, depths=(1,))
    net = trained(net, itertools.repeat((noisy, clean)), 60, 2e-3)
    with torch.no_grad():
        output = net(noisy, return_aux=True)
    dead = {key: value for key, value in output.aux.statistics.items() if key.endswith("dead_experts")}
    assert len(dead) == 3
    assert all(value == 0 for value in dead.values())

    def error(x: torch.Tensor, size: int) -> float:
        return (nn.functional.avg_pool2d(x, size) - nn.functional.avg_pool2d(clean, size)).square().mean().item()

    assert error(output.image, 4) <= error(noisy, 4)
    assert error(output.image, 1) < error(noisy, 1) / 1.6  # 2 dB


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": ()}, r"depths must be integers of at least 1, one or more, got \(\)"),
        ({"bottleneck": 5}, "bottleneck must be 2 to 4, got 5"),
        ({"embed_dim": 6}, "embed_dim must be a multiple of 4 and of half of head_dim = 16, got 6"),
        ({"embed_dim": 20}, "embed_dim must be a multiple of 4 and of half of head_dim = 16, got 20"),
        ({"kernel_size": 4}, "kernel_size must be an odd integer of at least 1, got 4"),
        ({"k": 5}, "k must be at most the 4 experts, got 5"),
        ({"warm_up": -1}, "warm_up must be an integer of at least 0, got -1"),
        ({"hf_gain": 0.0}, "hf_gain must be above 0 and finite, got 0.0"),
        ({"split": "none"}, "moe needs a split"),
        ({"moe": False, "decoder_moe": True}, "decoder_moe needs moe"),
        ({"noise": True, "prompt_channels": 0}, "noise needs moe and prompt_channels"),
        ({"blur_kernel": 5}, "blur_kernel needs kernel_prior"),
        ({"deformable": True, "depths": (1,)}, "deformable needs depths of two stages or more"),
        ({"global_mixer": "mamba"}, "global_mixer must be one of ssm, window, none, got 'mamba'"),
    ],
)
def test_bad_fields_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        RSFMoEConfig(**fields)
