import numpy as np
import pytest
import skimage.color
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from claritycore.images import imresize, psnr, read_image, rgb_to_y, ssim

SET5 = ("baby", "bird", "butterfly", "head", "woman")


def reference_ssim(a, b, data_range):
    """scikit-image's SSIM, (C, H, W), with the window of Wang et al. wholly inside the image."""
    values = []
    for x, y in zip(a, b, strict=True):
        _, full = structural_similarity(
            x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=data_range, full=True
        )
        values.append(full[5:-5, 5:-5].mean())
    return np.mean(values)


def noisy(image, seed=0):
    return (image + 0.1 * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))).clamp(-0.1, 1.1)


def to_bytes(image):
    return (image.clamp(0, 1) * 255).round()


def test_rgb_to_y_equals_scikit_image(photo):
    expected = skimage.color.rgb2ycbcr(photo[0].permute(1, 2, 0).double().numpy())[..., 0] / 255
    np.testing.assert_allclose(rgb_to_y(photo.double())[0, 0].numpy(), expected, atol=1e-14)
    np.testing.assert_allclose(rgb_to_y(photo)[0, 0].numpy(), expected, atol=1e-6)


def test_rgb_to_y_spans_the_studio_swing():
    black_and_white = torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1).expand(2, 3, 4, 5)
    y = rgb_to_y(black_and_white)
    assert y.shape == (2, 1, 4, 5)
    torch.testing.assert_close(y[:, 0, 0, 0] * 255, torch.tensor([16.0, 235.0]).double())


@settings(deadline=None, max_examples=30)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.one_of(st.integers(11, 40), st.sampled_from([73, 74, 75, 85, 138, 139])),  # around strips of 64 rows
    width=st.integers(11, 40),
    depth=st.sampled_from([8, 16, None]),
    seed=st.integers(0, 99),
)
def test_both_equal_scikit_image(channels, height, width, depth, seed):
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(2, channels, height, width, generator=generator)
    image = noisy(target, seed)
    top = 1 if depth is None else 2**depth - 1
    a, b = image.double(), target.double()
    if depth is not None:
        a, b = (a.clamp(0, 1) * top).round(), (b * top).round()
    for sample in range(2):
        x, y = a[sample].numpy(), b[sample].numpy()
        expected = peak_signal_noise_ratio(y, x, data_range=top)
        np.testing.assert_allclose(psnr(image, target, depth=depth)[sample].item(), expected, rtol=1e-10)
        expected = reference_ssim(x, y, top)
        np.testing.assert_allclose(ssim(image, target, depth=depth)[sample].item(), expected, atol=1e-9)


def test_y_channel_rounds_rgb_and_not_the_luma(photo):
    image, photo = noisy(photo).double(), photo.double()
    y, target = rgb_to_y(to_bytes(image).double() / 255), rgb_to_y(to_bytes(photo).double() / 255)
    expected = peak_signal_noise_ratio(target.numpy(), y.numpy(), data_range=1)
    np.testing.assert_allclose(psnr(image, photo, y_channel=True).item(), expected, rtol=1e-12)
    expected = reference_ssim(y[0].numpy(), target[0].numpy(), 1)
    np.testing.assert_allclose(ssim(image, photo, y_channel=True).item(), expected, atol=1e-9)


def test_the_luma_given_as_an_image_is_rounded(photo):
    y, target = rgb_to_y(noisy(photo).double()), rgb_to_y(photo.double())
    expected = peak_signal_noise_ratio(to_bytes(target).numpy(), to_bytes(y).numpy(), data_range=255)
    np.testing.assert_allclose(psnr(y, target).item(), expected, rtol=1e-12)


def test_crop_border_leaves_out_each_side(photo):
    image = photo.clone()
    image[..., :3, :] = image[..., -3:, :] = image[..., :, :3] = image[..., :, -3:] = 0.5
    assert psnr(image, photo, crop_border=3).item() == float("inf")
    assert ssim(image, photo, crop_border=3).item() == 1
    assert psnr(image, photo, crop_border=2).item() < 50
    inner = noisy(photo)
    assert torch.equal(psnr(inner, photo, crop_border=4), psnr(inner[..., 4:-4, 4:-4], photo[..., 4:-4, 4:-4]))


def test_equal_images_are_infinitely_near(photo):
    assert psnr(photo, photo).tolist() == [float("inf")]
    assert ssim(photo, photo).tolist() == [1.0]


def test_each_sample_has_its_own_value(photo):
    batch, target = torch.cat([noisy(photo), photo, noisy(photo, 1)]), torch.cat([photo] * 3)
    for metric in (psnr, ssim):
        values = metric(batch, target)
        assert values.shape == (3,)
        assert values.dtype == torch.float64
        torch.testing.assert_close(values[2:], metric(batch[2:], target[2:]))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_gradients_flow_where_nothing_is_rounded(metric, photo):
    image, target = noisy(photo).double()[..., :12, :13].requires_grad_(), photo.double()[..., :12, :13]
    assert torch.autograd.gradcheck(lambda x: metric(x, target, depth=None), image)


