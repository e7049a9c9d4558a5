"""Partial large kernels: the formulas written out once more, what each form trains and deploys, and the refusals."""

import pytest
import torch
from torch.nn import functional as F

from claritycore.blocks import (
    DoubleConvChannelMixer,
    ElementwiseAttention,
    PartialLargeKernelConv,
    PLKBlock,
    reparameterize_model,
)
from claritycore.blocks.plk import trained_branches
from tests.strategies import normal

FORMS = ("dense", "dilated", "rectangular", "depthwise")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("split_ratio", [0.25, 0.3, 1.0])
def test_only_the_first_channels_are_convolved(form, split_ratio):
    torch.manual_seed(0)
    block = PartialLargeKernelConv(8, kernel_size=9, split_ratio=split_ratio, form=form).double()
    x = normal((2, 8, 11, 6), dtype=torch.float64)
    count = int(8 * split_ratio)
    y = block(x)
    assert torch.equal(y[:, count:], x[:, count:])
    other = x.clone()
    other[:, count:] += 1
    assert torch.equal(block(other)[:, :count], y[:, :count])
    kernel = reparameterize_model(block).conv
    expected = sum(
        F.conv2d(
            x[:, :count], c.weight, c.bias, padding=(c.weight.shape[2] // 2, c.weight.shape[3] // 2), groups=c.groups
        )
        for c in kernel.children()
    )
    if form == "depthwise":
        expected = F.conv2d(expected, block.point.weight, block.point.bias)
    torch.testing.assert_close(y[:, :count], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("form", "kernel_size", "deployed"),
    [
        ("dense", 17, [(17, 17)]),
        ("dilated", 17, [(17, 17)]),
        ("dilated", 3, [(3, 3)]),
        ("rectangular", 17, [(17, 5), (5, 17)]),
        ("rectangular", 13, [(13, 5), (5, 13)]),
        ("rectangular", 3, [(3, 1), (1, 3)]),
        ("rectangular", 1, [(1, 1)]),
        ("depthwise", 17, [(17, 17)]),
        ("depthwise", 21, [(21, 21)]),
        ("depthwise", 3, [(3, 3)]),
    ],
)
def test_what_each_form_leaves(form, kernel_size, deployed):
    block = reparameterize_model(PartialLargeKernelConv(8, kernel_size=kernel_size, split_ratio=0.5, form=form))
    kernels = list(block.conv.children())
    assert [conv.kernel_size for conv in kernels] == deployed
    assert {conv.groups for conv in kernels} == {4 if form == "depthwise" else 1}


def test_the_dilated_branches_are_those_of_plksr():
    assert trained_branches("dilated", 17) == ("17x17", "5x5@1", "5x5@2", "5x5@3", "5x5@4")
    assert trained_branches("depthwise", 21) == ("21x21", "5x5", "9x9@2", "3x3@4", "3x3@5", "3x3@7")


def test_branches_can_be_chosen():
    block = PartialLargeKernelConv(8, kernel_size=9, split_ratio=0.5, branches=("9x9", "identity"))
    assert block.conv.branch_names == ("9x9", "identity")


def by_hand(block: PLKBlock, x: torch.Tensor) -> torch.Tensor:
    weights = block.state_dict()

    def conv(x, name):
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights[f"{name}.bias"], padding=weight.shape[2] // 2)

    y = x
    if "norm.weight" in weights and block.tile_safe:
        mean, variance = y.mean(1, keepdim=True), y.var(1, unbiased=False, keepdim=True)
        y = (y - mean) / (variance + 1e-6).sqrt()
        y = y * weights["norm.weight"][:, None, None] + weights["norm.bias"][:, None, None]
    activation = {
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "mish": lambda x: x * torch.tanh(F.softplus(x)),
    }
    y = conv(activation[block.mixer.activation](conv(y, "mixer.conv1")), "mixer.conv2")
    count = block.large_kernel.convolved
    y = torch.cat([conv(y[:, :count], "large_kernel.conv.branches.0.convs.0"), y[:, count:]], dim=1)
    if "attention.conv.weight" in weights:
        y = y * torch.sigmoid(conv(y, "attention.conv"))
    y = conv(y, "refine")
    if "norm.weight" in weights and not block.tile_safe:
        groups = y.unflatten(1, (4, -1))
        mean, variance = groups.mean((2, 3, 4), True), groups.var((2, 3, 4), unbiased=False, keepdim=True)
        y = ((groups - mean) / (variance + 1e-5).sqrt()).flatten(1, 2)
        y = y * weights["norm.weight"][:, None, None] + weights["norm.bias"][:, None, None]
    return x + y


@pytest.mark.parametrize("norm", ["none", "layer", "group"])
@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "mish"])
def test_the_block_is_the_figure(norm, attention, activation):
    torch.manual_seed(0)
    mixer = DoubleConvChannelMixer(16, activation=activation)
    block = PLKBlock(16, kernel_size=7, norm=norm, attention=attention, mixer=mixer).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = normal((2, 16, 9, 5), dtype=torch.float64)
    torch.testing.assert_close(block(x), by_hand(block, x), rtol=0, atol=1e-12)
    assert block.tile_safe is (norm != "group")


