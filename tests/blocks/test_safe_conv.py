"""The convolution that is right in bfloat16: against float64, where oneDNN alone is not."""

import pytest
import torch
from torch import Tensor

from claritycore.blocks import ArtifactExpert, DeblurExpert, RepConv2d
from claritycore.blocks.safe_conv import SafeConv2d

FORMATS = (torch.contiguous_format, torch.channels_last)


def results(module: torch.nn.Module, x: Tensor, *, autocast: bool = False) -> list[Tensor]:
    """Output, gradient of the map and of every parameter, from a gradient in the format of the output."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    torch.manual_seed(1)
    upstream = torch.empty_like(y).copy_(torch.randn(y.shape, dtype=torch.float64))
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], upstream)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("width", [1, 2, 32])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (1, 3), (2, 1)])
@pytest.mark.parametrize("groups", [1, 8])
def test_it_is_right_in_bfloat16(groups, stride, dilation, width, memory_format, autocast):
    torch.manual_seed(0)
    conv = SafeConv2d(8, 8, 3, stride=stride, padding=dilation, dilation=dilation, groups=groups)
    conv = conv.bfloat16()  # the truth is of the same rounded weights
    x = torch.randn(4, 8, 32, width).bfloat16().contiguous(memory_format=memory_format)
    expected = results(conv.double(), x.double())
    found = results(conv.float() if autocast else conv.bfloat16(), x.float() if autocast else x, autocast=autocast)
    assert found[0].is_contiguous(memory_format=memory_format)
    for value, truth in zip(found, expected, strict=True):
        assert (value.double() - truth).abs().max() <= 0.02 * truth.abs().max()


@pytest.mark.parametrize(
    "block",
    [
        lambda: DeblurExpert(8),
        lambda: ArtifactExpert(8),
        lambda: RepConv2d(8, kernel_size=9, groups=8, branches=("9x9", "3x3@2", "3x3@4")),
    ],
    ids=["DeblurExpert", "ArtifactExpert", "RepConv2d"],
)
def test_dilated_blocks_have_the_same_gradients_in_either_format(block):
    torch.manual_seed(0)
    block = block()
    x = torch.randn(4, 8, 40, 36)
    contiguous, last = (results(block, x.contiguous(memory_format=format), autocast=True) for format in FORMATS)
    for one, other in zip(contiguous, last, strict=True):
        assert (one - other).abs().max() <= 0.03 * one.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize(
    ("size", "dilation", "stride", "padding"),
    [((3, 3), 2, 1, 2), ((3, 3), 4, 1, 0), ((5, 3), (2, 4), 2, 1), ((5, 5), 2, 1, "same"), ((3, 3), 7, 1, 7)],
)
def test_a_dilated_depthwise_kernel_learns_as_torch_has_it(size, dilation, stride, padding, mode, dtype):
    """Against F.conv2d in the other format; the last kernel is too large to be made dense."""
    torch.manual_seed(0)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": 6, "padding_mode": mode}
    conv = SafeConv2d(6, 6, size, **options).to(dtype)
    x = torch.randn(2, 6, 21, 18, dtype=dtype)
    plain = torch.nn.Conv2d(6, 6, size, **options).double()
    plain.load_state_dict(conv.state_dict())
    found = results(conv, x.contiguous(memory_format=torch.channels_last))
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for value, truth in zip(found, results(plain, x.double()), strict=True):
        torch.testing.assert_close(
            value.double(), truth, atol=(1e-5 if dtype == torch.float32 else 1e-12) * truth.abs().max(), rtol=0
        )
