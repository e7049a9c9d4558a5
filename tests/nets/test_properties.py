"""What every net keeps: any H and W, any scale, any number of channels; the files it writes; what it says of itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from claritycore.blocks import BicubicUp, reparameterize_model
from claritycore.nets import AutoModel, Aux, RestorationNet, RestorationOutput, RSFMoENet, UNet
from tests.small_nets import NETS, made
from tests.strategies import feature_maps, normal

SCALES = (1, 2, 3, 4, 8)

pytestmark = pytest.mark.parametrize("build", NETS.values(), ids=NETS.keys())


@given(data=st.data(), scale=st.sampled_from(SCALES))
def test_any_height_and_width_and_every_scale(build, data, scale):
    image, net = data.draw(feature_maps(3, sides=st.integers(1, 80))), made(build, scale=scale)
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            restored = net(image)
        assert tuple(restored.shape) == (len(image), 3, scale * image.shape[2], scale * image.shape[3])
        assert restored.isfinite().all()


def what_is_added(net: RestorationNet, image: Tensor, restored: Tensor) -> Tensor:
    """What a net makes beside its long skip, in which errors of the rest would hide."""
    return restored - BicubicUp(net.config.scale)(image) if getattr(net.config, "long_skip", False) else restored


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.05)], ids=str)
@given(scale=st.sampled_from(SCALES))
def test_dtype_is_kept(build, dtype, tolerance, scale):
    net = made(build, scale=scale)
    image = normal((1, 3, 9, 6)).to(dtype).float()
    with torch.no_grad():
        exact = net(image)
        restored = net.to(dtype)(image.to(dtype))
    assert restored.dtype == dtype
    rounding = torch.finfo(dtype).eps * exact.norm()  # of the sum with the long skip
    assert (restored.float() - exact).norm() < tolerance * what_is_added(net, image, exact).norm() + rounding


@given(data=st.data(), scale=st.sampled_from(SCALES))
def test_eval_repeats_bit_for_bit_and_samples_do_not_see_each_other(build, data, scale):
    image = data.draw(feature_maps(3, sides=st.integers(1, 12), dtype=torch.float64))
    net, before = made(build, scale=scale).double(), image.clone()
    with torch.no_grad():
        restored = net(image)
        assert torch.equal(net(image), restored)
        batch = net(torch.cat([image, normal(tuple(image.shape), dtype=torch.float64, seed=1)]))
        last = net(image.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(batch[: len(image)], restored, rtol=0, atol=1e-12)
    torch.testing.assert_close(last, restored, rtol=0, atol=1e-12)
    assert torch.equal(image, before)


@pytest.mark.parametrize("scale", SCALES)
def test_autocast_returns_the_dtype_of_the_image(build, scale):
    net = made(build, scale=scale)
    image = normal((1, 3, 9, 6))
    with torch.no_grad():
        exact = net(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            restored = net(image)
    assert restored.dtype == torch.float32
    assert (restored - exact).norm() < 0.05 * what_is_added(net, image, exact).norm()


@pytest.mark.parametrize(("in_channels", "out_channels"), [(1, 1), (12, 12), (4, 3)])
def test_any_number_of_channels(build, in_channels, out_channels):
    net = made(build, scale=2, in_channels=in_channels, out_channels=out_channels)
    assert tuple(net(normal((2, in_channels, 5, 7))).shape) == (2, out_channels, 10, 14)


def test_aux_and_features(build):
    net = made(build, scale=2)
    image = normal((1, 3, 8, 8))
    output = net(image, return_aux=True)
    assert isinstance(output, RestorationOutput)
    assert torch.equal(output.image, net(image))
    assert isinstance(output.aux, Aux)
    assert output.aux.total().ndim == 0
    features = net.features(image)
    assert isinstance(features, list)
    assert all((f.ndim, len(f), f.dtype) == (4, len(image), image.dtype) for f in features)


@given(scale=st.sampled_from(SCALES))
def test_every_parameter_gets_a_gradient(build, scale):
    net = made(build, scale=scale).train()
    output = net(normal((2, 3, 7, 9)), return_aux=True)
    (output.image.square().mean() + output.aux.total()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


@given(scale=st.sampled_from(SCALES), data=st.data())
def test_a_crop_with_the_receptive_radius_around_it_gives_the_same_pixels(build, scale, data):
    net = made(build, scale=scale).double()
    if not net.tile_safe:
        pytest.skip("reaches the whole map")
    margin, step = net.receptive_radius, net.tile_multiple
    margin += -margin % step
    size = 2 * margin + 4 * step
    whole = normal((1, 3, size + 3 * step, size + 3 * step), dtype=torch.float64)
    top, left = (step * data.draw(st.integers(0, 3)) for _ in range(2))
    with torch.no_grad():
        expected, tile = net(whole), net(whole[..., top : top + size, left : left + size])
    inside = slice(scale * margin, scale * (size - margin))
    expected = expected[..., scale * top : scale * (top + size), scale * left : scale * (left + size)]
    torch.testing.assert_close(tile[..., inside, inside], expected[..., inside, inside], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
def test_receptive_radius_is_exact(build, scale):
    net = made(build, scale=scale).double()
    if not net.tile_safe:
        pytest.skip("reaches the whole map")
    if isinstance(net, UNet) and scale not in (1, 4):
        pytest.skip("of these heads, those of two scales say enough: a gradient for each pixel of a cell takes seconds")
    radius, step = net.receptive_radius, net.tile_multiple
    middle = step * ((radius + step) // step + 1)
    image = normal((1, 3, 2 * middle + step, 2 * middle + step), dtype=torch.float64).requires_grad_()
    restored, reach = net(image), 0
    for pixel in range(middle, middle + step):  # a stem that unshuffles sees further from one side of a cell
        own = slice(scale * pixel, scale * (pixel + 1))
        (gradient,) = torch.autograd.grad(restored[..., own, own].square().sum(), image, retain_graph=True)
        touched = gradient.abs().sum((0, 1)).nonzero()
        reach = max(reach, pixel - touched.min().item(), touched.max().item() - pixel)
    # Of windows and of strides, what is stated is a bound: the largest reaches of two layers need not meet.
    assert radius / 2 < reach <= radius if isinstance(net, UNet) else reach == radius


@pytest.mark.parametrize("scale", SCALES)
def test_compiles_and_exports(build, scale):
    net = made(build, scale=scale)
    if isinstance(net, UNet) and scale not in (1, 4):
        pytest.skip("two scales: without a head and with one of several steps; each takes ten seconds")
    image = normal((1, 3, 8, 12))
    expected = net(image)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), expected, rtol=1e-5, atol=1e-5)
    if isinstance(net, UNet) and scale == 4:
        return  # which the next test exports for all sizes
    program = torch.export.export(net, (image,))
    torch.testing.assert_close(program.module()(image), expected, rtol=1e-5, atol=1e-5)


def test_exports_with_any_batch_height_and_width(build):
    net = made(build, scale=4)
    # torch takes what is 1 in its example for a constant: more than one window of experts each way there.
    example, other = ((24, 27), (29, 22)) if isinstance(net, RSFMoENet) else ((8, 11), (13, 6))
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(net, (normal((2, 3, *example)),), dynamic_shapes={"image": sizes})
    image = normal((3, 3, *other))
    torch.testing.assert_close(program.module()(image), net(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_a_deployed_net_computes_the_same_and_comes_back_from_a_file(build, scale, tmp_path):
    net = made(build, scale=scale)
    image = normal((1, 3, 5, 6), dtype=torch.float64)
    expected = net.double()(image)
    deployed = reparameterize_model(net)
    torch.testing.assert_close(deployed(image), expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    deployed = deployed.float()
    again = AutoModel.from_pretrained(deployed.save_pretrained(tmp_path / "net.safetensors")).eval()
    assert list(again.state_dict()) == list(deployed.state_dict())
    assert torch.equal(again(image.float()), deployed(image.float()))


@pytest.mark.parametrize("scale", SCALES)
def test_a_saved_net_comes_back_the_same(build, scale, tmp_path):
    net = made(build, scale=scale, seed=1)
    path = net.save_pretrained(tmp_path / "net.safetensors")
    again = AutoModel.from_pretrained(path).eval()
    assert again.config == net.config
    image = normal((1, 3, 5, 6))
    assert torch.equal(again(image), net(image))
    assert torch.equal(type(net).from_pretrained(path).eval()(image), net(image))


def test_prints_its_config(build):
    net = build(scale=2)
    assert "scale=2" in repr(net.config)
    assert f"  {net.config!r}\n" in repr(net)


def test_wrong_images_raise(build):
    net = made(build)
    with pytest.raises(
        ValueError, match=r"takes images \(B, C, H, W\) with C = 3 channels and H, W >= 1, got \(1, 4, 8, 8\)"
    ):
        net(torch.zeros(1, 4, 8, 8))
    with pytest.raises(
        ValueError, match=r"takes images \(B, C, H, W\) with C = 3 channels and H, W >= 1, got \(3, 8, 8\)"
    ):
        net(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match=r"and H, W >= 1, got \(1, 3, 0, 8\)"):
        net(torch.zeros(1, 3, 0, 8))
    with pytest.raises(TypeError, match=r"takes floating-point images in \[0, 1\], got torch.uint8"):
        net(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_runs_on_meta(build):
    net = build(scale=4).to("meta")
    assert tuple(net(torch.empty(1, 3, 10, 20, device="meta")).shape) == (1, 3, 40, 80)
