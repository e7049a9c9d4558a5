"""VGG and LPIPS losses with random weights in the public layouts, against a plain computation layer by layer."""

import math
import re

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from claritycore.training.feature_nets import FeatureNet, read_feature_net, standardize
from claritycore.training.perceptual import FeatureLoss, LPIPSLoss, VGGLoss
from claritycore.training.pyramid import texture

# As the papers draw them: widths of 3x3 convolutions each followed by a ReLU, and "M" for a pooling.
VGG16 = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
VGG19 = [64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M", 512, 512, 512, 512, "M", 512, 512, 512, 512, "M"]
ALEXNET = {0: (3, 64, 11), 3: (64, 192, 5), 6: (192, 384, 3), 8: (384, 256, 3), 10: (256, 256, 3)}


def weights_of(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for index, (inputs, outputs, kernel) in shapes.items():
        scale = math.sqrt(2 / (inputs * kernel**2))
        weight = torch.empty(outputs, inputs, kernel, kernel).normal_(0, scale, generator=generator)
        state[f"features.{index}.weight"] = weight.half()  # exact when it is read as float32, and half the file
        state[f"features.{index}.bias"] = torch.empty(outputs).normal_(0, 0.1, generator=generator).half()
    return state


def vgg_shapes(layers):
    shapes, index, inputs = {}, 0, 3
    for width in layers:
        if width == "M":
            index += 1
        else:
            shapes[index], inputs, index = (inputs, width, 3), width, index + 2
    return shapes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of the three networks and of the heads of two, gone again afterwards: they are large."""
    folder = tmp_path_factory.mktemp("weights")
    states = {"vgg16": weights_of(vgg_shapes(VGG16)), "vgg19": weights_of(vgg_shapes(VGG19))}
    states["alexnet"] = weights_of(ALEXNET)
    for name, widths in {"vgg16 heads": (64, 128, 256, 512, 512), "alexnet heads": (64, 192, 384, 256, 256)}.items():
        generator = torch.Generator().manual_seed(1)
        states[name] = {
            f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for i, c in enumerate(widths)
        }
    # A classifier comes with torchvision's files; it is not looked at.
    states["vgg19"]["classifier.0.bias"] = torch.zeros(4)
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pth")
    yield {name: (folder / f"{name}.pth", state) for name, state in states.items()}
    for name in states:
        (folder / f"{name}.pth").unlink()


def pair(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, *shape, generator=generator, dtype=torch.float64).to(dtype).unbind(0)


def plain_vgg(state, x):
    """Every map of a VGG by torchvision's index."""
    maps, x = {}, x.double()
    for index in range(37):
        if f"features.{index}.weight" in state:
            x = F.conv2d(x, *(state[f"features.{index}.{kind}"].double() for kind in ("weight", "bias")), padding=1)
        elif f"features.{index - 1}.weight" in state:
            x = x.clamp(min=0)
        elif min(x.shape[2:]) > 1:
            x = F.max_pool2d(x, 2)
        else:
            break
        maps[index] = x
    return maps


def plain_alexnet(state, x):
    maps, x = {}, x.double()
    for index, (stride, padding) in {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}.items():
        weight, bias = (state[f"features.{index}.{kind}"].double() for kind in ("weight", "bias"))
        x = maps[index + 1] = F.conv2d(x, weight, bias, stride, padding).clamp(min=0)
        if index in (0, 3):
            x = F.max_pool2d(x, 3, 2)
    return maps


def imagenet(x):
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (x - mean[:, None, None]) / std[:, None, None]


def lpips_scaling(x):
    shift, scale = (torch.tensor(v, dtype=torch.float64) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    return ((2 * x - 1) - shift[:, None, None]) / scale[:, None, None]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vgg16", {2: 0.1, 7: 0.1, 14: 1, 21: 1, 28: 1}),
        ("vgg19", {2: 0.1, 7: 0.1, 16: 1, 25: 1, 34: 1}),  # conv1_2, conv2_2, conv3_4, conv4_4, conv5_4
    ],
)
def test_the_vgg_loss_equals_its_formula(name, layers, files):
    path, state = files[name]
    a, b = pair(2, 3, 19, 16)
    maps_a, maps_b = plain_vgg(state, imagenet(a)), plain_vgg(state, imagenet(b))
    expected = sum(weight * (maps_a[i] - maps_b[i]).abs().mean() for i, weight in layers.items())
    loss = VGGLoss(path)
    torch.testing.assert_close(loss(a, b), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss(a.float(), b.float()), expected.float(), rtol=1e-4, atol=0)
    textures = (imagenet(texture(x, 2)) for x in (a, b))
    maps_a, maps_b = (plain_vgg(state, x) for x in textures)
    expected = sum(weight * (maps_a[i] - maps_b[i]).abs().mean() for i, weight in layers.items())
    torch.testing.assert_close(VGGLoss(path, high_pass=2)(a, b), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["vgg16", "alexnet"])
def test_lpips_equals_its_formula(name, files):
    (path, state), (heads_path, heads) = files[name], files[f"{name} heads"]
    layers = {"vgg16": (3, 8, 15, 22, 29), "alexnet": (1, 4, 7, 9, 11)}[name]
    plain = plain_vgg if name == "vgg16" else plain_alexnet
    a, b = pair(2, 3, 35, 31)
    maps_a, maps_b = plain(state, lpips_scaling(a)), plain(state, lpips_scaling(b))
    expected = torch.zeros(2, 1, 1, 1, dtype=torch.float64)
    for place, index in enumerate(layers):
        x, y = (m[index] / (m[index].square().sum(1, keepdim=True).sqrt() + 1e-10) for m in (maps_a, maps_b))
        error = F.conv2d((x - y) ** 2, heads[f"lin{place}.model.1.weight"].double())
        expected = expected + error.mean((2, 3), keepdim=True)
    loss = LPIPSLoss(path, heads_path)
    torch.testing.assert_close(loss(a, b), expected.mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(loss(a[:1], b[:1]), expected[0].mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(loss(a.float(), b.float()), expected.mean().float(), rtol=1e-4, atol=0)
    texture_alone = LPIPSLoss(path, heads_path, high_pass=1)(a, b)
    torch.testing.assert_close(texture_alone, loss(texture(a, 1), texture(b, 1)), rtol=1e-9, atol=0)


@pytest.fixture(scope="module")
def losses(files):
    shallow = {"conv1_2": 0.1, "relu2_1": 2.0}
    return {
        "vgg": VGGLoss(files["vgg16"][0], layers=shallow),
        "lpips": LPIPSLoss(files["alexnet"][0], files["alexnet heads"][0]),
    }


@pytest.mark.parametrize("name", ["vgg", "lpips"])
def test_perceptual_losses_keep_what_every_loss_keeps(name, losses):
    loss = losses[name]
    a, b = pair(1, 3, 33, 32, dtype=torch.float32)
    image = b.clone().requires_grad_()
    assert loss(image, b) == 0
    (gradient,) = torch.autograd.grad(loss(image, b), image)
    assert gradient.abs().max() == 0
    torch.testing.assert_close(loss(a, b), loss(b, a))
    (gradient,) = torch.autograd.grad(loss(image, a), image)
    assert gradient.abs().max() > 0
    narrow = loss(a.half(), b.half())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, loss(a.half().float(), b.half().float()))
    grey = a[:, :1], b[:, :1]
    torch.testing.assert_close(loss(*grey), loss(*(x.expand(1, 3, -1, -1) for x in grey)))


@pytest.mark.parametrize("name", ["vgg", "lpips"])
def test_the_gradient_is_that_of_the_loss(name, losses):
    a, b = pair(1, 1, 31, 31)
    a, loss = a[..., :2, :2].clone().requires_grad_(), losses[name]

    def at_a_corner(corner):
        image = b.clone()
        image[..., 14:16, 14:16] = corner
        return loss(image, b)

    assert torch.autograd.gradcheck(at_a_corner, a, atol=1e-6)


def test_autocast_changes_nothing(losses):
    a, b = pair(1, 3, 32, 32, dtype=torch.float32)
    for loss in losses.values():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = loss(a, b)
        assert torch.equal(inside, loss(a, b))


def test_features_that_are_all_zero_have_a_finite_gradient(files, tmp_path):
    state = {key: value - 100 if "bias" in key else value for key, value in files["alexnet"][1].items()}
    save_file(state, tmp_path / "dark.safetensors")
    image = torch.rand(1, 3, 31, 31).requires_grad_()
    loss = LPIPSLoss(tmp_path / "dark.safetensors", files["alexnet heads"][0])(image, torch.rand(1, 3, 31, 31))
    (gradient,) = torch.autograd.grad(loss, image)
    assert loss == 0
    assert gradient.abs().max() == 0


def test_weights_are_frozen_and_no_random_number_is_drawn(files):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    loss = LPIPSLoss(files["alexnet"][0], files["alexnet heads"][0])
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for p in loss.parameters()} == {torch.float32}
    assert not any(p.requires_grad or p.is_meta for p in loss.parameters())
    assert isinstance(loss, FeatureLoss)
    assert [key for key in loss.net.state_dict() if key.startswith("features.0.")] == [
        "features.0.weight",
        "features.0.bias",
    ]


@pytest.mark.parametrize(
    ("architecture", "layers", "side"),
    [
        ("vgg19", ["conv5_4"], 16),
        ("vgg16", ["conv1_2"], 1),
        ("alexnet", ["relu3_3"], 31),
        ("alexnet", ["conv1_1"], 7),
    ],
)
def test_the_smallest_image_that_leaves_a_pixel_is_known(architecture, layers, side):
    with torch.device("meta"):
        net = FeatureNet(architecture, layers)
        (features,) = net(torch.rand(1, 3, side, side))
    assert net.smallest == side
    assert min(features.shape) >= 1
    if side > 1:
        message = rf"{architecture} to the depth of {layers[0]} takes images of at least {side} x {side} pixels, got "
        with pytest.raises(ValueError, match=message + f"{side - 1} x 40"):
            net(torch.rand(1, 3, side - 1, 40, device="meta"))


def test_standardize_takes_channels_as_they_are_or_one_for_all():
    image = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(standardize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), imagenet(image))
    torch.testing.assert_close(standardize(image[:, :1], (0, 0, 0), (1, 1, 1)), image[:, :1].expand(-1, 3, -1, -1))


