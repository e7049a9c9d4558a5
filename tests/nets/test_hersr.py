"""HERSR: its figure, where attention and noise are, what the experts do, what its fields change, and what it learns."""

import pytest
import torch
from skimage import data
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from claritycore.blocks import (
    FreqBands,
    ModulatedConv2d,
    NoiseField,
    NoiseInjection,
    TopKRouter,
    WindowAttention2d,
)
from claritycore.blocks.window_attention import Projections
from claritycore.deploy import flop_formulas, restore_tiled
from claritycore.kernels import blur_split
from claritycore.nets import HERSR, AutoConfig, AutoModel, Aux, HERSRConfig
from claritycore.nets.dual_path import AtHalfSize, DualPath, SplitEntry
from claritycore.nets.hersr_stages import HERSRContext, TextureStage
from tests.small_nets import LOCAL_HERSR, small_hersr
from tests.strategies import normal

LOCAL = {**LOCAL_HERSR, "kernel_size": 3, "window_size": 2}


def made(**fields) -> HERSR:
    """A net none of whose layers is zero, and whose texture has noise of a strength that shows."""
    torch.manual_seed(0)
    net = small_hersr(**fields).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if net.config.texture:
            texture_of(net).conv.noise.weight.fill_(0.5)
    return net


def texture_of(net: HERSR) -> TextureStage:
    return (
        net.refinement.blocks[0].blocks[0] if hasattr(net.refinement.blocks[0], "blocks") else net.refinement.blocks[0]
    )


def bottleneck_of(net: HERSR):
    return net.bottleneck.blocks[0]


def entry_of(net: HERSR) -> SplitEntry:
    return net.encoder[0].blocks[0].blocks[0]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("hersr-tiny", 501_197), ("hersr-small", 2_701_663), ("hersr-base", 20_408_675)],
)
def test_sizes(name, parameters):
    with torch.device("meta"):
        net = AutoModel.from_config(AutoConfig.from_name(name))
        assert tuple(net(torch.empty(1, 3, 50, 70)).shape) == (1, 3, 50, 70)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert AutoConfig.from_name("hersr") == AutoConfig.from_name("hersr-base")


class TestTheFigure:
    def test_a_block_adds_both_paths_by_one_convolution(self):
        local, context = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 5, padding=2)
        block = DualPath(4, local=local, context=context).double()
        x, high, low = (normal((2, 4, 5, 7), dtype=torch.float64, seed=seed) for seed in range(3))

        def added(a, b):
            both = torch.cat([local(a), context(b)], 1)
            return (
                x + torch.einsum("oi,bihw->bohw", block.fuse.weight[..., 0, 0], both) + block.fuse.bias[:, None, None]
            )

        torch.testing.assert_close(block(x, high, low), added(high, low), rtol=0, atol=1e-12)
        torch.testing.assert_close(block(x), added(x, x), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("split", ["avgpool", "haar"])
    def test_high_frequencies_go_down_the_local_path_and_low_ones_down_the_context_path(self, split):
        entry = entry_of(made(split=split)).double()
        first = normal((2, 4, 8, 6), dtype=torch.float64)
        pooled = F.avg_pool2d(first, 2)
        mode = {"avgpool": {"mode": "bilinear"}, "haar": {"mode": "nearest"}}[split]
        low = F.interpolate(pooled, scale_factor=2, **mode)
        torch.testing.assert_close(entry(first), entry.block(first, first - low, low), rtol=0, atol=1e-12)

    def test_the_map_and_both_of_its_bands_matter(self):
        net, image, given = made(), normal((1, 3, 8, 8)), []

        def apart(block, inputs):
            given.extend(x.detach().requires_grad_() for x in inputs)
            return tuple(given)

        hook = entry_of(net).block.register_forward_pre_hook(apart)
        restored = net(image)
        assert len(given) == 3
        for gradient in torch.autograd.grad(restored.square().sum(), given):
            assert (gradient != 0).any((0, 2, 3)).all()
        hook.remove()
        split, wrongs = entry_of(net).split, (lambda low, high: (low, 0 * high), lambda low, high: (0 * low, high))
        for wrong in wrongs:
            hook = split.register_forward_hook(lambda _, __, bands, wrong=wrong: FreqBands(*wrong(*bands[:2])))
            assert not torch.allclose(net(image), restored, atol=1e-4)
            hook.remove()

    def test_nothing_attends_at_the_size_of_the_image(self):
        net = made(widths=(4, 8, 8), depths=(2, 1), overlap_ratio=0.5, scale=2)
        seen = {}
        for name, module in net.named_modules():
            if isinstance(module, Projections):
                module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].shape[2:]}))
        net(normal((1, 3, 16, 24)))
        # Two attentions a block, three blocks and their mirror images, and an expert's.
        assert len(seen) == 2 * 2 * 3 + 1
        assert {tuple(size) for size in seen.values()} == {(8, 12), (4, 6)}

    @pytest.mark.parametrize("fields", [{}, LOCAL], ids=str)
    def test_it_begins_with_two_convolutions_and_ends_with_one_of_a_style(self, fields):
        net, image, seen = made(**fields), normal((2, 3, 8, 6)), []
        first, _, second = net.stem
        torch.testing.assert_close(net.stem(image), second(F.gelu(first(image))))
        texture_of(net).conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        net(image)
        x, style, _ = seen[0]
        torch.testing.assert_close(style, torch.ones(2, 4) if fields else x.mean((2, 3)))

    def test_windows_are_shifted_in_every_other_block(self):
        net = small_hersr(depths=(3,))
        shifts = [
            [module.shift[0] for module in stage.modules() if isinstance(module, WindowAttention2d)]
            for stage in (net.encoder[0], net.decoder[0])
        ]
        assert shifts == [[0, 2, 0], [2, 0, 2]]

    def test_half_the_size_is_what_is_between(self):
        seen = nn.Identity()
        half, sizes = AtHalfSize(4, seen), []
        seen.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
        assert tuple(half(normal((1, 4, 5, 8))).shape) == (1, 4, 5, 8)
        assert sizes == [(3, 4)]

    def test_half_the_size_sees_as_far_as_it_says(self):
        half = AtHalfSize(4, nn.Conv2d(4, 4, 3, padding=1)).double()
        x, reach = normal((1, 4, 32, 32), dtype=torch.float64).requires_grad_(), 0
        for pixel in (15, 16):
            (gradient,) = torch.autograd.grad(half(x)[..., pixel, pixel].square().sum(), x)
            touched = gradient.abs().sum((0, 1)).nonzero()
            reach = max(reach, pixel - touched.min().item(), touched.max().item() - pixel)
        assert reach == half.receptive_radius - 1 == 5  # of a stride, what is stated is a bound


