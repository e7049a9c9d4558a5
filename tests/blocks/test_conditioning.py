"""FiLM, PromptGenerator and LocalStatistics against loops, scipy and float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch.nn import functional as F

from claritycore.blocks import FiLM, GatedFFN, KernelPrior, LocalStatistics, PromptGenerator
from tests.strategies import feature_maps, normal


def shaken(block, std=0.5):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=std)
    return block


@pytest.mark.parametrize("form", [{"form": "vector"}, {"form": "grid", "size": 3}, {"form": "spatial"}], ids=str)
@given(x=feature_maps(4))
def test_a_prompt_added_to_a_block_changes_nothing_at_first(form, x):
    prompt, film, block = PromptGenerator(4, 6, **form), FiLM(4, 6), GatedFFN(4)
    assert torch.equal(block(film(x, prompt(x))), block(x))
    assert torch.equal(film(block(x), prompt(x)), block(x))


@given(x=feature_maps(4))
def test_codes_of_blur_modulate_a_map(x):
    film, prior = FiLM(4, 8), KernelPrior(4)
    assert torch.equal(film(x, prior(x)), x)
    assert not torch.equal(shaken(film)(x, prior(x)), x)


def test_film_is_the_formula():
    film, x, t = shaken(FiLM(4, 3)).double(), normal((2, 4, 3, 5), dtype=torch.float64), normal((2, 3)).double()
    y = film(x, t)
    for b in range(2):
        values = film.linear.weight @ (t[b] * torch.sigmoid(t[b])) + film.linear.bias
        for c in range(4):
            torch.testing.assert_close(y[b, c], x[b, c] * (1 + values[c]) + values[4 + c])


def test_film_of_a_map_is_film_at_each_pixel_and_of_a_flat_map_that_of_its_vector():
    film, x = shaken(FiLM(4, 3)).double(), normal((2, 4, 6, 5), dtype=torch.float64)
    at_each = normal((2, 3, 6, 5), dtype=torch.float64)
    for i, j in [(0, 0), (5, 4), (3, 2)]:
        pixel = x[:, :, i : i + 1, j : j + 1]
        torch.testing.assert_close(film(x, at_each)[:, :, i, j], film(pixel, at_each[:, :, i, j])[:, :, 0, 0])
    flat = at_each[:, :, 0, 0]
    torch.testing.assert_close(film(x, flat[:, :, None, None].expand(-1, -1, 2, 7)), film(x, flat))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2, 5)])
def test_film_of_no_images(shape):
    film, x = FiLM(4, 3), torch.zeros(0, 4, 5, 5, requires_grad=True)
    film(x, torch.zeros(shape)).sum().backward()
    assert x.grad.shape == x.shape
    assert not film.linear.weight.grad.any()


@pytest.mark.parametrize("size", [(6, 5), (3, 4)])
def test_maps_of_conditions_are_interpolated_between_the_middles_of_their_pixels(size):
    film, x = shaken(FiLM(1, 1)).double(), torch.ones(1, 1, *size, dtype=torch.float64)
    film.linear.weight.data[0] = 0  # what is left is the shift
    condition = normal((1, 1, 2, 3), dtype=torch.float64)
    values = film.linear(torch.nn.functional.silu(condition).movedim(1, -1))[0, :, :, 1]
    places = [((np.arange(n) + 0.5) * m / n - 0.5).clip(0, m - 1) for n, m in zip(size, (2, 3), strict=True)]
    wanted = ndimage.map_coordinates(values.detach().numpy(), np.meshgrid(*places, indexing="ij"), order=1)
    found = film(x, condition)[0, 0] - 1 - film.linear.bias[0]
    np.testing.assert_allclose(found.detach().numpy(), wanted, atol=1e-12)


def test_bad_conditions_raise():
    film = FiLM(4, 3)
    for shape in [(2, 4), (1, 3), (2, 3, 5), (2, 3, 0, 5)]:
        with pytest.raises(
            ValueError, match=r"condition must be \(2, 3\) or \(2, 3, h, w\), as many as maps, got shape"
        ):
            film(torch.zeros(2, 4, 5, 5), torch.zeros(shape))
    for name in ("channels", "condition_channels"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            FiLM(**{"channels": 4, "condition_channels": 3, name: 0})
    assert repr(film).startswith("FiLM(\n  4, 3\n")


# Prompts


def published_prompt(state, x):
    """PromptIR's generator as its paper puts it, with the prompts repeated for each image."""
    weights = F.softmax(F.linear(x.mean((2, 3)), state["linear_layer.weight"], state["linear_layer.bias"]), dim=1)
    prompts = state["prompt_param"].unsqueeze(0).repeat(len(x), 1, 1, 1, 1, 1).squeeze(1)
    prompt = (weights[:, :, None, None, None] * prompts).sum(1)
    prompt = F.interpolate(prompt, x.shape[2:], mode="bilinear")
    return F.conv2d(prompt, state["conv3x3.weight"], padding=1)


