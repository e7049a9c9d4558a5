"""RepConv2d: each branch against its formula by scipy, and both forms against each other and against float64."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.signal import correlate
from torch import nn

from claritycore.blocks import RepConv2d
from claritycore.blocks.padding import pad_same
from claritycore.blocks.rep_conv import DILATED_BRANCHES
from tests.strategies import normal

NUMPY_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
MASKS = {
    "sobel-x": [[1, 0, -1], [2, 0, -2], [1, 0, -1]],
    "sobel-y": [[1, 2, 1], [0, 0, 0], [-1, -2, -1]],
    "laplacian": [[0, 1, 0], [1, -4, 1], [0, 1, 0]],
}
BRANCHES = (
    *("7x7", "5x5", "3x3", "1x1", "3x3@2", "3x3@3", "7x3", "3x7", "1x5", "identity", "average", *MASKS),
    *("1x1-3x3", "1x1-5x5*2", "1x1-3x3-1x1*2", "3x3-3x3", "3x3-1x1-5x5", "1x1-3x3@2"),
)
WIDER_THAN_FIVE = ("7x7", "3x3@3", "3x7", "3x3-1x1-5x5")


@st.composite
def rep_convs(draw, *, strides=(1, 2, 3)) -> RepConv2d:
    """Any branch set, groups, stride, padding mode and norm, with the statistics that batch norms have in practice."""
    stride, groups = draw(st.sampled_from(strides)), draw(st.sampled_from([1, 2, 6]))
    in_channels, out_channels = draw(st.sampled_from([(6, 6), (6, 12), (12, 6)]))
    kernel_size = draw(st.sampled_from([(7, 7), (7, 5)]))
    possible = [b for b in BRANCHES if b != "identity" or (stride == 1 and in_channels == out_channels)]
    possible = [b for b in possible if kernel_size == (7, 7) or b not in WIDER_THAN_FIVE]
    seed = draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    block = RepConv2d(
        in_channels,
        out_channels,
        kernel_size=kernel_size,
        stride=stride,
        groups=groups,
        padding_mode=draw(st.sampled_from(list(NUMPY_MODES))),
        branches=draw(st.lists(st.sampled_from(possible), min_size=1, max_size=4)),
        norm=draw(st.sampled_from(["none", "branch", "sum"])),
    )
    return stirred(block).eval()


def stirred(model: nn.Module) -> nn.Module:
    """Move every parameter off its start value, and give batch norms means and variances from 1e-3 to 1e3."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.copy_(10 ** torch.empty_like(module.running_var).uniform_(-3, 3))
    return model


SIDES = st.integers(1, 12)


def by_scipy(block: RepConv2d, x: torch.Tensor) -> np.ndarray:
    """The sum of the branches as the docstring tells it: pad once, then correlate, in float64."""
    image = x.double().numpy()
    total = 0.0
    for text, branch in zip(block.branch_names, block.branches, strict=True):
        y = _branch_by_scipy(block, text, {k: v.double().numpy() for k, v in branch.state_dict().items()}, image)
        total = total + y
    if block.norm_place == "sum":
        total = _norm({k: v.double().numpy() for k, v in block.norm.state_dict().items()}, total)
    return total


def _branch_by_scipy(block, text, values, image):
    if text == "identity":
        return _norm(values, image, "norm.") if "scale" not in values else image * values["scale"][:, None, None]
    if text == "average":
        taps = np.full((image.shape[1], 1, *block.kernel_size), 1 / np.prod(block.kernel_size))
        mean = _correlate(_padded(image, block.kernel_size, block.padding_mode), taps, image.shape[1], block.stride)
        y = _correlate(mean, values["conv.weight"], block.groups, 1, values.get("conv.bias"))
        return _norm(values, y, "norm.") if "norm.weight" in values else y
    if text in MASKS:
        y = _correlate(_padded(image, (3, 3), block.padding_mode), values["conv.weight"], block.groups, 1)
        mask = np.array(MASKS[text], float) * values["scale"][:, None, None, None]
        y = _correlate(y, mask, y.shape[1], block.stride, values.get("bias"))
        return _norm(values, y, "norm.") if "norm.weight" in values else y
    text, _, dilation = text.partition("@")
    kernels = [_dilated(values[f"convs.{i}.weight"], int(dilation or 1)) for i in range(text.count("-") + 1)]
    span = tuple(1 + sum(kernel.shape[axis] - 1 for kernel in kernels) for axis in (2, 3))
    y = _padded(image, span, block.padding_mode)
    for i, kernel in enumerate(kernels):
        stride = block.stride if i == len(kernels) - 1 else 1
        y = _correlate(y, kernel, block.groups, stride, values.get(f"convs.{i}.bias"))
        if "norms.0.weight" in values:
            y = _norm(values, y, f"norms.{i}.")
    return y


