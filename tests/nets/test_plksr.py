"""PLKSR and RealPLKSR: published parameter counts, and the figure written out once more."""

import pytest
import torch
from torch.nn import functional as F

from claritycore.nets import PLKSR, AutoConfig, AutoModel, PLKSRConfig
from tests.strategies import normal


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        ("plksr", {"scale": 2}, 7_365_324),
        ("plksr", {"scale": 3}, 7_373_979),
        ("plksr", {"scale": 4}, 7_386_096),
        ("plksr-tiny", {"scale": 2}, 2_349_772),
        ("plksr-tiny", {"scale": 3}, 2_358_427),
        ("plksr-tiny", {"scale": 4}, 2_370_544),
        ("realplksr", {"scale": 4}, 7_389_680),
        ("realplksr", {"scale": 4, "upsampler": "dysample"}, 7_402_243),
        ("realplksr", {"scale": 4, "num_block": 12, "kernel_size": 13, "attention": False}, 2_372_080),
        ("realplksr", {"scale": 4, "num_feat": 96}, 16_594_896),
    ],
)
def test_parameter_counts(name, fields, count):
    with torch.device("meta"):
        net = AutoModel.from_config(AutoConfig.from_name(name, **fields))
    assert sum(parameter.numel() for parameter in net.parameters()) == count


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_the_net_is_the_figure(scale):
    torch.manual_seed(0)
    net = PLKSR(PLKSRConfig(scale=scale, num_feat=8, num_block=2, kernel_size=5)).double()
    image = normal((2, 3, 7, 9), dtype=torch.float64)
    x = F.conv2d(image, net.conv_first.weight, net.conv_first.bias, padding=1)
    for block in net.body:
        x = block(x)
    x = F.conv2d(x, net.conv_last.weight, net.conv_last.bias, padding=1)
    nearest = image.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    expected = F.pixel_shuffle(x, scale) + nearest
    torch.testing.assert_close(net(image), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_the_sampled_head_reads_the_shuffled_channels_and_ends_in_a_point(scale):
    torch.manual_seed(0)
    net = PLKSR(PLKSRConfig(scale=scale, num_feat=8, num_block=1, kernel_size=5, upsampler="dysample")).double()
    with torch.no_grad():
        for parameter in [net.upsample.offset.weight, net.upsample.offset.bias]:
            parameter.zero_()
    image = normal((2, 3, 7, 9), dtype=torch.float64)
    shuffled = net.conv_last(net.features(image)[0]) + image.repeat_interleave(scale**2, dim=1)
    expected = F.interpolate(shuffled, scale_factor=float(scale), mode="bilinear", align_corners=False)
    if scale > 1:
        expected = F.conv2d(expected, net.conv_end.weight, net.conv_end.bias)
    # The grid of thirds is a float32 buffer.
    torch.testing.assert_close(net(image), expected, rtol=0, atol=1e-7 if scale == 3 else 1e-12)
    assert not net.tile_safe


def test_without_equal_channels_no_image_is_added():
    net = PLKSR(PLKSRConfig(in_channels=4, scale=2, num_feat=8, num_block=1, kernel_size=5))
    torch.nn.init.zeros_(net.conv_last.weight)
    torch.nn.init.zeros_(net.conv_last.bias)
    assert not net(normal((1, 4, 5, 5))).any()


def test_dropout_is_for_training_alone():
    net = PLKSR(PLKSRConfig(scale=2, num_feat=8, num_block=1, kernel_size=5, dropout=0.5))
    image = normal((1, 3, 6, 6))
    torch.manual_seed(0)
    assert not torch.equal(net.train()(image), net(image))
    assert torch.equal(net.eval()(image), net(image))


def test_group_norm_and_sampling_make_tiles_inexact():
    small = {"num_feat": 8, "num_block": 1, "kernel_size": 5}
    assert PLKSR(PLKSRConfig(**small)).tile_safe
    assert PLKSR(PLKSRConfig(norm="layer", **small)).tile_safe
    assert not PLKSR(PLKSRConfig(norm="group", **small)).tile_safe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 5}, "scale must be one of 1, 2, 3, 4, 8, got 5"),
        ({"num_feat": 0}, "num_feat must be an integer of at least 1, got 0"),
        ({"kernel_size": 4}, "kernel_size must be an odd integer of at least 1, got 4"),
        ({"upsampler": "nearest"}, "upsampler must be one of pixelshuffle, dysample, got 'nearest'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
        ({"form": "round"}, "form must be one of dense, dilated, rectangular, depthwise, got 'round'"),
        ({"norm": "batch"}, "norm must be one of none, layer, group, got 'batch'"),
        ({"norm": "group", "num_feat": 6}, "num_feat must be a multiple of norm_groups 4, got 6"),
        ({"norm_groups": 0}, "norm_groups must be an integer of at least 1, got 0"),
        ({"split_ratio": 0.0}, r"split_ratio must leave 1 to 64 channels to convolve, got 0\.0"),
        ({"branches": ("5x5", "triangle")}, "branch must be like one of .*; got 'triangle'"),
        ({"branches": ("19x19",)}, "branch '19x19' spans 19x19 pixels, more than kernel_size"),
        ({"attention": 1}, "attention must be one of True, False, got 1"),
        ({"activation": "relu"}, "activation must be one of gelu, mish, got 'relu'"),
    ],
)
def test_bad_sizes_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        PLKSRConfig(**fields)
