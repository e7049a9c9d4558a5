"""A mixture of experts at every level against the dense sum, and that what was not chosen costs and changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from claritycore.blocks import (
    ArtifactExpert,
    AttentionExpert,
    BiasBalance,
    ConvExpert,
    DeblurExpert,
    DetailExpert,
    Expert,
    FrequencyExpert,
    MoE2d,
    PointwiseExpert,
    TextureExpert,
    TopKRouter,
)
from claritycore.blocks import moe as moe_file
from claritycore.blocks.moe_dispatch import Assignment, map_of, rows_of, tokens_of
from claritycore.blocks.padding import pad_to_multiple
from claritycore.deploy.flops import flop_formulas
from claritycore.kernels.expert_routing import route_top_k_flops
from tests.strategies import normal

C, SIZE = 4, 4
LEVELS = ["token", "window", "image"]
SHAPE = (2, C, 9, 14)


def experts(level: str, number: int = 4) -> list[nn.Module]:
    if level == "token":
        return [PointwiseExpert(C) for _ in range(number)]
    every = [DetailExpert(C), AttentionExpert(C, 2, window_size=2), FrequencyExpert(C, window_size=4), ConvExpert(C)]
    return [copy.deepcopy(every[i % 4]) for i in range(number)]


def mixture(level: str, *, number=4, k=2, keep=1.0, always=(), seed=0, **options) -> MoE2d:
    """A mixture whose router is sure of its choices, in float64."""
    torch.manual_seed(seed)
    width = C if level == "token" else 2 * C
    router = TopKRouter(width, number, k=k, keep=keep, **options)
    further = {name: PointwiseExpert(C) for name in always}
    moe = MoE2d(C, experts(level, number), level=level, window_size=SIZE, router=router, **further).double()
    with torch.no_grad():
        moe.router.linear.weight.normal_()
    return moe


def one_by_one(moe: MoE2d, number: int):
    """A stacked expert, or one of a list, as a function of maps."""
    if moe.level != "token":
        return moe.experts[number]
    w1, b1, w2, b2 = (getattr(moe.experts, name)[number] for name in ("w1", "b1", "w2", "b2"))
    return lambda x: (nn.functional.gelu(x.permute(0, 2, 3, 1) @ w1.T + b1) @ w2.T + b2).permute(0, 3, 1, 2)


def dense(moe: MoE2d, x: torch.Tensor) -> torch.Tensor:
    """Every expert on the whole map, times a map of weights that is zero where it was not chosen."""
    _, route = moe(x)
    whole = {"token": lambda: moe.prepare(x), "window": lambda: pad_to_multiple(x, SIZE), "image": lambda: x}
    whole, size = whole[moe.level](), x.shape[2:]
    images, rows, columns = route.grid
    places = torch.arange(images * rows * columns) if route.regions is None else route.regions
    gate = torch.ones(len(places)).double() if route.gate is None else route.gate
    weights = route.probabilities.gather(1, route.indices) if moe.has_fallback else route.weights
    table = torch.zeros(images * rows * columns, moe.router.num_experts + 2).double()
    for slot in range(weights.shape[1]):
        table = table.index_put((places, route.indices[:, slot]), weights[:, slot] * gate, accumulate=True)
    always = []
    if moe.has_shared:
        always.append(gate)
    if moe.has_fallback:
        always.append((1 - weights.sum(1)) * gate)
    for number, weight in enumerate(always, moe.router.num_experts):
        table = table.index_put((places, torch.tensor(number)), weight)
    y = x
    for number in range(moe.router.num_experts + len(always)):
        mask = table[:, number].view(images, 1, rows, columns)
        mask = mask.repeat_interleave(whole.shape[2] // rows, 2).repeat_interleave(whole.shape[3] // columns, 3)
        expert = one_by_one(moe, number)
        # What an expert sees beyond the map it mirrors itself; but cells of attention are whole in a window.
        mirrored = moe.level == "token" or isinstance(expert, AttentionExpert)
        y = y + (mask[..., : size[0], : size[1]] * expert(whole if mirrored else x)[..., : size[0], : size[1]])
    return y


def gradients(moe, outputs, inputs):
    found = torch.autograd.grad(outputs, [*inputs, *moe.parameters()], allow_unused=True)
    return [torch.zeros(()) if gradient is None else gradient for gradient in found]


CASES = [
    *((level, k, 1.0, always) for level in LEVELS for k in (1, 2) for always in ((), ("shared", "fallback"))),
    *((level, k, 0.3, ("shared",)) for level in LEVELS[:2] for k in (1, 2)),
]


@pytest.mark.parametrize(("level", "k", "keep", "always"), CASES)
def test_equal_to_the_dense_sum_with_all_gradients(level, k, keep, always):
    moe = mixture(level, k=k, keep=keep, always=always)
    x = normal(SHAPE, dtype=torch.float64).requires_grad_()
    y, expected = moe(x)[0], dense(moe, x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    upstream = normal(SHAPE, dtype=torch.float64, seed=1)
    ours, theirs = (gradients(moe, (out * upstream).sum(), [x]) for out in (y, expected))
    for (name, _), a, b in zip([("x", x), *moe.named_parameters()], ours, theirs, strict=True):
        torch.testing.assert_close(a, b.expand_as(a), rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("level", "k", "keep", "always"), [case for case in CASES if case[0] != "token"])
def test_what_computes_all_experts_gives_the_same_numbers(level, k, keep, always, monkeypatch):
    moe = mixture(level, k=k, keep=keep, always=always)
    x = normal(SHAPE, dtype=torch.float64).requires_grad_()
    upstream = normal(SHAPE, dtype=torch.float64, seed=1)
    sparse = moe(x)[0]
    expected = gradients(moe, (sparse * upstream).sum(), [x])
    monkeypatch.setattr(moe_file, "computes_all", lambda x: True)
    masked = moe(x)[0]
    torch.testing.assert_close(masked, sparse, rtol=1e-13, atol=1e-13)
    for a, b in zip(gradients(moe, (masked * upstream).sum(), [x]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (7, 1), (4, 8), (3, 2)])
def test_every_size_is_the_dense_sum(level, size):
    moe = mixture(level, k=1)
    x = normal((2, C, *size), dtype=torch.float64)
    torch.testing.assert_close(moe(x)[0], dense(moe, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(31, 33), (17, 14), (5, 7), (1, 37), (1, 1)])
@pytest.mark.parametrize("expert", [DetailExpert, ArtifactExpert, DeblurExpert, TextureExpert])
def test_a_lone_expert_computes_by_window_what_it_computes_for_the_whole_map(expert, size):
    alone = expert(C).double()
    moe = MoE2d(C, [alone], k=1, level="window", window_size=16).double()
    x = normal((2, C, *size), dtype=torch.float64)
    torch.testing.assert_close(moe(x)[0], x + alone(x), rtol=1e-12, atol=1e-12)


class Image(nn.Module):
    """The map alone: what is traced returns nothing but tensors."""

    def __init__(self, moe: MoE2d) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x):
        return self.moe(x)[0]


@pytest.mark.filterwarnings("ignore:.*trac:torch.jit.TracerWarning", "ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("level", LEVELS)
def test_traced_it_does_not_keep_the_choice_of_the_example(level):
    moe = mixture(level, k=1).eval()
    maps = [normal((1, C, 4, 4), seed=seed, dtype=torch.float64) for seed in range(8)]
    with torch.no_grad():
        assert len({tuple(moe(x)[1].indices.flatten().tolist()) for x in maps}) > 1
        traced = torch.jit.trace(Image(moe), maps[0], check_trace=False)
        for x in maps:
            # A trace keeps some numbers of attention in single precision; another expert is off by much more.
            torch.testing.assert_close(traced(x), moe(x)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("level", "keep"), [("token", 0.3), ("window", 0.3), ("image", 1.0)])
def test_compiled_and_exported_it_is_the_same(level, keep):
    moe = mixture(level, number=2, k=1, keep=keep, always=("shared",)).eval()
    x = normal(SHAPE, dtype=torch.float64)
    y, route = moe(x)
    torch._dynamo.reset()
    compiled, its_route = torch.compile(moe, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, y, rtol=1e-12, atol=1e-12)
    assert torch.equal(its_route.indices, route.indices)
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(moe, (x,), dynamic_shapes=(sizes,)).module()
    for shape in (SHAPE, (3, C, 6, 5)):
        x = normal(shape, dtype=torch.float64)
        exported, its_route = program(x)
        torch.testing.assert_close(exported, moe(x)[0], rtol=1e-12, atol=1e-12)
        assert torch.equal(its_route.indices, moe(x)[1].indices)


@pytest.mark.parametrize("level", LEVELS)
def test_an_expert_that_nothing_chose_changes_nothing_were_it_nan(level, monkeypatch):
    moe = mixture(level, k=1, policies=(BiasBalance(),)).eval()
    moe.router.bias.copy_(torch.tensor([10.0, 0, 0, 0]))
    x = normal(SHAPE, dtype=torch.float64)
    expected = moe(x)[0]
    with torch.no_grad():
        for parameter in moe.experts.parameters() if level == "token" else moe.experts[1:].parameters():
            (parameter[1:] if level == "token" else parameter).fill_(torch.nan)
    assert torch.equal(moe(x)[0], expected)
    monkeypatch.setattr(moe_file, "computes_all", lambda x: True)
    torch.testing.assert_close(moe(x)[0], expected)


@pytest.mark.parametrize("level", LEVELS)
def test_experts_without_regions_have_gradients_of_zeros(level):
    moe = mixture(level, k=1, policies=(BiasBalance(),))
    moe.router.bias.copy_(torch.tensor([10.0, 0, 0, 0]))
    y, route = moe(normal(SHAPE, dtype=torch.float64))
    (y.sum() + route.total()).backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if level == "token":
        assert not moe.experts.w1.grad[1:].any()
    else:
        assert not any(parameter.grad.any() for parameter in moe.experts[1:].parameters())


@pytest.mark.parametrize("level", LEVELS)
def test_no_image_is_returned_as_no_image(level):
    moe = mixture(level, always=("shared", "fallback"))
    x = normal(SHAPE, dtype=torch.float64)[:0].requires_grad_()
    y, route = moe(x)
    assert y.shape == (0, *SHAPE[1:])
    (y.sum() + route.total()).backward()
    assert all(not parameter.grad.any() for parameter in moe.parameters())


@pytest.mark.parametrize("level", LEVELS)
def test_an_image_is_computed_as_if_alone_and_in_any_order(level):
    moe = mixture(level, k=1, keep=0.5 if level != "image" else 1.0).eval()
    x = normal((5, *SHAPE[1:]), dtype=torch.float64)
    whole = moe(x)[0]
    for number in range(5):
        torch.testing.assert_close(moe(x[number, None])[0][0], whole[number], rtol=1e-12, atol=1e-12)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(moe(x[order])[0], whole[order], rtol=1e-12, atol=1e-12)


def test_the_names_of_experts_mean_nothing():
    """Experts and the router's rows exchanged alike: the same map, at every level."""
    order = torch.tensor([2, 0, 3, 1])
    for level in LEVELS:
        moe, other = mixture(level), mixture(level)
        with torch.no_grad():
            other.router.linear.weight.copy_(moe.router.linear.weight[order])
            if level == "token":
                for mine, theirs in zip(other.experts.parameters(), moe.experts.parameters(), strict=True):
                    mine.copy_(theirs[order])
            else:
                other.experts = nn.ModuleList([moe.experts[number] for number in order])
        x = normal(SHAPE, dtype=torch.float64)
        torch.testing.assert_close(other(x)[0], moe(x)[0], rtol=1e-12, atol=1e-12)