def test_what_is_missing_is_told(files, tmp_path):
    with pytest.raises(ValueError, match=r"VGGLoss needs weights=FILE, vgg19 or vgg16 in torchvision's layout, as htt"):
        VGGLoss()
    with pytest.raises(ValueError, match=r"LPIPSLoss needs weights=FILE, alexnet or vgg16 in torchvision's layout, as"):
        LPIPSLoss()
    with pytest.raises(ValueError, match=r"LPIPSLoss needs heads=FILE, alex.pth or vgg.pth of https://github.com/rich"):
        LPIPSLoss(files["alexnet"][0])
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*none.pth"):
        VGGLoss(tmp_path / "none.pth")


def test_another_file_is_told(files, tmp_path):
    heads, alexnet = files["alexnet heads"][0], files["alexnet"][0]
    message = re.escape(f"{alexnet} is not in torchvision's layout of vgg19 or vgg16, as https://download.pytorch.org/")
    with pytest.raises(ValueError, match=message):
        VGGLoss(alexnet)
    with pytest.raises(ValueError, match=r"is not in torchvision's layout of alexnet or vgg16, as https.* or https"):
        LPIPSLoss(heads, heads)
    with pytest.raises(ValueError, match=r"does not hold the LPIPS heads of alexnet: lin1.model.1.weight has the shap"):
        LPIPSLoss(alexnet, files["vgg16 heads"][0])
    with pytest.raises(ValueError, match=r"does not hold the LPIPS heads of alexnet: lin0.model.1.weight is missing"):
        LPIPSLoss(alexnet, alexnet)
    state = files["alexnet"][1]
    save_file(state | {"features.3.weight": torch.zeros(192, 64, 3, 3)}, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"does not fit FeatureNet: of its tensors 1 of another shape \(first feat"):
        read_feature_net(tmp_path / "odd.safetensors", lambda architecture: ["conv2_1"])
    save_file({k: v for k, v in state.items() if k != "features.3.bias"}, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"does not fit FeatureNet: of its tensors 1 missing \(first features.3.bias"):
        read_feature_net(tmp_path / "less.safetensors", lambda architecture: ["conv2_1"])