def test_elementwise_attention_and_the_mixer_are_their_formulas():
    torch.manual_seed(0)
    x = normal((2, 4, 5, 6), dtype=torch.float64)
    gate = ElementwiseAttention(4).double()
    torch.testing.assert_close(gate(x), x / (1 + (-gate.conv(x)).exp()), rtol=0, atol=1e-14)


@pytest.mark.parametrize("expansion", [1, 2, 3])
@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5))),
        ("mish", lambda x: x * torch.tanh((1 + x.exp()).log())),
    ],
)
def test_the_mixer_is_its_formula(expansion, activation, formula):
    torch.manual_seed(0)
    x = normal((2, 4, 5, 6), dtype=torch.float64)
    mixer = DoubleConvChannelMixer(4, expansion=expansion, activation=activation).double()
    weights = mixer.state_dict()
    assert weights["conv1.weight"].shape == (4 * expansion, 4, 3, 3)
    hidden = formula(F.conv2d(x, weights["conv1.weight"], weights["conv1.bias"], padding=1))
    expected = F.conv2d(hidden, weights["conv2.weight"], weights["conv2.bias"], padding=1)
    torch.testing.assert_close(mixer(x), expected, rtol=0, atol=1e-14)


def test_weights_start_as_those_of_plksr():
    torch.manual_seed(0)
    block = PLKBlock(64, kernel_size=13)
    for conv in (block.mixer.conv2, block.large_kernel.conv.branches[0].convs[0], block.attention.conv, block.refine):
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert block.mixer.conv1.weight.std().item() > 0.021  # torch's own start


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PartialLargeKernelConv(8, kernel_size=8), "kernel_size must be an odd integer of at least 1, got 8"),
        (lambda: PartialLargeKernelConv(8, split_ratio=0.1), r"split_ratio must leave 1 to 8 channels .*, got 0\.1"),
        (lambda: PartialLargeKernelConv(8, split_ratio=1.5), r"split_ratio must leave 1 to 8 channels .*, got 1\.5"),
        (lambda: PartialLargeKernelConv(8, form="sparse"), "form must be one of dense, .*, got 'sparse'"),
        (lambda: PartialLargeKernelConv(0), "channels must be an integer of at least 1, got 0"),
        (lambda: ElementwiseAttention(0), "channels must be an integer of at least 1, got 0"),
        (lambda: DoubleConvChannelMixer(8, expansion=0), "expansion must be an integer of at least 1, got 0"),
        (lambda: DoubleConvChannelMixer(8, activation="relu"), "activation must be one of gelu, mish, got 'relu'"),
        (lambda: DoubleConvChannelMixer(8, branches=("identity",)), "branch 'identity' .*"),
        (lambda: PLKBlock(8, mixer=DoubleConvChannelMixer(4)), "mixer must be of 8 channels, got 4"),
        (lambda: PLKBlock(8, norm="batch"), "norm must be one of none, layer, group, got 'batch'"),
        (lambda: PLKBlock(6, norm="group"), "channels must be a multiple of 4, the groups of the norm, got 6"),
        (lambda: PLKBlock(6, norm=4), "channels must be a multiple of 4, the groups of the norm, got 6"),
        (lambda: PLKBlock(6, norm=0), "norm must be an integer of at least 1, got 0"),
        (lambda: PLKBlock(6, norm=True), "norm must be one of none, layer, group, got True"),
        (lambda: PLKBlock(8, kernel_size=1025), "kernel_size must be at most 1023, got 1025"),
    ],
)
def test_bad_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