def test_pixels_at_level_token_may_come_in_any_order_once_they_are_prepared():
    moe = mixture("token", k=1).eval()
    with torch.no_grad():
        moe.prepare.weight.zero_()[..., 1, 1] = 1
    x = normal(SHAPE, dtype=torch.float64)
    order = torch.randperm(126, generator=torch.Generator().manual_seed(0))
    shuffled = moe(x.flatten(2)[..., order].view_as(x))[0]
    torch.testing.assert_close(shuffled.flatten(2), moe(x)[0].flatten(2)[..., order], rtol=1e-12, atol=1e-12)


# The cost


def flops(moe: MoE2d, x: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        moe(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("level", LEVELS)
def test_the_work_grows_with_k_and_not_with_the_number_of_experts(level):
    """Without the convolution and the router, whose product with E rows stays."""

    def work(number: int, k: int, keep: float = 1.0) -> int:
        torch.manual_seed(0)
        width = C if level == "token" else 2 * C
        kinds = [PointwiseExpert(C) if level == "token" else TextureExpert(C) for _ in range(number)]
        router = TopKRouter(width, number, k=k, keep=keep)
        moe = MoE2d(C, kinds, level=level, window_size=SIZE, router=router).eval()
        x = normal((4, C, 16, 16))
        features = moe.prepare(x) if level == "token" else None
        regions = {"token": 1024, "window": 64, "image": 4}[level]
        fixed = 2 * 9 * C * 1024 if features is not None else 0
        kept = round(regions * keep)
        own = 2 * (width + 1) * (kept * number + (regions if keep < 1 else 0)) + route_top_k_flops(kept, number, k)
        return flops(moe, x) - fixed - own

    assert work(4, 2) == 2 * work(4, 1)
    assert work(4, 4) == 4 * work(4, 1)
    assert work(8, 2) == work(4, 2) > 0
    if level != "image":
        assert work(4, 2, keep=0.25) == work(4, 2) / 4


def test_regions_that_the_gate_leaves_alone_are_the_input_itself():
    for level in LEVELS[:2]:
        moe = mixture(level, keep=0.25, always=("shared", "fallback")).eval()
        x = normal((1, C, 8, 8), dtype=torch.float64)
        y, route = moe(x)
        side = 1 if level == "token" else SIZE
        kept = torch.zeros(route.grid[1] * route.grid[2])
        kept[route.regions] = 1
        kept = kept.view(route.grid[1:]).repeat_interleave(side, 0).repeat_interleave(side, 1).bool()
        assert torch.equal(y[..., ~kept], x[..., ~kept])
        assert (y[..., kept] != x[..., kept]).all()


# Conditions


@pytest.mark.parametrize("level", LEVELS)
def test_conditions_reach_the_router_by_region(level):
    moe = mixture(level, condition_channels=3)
    x = normal(SHAPE, dtype=torch.float64)
    prompt, variance = normal((2, 2), dtype=torch.float64), normal((2, 1, 9, 14), dtype=torch.float64, seed=1)
    route = moe(x, [prompt, variance])[1]
    seen = moe.prepare(x) if level == "token" else None
    if level == "token":
        expected = moe.router(seen, [prompt, variance])
        assert torch.equal(route.probabilities, expected.probabilities)
    else:
        parts = SIZE if level == "window" else 1
        whole = pad_to_multiple(variance, parts)
        means = nn.functional.avg_pool2d(whole, parts) if level == "window" else whole.mean((2, 3), keepdim=True)
        x = pad_to_multiple(x, parts)
        mean = nn.functional.avg_pool2d(x, parts) if level == "window" else x.mean((2, 3), keepdim=True)
        power = nn.functional.avg_pool2d(x**2, parts) if level == "window" else (x**2).mean((2, 3), keepdim=True)
        expected = moe.router(torch.cat([mean, (power + 1e-5).sqrt()], 1), [prompt, means])
        torch.testing.assert_close(route.probabilities, expected.probabilities)


# What is refused


class Pooled(nn.Module):
    """A mean of the map."""

    def forward(self, x):
        return x.mean((2, 3), keepdim=True).expand_as(x)


class Narrower(Expert):
    def valid(self, x):
        return x[:, 1:]


class Foreign(nn.Module):
    halo = 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"experts": []}, ValueError, "experts must be at least one, got none"),
        ({"level": "pixel"}, ValueError, "level must be one of token, window, image, got 'pixel'"),
        ({"k": 3}, ValueError, "k must be at most num_experts = 2, got 3"),
        ({"k": 0}, ValueError, "k must be an integer of at least 1, got 0"),
        ({"window_size": 0}, ValueError, "window_size must be an integer of at least 1, got 0"),
        (
            {"experts": [DetailExpert(C)], "k": 1},
            ValueError,
            "experts must have halo 0 at level 'token', got DetailExpert with 2: take level 'window'",
        ),
        ({"shared": TextureExpert(C)}, ValueError, "experts must have halo 0 .*, got TextureExpert with 2: .*"),
        (
            {"fallback": AttentionExpert(C, 2)},
            TypeError,
            "experts must be PointwiseExpert at level 'token', got AttentionExpert",
        ),
        (
            {"shared": PointwiseExpert(C, mlp_ratio=3)},
            ValueError,
            r"experts must be of one width at level 'token', got \[8, 12\]",
        ),
        (
            {"experts": [Pooled()], "k": 1, "level": "window"},
            ValueError,
            "experts must have a halo at level 'window', got Pooled, which may see the whole map",
        ),
        (
            {"experts": [Foreign()], "k": 1, "level": "window"},
            TypeError,
            "experts with a halo must derive from Expert at level 'window', got Foreign",
        ),
        (
            {"fallback": FrequencyExpert(C, window_size=8), "level": "window", "window_size": 12},
            ValueError,
            "window_size must be a multiple of the cells of FrequencyExpert, 8, got 12",
        ),
        (
            {"experts": [PointwiseExpert(C), PointwiseExpert(8)]},
            ValueError,
            "experts must have 4 channels, got PointwiseExpert with 8",
        ),
        ({"experts": [nn.GELU, nn.GELU], "level": "image"}, TypeError, "experts must be modules, got .*GELU.*"),
        ({"router": nn.Linear(C, 2)}, TypeError, "router must be a TopKRouter, got Linear"),
        (
            {"router": TopKRouter(C, 3)},
            ValueError,
            "router must be of 4 channels and 2 experts at level 'token', got 4 and 3",
        ),
        (
            {"router": TopKRouter(C, 2), "level": "window"},
            ValueError,
            "router must be of 8 channels and 2 experts at level 'window', got 4 and 2",
        ),
        (
            {"router": TopKRouter(C, 2), "k": 2},
            ValueError,
            "k must be left out where a router is given, which has its own, got 2",
        ),
        (
            {"router": TopKRouter(2 * C, 2, keep=0.5), "level": "image"},
            ValueError,
            "router must have keep = 1 and bypass = 0 at level 'image', got 0.5 and 0.0",
        ),
    ],
)
def test_wrong_arguments_are_refused(options, error, message):
    made = {"experts": [PointwiseExpert(C), PointwiseExpert(C)], **options}
    with pytest.raises(error, match=f"^{message}$"):
        MoE2d(C, made.pop("experts"), **made)


