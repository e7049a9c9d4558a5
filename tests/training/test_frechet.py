"""The Frechet distance against scipy, and the Inception network against a plain writing-out of it."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.nn import functional as F

from claritycore.training.frechet import FeatureSums, frechet_distance, patch_features, patch_places
from claritycore.training.inception import BLOCKS, Inception


def features(count, width, seed):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + seed


@pytest.mark.parametrize("width", [1, 5, 24])
def test_the_distance_is_that_of_scipy(width):
    a, b = features(60, width, 1), features(47, width, 2)
    means = [x.mean(0).numpy() for x in (a, b)]
    covariances = [np.atleast_2d(np.cov(x.numpy(), rowvar=False)) for x in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * np.trace(root)
    np.testing.assert_allclose(frechet_distance(FeatureSums.of(a), FeatureSums.of(b)), expected, rtol=1e-10)


def test_fewer_patches_than_features():
    # Rotated diagonal covariances commute: the root of their product is known.
    rotation = torch.linalg.qr(features(12, 12, 3)).Q
    scales = torch.zeros(12, dtype=torch.float64)
    scales[:3] = torch.tensor([1.0, 2.0, 3.0])
    cube = torch.cat([torch.eye(12, dtype=torch.float64), -torch.eye(12, dtype=torch.float64)])
    a, b = (FeatureSums.of((cube * values) @ rotation.mT) for values in (scales, 2 * scales.flip(0) + scales))
    deviations = [values.square() * 2 / 23 for values in (scales, 2 * scales.flip(0) + scales)]
    expected = (deviations[0].sqrt() - deviations[1].sqrt()).square().sum().item()
    np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-12)
    assert abs(frechet_distance(a, a)) < 1e-12


def test_sums_of_parts_are_those_of_the_whole():
    a = features(30, 6, 4)
    whole, parts = FeatureSums.of(a), FeatureSums.of(a[:11]) + FeatureSums.of(a[11:])
    assert whole.count == parts.count == 30
    for one, other in zip(whole.moments(), parts.moments(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whole.moments()[1].numpy(), np.cov(a.numpy(), rowvar=False), rtol=1e-10)


def test_one_patch_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 patches, got 1"):
        frechet_distance(FeatureSums.of(features(1, 3, 0)), FeatureSums.of(features(5, 3, 0)))


@pytest.mark.parametrize(("height", "width"), [(255, 999), (256, 256), (511, 512), (512, 512), (600, 1024)])
def test_patches_are_a_grid_and_its_shift(height, width):
    rows, columns = height // 256, width // 256
    expected = {(256 * i, 256 * j) for i in range(rows) for j in range(columns)}
    expected |= {(128 + 256 * i, 128 + 256 * j) for i in range(rows - 1) for j in range(columns - 1)}
    assert set(patch_places(height, width)) == expected


def test_patches_are_looked_at_one_by_one():
    image = torch.rand(1, 3, 600, 1300, generator=torch.Generator().manual_seed(0))
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    seen = patch_features(pool, image)
    cuts = [image[..., top : top + 256, left : left + 256] for top, left in patch_places(600, 1300)]
    assert seen.count == len(cuts) == 14
    torch.testing.assert_close(seen.total, sum(cut.mean((0, 2, 3)) for cut in cuts).double(), rtol=1e-6, atol=0)


# The network


def conv(state, name, x, stride=1, padding=0):
    """A convolution, batch norm in eval mode and ReLU, from their formulas."""
    weight = state[f"{name}.conv.weight"]
    y = F.conv2d(x, weight, None, stride, padding)
    mean, var, gamma, beta = (
        state[f"{name}.bn.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return ((y - mean) / (var + 0.001).sqrt() * gamma + beta).clamp(min=0)


def average(x):
    """Mean over 3 x 3 pixels, of those that there are."""
    return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)


def mixed_5(s, n, x):
    a = conv(s, f"{n}.branch1x1", x)
    b = conv(s, f"{n}.branch5x5_2", conv(s, f"{n}.branch5x5_1", x), padding=2)
    c = conv(s, f"{n}.branch3x3dbl_2", conv(s, f"{n}.branch3x3dbl_1", x), padding=1)
    c = conv(s, f"{n}.branch3x3dbl_3", c, padding=1)
    return torch.cat([a, b, c, conv(s, f"{n}.branch_pool", average(x))], 1)


def mixed_6(s, n, x):
    a = conv(s, f"{n}.branch1x1", x)
    b = conv(s, f"{n}.branch7x7_2", conv(s, f"{n}.branch7x7_1", x), padding=(0, 3))
    b = conv(s, f"{n}.branch7x7_3", b, padding=(3, 0))
    c = conv(s, f"{n}.branch7x7dbl_1", x)
    for place, padding in ((2, (3, 0)), (3, (0, 3)), (4, (3, 0)), (5, (0, 3))):
        c = conv(s, f"{n}.branch7x7dbl_{place}", c, padding=padding)
    return torch.cat([a, b, c, conv(s, f"{n}.branch_pool", average(x))], 1)


def mixed_7(s, n, x, pooled):
    a = conv(s, f"{n}.branch1x1", x)
    b = conv(s, f"{n}.branch3x3_1", x)
    b = [conv(s, f"{n}.branch3x3_2a", b, padding=(0, 1)), conv(s, f"{n}.branch3x3_2b", b, padding=(1, 0))]
    c = conv(s, f"{n}.branch3x3dbl_2", conv(s, f"{n}.branch3x3dbl_1", x), padding=1)
    c = [conv(s, f"{n}.branch3x3dbl_3a", c, padding=(0, 1)), conv(s, f"{n}.branch3x3dbl_3b", c, padding=(1, 0))]
    return torch.cat([a, *b, *c, conv(s, f"{n}.branch_pool", pooled)], 1)


def written_out(s, image):
    x = 2 * F.interpolate(image, (299, 299), mode="bilinear", align_corners=False) - 1
    x = conv(s, "Conv2d_2a_3x3", conv(s, "Conv2d_1a_3x3", x, stride=2))
    x = F.max_pool2d(conv(s, "Conv2d_2b_3x3", x, padding=1), 3, 2)
    x = F.max_pool2d(conv(s, "Conv2d_4a_3x3", conv(s, "Conv2d_3b_1x1", x)), 3, 2)
    for letter in "bcd":
        x = mixed_5(s, f"Mixed_5{letter}", x)
    n = "Mixed_6a"
    c = conv(s, f"{n}.branch3x3dbl_2", conv(s, f"{n}.branch3x3dbl_1", x), padding=1)
    c = conv(s, f"{n}.branch3x3dbl_3", c, stride=2)
    x = torch.cat([conv(s, f"{n}.branch3x3", x, stride=2), c, F.max_pool2d(x, 3, 2)], 1)
    for letter in "bcde":
        x = mixed_6(s, f"Mixed_6{letter}", x)
    n = "Mixed_7a"
    a = conv(s, f"{n}.branch3x3_2", conv(s, f"{n}.branch3x3_1", x), stride=2)
    c = conv(s, f"{n}.branch7x7x3_2", conv(s, f"{n}.branch7x7x3_1", x), padding=(0, 3))
    c = conv(s, f"{n}.branch7x7x3_4", conv(s, f"{n}.branch7x7x3_3", c, padding=(3, 0)), stride=2)
    x = torch.cat([a, c, F.max_pool2d(x, 3, 2)], 1)
    x = mixed_7(s, "Mixed_7b", x, average(x))
    x = mixed_7(s, "Mixed_7c", x, F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-torch.inf), 3, 1))
    return x.mean((2, 3))


class Unloaded(Inception):
    """The network without weights."""

    def _load(self, path):
        pass


def shapes():
    return {key: value.shape for key, value in Unloaded("").state_dict().items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights such that the values of all layers are near 1; and what it holds."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes().items():
        if key.endswith("conv.weight"):
            fan = shape[1:].numel()
            state[key] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
        elif not key.endswith("num_batches_tracked"):
            state[key] = torch.rand(shape, generator=generator) * 0.5 + (0.75 if key[-4:] != "bias" else 0)
            state[key] -= 0.9 if key.endswith("mean") else 0
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path, state


def test_the_network_is_the_published_one():
    found = shapes()
    # Of the 23,834,568 parameters of Inception v3 with 1000 classes, those before the classifier of 2,049,000.
    counted = {key: shape.numel() for key, shape in found.items()}
    assert sum(n for key, n in counted.items() if key.endswith(("conv.weight", "bn.weight", "bn.bias"))) == 21_785_568
    assert sum(key.endswith("running_mean") for key in found) == 94
    assert found["Mixed_6c.branch7x7dbl_4.conv.weight"] == (160, 160, 7, 1)
    assert found["Mixed_7c.branch_pool.conv.weight"] == (192, 2048, 1, 1)
    assert len(BLOCKS) == 11


@pytest.mark.parametrize("channels", [1, 3])
def test_features_are_those_of_the_formulas(weights, channels):
    path, state = weights
    image = torch.rand(2, channels, 70, 90, generator=torch.Generator().manual_seed(1))
    found = Inception(path)(image)
    expected = written_out({key: value.double() for key, value in state.items()}, image.double().expand(-1, 3, -1, -1))
    assert found.shape == (2, 2048)
    assert expected.abs().mean() > 0.01
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_another_file_is_refused(weights, tmp_path):
    path, state = weights
    net = Inception(path)
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    torch.save({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.pth")
    with pytest.raises(ValueError, match="does not hold the weights by which FID is defined"):
        Inception(tmp_path / "torchvision.pth")
    del state["Mixed_5b.branch1x1.bn.bias"]
    torch.save({**state, "fc.weight": torch.zeros(1008, 2048)}, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"1 missing \(first Mixed_5b.branch1x1.bn.bias\)"):
        Inception(tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        Inception(tmp_path / "nowhere.pth")
