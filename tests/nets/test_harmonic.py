"""HARMONIC: structure and texture apart until they are fused, bounded texture, noise by place, and a fast path."""

import itertools

import pytest
import torch
from skimage import data
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from claritycore.blocks import (
    BicubicUp,
    ConvGate,
    FreqBands,
    FreqSplit2d,
    HighPass,
    HybridAttention,
    ModulatedNoiseConv2d,
    MoE2d,
    OverlappingCrossAttention,
    SSMGlobalMixer,
    TextureHead,
    WindowAttention2d,
    reparameterize_model,
)
from claritycore.deploy import restore_tiled, summarize
from claritycore.images import psnr
from claritycore.nets import HARMONIC, AutoConfig, AutoModel, Aux, HARMONICConfig
from claritycore.nets.busyness import busyness
from claritycore.nets.harmonic_branches import BandFusion, HARMONICContext
from claritycore.training import supervise
from claritycore.training.pyramid import low_pass
from claritycore.training.supervision import structure_target
from tests.small_nets import made, small_harmonic
from tests.strategies import normal

PHOTOGRAPH = torch.from_numpy(data.astronaut()[60:124, 180:244]).movedim(-1, 0)[None] / 255


def parts(net: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, kind)]


# Sizes


@pytest.mark.parametrize(
    ("name", "parameters", "fast"),
    [
        ("harmonic-tiny", 464_989, 282_909),
        ("harmonic-small", 1_857_910, 1_056_302),
        ("harmonic-base", 22_580_403, 11_373_086),
    ],
)
def test_sizes(name, parameters, fast):
    config = AutoConfig.from_name(name)
    assert config.head_dim <= 32
    assert 8 <= config.window_size <= 16
    with torch.device("meta"):
        net, quick = AutoModel.from_config(config), AutoModel.from_config(AutoConfig.from_name(name, fast_path=True))
        assert tuple(net(torch.empty(1, 3, 50, 70)).shape) == (1, 3, 50, 70)
    assert isinstance(net, HARMONIC)
    assert [sum(p.numel() for p in each.parameters()) for each in (net, quick)] == [parameters, fast]
    assert AutoConfig.from_name("harmonic") == AutoConfig.from_name("harmonic-base")
    macs = [summarize(each, (1, 3, 64, 64)).macs for each in (net, reparameterize_model(quick.eval()))]
    assert macs[1] < 0.75 * macs[0]


# What it is made of


def test_stages_have_whole_shifted_and_overlapping_windows():
    net = small_harmonic(depths=(2, 2), window_size=8)
    for stage in (net.encoder[0].blocks[0], net.decoder[0].blocks[0].blocks[1]):
        windows = parts(stage, WindowAttention2d)
        assert [window.shift for window in windows] == [(0, 0), (4, 4)]
        (overlapping,) = parts(stage, OverlappingCrossAttention)
        assert overlapping.key_window_size == (12, 12)
    assert [block.form for block in parts(net.bottleneck, HybridAttention)] == ["dilated", "window"]
    assert len(parts(net.bottleneck, SSMGlobalMixer)) == 2
    assert not parts(small_harmonic(overlap_ratio=0.0), OverlappingCrossAttention)


def test_where_the_gated_convolution_of_a_stage_stands():
    def kinds(**fields):
        attention = small_harmonic(**fields).encoder[0].blocks[0].blocks[-1].attn
        return [type(part) for part in attention] if isinstance(attention, nn.Sequential) else [type(attention)]

    assert kinds(conv_gate="pre") == [ConvGate, OverlappingCrossAttention]
    assert kinds(conv_gate="post") == [OverlappingCrossAttention, ConvGate]
    assert kinds(conv_gate="none") == [OverlappingCrossAttention]


OPTIONS = [
    {"mixer": "deformable", "long_range": "grid"},
    {"split": "laplacian", "edges": "learned", "low_ssm": True},
    {"moe_level": "window", "texture_head": True, "scale": 2},
    {"texture_head": True, "fast_path": True, "global_size": 0},
    {"depths": (1, 1, 1), "scale": 2, "scales": (2, 3)},
]
CHAIN = [{"branches": "none"}, {"moe": False, "noise": False}, {"noise": False}, {}, {"texture_head": True}]
ABLATIONS = [{"branches": "low"}, {"moe": False}, {"noise": False}]


