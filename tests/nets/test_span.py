"""SPAN: published parameter counts in both forms, and the figure written out once more."""

import pytest
import torch
from torch.nn import functional as F

from claritycore.blocks import reparameterize_model
from claritycore.nets import SPAN, AutoConfig, AutoModel, SPANConfig
from tests.strategies import normal


@pytest.mark.parametrize(
    ("num_feat", "scale", "trained", "deployed"),
    [
        (48, 4, 1_840_488, 426_288),
        (48, 2, None, 410_700),
        (52, 4, None, 498_208),
        (52, 2, None, 481_324),
        (28, 4, None, 150_688),
        (28, 2, None, 141_580),
        (26, 4, None, 130_828),
    ],
)
def test_parameter_counts(num_feat, scale, trained, deployed):
    with torch.device("meta"):
        net = AutoModel.from_config(AutoConfig.from_name("span", scale=scale, num_feat=num_feat)).eval()
    count = sum(parameter.numel() for parameter in net.parameters())
    assert trained is None or count == trained
    assert sum(parameter.numel() for parameter in reparameterize_model(net).parameters()) == deployed


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_net_is_the_figure(scale, normalize):
    torch.manual_seed(0)
    net = SPAN(SPANConfig(scale=scale, num_feat=6, num_block=3, normalize=normalize)).double().eval()
    image = normal((2, 3, 7, 9), dtype=torch.float64)
    weights = reparameterize_model(net).state_dict()

    def conv(x, name):
        return F.conv2d(
            x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=weights[f"{name}.weight"].shape[2] // 2
        )

    mean = torch.tensor([0.4488, 0.4371, 0.4040])[:, None, None].double()
    first = conv((image - mean) * 255 if normalize else image, "conv_first.fused")
    x, outputs = first, []
    for i in range(3):
        middle = F.silu(conv(x, f"body.{i}.conv1.fused"))
        z = conv(F.silu(conv(middle, f"body.{i}.conv2.fused")), f"body.{i}.conv3.fused")
        x = (z + x) * (torch.sigmoid(z) - 0.5)
        outputs.append(x)
    joined = torch.cat([first, conv(x, "conv_body.fused"), outputs[0], middle], dim=1)
    expected = F.pixel_shuffle(conv(conv(joined, "conv_cat"), "conv_last"), scale)
    torch.testing.assert_close(net(image), expected, rtol=0, atol=1e-11 * expected.abs().max().item())


def test_other_images_have_the_mean_of_the_three_taken_off():
    net = SPAN(SPANConfig(in_channels=1, out_channels=1, num_feat=4, num_block=1))
    assert net.mean.item() == pytest.approx((0.4488 + 0.4371 + 0.4040) / 3)
    assert "mean" not in net.state_dict()


@pytest.mark.parametrize("assign", [False, True])
def test_one_that_was_made_on_meta_has_the_mean_once_its_weights_are_loaded(assign):
    config, image = SPANConfig(num_feat=4, num_block=1), normal((1, 3, 5, 6))
    with torch.device("meta"):
        net = SPAN(config)
    if not assign:
        net = net.to_empty(device="cpu")
    source = SPAN(config)
    net.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(net.eval()(image), source.eval()(image))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": 5}, "scale must be one of 1, 2, 3, 4, 8, got 5"),
        ({"num_feat": 0}, "num_feat must be an integer of at least 1, got 0"),
        ({"normalize": "no"}, "normalize must be one of True, False, got 'no'"),
        ({"num_block": 2.0}, r"num_block must be an integer of at least 1, got 2\.0"),
    ],
)
def test_bad_sizes_raise(fields, message):
    with pytest.raises(ValueError, match=message):
        SPANConfig(**fields)
