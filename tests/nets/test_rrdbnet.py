"""RRDBNet: the published parameter counts and names, and the figure written out once more."""

import pytest
import torch
from torch.nn import functional as F

from claritycore.nets import AutoConfig, AutoModel, RRDBNet, RRDBNetConfig
from tests.strategies import normal


def parameters(name: str, **fields) -> int:
    with torch.device("meta"):
        net = AutoModel.from_config(AutoConfig.from_name(name, **fields))
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("name", "fields", "count"),
    [
        ("rrdbnet", {"scale": 2}, 16_771_843),
        ("rrdbnet", {"scale": 3}, 16_956_483),
        ("rrdbnet", {"scale": 4}, 16_919_555),
        ("rrdbnet", {"scale": 8}, 17_067_267),
        ("rrdbnet", {"scale": 4, "upsampler": "nearest+conv"}, 16_697_987),
        ("rrdbnet", {"scale": 2, "upsampler": "nearest+conv"}, 16_703_171),
        ("rrdbnet", {"scale": 1, "upsampler": "nearest+conv"}, 16_723_907),
        ("rrdbnet", {"scale": 2, "upsampler": "nearest+conv", "unshuffle_stem": False}, 16_661_059),
        ("rrdbnet", {"scale": 3, "upsampler": "nearest+conv"}, 16_661_059),
        ("rrdbnet", {"scale": 8, "upsampler": "nearest+conv"}, 16_734_915),
        ("rrdbnet-lite", {"scale": 4}, 1_174_243),
        ("rrdbnet", {"scale": 4, "num_feat": 32, "num_block": 6}, 2_585_443),
    ],
)
def test_parameter_counts(name, fields, count):
    assert parameters(name, **fields) == count


def test_nearest_conv_has_the_names_that_esrgan_checkpoints_have():
    net = RRDBNet(RRDBNetConfig(num_feat=4, num_block=2, num_grow_ch=2, upsampler="nearest+conv"))
    dense = {f"body.{i}.rdb{j}.conv{k}" for i in range(2) for j in (1, 2, 3) for k in (1, 2, 3, 4, 5)}
    layers = {"conv_first", "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last", *dense}
    assert set(net.state_dict()) == {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def by_hand(weights: dict[str, torch.Tensor], image: torch.Tensor, *, blocks: int, unshuffle: int, stages: int):
    """The figure of the paper, from tensors alone, with nearest upsampling and convolution."""

    def conv(x, name):
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    def lrelu(x):
        return torch.where(x > 0, x, 0.2 * x)

    first = conv(F.pixel_unshuffle(image, unshuffle), "conv_first")
    x = first
    for i in range(blocks):
        block_input = x
        for j in (1, 2, 3):
            grown = [x]
            for k in (1, 2, 3, 4):
                grown.append(lrelu(conv(torch.cat(grown, 1), f"body.{i}.rdb{j}.conv{k}")))
            x = x + 0.2 * conv(torch.cat(grown, 1), f"body.{i}.rdb{j}.conv5")
        x = block_input + 0.2 * x
    x = first + conv(x, "conv_body")
    for stage in range(1, stages + 1):
        x = lrelu(conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), f"conv_up{stage}"))
    return conv(lrelu(conv(x, "conv_hr")), "conv_last")


@pytest.mark.parametrize(
    ("scale", "unshuffle", "stages"), [(1, 4, 2), (2, 2, 2), (4, 1, 2), (8, 1, 3), (1, 1, 0), (2, 1, 1)]
)
def test_the_net_is_the_figure(scale, unshuffle, stages):
    stem = unshuffle > 1 or scale > 2
    sizes = {"num_feat": 6, "num_block": 2, "num_grow_ch": 3}
    net = RRDBNet(RRDBNetConfig(scale=scale, upsampler="nearest+conv", unshuffle_stem=stem, **sizes)).double()
    image = normal((2, 3, 8, 12), dtype=torch.float64)
    expected = by_hand(net.state_dict(), image, blocks=2, unshuffle=unshuffle, stages=stages)
    torch.testing.assert_close(net(image), expected, rtol=0, atol=1e-12)


def test_no_normalisation_layer():
    kinds = {type(module).__name__ for module in RRDBNet(RRDBNetConfig(num_block=1)).modules()}
    assert not any("Norm" in kind for kind in kinds)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 5}, "scale must be one of 1, 2, 3, 4, 8, got 5"),
        ({"num_feat": 0}, "num_feat must be an integer of at least 1, got 0"),
        ({"num_block": -1}, "num_block must be an integer of at least 1, got -1"),
        ({"scale": 4.0}, r"scale must be one of 1, 2, 3, 4, 8, got 4\.0"),
        ({"scale": "4"}, "scale must be one of 1, 2, 3, 4, 8, got '4'"),
        ({"num_block": True}, "num_block must be an integer of at least 1, got True"),
        ({"num_grow_ch": None}, "num_grow_ch must be an integer of at least 1, got None"),
        ({"upsampler": "bilinear"}, r"upsampler must be one of pixelshuffle, nearest\+conv, got 'bilinear'"),
        ({"unshuffle_stem": 1}, "unshuffle_stem must be one of True, False, got 1"),
    ],
)
def test_bad_sizes_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        RRDBNetConfig(**fields)