@pytest.mark.parametrize("fields", [*OPTIONS, *CHAIN, *ABLATIONS], ids=str)
def test_every_option_starts_as_the_image_and_every_parameter_learns(fields):
    image = normal((2, 3, 9, 6))
    assert torch.equal(small_harmonic(**fields).eval()(image), BicubicUp(fields.get("scale", 1))(image))
    net = made(small_harmonic, **fields).train()
    output = net(image, return_aux=True)
    (output.image.square().mean() + output.aux.total()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        # A window goes to two of four experts: the others' gradients may be zero.
        assert parameter.grad.any() or ".experts." in name or ".heads.x3." in name, name


def test_each_step_of_the_chain_adds_what_it_is_named_for():
    nets = [small_harmonic(**fields) for fields in CHAIN]
    for kind, counts in {
        BandFusion: [0, 1, 1, 1, 1],
        MoE2d: [0, 0, 1, 1, 1],
        ModulatedNoiseConv2d: [0, 0, 0, 1, 2],
        TextureHead: [0, 0, 0, 0, 1],
    }.items():
        assert [len(parts(net, kind)) for net in nets] == counts, kind.__name__
    sizes = [sum(p.numel() for p in net.parameters()) for net in nets]
    assert sizes[0] < sizes[1]
    assert sizes[2] < sizes[3] < sizes[4]
    without = small_harmonic(branches="low")
    assert without.high_branch is None
    assert without.residual is None
    assert len(parts(without, BandFusion)) == 1


def test_each_decoder_stage_fuses_at_its_scale():
    net = made(small_harmonic, depths=(1, 1, 1))
    fusions, fused = parts(net, BandFusion), []
    assert [part.level for part in fusions] == [0, 1]
    for part in fusions:
        part.fuse.register_forward_pre_hook(lambda _, inputs: fused.insert(0, inputs[1]))
    context = HARMONICContext(1, Aux())
    net.maps(normal((1, 3, 8, 12)), context)
    for maps in (context.low, context.high):
        assert [tuple(x.shape) for x in maps] == [(1, 4, 8, 12), (1, 8, 4, 6)]
    assert tuple(context.coarse.shape) == (1, 3, 4, 6)
    for bands, low, high in zip(fused, context.low, context.high, strict=True):
        assert bands.low is low
        assert bands.high is high


@pytest.mark.parametrize("fast_path", [False, True])
def test_texture_is_made_of_the_high_frequencies_and_their_edges(fast_path):
    net, high, seen = made(small_harmonic, fast_path=fast_path), normal((2, 3, 8, 12)), {}
    block = net.high_branch.texture.blocks[0]
    for name, part in {"embed": net.high_branch.embed, "noise": block.noise, "experts": block.experts}.items():
        part.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs}))
    net.high_branch(high, HARMONICContext(1, Aux()))
    edges = HighPass(3, kind="sobel")(high)
    assert torch.equal(seen["embed"][0], torch.cat([high, edges], 1))
    means = torch.ones(2, 1) if fast_path else edges.abs().mean((2, 3))
    torch.testing.assert_close(seen["noise"][1], means)
    if not fast_path:
        assert torch.equal(seen["experts"][1][0], busyness(high))
        assert torch.equal(seen["experts"][1][1], edges)


def test_a_scan_may_follow_the_coarsest_large_kernels_and_texture_is_added_to_the_image_last():
    net, seen = made(small_harmonic, depths=(1, 1, 1, 1), low_ssm=True, texture_head=True), {}
    assert [len(parts(stage, SSMGlobalMixer)) for stage in net.low_branch.stages] == [0, 1]
    net.high_branch.register_forward_hook(lambda _, inputs, output: seen.update(high=output[0]))
    net.texture_head.register_forward_hook(lambda _, inputs, output: seen.update(features=inputs[0], image=output))
    restored = net(normal((1, 3, 9, 6)))
    assert torch.equal(seen["features"], seen["high"][..., :9, :6])
    assert torch.equal(seen["image"], restored)