class TestNoise:
    def test_it_is_off_in_eval_unless_seeded_and_equal_for_equal_seeds(self):
        net, image = made(), normal((2, 3, 9, 7))
        state = torch.get_rng_state()
        plain, seeded = net(image), net(image, noise_seed=3)
        assert torch.equal(net(image), plain)
        assert torch.equal(net(image, noise_seed=3), seeded)
        assert torch.equal(net(image, noise_seed=NoiseField(3)), seeded)
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.allclose(seeded, plain, atol=1e-3)
        assert not torch.allclose(net(image, noise_seed=4), seeded, atol=1e-3)
        texture_of(net).conv.noise.weight.data.zero_()
        assert torch.equal(net(image, noise_seed=3), net(image))

    def test_training_draws_it(self):
        net, image = made().train(), normal((1, 3, 9, 7))
        assert not torch.allclose(net(image), net(image), atol=1e-3)
        assert torch.equal(net(image, noise_seed=3), net(image, noise_seed=3))

    def test_it_is_nowhere_but_in_the_last_stage(self):
        net, image = made(widths=(4, 8, 8), depths=(1, 1)), normal((1, 3, 8, 8))
        kinds = (NoiseInjection, ModulatedConv2d)
        names = [name for name, module in net.named_modules() if isinstance(module, kinds)]
        assert len(names) == 2
        assert all(name.startswith("refinement.") for name in names)
        without, with_noise = (net.maps(image, HERSRContext(1, Aux(), noise=noise)) for noise in (None, NoiseField(3)))
        same = [torch.equal(a, b) for a, b in zip(without, with_noise, strict=True)]
        assert same == [False, True, True]

    def test_a_tile_has_that_of_the_whole(self):
        net = made(**LOCAL).double()
        margin = net.receptive_radius + -net.receptive_radius % net.tile_multiple
        image = normal((1, 3, 2 * margin + 8, 2 * margin + 12), dtype=torch.float64)
        with torch.no_grad():
            whole = net(image, noise_seed=5)
            tile = net(image[..., 4:, 8:], noise_seed=NoiseField(5, offset=(4, 8)))
            elsewhere = net(image[..., 4:, 8:], noise_seed=5)
        inside = slice(margin, None)
        whole, tile, elsewhere = (
            whole[..., 4:, 8:][..., inside, inside],
            tile[..., inside, inside],
            elsewhere[..., inside, inside],
        )
        torch.testing.assert_close(tile, whole, rtol=0, atol=1e-12)
        assert not torch.allclose(elsewhere, whole, atol=1e-3)

    def test_a_net_without_texture_takes_no_seed(self):
        with pytest.raises(ValueError, match="noise_seed must be None for a net without noise"):
            small_hersr(texture=False)(normal((1, 3, 4, 4)), noise_seed=1)


