"""Modulated convolutions against StyleGAN2's own steps, noise of every kind, and the bound on what a head adds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from claritycore.blocks import ModulatedConv2d, ModulatedNoiseConv2d, NoiseField, NoiseInjection, TextureHead
from claritycore.kernels import blur_split, noise_field
from tests.strategies import SIDES, normal

DOUBLE = torch.float64


def styled(block, seed=0):
    with torch.no_grad():
        for number, parameter in enumerate(block.parameters()):
            parameter.add_(0.2 * normal(tuple(parameter.shape), seed=seed + number))
    return block.double().eval()


def zero_inserted(x):
    y = x.new_zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
    y[..., ::2, ::2] = x
    return y


def blur(x, gain=1.0):
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
    kernel = (gain * taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(x, kernel, groups=x.shape[1])


def by_definition(block, x, style):
    """Convolution by a kernel of each sample; up on maps with zeros between pixels, down by every second result."""
    weight = block.weight * block.weight[0].numel() ** -0.5
    scale = F.linear(style, block.modulation.weight / math.sqrt(style.shape[1]), block.modulation.bias)
    half, maps = weight.shape[2] // 2, []
    for one, s in zip(x, scale, strict=True):
        kernel = weight * s[:, None, None]
        if block.demodulate:
            kernel = kernel / kernel.square().sum((1, 2, 3), keepdim=True).sqrt()
        if block.resample == "up":
            # A transposed convolution is one with the turned kernel among zeros.
            sparse = F.pad(zero_inserted(one[None]), (2 * half, 2 * half - 1, 2 * half, 2 * half - 1))
            y = F.conv2d(F.pad(sparse, (0, 1, 0, 1)), kernel.flip(2, 3))
            y = y[..., : 2 * x.shape[2] - 1 + 2 * half, : 2 * x.shape[3] - 1 + 2 * half]
            maps.append(blur(F.pad(y, [2 - half] * 4), gain=4.0))
        elif block.resample == "down":
            y = blur(F.pad(one[None], [half + 1, half + 2] * 2))
            maps.append(F.conv2d(y, kernel)[..., ::2, ::2])
        else:
            maps.append(F.conv2d(one[None], kernel, padding=half))
    return torch.cat(maps)


@given(
    height=SIDES, width=SIDES, kernel=st.sampled_from([1, 3, 5]), demodulate=st.booleans(),
    resample=st.sampled_from([None, "up", "down"]), batch=st.integers(1, 2),
)  # fmt: skip
def test_it_is_the_convolution_of_the_paper(height, width, kernel, demodulate, resample, batch):
    block = styled(ModulatedConv2d(
        3, 4, style_channels=5, kernel_size=kernel, demodulate=demodulate, resample=resample
    ))  # fmt: skip
    x, style = normal((batch, 3, height, width), dtype=DOUBLE), normal((batch, 5), dtype=DOUBLE, seed=1)
    expected = by_definition(block, x, style)
    torch.testing.assert_close(block(x, style), expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_a_fresh_style_is_near_one():
    torch.manual_seed(0)
    block = ModulatedConv2d(64, 4, style_channels=64)
    assert torch.equal(block.modulation.bias, torch.ones(64))
    assert block.modulation.weight.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_autocast_convolves_in_half_precision(resample):
    block = ModulatedNoiseConv2d(3, 4, style_channels=5, resample=resample).eval()
    x, style = normal((2, 3, 5, 6)), normal((2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert block.conv.convolve(x, style)[0].dtype == torch.bfloat16
        assert block(x, style).dtype == torch.bfloat16
        assert block.conv(x, style).dtype == torch.bfloat16
        assert block.double()(x.double(), style).dtype == torch.float64


@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_unit_variance_stays(resample):
    torch.manual_seed(0)
    block = ModulatedConv2d(32, 32, style_channels=8, resample=resample).eval()
    y = block(normal((2, 32, 64, 64)), normal((2, 8), seed=1))[..., 4:-4, 4:-4]
    # Of white noise the blur keeps 20 / 64 along each side, and of four pixels that an upsampled map has, one is there.
    expected = {None: 1.0, "up": 4 * (20 / 64) ** 2, "down": (20 / 64) ** 2}[resample]
    assert y.var().item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_the_scale_of_a_style_changes_nothing(resample):
    block = ModulatedConv2d(3, 4, style_channels=5, resample=resample)
    x, style = normal((2, 3, 5, 6)), normal((2, 5))
    torch.nn.init.zeros_(block.modulation.bias)
    torch.testing.assert_close(block(x, 1e6 * style), block(x, style), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("resample", [None, "up", "down"])
def test_half_precision_at_extreme_styles(dtype, resample):
    torch.manual_seed(0)
    block = ModulatedNoiseConv2d(512, 4, style_channels=5, resample=resample).eval()
    x, style = 30 * normal((1, 512, 3, 4)), 1e4 * normal((1, 5))
    y, exact = (
        block.to(dtype)(x.to(dtype), style.to(dtype)),
        block.double()(x.to(dtype).double(), style.to(dtype).double()),
    )
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= 10 * torch.finfo(dtype).eps * exact.abs().max()
    assert exact.abs().min() > 0


@pytest.mark.parametrize("layout", ["rosinality", "basicsr"])
@pytest.mark.parametrize("resample", ["up", None])
def test_state_dicts_of_stylegan2_load(resample, layout):
    """The names and shapes of rosinality's StyledConv, and of BasicSR's StyleConv."""
    theirs = {
        "conv.weight": normal((1, 4, 3, 3, 3)),
        "conv.modulation.weight": normal((3, 5), seed=1),
        "conv.modulation.bias": normal((3,), seed=2),
        "noise.weight": normal((1,), seed=3),
        "activate.bias": normal((4,), seed=4),
    }
    if resample:
        theirs["conv.blur.kernel"] = torch.ones(4, 4)
    net = torch.nn.Sequential(ModulatedNoiseConv2d(3, 4, style_channels=5, resample=resample))
    renamed = {"noise.weight": "weight", "conv.blur.kernel": "conv.smooth.kernel"} if layout == "basicsr" else {}
    own = "modulated_conv." if layout == "basicsr" else "conv."
    named = {f"0.{renamed.get(name, name)}".replace("0.conv.", f"0.{own}"): value for name, value in theirs.items()}
    net.load_state_dict(named)
    (block,) = net.double()
    x, style = normal((2, 3, 5, 4), dtype=DOUBLE), normal((2, 5), dtype=DOUBLE)
    y = block(x, style, noise := normal((2, 1, *([10, 8] if resample else [5, 4])), dtype=DOUBLE))
    expected = by_definition(block.conv, x, style) + theirs["noise.weight"].double() * noise
    expected = math.sqrt(2) * F.leaky_relu(expected + theirs["activate.bias"].double()[:, None, None], 0.2)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
    assert torch.equal(block.conv.weight, theirs["conv.weight"][0].double())


def test_a_state_dict_of_basicsr_loads_wherever_the_block_is_held():
    net = torch.nn.ModuleDict({"modulated_conv1": ModulatedNoiseConv2d(3, 4, style_channels=5)})
    state = net.state_dict()
    own = "modulated_conv1.conv."
    theirs = {name.replace(own, "modulated_conv1.modulated_conv."): torch.ones_like(x) for name, x in state.items()}
    net.load_state_dict(theirs)
    assert all((x == 1).all() for x in net.state_dict().values())


def test_noise_of_strength_zero_changes_nothing():
    x, style = normal((2, 3, 5, 4)), normal((2, 5))
    block = ModulatedNoiseConv2d(3, 4, style_channels=5)
    assert torch.equal(block(x, style, NoiseField(1)), block(x, style, NoiseField(2)))
    assert torch.equal(block(x, style), block.eval()(x, style))


def test_where_noise_comes_from():
    block, x = NoiseInjection(), normal((2, 3, 5, 4))
    torch.nn.init.constant_(block.weight, 0.5)
    assert not torch.equal(block(x), block(x))  # drawn in training
    block.eval()
    assert torch.equal(block(x), x)  # none in eval
    noise = normal((2, 1, 5, 4), seed=1)
    torch.testing.assert_close(block(x, noise), x + 0.5 * noise)
    torch.testing.assert_close(block(x, noise[:1]), x + 0.5 * noise[:1])
    field = NoiseField(9, layer=2, samples=(4, 1), offset=(3, 5))
    torch.testing.assert_close(block(x, field), x + 0.5 * field(x))
    torch.testing.assert_close(block(x, NoiseField(9, 2, torch.tensor([4, 1]), (3, 5))), block(x, field))


def test_noise_of_training_is_normal_and_that_of_a_field_as_precise_as_the_map():
    torch.manual_seed(0)
    block, x = NoiseInjection(), torch.zeros(2, 1, 100, 100)
    torch.nn.init.ones_(block.weight)
    drawn = block(x)
    assert abs(drawn.mean().item()) <= 4 / math.sqrt(drawn.numel())
    assert abs(drawn.var().item() - 1) <= 4 * math.sqrt(2 / drawn.numel())
    assert abs((drawn**4).mean().item() - 3) <= 4 * math.sqrt(96 / drawn.numel())
    exact = noise_field(9, (100, 100), samples=[0, 1], dtype=DOUBLE)
    assert torch.equal(NoiseField(9)(x.double()), exact)
    torch.testing.assert_close(NoiseField(9)(x.half()), exact.float(), rtol=0, atol=1e-5)


def test_a_tile_has_the_noise_of_the_whole():
    block = ModulatedNoiseConv2d(3, 4, style_channels=5).eval()
    torch.nn.init.ones_(block.noise.weight)
    x, style = normal((2, 3, 30, 40)), normal((2, 5))
    whole = block(x, style, NoiseField(7))
    tile = block(x[1:, :, 9:25, 13:36], style[1:], NoiseField(7, samples=(1,), offset=(9, 13)))
    torch.testing.assert_close(tile[..., 1:-1, 1:-1], whole[1:, :, 10:24, 14:35], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1, 1), (2, 1, 5, 4)], ids=str)
def test_a_gate_lets_noise_through(shape):
    block, x, noise = NoiseInjection(3).eval(), normal((2, 3, 5, 4)), normal((2, 1, 5, 4), seed=1)
    torch.nn.init.constant_(block.weight, 0.5)
    gate = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    spread = gate.reshape(2, 1, 1, 1) if gate.numel() == 2 else gate
    torch.testing.assert_close(block(x, noise, gate), x + 0.5 * spread * noise)
    torch.testing.assert_close(block(x, noise, gate + 5), x + 0.5 * noise)
    assert torch.equal(block(x, noise, 0 * gate), x)
    assert torch.equal(block(x, noise, gate - 5), x)


def test_noise_is_clamped():
    block, x = NoiseInjection(clamp=0.5).eval(), torch.zeros(1, 1, 50, 50)
    torch.nn.init.ones_(block.weight)
    assert block(x, NoiseField(0)).abs().max() == 0.5


def test_up_and_down_of_one_row():
    for resample, size in ((None, (1, 7)), ("up", (2, 14)), ("down", (1, 4))):
        block = ModulatedNoiseConv2d(3, 4, style_channels=5, resample=resample)
        assert block(normal((1, 3, 1, 7)), normal((1, 5))).shape == (1, 4, *size)


# The texture head


def loud_head(limit=0.3, sigma=1.5):
    head = TextureHead(4, limit=limit, sigma=sigma).double().eval()
    with torch.no_grad():
        head.to_image.weight.copy_(1e3 * normal(tuple(head.to_image.weight.shape), dtype=DOUBLE))
        head.texture.noise.weight.fill_(1.0)
        head.gate_bias.fill_(50.0)
    return head


@given(height=st.integers(1, 30), width=st.integers(1, 30), sigma=st.sampled_from([0.5, 1.5]))
def test_what_it_adds_at_low_frequencies_is_bounded(height, width, sigma):
    """With weights so large that texture is at its limit everywhere, and features in blocks, the worst there is."""
    head = loud_head(sigma=sigma)
    rough = normal((1, 4, (height + 3) // 4, (width + 3) // 4), dtype=DOUBLE)
    features = F.interpolate(rough, scale_factor=4)[..., :height, :width]
    image = torch.full((1, 3, height, width), 0.5, dtype=DOUBLE)
    added = head(features, image, NoiseField(1)) - image
    low, _ = blur_split(added, sigma)
    assert low.abs().max() <= 0.53 * 0.3
    assert added.abs().max() <= 2 * 0.3
    if min(height, width) > 8:
        assert added.abs().max() > 0.1


def low_part_of_high(sigma):
    """The filter whose sum of magnitudes is the bound: what the blur lets pass of what it leaves."""
    side = 4 * math.ceil(6 * sigma) + 3  # no border within reach
    impulse = torch.zeros(1, 1, side, side, dtype=DOUBLE)
    impulse[..., side // 2, side // 2] = 1
    low, _ = blur_split(impulse, sigma)
    return low - blur_split(low, sigma)[0]


def test_the_bound_holds_for_every_deviation_and_is_nearly_met():
    bounds = [low_part_of_high(0.02 * n).abs().sum().item() for n in range(10, 200)]
    assert 0.51 <= max(bounds) <= 0.53
    band = low_part_of_high(1.5)
    low, _ = blur_split(blur_split(band.sign(), 1.5)[1], 1.5)  # the pattern that adds up in the middle
    middle = band.shape[-1] // 2
    assert low[..., middle, middle].item() == pytest.approx(band.abs().sum().item(), 1e-9)


def test_flat_texture_adds_nothing():
    head = loud_head()
    torch.nn.init.zeros_(head.to_image.weight)
    torch.nn.init.ones_(head.to_image.bias)
    image = torch.rand(1, 3, 12, 13, dtype=DOUBLE)
    torch.testing.assert_close(head(normal((1, 4, 12, 13), dtype=DOUBLE), image), image, rtol=0, atol=1e-15)


def test_noise_and_sharpness_close_the_gate():
    head = TextureHead(4).eval()
    flat, texture = torch.full((1, 3, 64, 64), 0.5), normal((1, 3, 64, 64))
    metrics = [head.metrics(flat + s * texture) for s in (0.0, 0.02, 0.1)]
    for sigma, metric in zip((0.0, 0.02, 0.1), metrics, strict=True):
        assert metric[0, 0].item() == pytest.approx(sigma, rel=0.1, abs=1e-6)
    gates = [head.gate(metric).item() for metric in metrics]
    assert 1 > gates[0] > gates[1] > gates[2] > 0
    edges = flat + 0.2 * torch.sign(torch.sin(torch.arange(64) / 3))
    blurred = blur_split(edges, 3.0)[0]
    assert head.gate(head.metrics(edges)) < head.gate(head.metrics(blurred))


def test_the_head_is_its_formula():
    head = styled(TextureHead(4, limit=0.3, noise_clamp=1.0), seed=5)
    features, noise = normal((2, 4, 9, 7), dtype=DOUBLE), normal((2, 1, 9, 7), dtype=DOUBLE, seed=1)
    image = 0.5 + torch.tensor([0.01, 0.05]).double().view(2, 1, 1, 1) * normal((2, 3, 9, 7), dtype=DOUBLE, seed=2)
    padded, mask = F.pad(image, (1, 1, 1, 1), mode="replicate"), torch.tensor([1.0, -2.0, 1.0], dtype=DOUBLE)
    differences = F.conv2d(padded, (mask[:, None] * mask).expand(3, 1, 3, 3), groups=3)
    sigma = math.sqrt(math.pi / 2) / 6 * differences.abs().mean((1, 2, 3))
    sharpness = (image - blur_split(image, 1.5)[0]).abs().mean((1, 2, 3))
    metrics = torch.stack([sigma, sharpness], 1)
    gate = torch.sigmoid(head.gate_bias - metrics @ head.gate_steepness.exp()).view(2, 1, 1, 1)
    texture = head.to_image(head.texture(features, metrics, gate * noise.clamp(-1, 1)))
    texture = 0.3 * torch.tanh(texture)
    expected = image + gate * (texture - blur_split(texture, 1.5)[0])
    torch.testing.assert_close(head(features, image, noise), expected, rtol=0, atol=1e-9)
    assert torch.allclose(TextureHead(4).gate_steepness.exp(), torch.tensor(20.0))


def test_gradients_of_the_head():
    """Those of the image too, which reach its metrics."""
    head = styled(TextureHead(2, 1))
    features, image = (normal((1, c, 3, 4), dtype=DOUBLE) for c in (2, 1))
    leaves = [features.requires_grad_(), (0.5 + 0.02 * image).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *maps: head(*maps, NoiseField(1)), leaves)
    assert torch.autograd.gradgradcheck(lambda *maps: head(*maps, NoiseField(1)), leaves, fast_mode=True)


def test_it_starts_as_the_identity():
    head, image = TextureHead(4), torch.rand(2, 3, 5, 7)
    assert torch.equal(head(normal((2, 4, 5, 7)), image), image)


X, V = torch.zeros(2, 3, 5, 4), torch.zeros(2, 5)
CONV, LAYER = ModulatedConv2d(3, 4, style_channels=5), ModulatedNoiseConv2d(3, 4, style_channels=5).eval()
REFUSED = [
    (lambda: CONV(X, V[:, :4]), r"style must be \(B, 5\) with B = 2, got shape \(2, 4\)"),
    (lambda: CONV(X, V[:1]), r"style must be \(B, 5\) with B = 2, got shape \(1, 5\)"),
    (lambda: LAYER(X, V, torch.zeros(2, 1, 4, 5)), r"noise must be \(B, 1, H, W\) = \(2, 1, 5, 4\), .* \(2, 1, 4, 5\)"),
    (lambda: NoiseField(-1), r"seed must be an integer from 0 to 2\^63 - 1, got -1"),
    (lambda: LAYER(X, V, NoiseField(0), torch.ones(3)), r"gate must be \(B,\), .* got shape \(3,\)"),
    (lambda: LAYER(X, V, NoiseField(0, samples=(1, 2, 3))), r"noise must be .* got shape \(3, 1, 5, 4\)"),
    (lambda: LAYER(X, V, None, torch.ones(3)), r"gate must be \(B,\), .* got shape \(3,\)"),  # in eval without noise
    (lambda: NoiseField(0, layer=-2), r"layer must be integers from 0 to 2\^32 - 1, got -2"),
    (lambda: NoiseField(0, offset=(1,)), r"offset must be a row and a column, below 2\^62, got \(1,\)"),
    (lambda: NoiseInjection(0), "channels must be an integer of at least 1, got 0"),
    (lambda: ModulatedConv2d(3, 4, style_channels=0), "style_channels must be an integer of at least 1, got 0"),
    (lambda: ModulatedConv2d(3, 4, style_channels=5, kernel_size=4), "kernel_size must be an odd integer"),
    (lambda: ModulatedConv2d(3, 4, style_channels=5, resample="both"), "resample must be one of None, up, down, got"),
    (lambda: ModulatedNoiseConv2d(3, 4, style_channels=5, clamp=0.0), "clamp must be above 0, got 0.0"),
    (lambda: NoiseInjection(clamp=-1.0), "clamp must be above 0, got -1.0"),
    (lambda: TextureHead(3, limit=0.0), "limit must be above 0, got 0.0"),
    (lambda: TextureHead(3, sigma=-1.0), "sigma must be above 0, got -1.0"),
    (lambda: TextureHead(3)(X, X[..., :3]), r"image must have the batch and size of features, \(2, 3, 5, 4\), got"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_noise_and_gates_of_other_types_are_named():
    with pytest.raises(TypeError, match="noise must be a tensor, a NoiseField or None, got 7"):
        LAYER(X, V, 7)
    with pytest.raises(TypeError, match=r"gate must be a tensor, got 0\.5"):
        LAYER(X, V, NoiseField(7), 0.5)
