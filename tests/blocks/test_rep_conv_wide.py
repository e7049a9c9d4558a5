"""RepConv2d with wide kernels in small groups: computed in other ways, for speed, and the same."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from claritycore.blocks import PartialLargeKernelConv, RepConv2d, reparameterize_model, same_conv
from claritycore.blocks.same_conv import SameConv2d
from tests.blocks.test_rep_conv import by_scipy, stirred
from tests.strategies import normal

WIDE = {
    "stride": {"stride": 2},
    "reflect": {"padding_mode": "reflect"},
    "chain": {"branches": ("1x1-17x17",)},
    "strips": {"branches": ("17x5", "5x17", "5x5"), "padding_mode": "reflect"},
    "dilated": {"branches": ("5x5@4", "9x9@2"), "padding_mode": "circular"},
    "more out": {"out_channels": 12},
    "fewer out": {"out_channels": 3, "groups": 3},
    "pairs": {"groups": 3, "stride": 1},
    "strided more out": {"out_channels": 12, "stride": 3},
}


@pytest.mark.parametrize("channels_are", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("options", WIDE.values(), ids=WIDE)
def test_wide_kernels_are_their_formula_however_they_are_computed(options, channels_are):
    torch.manual_seed(0)
    block = stirred(RepConv2d(6, kernel_size=17, **{"groups": 6, "branches": ("17x17",), **options})).eval().double()
    x = normal((2, 6, 9, 20), dtype=torch.float64).to(memory_format=channels_are)
    expected = torch.from_numpy(by_scipy(block, x))
    tolerance = 1e-12 * expected.abs().max().item()
    torch.testing.assert_close(block(x), expected, rtol=0, atol=tolerance)
    with torch.no_grad():
        y = block(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)
    assert y.is_contiguous(memory_format=channels_are)
    block.switch_to_deploy()
    torch.testing.assert_close(block(x), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("options", WIDE.values(), ids=WIDE)
def test_wide_kernels_have_the_gradients_of_torch(options, monkeypatch):
    torch.manual_seed(0)
    block = stirred(RepConv2d(6, kernel_size=17, **{"groups": 6, "branches": ("17x17",), **options})).double()
    x = normal((2, 6, 9, 20), dtype=torch.float64).requires_grad_()
    leaves = [x, *block.parameters()]
    gradients = torch.autograd.grad(block(x).square().sum(), leaves)
    monkeypatch.setattr(SameConv2d, "forward", nn.Conv2d.forward)
    for actual, expected in zip(gradients, torch.autograd.grad(block(x).square().sum(), leaves), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


@pytest.mark.parametrize("options", WIDE.values(), ids=WIDE)
def test_wide_depthwise_kernels_never_reach_the_slow_convolution_of_contiguous_maps(options):
    """Of torch a contiguous map of so few channels in a group takes 4 to 40 times as long as it need."""
    block = RepConv2d(6, kernel_size=17, **{"groups": 6, "branches": ("17x17",), **options})
    slow = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default and args[1].shape[3] >= 15 and args[1].shape[1] == 1:
                slow.extend([args[0].shape] if args[0].is_contiguous() else [])
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 6, 9, 20, requires_grad=True)
    with Watch():
        block(x).sum().backward()
        reparameterize_model(block.eval())(x.detach())
    assert slow == []


WHOLE = {"9x9": (9, 9), "17x17": (17, 17), "5x17": (5, 17), "11x3": (11, 3)}


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("kept", ["first", "last", "cut from last"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", WHOLE.values(), ids=WHOLE)
def test_kernels_over_all_channels_are_the_same_with_avx2(size, padded, kept, learns, monkeypatch):
    padding = 0 if padded else (size[0] // 2, size[1] // 2)
    conv = SameConv2d(4, 5, size, padding=padding)
    whole = normal((2, 6, 20, 21))
    x = {"first": whole[:, :4].contiguous(), "cut from last": whole.to(memory_format=torch.channels_last)[:, :4]}
    x["last"] = x["first"].contiguous(memory_format=torch.channels_last)
    results = []
    for avx2 in (False, True):
        monkeypatch.setattr(same_conv, "AVX2", avx2)
        given = x[kept].detach().requires_grad_(learns)
        with torch.set_grad_enabled(learns):
            y = conv(given)
        results.append([y, *(torch.autograd.grad(y.square().sum(), [given, *conv.parameters()]) if learns else [])])
    assert results[0][0].stride() == results[1][0].stride()
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("channels_are", [torch.contiguous_format, torch.channels_last], ids=str)
def test_with_avx2_no_wide_kernel_reaches_what_is_slow_there(channels_are, learns, monkeypatch):
    """A convolution that pads contiguous maps by itself, and the gradient of the weight for channels-last ones."""
    monkeypatch.setattr(same_conv, "AVX2", True)
    block, seen = PartialLargeKernelConv(16), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default and args[1].shape[3] == 17:
                seen.append((args[0].stride(1) == 1, any(args[4])))
            return func(*args, **(kwargs or {}))

    x = torch.randn(1, 16, 20, 21).to(memory_format=channels_are)
    with Watch(), torch.set_grad_enabled(learns):
        block(x)
    assert seen == [(channels_are is torch.channels_last and not learns,) * 2]