class TestExperts:
    def test_soft_routing_is_the_sum_of_all_experts_by_their_gates(self):
        net = made(experts=("conv", "frequency", "attention", "conv")).double()
        moe, x = bottleneck_of(net).moe, normal((3, 8, 5, 6), dtype=torch.float64)
        features = torch.cat([x.mean((2, 3)), (x.square().mean((2, 3)) + 1e-5).sqrt()], 1)
        power = features.square().mean(1, keepdim=True) + 1e-5
        logits = torch.cat([features / power.sqrt(), power.log() / 2], 1) @ moe.router.linear.weight.mT
        gates = logits.exp() / logits.exp().sum(1, keepdim=True)
        expected = x + sum(gates[:, i, None, None, None] * expert(x) for i, expert in enumerate(moe.experts))
        torch.testing.assert_close(moe(x)[0], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(bottleneck_of(net)(x, HERSRContext(1, Aux())), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("level", ["image", "window"])
    def test_experts_that_are_not_chosen_compute_nothing(self, level):
        image, counted, called = normal((1, 3, 8, 8)), [], []
        for k in (1, 2, None):
            net = made(k=k, level=level, window_size=4)
            for expert in bottleneck_of(net).moe.experts:
                method = expert if level == "image" else getattr(expert, "attn", expert)
                method.register_forward_hook(lambda module, *_: called.append(module))
            with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
                net(image)
            counted.append((counter.get_total_flops(), len(called)))
            called.clear()
        flops, calls = zip(*counted, strict=True)
        assert flops[0] < flops[1] < flops[2]
        if level == "image":
            assert calls == (1, 2, 3)

    def test_an_easy_image_sends_no_window_to_experts_and_costs_less(self):
        net = made(level="window", window_size=2, bypass=0.5)
        flat, textured = (
            torch.full((1, 3, 16, 16), 0.5),
            torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        )
        kept, cost = [], []
        for image in (flat, torch.cat([flat[..., :8], textured[..., 8:]], 3), textured):
            kept.append(net(image, return_aux=True).aux.statistics["bottleneck.blocks.0.kept_share"].item())
            with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
                net(image)
            cost.append(counter.get_total_flops())
        assert kept == [0, 0.5, 1]
        assert cost[1] - cost[0] == pytest.approx(0.5 * (cost[2] - cost[0]), rel=0.01)
        output = net.train()(flat, return_aux=True)
        (output.image.square().mean() + output.aux.total()).backward()
        assert all(p.grad is not None and not p.grad.any() for p in bottleneck_of(net).moe.experts.parameters())

    def test_a_poisoned_expert_that_is_not_chosen_changes_nothing(self):
        net, image = made(k=1), normal((1, 3, 8, 8))
        restored, moe = net(image), bottleneck_of(net).moe
        routes = []
        moe.router.register_forward_hook(lambda *found: routes.append(found[2]))
        net(image)
        for number, expert in enumerate(moe.experts):
            if number != routes[0].indices.item():
                for parameter in expert.parameters():
                    parameter.data.fill_(torch.nan)
        assert torch.equal(net(image), restored)

    def test_aux_has_the_losses_and_the_statistics_of_the_router(self):
        for fields, loss in ({}, "importance"), ({"k": 1}, "balance"):
            aux = made(**fields).train()(normal((2, 3, 8, 8)), return_aux=True).aux
            assert list(aux.losses) == [f"bottleneck.blocks.0.{loss}"]
            assert "bottleneck.blocks.0.load" in aux.statistics
        assert made(experts=()).train()(normal((2, 3, 8, 8)), return_aux=True).aux.total() == 0


class TestPrompt:
    def probabilities(self, net, image, prompt=None):
        found = []
        router = next(module for module in net.modules() if isinstance(module, TopKRouter))
        hook = router.register_forward_hook(lambda *passed: found.append(passed[2].probabilities))
        net(image, prompt=prompt)
        hook.remove()
        return found[0]

    def test_it_changes_the_routing_and_the_image(self):
        net, image = made(prompt="given", prompt_dim=5), normal((1, 3, 8, 8))
        nn.init.normal_(bottleneck_of(net).moe.router.linear.weight)
        prompts = normal((1, 5)), normal((1, 5), seed=1)
        first, second = (self.probabilities(net, image, prompt) for prompt in prompts)
        assert (first - second).abs().max() > 0.01
        assert not torch.allclose(net(image, prompt=prompts[0]), net(image, prompt=prompts[1]), atol=1e-4)
        assert torch.equal(net(image), net(image, prompt=torch.zeros(1, 5)))
        bottleneck, seen = bottleneck_of(net), []
        bottleneck.moe.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        x = normal((1, 8, 4, 4))
        bottleneck(x, HERSRContext(1, Aux(), prompts[0]))
        torch.testing.assert_close(seen[0], bottleneck.film(x, prompts[0]))

    def test_a_map_of_uncertainty_may_take_its_place(self):
        net, image = made(prompt="given", prompt_dim=1).double(), normal((2, 3, 7, 9), dtype=torch.float64)
        flat = torch.full((2, 1, 7, 9), 0.7, dtype=torch.float64)
        by_map, by_vector = net(image, prompt=flat), net(image, prompt=flat[..., 0, 0])
        torch.testing.assert_close(by_map, by_vector, rtol=0, atol=1e-12)
        corner = flat.clone()
        corner[..., :4, :4] = -3
        seen = []
        bottleneck_of(net).film.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1][:, 0]))
        assert not torch.allclose(net(image, prompt=corner), by_map, atol=1e-4)
        expected = torch.full((2, 4, 5), 0.7, dtype=torch.float64)
        expected[:, :2, :2] = -3
        torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-12)

    def test_a_generated_one_follows_the_image_and_learns(self):
        net = made(prompt="generated").train()
        first, second = (self.probabilities(net, normal((1, 3, 8, 8), seed=seed)) for seed in range(2))
        assert not torch.equal(first, second)
        output = net(normal((2, 3, 8, 8)), return_aux=True)
        (output.image.square().mean() + output.aux.total()).backward()
        assert bottleneck_of(net).prompt.prompt_param.grad.any()

    def test_a_program_takes_it_too(self):
        net, image, prompt = made(prompt="given", prompt_dim=2), normal((1, 3, 8, 12)), normal((1, 2, 8, 12))
        program = torch.export.export(net, (image,), {"prompt": prompt, "noise_seed": 3})
        expected = net(image, prompt=prompt, noise_seed=3)
        found = program.module()(image, prompt=prompt, noise_seed=3)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    def test_one_that_does_not_fit_raises(self):
        image = normal((2, 3, 8, 8))
        with pytest.raises(ValueError, match="prompt must be None for a net whose config has not prompt='given'"):
            small_hersr(prompt="generated")(image, prompt=torch.zeros(2, 16))
        net = small_hersr(prompt="given", prompt_dim=4)
        for shape in ((2, 3), (1, 4), (2, 4, 4, 4)):
            with pytest.raises(ValueError, match=r"prompt must be \(2, 4\), or such a map of the image's size, got"):
                net(image, prompt=torch.zeros(shape))


