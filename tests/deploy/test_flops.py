"""Each entry of the table of flops, against a closed form and against operands that the operator itself takes."""

import pytest
import torch

from claritycore.deploy import flop_formulas
from claritycore.kernels import KERNELS

B, C, H, W, N, L, K = 2, 6, 5, 7, 3, 11, 4
UP = (B, C, 2 * H, 2 * W)
OUTPUTS = B * C * 4 * H * W
SCAN = [(B, C, L), (B, C, L), (C, N)]
SCAN_2D = [(B, H, W, C), (B, K, H, W, C), (K, C, N)]
MAP, TAPS = (B, C, H, W), (C, 1, 3, 5)
ATTENTION = ([(B, 2, L, C), (B, 2, H, C), (B, 2, H, N)], {}, 2 * B * 2 * L * H * (C + N))

# Shapes of a call, and its flops written out.
CLOSED_FORMS = {
    "aten::scaled_dot_product_attention": [ATTENTION],
    "aten::_scaled_dot_product_flash_attention_for_cpu": [ATTENTION],
    "aten::upsample_bilinear2d": [([MAP], {"out_shape": UP}, OUTPUTS * 4 * 2)],
    "aten::upsample_bicubic2d": [([MAP], {"out_shape": UP}, OUTPUTS * 16 * 2)],
    "claritycore::depthwise_conv2d": [([MAP, TAPS, (C,), None, "torch"], {}, 2 * B * C * H * W * 15)],
    "claritycore::depthwise_conv2d_backward": [
        ([MAP, TAPS, (C,), None, MAP, None, (True, True, True), "torch"], {}, 2 * 2 * B * C * H * W * 15),
        ([MAP, TAPS, (C,), None, MAP, None, (False, True, True), "torch"], {}, 2 * B * C * H * W * 15),
        ([MAP, TAPS, (C,), MAP, MAP, "relu", (True, True, True), "torch"], {}, 2 * 2 * B * C * H * W * 15),
        ([MAP, TAPS, (C,), None, MAP, "gelu", (True, True, True), "torch"], {}, 3 * 2 * B * C * H * W * 15),
    ],
    "claritycore::selective_scan": [(SCAN, {}, 9 * B * C * L * N)],
    "claritycore::selective_scan_backward": [(SCAN, {}, 22 * B * C * L * N)],
    "claritycore::selective_scan_2d": [(SCAN_2D, {}, 9 * K * B * H * W * C * N)],
    "claritycore::selective_scan_2d_backward": [(SCAN_2D, {}, 22 * K * B * H * W * C * N)],
}
FORMULAS = {packet._qualified_op_name: formula for packet, formula in flop_formulas().items()}


@pytest.mark.parametrize("name", FORMULAS)
def test_an_entry_has_its_closed_form(name):
    assert name in CLOSED_FORMS, "a new entry needs a row above"
    for shapes, named, flops in CLOSED_FORMS[name]:
        assert FORMULAS[name](*shapes, **named) == flops


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_kernel_and_its_backward_are_counted(kernel):
    for name in (kernel.name, f"{kernel.name}_backward"):
        assert hasattr(torch.ops.claritycore, name)
        assert f"claritycore::{name}" in FORMULAS, "without a row its flops count as zero"