# Structure and texture


@pytest.mark.parametrize("fast_path", [False, True])
def test_before_they_are_fused_neither_branch_learns_of_the_other(fast_path):
    net, seen = made(small_harmonic, depths=(1, 1, 1), low_ssm=True, fast_path=fast_path).train(), {}
    low, high = (normal((1, 3, 8, 12), seed=seed).requires_grad_() for seed in (1, 2))
    net.split.register_forward_hook(lambda *_: FreqBands(low, high))

    def keep(name):
        def hook(module, inputs, output):
            found = output if isinstance(output, tuple) else (output,)
            seen[name] = [
                x for x in itertools.chain(*map(torch.utils._pytree.tree_leaves, found)) if torch.is_tensor(x)
            ]

        return hook

    for name, module in net.named_modules():
        if name.startswith(("low_branch", "high_branch", "decoder.0.blocks.0.blocks.0")):
            module.register_forward_hook(keep(name))
    net(normal((1, 3, 8, 12)))

    def depends(x, on):
        return torch.autograd.grad(x.sum(), on, retain_graph=True, allow_unused=True)[0] is not None

    known = {"low_branch": (low, high), "high_branch": (high, low)}
    counts = dict.fromkeys(known, 0)
    for name, tensors in seen.items():
        branch = name.partition(".")[0]
        if branch in known:
            own, other = known[branch]
            floating = [x for x in tensors if x.requires_grad]
            counts[branch] += sum(depends(x, own) for x in floating)
            assert not any(depends(x, other) for x in floating), name
    assert min(counts.values()) > 10
    (fused,) = seen["decoder.0.blocks.0.blocks.0"]
    assert depends(fused, low)
    assert depends(fused, high)