@pytest.mark.parametrize(
    "fields",
    [
        {"split": "none"},
        {"split": "haar"},
        {"texture": False},
        {"experts": ()},
        {"experts": ("conv",)},
        {"level": "window"},
        {"frequency": "dct"},
        {"statistics": "local"},
        {"overlap_ratio": 0.5},
        {"form": "dense"},
        {"skip": "none"},
        {"up": "dysample"},
    ],
    ids=str,
)
def test_what_ablations_change_shows(fields):
    image = normal((1, 3, 12, 12))
    assert not torch.allclose(made(**fields)(image), made()(image), atol=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.003), (torch.bfloat16, 0.025)], ids=str)
@pytest.mark.parametrize("fields", [{"prompt": "generated", "overlap_ratio": 0.5}, LOCAL], ids=str)
def test_half_precision_makes_the_same_corrections(fields, dtype, tolerance):
    net, image = made(**fields), torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        exact = net(image.float(), noise_seed=3) - image.float()
        restored = net.to(dtype)(image, noise_seed=3)
    assert restored.dtype == dtype
    assert exact.abs().max() > 0.5
    assert (restored.float() - image.float() - exact).norm() <= tolerance * exact.norm()


def test_tiles_are_the_whole_with_local_statistics_alone():
    net = made(**LOCAL).double()
    image = normal((1, 3, 90, 71), dtype=torch.float64)
    assert net.tile_safe
    with torch.no_grad():
        torch.testing.assert_close(restore_tiled(net, image, 40), net(image), rtol=0, atol=1e-12)
    for fields in ({"statistics": "map"}, {"level": "image", "bypass": 0.0}, {"up": "dysample"}):
        assert not small_hersr(**{**LOCAL, **fields}).tile_safe