def test_experts_that_see_the_whole_map_are_taken_by_level_image():
    moe = MoE2d(C, [Pooled(), PointwiseExpert(C)], k=1, level="image").double()
    x = normal((3, C, 5, 7), dtype=torch.float64)
    y, route = moe(x)
    for number in range(3):
        expert = moe.experts[int(route.indices[number])]
        torch.testing.assert_close(y[number], (x + route.weights[number] * expert(x[number, None]))[number])


def test_an_expert_that_changes_the_shape_is_refused():
    moe = MoE2d(C, [Narrower(C)], k=1, level="window", window_size=4)
    with pytest.raises(
        ValueError, match=r"^experts must keep the shape of a map, \(4, 4, 4\); Narrower makes \(3, 4, 4"
    ):
        moe(normal(SHAPE))


def test_conditions_of_another_size_are_refused():
    moe = mixture("window", condition_channels=1)
    with pytest.raises(ValueError, match=r"^conditions that are maps must be .*, \(9, 14\), got \(3, 3\)$"):
        moe(normal(SHAPE, dtype=torch.float64), [torch.zeros(2, 1, 3, 3)])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("halo", [0, 1, 4])
def test_windows_are_those_of_the_mirrored_map_and_so_are_their_gradients(halo, channels_last):
    regions, size = torch.tensor([7, 0, 10, 4, 5, 11]), 3  # of two images of 2 x 3 windows, the last of them ragged
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = normal((2, 2, 5, 8), dtype=torch.float64).to(memory_format=layout).requires_grad_()
    wide, side = pad_to_multiple(x, size, surround=halo), size + 2 * halo
    assignment = Assignment(regions[:, None], torch.ones(6, 1), (2, 2, 3), regions)
    every = assignment.pixels((size, size), x.shape[2:], halo)
    asked = [every[:4], every[:0], every[4:]]

    def windows(x):
        return rows_of(tokens_of(x), asked)

    parts = [part.permute(0, 3, 1, 2) for part in windows(x)]
    assert [len(part) for part in parts] == [4, 0, 2]
    found = torch.cat(parts)
    corners = [(place // 6, place % 6 // 3 * size, place % 3 * size) for place in regions.tolist()]
    wanted = torch.stack([wide[i, :, row : row + side, column : column + side] for i, row, column in corners])
    assert found.equal(wanted)
    upstream = normal(found.shape, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream, retain_graph=True)[0] for y in (found, wanted)))
    assert torch.autograd.gradgradcheck(windows, x, fast_mode=True)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (37, 41), (64, 64)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_and_maps_are_one_another(size, channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = normal((2, 3, *size)).to(memory_format=layout).requires_grad_()
    tokens = tokens_of(x)
    assert tokens.equal(x.permute(0, 2, 3, 1).flatten(0, 2))
    y = map_of(tokens.view(2, *size, 3), x)
    assert y.equal(x)
    assert y.is_contiguous(memory_format=layout)
    upstream = normal(x.shape)
    assert torch.autograd.grad(y, x, upstream)[0].equal(upstream)