def _padded(image, size, mode):
    rows, columns = size[0] // 2, size[1] // 2
    if mode == "reflect":  # where it runs out, the far edge: numpy would reflect again
        rows_index, columns_index = (_reflected(n, r) for n, r in zip(image.shape[2:], (rows, columns), strict=True))
        return image[:, :, rows_index][..., columns_index]
    return np.pad(image, ((0, 0), (0, 0), (rows, rows), (columns, columns)), NUMPY_MODES[mode])


def _reflected(size, reach):
    index = [abs(i) if i < size else 2 * (size - 1) - i for i in range(-reach, size + reach)]
    return [min(max(i, 0), size - 1) for i in index]


def _dilated(kernel, dilation):
    rows, columns = ((n - 1) * dilation + 1 for n in kernel.shape[2:])
    spread = np.zeros((*kernel.shape[:2], rows, columns))
    spread[..., ::dilation, ::dilation] = kernel
    return spread


def _correlate(image, kernel, groups, stride, bias=None):
    out_per_group, in_per_group = len(kernel) // groups, kernel.shape[1]
    samples = []
    for sample in image:
        maps = []
        for o in range(len(kernel)):
            first = o // out_per_group * in_per_group
            taken = (correlate(sample[first + i], kernel[o, i], "valid", "direct") for i in range(in_per_group))
            maps.append(sum(taken) + (0 if bias is None else bias[o]))
        samples.append(np.stack(maps))
    return np.stack(samples)[:, :, ::stride, ::stride]


def _norm(values, y, prefix=""):
    mean, variance, weight, bias = (
        values[prefix + key][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (y - mean) / np.sqrt(variance + 1e-5) * weight + bias


@given(block=rep_convs(), height=SIDES, width=SIDES, seed=st.integers(0, 99))
def test_both_forms_are_the_formula_in_float64(block, height, width, seed):
    block = block.double()
    x = normal((2, block.in_channels, height, width), dtype=torch.float64, seed=seed)
    expected = torch.from_numpy(by_scipy(block, x))
    scale = expected.abs().max().item()
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12 * scale)
        block.switch_to_deploy()
        torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("branch", [branch for branch in BRANCHES if branch not in WIDER_THAN_FIVE])
def test_each_branch_alone_is_its_formula(branch):
    x = normal((1, 4, 9, 6), dtype=torch.float64)
    for padding_mode, norm in itertools.product(NUMPY_MODES, ("none", "branch", "sum")):
        torch.manual_seed(0)
        options = {"padding_mode": padding_mode, "norm": norm, "branches": (branch,), "groups": 2}
        block = stirred(RepConv2d(4, kernel_size=(7, 5), **options)).eval().double()
        expected = torch.from_numpy(by_scipy(block, x))
        for _ in range(2):
            torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12 * expected.abs().max().item())
            block.switch_to_deploy()


@given(block=rep_convs(), height=SIDES, width=SIDES, seed=st.integers(0, 99))
def test_both_forms_agree_in_float32(block, height, width, seed):
    x = normal((2, block.in_channels, height, width), seed=seed)
    with torch.no_grad():
        trained = block(x)
        block.switch_to_deploy()
        deployed = block(x)
    torch.testing.assert_close(deployed, trained, rtol=0, atol=5e-6 * trained.abs().max().item())