def learned(steps: int, side: int, lr: float, **fields):
    """Train a net on one noisy crop of a photograph: PSNR and that of low frequencies, before and after; statistics."""

    def measured(image):
        pairs = (image, clean), (blur_split(image, 3.0)[0], blur_split(clean, 3.0)[0])
        return [-10 * F.mse_loss(a, b).log10().item() for a, b in pairs]

    torch.manual_seed(0)
    clean = torch.from_numpy(data.astronaut()[60 : 60 + side, 180 : 180 + side]).movedim(-1, 0)[None] / 255
    noisy = clean + 25 / 255 * torch.randn(clean.shape)
    net = small_hersr(**{"widths": (16, 32), "head_dim": 8, "norm_groups": 4, "window_size": 8, **fields})
    optimizer = torch.optim.Adam(net.train().parameters(), lr=lr)
    # At the end the rate falls, so that what is measured is no swing of the last step.
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 5 * (1 - step / steps)))
    for _ in range(steps):
        optimizer.zero_grad()
        output = net(noisy, return_aux=True)
        (F.l1_loss(output.image, clean) + output.aux.total()).backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        output = net.eval()(noisy, return_aux=True)
    return measured(noisy), measured(output.image), output.aux.statistics


@pytest.mark.parametrize(
    ("run", "least", "fields"),
    [
        pytest.param({"steps": 80, "side": 32, "lr": 4e-3}, 22.0, {}, id="short"),
        pytest.param(
            {"steps": 300, "side": 64, "lr": 2e-3},
            32.0,
            {"k": 1, "level": "window"},
            id="windows",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_it_learns_without_drift_of_low_frequencies_and_with_all_experts(run, least, fields):
    (start, low_start), (end, low_end), statistics = learned(**run, **fields)
    assert start == pytest.approx(20.2, abs=0.3)
    assert end >= least
    assert low_end >= low_start
    assert statistics["bottleneck.blocks.0.dead_experts"] == 0
    assert statistics["bottleneck.blocks.0.entropy"] > 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"widths": (32, 64)}, r"widths must be one more than depths, got \(32, 64\) and \(1, 1, 2, 2\)"),
        ({"widths": (8,), "depths": ()}, r"widths must be one more than depths, got \(8,\) and \(\)"),
        ({"widths": (8, 16), "depths": (1,)}, r"must be multiples of 4, head_dim and norm_groups, 16, got \(8, 16\)"),
        ({"depths": (1, 1, 0, 1)}, r"depths\[2\] must be an integer of at least 1, got 0"),
        ({"widths": (0, 16), "depths": (1,)}, r"widths\[0\] must be an integer of at least 1, got 0"),
        ({"window_size": 0}, "window_size must be an integer of at least 1, got 0"),
        ({"kernel_size": 4}, "kernel_size must be an odd integer of at least 1, got 4"),
        ({"experts": ("conv", "fourier")}, "experts must be one of conv, attention, frequency, got 'fourier'"),
        ({"k": 4}, "k must be None or an integer from 1 to the 3 experts, got 4"),
        ({"k": 1, "experts": ()}, "k must be None or an integer from 1 to the 0 experts, got 1"),
        ({"bypass": 0.5}, "bypass must be at least 0 and below 1, and 0 but for experts of windows, got 0.5"),
        ({"bypass": 1.0, "level": "window"}, "bypass must be at least 0 and below 1, and 0 but for experts of windows"),
        ({"prompt": "given", "experts": ()}, "prompt must be 'none' where there are no experts, got 'given'"),
        ({"overlap_ratio": -0.5}, "overlap_ratio must be at least 0 and finite, got -0.5"),
        ({"overlap_ratio": 0.2}, "overlap_ratio must enlarge 8 by an even number, got 0.2"),
        ({"balance": float("nan")}, "balance must be at least 0 and finite, got nan"),
        ({"mlp_ratio": 0.01}, "mlp_ratio must be at least 0.0312 and finite, got 0.01"),
        ({"split": "fft"}, "split must be one of avgpool, haar, none, got 'fft'"),
        ({"statistics": "batch"}, "statistics must be one of map, local, got 'batch'"),
        ({"level": "token"}, "level must be one of image, window, got 'token'"),
    ],
)
def test_bad_sizes_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        HERSRConfig(**fields)