def test_depth_none_neither_clamps_nor_rounds(photo):
    assert psnr(photo + 0.001, photo).item() == float("inf")
    np.testing.assert_allclose(psnr(photo.double() + 0.001, photo.double(), depth=None).item(), 60, rtol=1e-9)
    assert psnr(torch.full((1, 1, 2, 2), 1.5), torch.ones(1, 1, 2, 2)).item() == float("inf")


def set5(folder, factor):
    for name in SET5:
        image = read_image(folder / f"set5/HR/{name}.png").pixels
        height, width = (side // factor * factor for side in image.shape[2:])
        yield image[..., :height, :width]


# x4, and all of the classic protocol, are the figures of the literature.
@pytest.mark.parametrize(
    ("factor", "expected"), [(2, (33.68, 0.9304)), (3, (30.40, 0.8690)), (4, (28.43, 0.8113))], ids=str
)
def test_bicubic_on_set5_by_todays_protocol(data_folder, factor, expected):
    values = []
    for image in set5(data_folder, factor):
        restored = imresize(imresize(image, 1 / factor), factor, intermediate="float")
        options = {"crop_border": factor, "y_channel": True}
        values.append((psnr(restored, image, **options).item(), ssim(restored, image, **options).item()))
    mean = np.mean(values, axis=0)
    assert (round(mean[0], 2), round(mean[1], 4)) == expected


@pytest.mark.parametrize(
    ("factor", "expected"), [(2, (33.66, 0.9299)), (3, (30.39, 0.8682)), (4, (28.42, 0.8104))], ids=str
)
def test_bicubic_on_set5_by_the_classic_protocol(data_folder, factor, expected):
    values = []
    for image in set5(data_folder, factor):
        y = to_bytes(rgb_to_y(image)) / 255
        restored = imresize(imresize(y, 1 / factor, intermediate="float"), factor, intermediate="float")
        values.append((psnr(restored, y, crop_border=factor).item(), ssim(restored, y, crop_border=factor).item()))
    mean = np.mean(values, axis=0)
    assert (round(mean[0], 2), round(mean[1], 4)) == expected


def test_refuses_images_that_cannot_be_compared():
    for metric in (psnr, ssim):
        with pytest.raises(ValueError, match=r"must have one shape, got \(1, 3, 16, 16\) and \(1, 3, 16, 17\)"):
            metric(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 17))
        with pytest.raises(ValueError, match=r"image must be \(B, C, H, W\), got shape \(3, 16, 16\)"):
            metric(torch.zeros(3, 16, 16), torch.zeros(3, 16, 16))
        with pytest.raises(TypeError, match=r"must be floating point in \[0, 1\], got torch.uint8"):
            metric(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16))
        for border in (-1, 8):
            with pytest.raises(ValueError, match=f"crop_border must be at least 0 and leave pixels .*, got {border}"):
                metric(torch.zeros(1, 3, 16, 20), torch.zeros(1, 3, 16, 20), crop_border=border)
        with pytest.raises(ValueError, match="depth must be 8, 16 or None, got 10"):
            metric(torch.zeros(1, 3, 16, 20), torch.zeros(1, 3, 16, 20), depth=10)
        with pytest.raises(ValueError, match=r"image must be \(B, 3, H, W\), got shape \(1, 1, 16, 16\)"):
            metric(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), y_channel=True)
    with pytest.raises(ValueError, match="at least 11 x 11 pixels inside the border, got 10 x 12"):
        ssim(torch.zeros(1, 3, 16, 18), torch.zeros(1, 3, 16, 18), crop_border=3)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_refuses_a_target_of_another_range(metric, photo):
    with pytest.raises(ValueError, match=r"^images must be in \[0, 1\], got a target with values from 0 to 255$"):
        metric(255 * photo, 255 * photo.round())
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\], got a target with values from -1 to 1"):
        metric(photo, torch.where(photo > 0.5, 1.0, -1.0))
    with pytest.raises(ValueError, match="got a target with values from nan to nan"):
        metric(photo, photo * torch.nan)
    metric(photo * 1.2 - 0.1, photo)  # a restored image may overshoot
    metric(photo, photo * 1.001)


def test_rgb_to_y_refuses_other_tensors():
    with pytest.raises(TypeError, match=r"image must be floating point .* got torch.uint8"):
        rgb_to_y(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"image must be \(B, 3, H, W\), got shape \(3, 4, 4\)"):
        rgb_to_y(torch.zeros(3, 4, 4))