@given(block=rep_convs(strides=(1,)))
def test_fused_weights_are_the_float64_kernel_rounded_once(block):
    exact = copy.deepcopy(block).double()
    side = 15
    x = torch.zeros(1, block.in_channels, side, side, dtype=torch.float64, requires_grad=True)
    centre = exact(x)[0, :, side // 2, side // 2]
    response = torch.stack([torch.autograd.grad(value, x, retain_graph=True)[0][0] for value in centre])
    block.switch_to_deploy()
    dense = torch.zeros(block.out_channels, block.in_channels, side, side, dtype=torch.float64)
    for conv in block.children():
        rows, columns = ((side - n) // 2 for n in conv.kernel_size)
        for o in range(block.out_channels):
            first = o // (block.out_channels // block.groups) * (block.in_channels // block.groups)
            inside = slice(rows, side - rows), slice(columns, side - columns)
            dense[(o, slice(first, first + conv.weight.shape[1]), *inside)] += conv.weight[o].detach().double()
    strips = len(list(block.children())) > 1  # a tap that both strips have is split between them, each rounded
    if strips:
        torch.testing.assert_close(dense, response, rtol=0, atol=1e-7 * response.abs().max().item())
    else:
        assert torch.equal(dense.float(), response.float())
    torch.testing.assert_close(block.fused.bias.double(), centre.float().double(), rtol=1e-6, atol=1e-30)


@given(block=rep_convs(strides=(1,)), dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_precision_deploys_no_less_exact_than_it_trains(block, dtype):
    x = normal((1, block.in_channels, 9, 8))
    with torch.no_grad():
        exact = block.double()(x.double())
        assume(exact.abs().max() < 1e4)  # else float16 overflows in either form
        deployed = copy.deepcopy(block).float()
        deployed.switch_to_deploy()
        y = deployed.to(dtype)(x.to(dtype))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=4 * eps * absolute_sum(deployed, x).item())


def absolute_sum(block, x):
    """The largest sum of the magnitudes that one output adds up: the unit of its rounding."""
    block = copy.deepcopy(block).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.abs_()
    return block(x.double().abs()).max()


@given(block=rep_convs(), seed=st.integers(0, 99))
def test_the_way_back_is_exact(block, seed):
    block.switch_to_deploy()
    x = normal((1, block.in_channels, 9, 8), seed=seed)
    expected, weights = block(x), {key: value.clone() for key, value in block.state_dict().items()}
    if not whole_kernel_fits(block):
        with pytest.raises(ValueError, match=r"none of the branches .* can hold a whole"):
            block.to_training_form()
        return
    block.to_training_form()
    assert not block.deployed
    trained = block(x)
    torch.testing.assert_close(trained, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert sum(parameter.requires_grad for parameter in block.parameters()) == len(list(block.parameters()))
    block.switch_to_deploy()
    for key, value in block.state_dict().items():
        assert torch.equal(value, weights[key]), key


def whole_kernel_fits(block) -> bool:
    """Whether for each fused kernel there is a branch with a kernel of that size and enough channels."""
    sizes = ["x".join(map(str, conv.kernel_size)) for conv in block.children()]
    pointwise = {size: {size, f"1x1-{size}", f"1x1-{size}*2", f"1x1-{size}-1x1*2"} for size in sizes}
    return all(pointwise[size] & set(block.branch_names) for size in sizes)


def test_after_the_way_back_every_parameter_can_learn():
    torch.manual_seed(0)
    block = RepConv2d(6, kernel_size=5, branches=("5x5", "3x3@2", "1x1", "identity", "average", "sobel-x"))
    block.switch_to_deploy()
    block.to_training_form()
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-2)
    x = normal((2, 6, 8, 8))
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        block(x).square().mean().backward()
        optimizer.step()
    unmoved = [name for name, parameter in block.named_parameters() if torch.equal(parameter, before[name])]
    assert unmoved == []


@pytest.mark.parametrize("kernel_size", DILATED_BRANCHES)
def test_the_dilated_sets_of_unireplknet_fuse(kernel_size):
    torch.manual_seed(0)
    branches = DILATED_BRANCHES[kernel_size]
    block = RepConv2d(4, kernel_size=kernel_size, groups=4, branches=branches, norm="branch")
    stirred(block).eval().double()
    x = normal((1, 4, 11, 23), dtype=torch.float64)
    expected = torch.from_numpy(by_scipy(block, x))
    block.switch_to_deploy()
    assert block.fused.kernel_size == (kernel_size, kernel_size)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_a_cross_of_strips_stays_two_strips_and_a_square_in_it_costs_nothing():
    block = RepConv2d(4, kernel_size=17, branches=("17x5", "5x17", "5x5", "identity"))
    block.switch_to_deploy()
    assert {name: conv.kernel_size for name, conv in block.named_children()} == {
        "fused": (17, 5),
        "fused_wide": (5, 17),
    }
    assert sum(p.numel() for p in block.parameters()) == 2 * 4 * 4 * 85 + 4
    for branches in [("17x5", "5x17", "17x17"), ("17x15", "15x17"), ("17x5", "5x17", "7x7")]:
        square = RepConv2d(4, kernel_size=17, branches=branches)
        square.switch_to_deploy()
        assert [name for name, _ in square.named_children()] == ["fused"]


@pytest.mark.parametrize("mode", NUMPY_MODES)
def test_padding_is_that_of_numpy_whatever_the_size(mode):
    for height, width, rows, columns in itertools.product([1, 2, 5], [1, 3, 6], [0, 1, 4], [0, 2, 7]):
        x = normal((2, 3, height, width), dtype=torch.float64)
        expected = _padded(x.numpy(), (2 * rows + 1, 2 * columns + 1), mode)
        assert np.array_equal(pad_same(x, (rows, columns), mode).numpy(), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, r"kernel_size must be odd and positive, or two such numbers, got \(4, 4\)"),
        ({"kernel_size": (3, 0)}, r"kernel_size must be odd and positive, or two such numbers, got \(3, 0\)"),
        ({"groups": 4}, "groups must divide in_channels 6 and out_channels 6, got 4"),
        ({"stride": 0}, "stride must be an integer of at least 1, got 0"),
        ({"branches": ("5x5",)}, r"branch '5x5' spans 5x5 pixels, more than kernel_size \(3, 3\)"),
        ({"branches": ("3x3@2",)}, r"branch '3x3@2' spans 5x5 pixels, more than kernel_size \(3, 3\)"),
        ({"branches": ("3x3-3x3",)}, r"branch '3x3-3x3' spans 5x5 pixels, more than kernel_size \(3, 3\)"),
        ({"branches": ("sobel-x",), "kernel_size": 1}, r"branch 'sobel-x' spans 3x3 pixels, more than kernel_size"),
        ({"branches": ("2x2",)}, r"branch must be like one of '5x5', .*\(odd sizes\).*; got '2x2'"),
        ({"branches": ("3x3@0",)}, r"branch must be like one of .*; got '3x3@0'"),
        ({"branches": ("maxpool",)}, r"branch must be like one of .*; got 'maxpool'"),
        ({"branches": ("identity",), "stride": 2}, "branch 'identity' needs as many channels out as in, and stride 1"),
        ({"padding_mode": "same"}, "padding_mode must be one of zeros, reflect, replicate, circular, got 'same'"),
        ({"norm": "group"}, "norm must be one of none, branch, sum, got 'group'"),
    ],
)
def test_what_cannot_be_exact_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RepConv2d(6, **options)


@pytest.mark.parametrize("size", [3.0, "3", None])
def test_a_kernel_size_that_is_no_integer_is_named(size):
    with pytest.raises(ValueError, match=r"kernel_size must be odd and positive, or two such numbers, got"):
        RepConv2d(8, kernel_size=size)


def test_identity_between_different_shapes_is_refused():
    with pytest.raises(ValueError, match="branch 'identity' needs as many channels out as in, and stride 1"):
        RepConv2d(6, 8, branches=("identity",))


def test_a_norm_that_follows_the_data_is_refused():
    block = RepConv2d(4, branches=("3x3",), norm="branch").eval()
    block.branches[0].norms[0] = nn.GroupNorm(2, 4)
    with pytest.raises(TypeError, match="only a batch norm with running statistics can be fused, got GroupNorm"):
        block.switch_to_deploy()
    assert not block.deployed