@pytest.mark.parametrize(("split", "stated"), [("blur", 0.53), ("laplacian", 0.53)])
def test_texture_at_its_clamp_leaves_low_frequencies_within_the_stated_bound(split, stated):
    net = made(small_harmonic, split=split, max_gain=2.0, high_limit=0.25).double()
    side = 16
    points = torch.eye(side**2, dtype=torch.float64).view(1, side**2, side, side)
    low = FreqSplit2d(side**2, kind=split)(points).low[0].flatten(1).T
    largest = (low @ (torch.eye(side**2, dtype=torch.float64) - low)).abs().sum(1).max().item()
    assert largest <= stated
    image = torch.rand(1, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(net.head.conv.weight, std=3)  # corrections far beyond the limit
    changes = []
    with torch.no_grad():
        for weight in (0.0, 1e6):
            net.residual.fuse.high_weight.fill_(weight)
            changes.append(net(image))
    difference = changes[1] - changes[0]
    change = net.residual.split(difference).low.abs().max().item()
    assert 0.05 < change <= largest * 2.0 * 0.25
    assert difference.abs().max() <= 2 * 2.0 * 0.25
    assert difference.abs().max() > 0.5


@pytest.mark.parametrize("size", [(8, 12), (5, 7), (1, 1)])
def test_structure_is_the_image_made_smaller_and_what_the_low_branch_adds(size):
    image = normal((2, 3, *size))
    fresh = small_harmonic(scale=2).eval()
    half = [(side + 1) // 2 for side in size]
    assert tuple(fresh.structure(image).shape) == (2, 3, *half)
    if size == (8, 12):
        torch.testing.assert_close(fresh.structure(image), F.avg_pool2d(image, 2))
    net = made(small_harmonic, scale=2)
    told = net(image, return_aux=True).aux.structure
    assert torch.equal(told, net.structure(image))
    assert not torch.allclose(told, fresh.structure(image), atol=1e-3)
    with pytest.raises(RuntimeError, match="structure needs a net with branches, got branches='none'"):
        small_harmonic(branches="none").structure(image)
    with pytest.raises(ValueError, match="HARMONIC takes images"):
        net.structure(image[:, :2])


# The fast path


class Operations(TorchDispatchMode):
    """Writes down what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


FORBIDDEN = ("attention", "softmax", "scan", "bmm", "expert", "route", "baddbmm", "einsum")


def test_the_fast_path_has_no_attention_no_scan_and_no_router():
    def found(net):
        with Operations() as operations, torch.no_grad():
            net(normal((1, 3, 9, 12)), noise_seed=1)
        names = {type(module).__name__.lower() for module in net.modules()} | operations.names
        return {word for word in FORBIDDEN if any(word in name for name in names)}

    everything = {"low_ssm": True, "depths": (1, 2, 1), "refinement": 1}
    assert found(made(small_harmonic, **everything)) >= {"attention", "softmax", "scan", "expert", "route"}
    assert found(made(small_harmonic, fast_path=True, moe=False, **everything)) - {"expert"} == set()
    # An expert in the place of the mixture is two convolutions.
    for module in made(small_harmonic, fast_path=True, **everything).modules():
        assert not isinstance(module, MoE2d | nn.MultiheadAttention)


@pytest.mark.parametrize(("scale", "split"), [(1, "blur"), (2, "laplacian")])
def test_tiles_of_the_fast_path_are_the_whole(scale, split):
    net = made(small_harmonic, fast_path=True, scale=scale, split=split, kernel_size=3).double()
    image = normal((1, 3, 93, 88), dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(restore_tiled(net, image, 24), net.eval()(image), rtol=0, atol=1e-12)


def test_only_the_fast_path_promises_exact_tiles():
    assert small_harmonic(fast_path=True).tile_safe
    assert not small_harmonic(fast_path=True, texture_head=True).tile_safe
    assert not small_harmonic().tile_safe


# What it learns


@pytest.mark.parametrize("fast_path", [False, True])
def test_both_branches_learn_as_soon_as_the_head_does(fast_path):
    torch.manual_seed(0)
    net = small_harmonic(fast_path=fast_path)
    nn.init.normal_(net.head.conv.weight)
    net(normal((1, 3, 8, 12))).square().mean().backward()
    for branch in (net.low_branch, net.high_branch):
        assert branch.embed.proj.weight.grad.any()


def test_experts_stay_alive_and_low_frequencies_do_not_drift():
    torch.manual_seed(0)
    clean = PHOTOGRAPH[..., :24, :24]
    degraded = clean + 25 / 255 * torch.randn(clean.shape)
    net = small_harmonic(embed_dim=8, head_dim=4).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=40, pct_start=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        output = net(degraded, return_aux=True)
        supervise(output.aux, None, clean=clean)
        (F.l1_loss(output.image, clean) + output.aux.total()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        output = net.eval()(degraded, return_aux=True)
    assert psnr(output.image, clean) > psnr(degraded, clean)
    before, after = (psnr(low_pass(x, 3), low_pass(clean, 3), depth=None) for x in (degraded, output.image))
    assert after >= before
    target = structure_target(clean)
    assert psnr(output.aux.structure, target, depth=None) > psnr(F.avg_pool2d(degraded, 2), target, depth=None)
    dead = [value.item() for name, value in output.aux.statistics.items() if name.endswith("dead_experts")]
    assert dead == [0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 10}, "embed_dim must be a multiple of head_dim 10, got 48"),
        ({"embed_dim": 3, "head_dim": 3}, "embed_dim must be even, got 3"),
        ({"depths": (1,)}, r"depths must be of two stages or more, got \(1,\)"),
        ({"refinement": -1}, "depths and refinement must be integers of at least 0, got"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"top_k": 5}, "top_k must be at most the 4 experts, got 5"),
        ({"bypass": 1.0}, "bypass must be at least 0 and below 1, got 1.0"),
        ({"kernel_size": 4}, "kernel_size must be an odd integer of at least 1, got 4"),
        ({"max_gain": 0.0}, "max_gain must be above 0 and finite, got 0.0"),
        ({"high_limit": float("inf")}, "high_limit must be above 0 and finite, got inf"),
        ({"texture_head": True, "branches": "low"}, "branches must be 'both' for a texture_head, got 'low'"),
        ({"conv_gate": "both"}, "conv_gate must be one of pre, post, none, got 'both'"),
        ({"fast_path": 1}, "fast_path must be one of True, False, got 1"),
    ],
)
def test_bad_sizes_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        HARMONICConfig(**fields)