def test_bad_arguments_are_told(files, losses):
    path = files["vgg16"][0]
    with pytest.raises(ValueError, match=r"high_pass must be an integer of at least 0, got -1"):
        VGGLoss(path, high_pass=-1)
    with pytest.raises(ValueError, match=r"high_pass must be an integer of at least 0, got 0.5"):
        LPIPSLoss(path, path, high_pass=0.5)
    with pytest.raises(ValueError, match=r"vgg16 has no layer 'conv3_4'; it has conv1_1, relu1_1, .*, pool5"):
        VGGLoss(path, layers={"conv3_4": 1.0})
    with pytest.raises(ValueError, match=r"layers must name at least one layer, got none"):
        VGGLoss(path, layers={})
    with pytest.raises(ValueError, match=r"the weight of layer 'conv1_2' must be positive and finite, got 0"):
        VGGLoss(path, layers={"conv1_2": 0})
    with pytest.raises(TypeError, match=r"layers must map names to weights, got \['conv1_2'\]"):
        VGGLoss(path, layers=["conv1_2"])
    with pytest.raises(ValueError, match=r"architecture must be one of vgg16, vgg19, alexnet, got 'resnet'"):
        FeatureNet("resnet", ["conv1_1"])
    with pytest.raises(ValueError, match=r"VGGLoss takes images of 1 or 3 channels, got 4"):
        losses["vgg"](torch.rand(1, 4, 32, 32), torch.rand(1, 4, 32, 32))
    with pytest.raises(ValueError, match=r"alexnet to the depth of .* takes images of at least 31 x 31 pixels, got 30"):
        losses["lpips"](torch.rand(1, 3, 30, 32), torch.rand(1, 3, 30, 32))