def test_the_grid_is_that_of_promptir_names_and_numbers():
    block = PromptGenerator(6, 4, num_prompts=3, form="grid", size=5).double()
    shapes = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    assert shapes == {
        "prompt_param": (1, 3, 4, 5, 5),
        "linear_layer.weight": (3, 6),
        "linear_layer.bias": (3,),
        "conv3x3.weight": (4, 4, 3, 3),
    }
    x = normal((2, 6, 7, 9), dtype=torch.float64)
    torch.testing.assert_close(block(x), published_prompt(block.state_dict(), x))


def test_prompts_are_mixtures_and_those_of_pixels_are_local():
    block = shaken(PromptGenerator(4, 6, num_prompts=3, form="spatial"), 1.0).double()
    x = normal((2, 4, 5, 7), dtype=torch.float64)
    weights = block.conv(x).softmax(1)
    expected = sum(weights[:, i, None] * block.prompt_param[i, :, None, None] for i in range(3))
    torch.testing.assert_close(block(x), expected)
    vector = shaken(PromptGenerator(4, 6, num_prompts=3), 1.0).double()
    weights = vector.linear_layer(x.mean((2, 3))).softmax(1)
    torch.testing.assert_close(vector(x), weights @ vector.prompt_param)


def test_prompts_are_not_copied_for_the_batch():
    """A batch of 64 maps of one pixel: copies of the prompts would be 64 times these."""
    block = PromptGenerator(4, 8, num_prompts=5, form="grid", size=16)
    with torch.profiler.profile(profile_memory=True) as profile:
        block(torch.zeros(64, 4, 1, 1))
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert largest < 64 * block.prompt_param.numel() * 4


def test_bad_arguments_of_prompts_raise():
    for options in ({"form": "grid"}, {"size": 3}, {"form": "spatial", "size": 3}):
        with pytest.raises(ValueError, match='size must be given for form="grid", and for it alone, got'):
            PromptGenerator(4, 6, **options)
    with pytest.raises(ValueError, match="form must be one of vector, grid, spatial, got 'other'"):
        PromptGenerator(4, 6, form="other")
    with pytest.raises(ValueError, match="num_prompts must be an integer of at least 1, got 0"):
        PromptGenerator(4, 6, num_prompts=0)
    with pytest.raises(ValueError, match="size must be an integer of at least 1, got 0"):
        PromptGenerator(4, 6, form="grid", size=0)
    assert "PromptGenerator(\n  4, 6, form='vector', prompts=(5, 6)\n" in repr(PromptGenerator(4, 6))


# Statistics


@given(x=feature_maps(2, dtype=torch.float64), radius=st.integers(0, 4))
def test_statistics_are_those_of_each_window(x, radius):
    y = LocalStatistics(2 * radius + 1)(x).numpy()
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            window = x[:, :, max(0, i - radius) : i + radius + 1, max(0, j - radius) : j + radius + 1].numpy()
            np.testing.assert_allclose(y[:, :2, i, j], window.mean((2, 3)), atol=1e-12)
            np.testing.assert_allclose(np.expm1(y[:, 2:, i, j]), window.var((2, 3)), atol=1e-12)


def test_statistics_agree_with_scipy_inside_the_map():
    x = normal((1, 1, 30, 24), dtype=torch.float64)
    y = LocalStatistics(7)(x)[0].numpy()
    variance = ndimage.generic_filter(x[0, 0].numpy(), np.var, size=7)
    np.testing.assert_allclose(np.expm1(y[1])[3:-3, 3:-3], variance[3:-3, 3:-3], atol=1e-12)


@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_nothing_cancels_where_the_mean_is_large(mean):
    """Of E[x^2] - E[x]^2 nothing would be right in float32."""
    noise = normal((1, 1, 40, 40), dtype=torch.float64)
    x = (noise + mean).float()
    exact = LocalStatistics()(x.double())[:, 1:].expm1()
    ours = LocalStatistics()(x)[:, 1:].double().expm1()
    naive = (F.avg_pool2d(x**2, 7, 1, 3, count_include_pad=False)
             - F.avg_pool2d(x, 7, 1, 3, count_include_pad=False) ** 2).double()  # fmt: skip
    assert ((ours - exact).abs() / exact).max() < (1e-4 if mean < 1e4 else 1e-2)
    assert ((naive - exact).abs() / exact).max() > 0.05
    assert (ours >= 0).all()


def test_a_flat_map_has_no_variance_and_a_finite_gradient():
    x = torch.full((1, 2, 5, 1), 3.7, requires_grad=True)
    y = LocalStatistics(3)(x)
    assert y[:, 2:].abs().max() < 1e-12
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_statistics_gather_nothing():
    """By number, columns are gathered twenty times as slowly as they are sliced."""
    graph = torch.export.export(LocalStatistics(7), (normal((1, 2, 9, 11)),)).graph
    assert not [node for node in graph.nodes if "index" in str(node.target) or "gather" in str(node.target)]


def test_gradients_of_statistics():
    x = normal((1, 2, 3, 4), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(LocalStatistics(3), x)
    assert torch.autograd.gradgradcheck(LocalStatistics(3), x, fast_mode=True)


def test_bad_windows_raise():
    for size in (0, 2, 3.0):
        with pytest.raises(ValueError, match="window_size must be an odd integer of at least 1, got"):
            LocalStatistics(size)
    assert repr(LocalStatistics(3)) == "LocalStatistics(window_size=3)"
