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
# Windows of 2 x 3 that begin at 1 and 0: of 5 rows 1 + 2 + 2, of 7 columns 3 + 3 + 1.
WINDOWS = (2, 3), (2, 3), (1, 0), (1, 1), 2, 1.0, False, False
PAIRS = (1 + 4 + 4) * (9 + 9 + 1)
TABLE, TOKENS, RESULTS = (15, 2), (B, 3, 2 * C), [(B, H, W, C), (0,), (B, H, W, C)]
T, E, HIDDEN = 13, 4, 10
EXPERTS = [(T, C), (T, 2), (T, 2), (E, HIDDEN, C), (E, HIDDEN), (E, C, HIDDEN), (E, C)]
GROUPS = [(2 * T,), (E + 1,), (T, C), "gelu"]
PRODUCT = 2 * (2 * T) * C * HIDDEN
CLOSED_FORMS = {
    "aten::scaled_dot_product_attention": [ATTENTION],
    "aten::_scaled_dot_product_flash_attention_for_cpu": [ATTENTION],
    "aten::upsample_bilinear2d": [([MAP], {"out_shape": UP}, OUTPUTS * 4 * 2)],
    "aten::upsample_bicubic2d": [([MAP], {"out_shape": UP}, OUTPUTS * 16 * 2)],
    "aten::grid_sampler_2d": [([MAP], {"out_shape": UP}, OUTPUTS * 4 * 2)],
    "aten::_fft_r2c": [(((1, 8, 8), [1, 2]), {"out_shape": (1, 8, 5)}, 960)],  # 2.5 * 64 * 6
    "aten::_fft_c2r": [(((1, 8, 5), [1, 2]), {"out_shape": (1, 8, 8)}, 960)],
    "aten::_fft_c2c": [(((1, 8, 8), [1, 2]), {}, 1920)],
    # A deviation of 1.2 reaches 4 pixels: 9 taps along each side.
    "claritycore::blur_split": [([MAP, (0.4, 1.2), "torch"], {}, B * C * H * W * (2 * 9 * 2 + 1))],
    "claritycore::blur_split_adjoint": [([MAP, MAP, (1.2,), "torch"], {}, B * C * H * W * (2 * 9 * 2 + 1))],
    "claritycore::haar_split": [([MAP, True, "torch"], {}, 12 * B * C * 3 * 4)],
    "claritycore::haar_merge": [([(B, C, 3, 4)] * 4 + [(H, W), False, "torch"], {}, 12 * B * C * 3 * 4)],
    "claritycore::depthwise_conv2d": [([MAP, TAPS, (C,), None, "torch"], {}, 2 * B * C * H * W * 15)],
    "claritycore::depthwise_conv2d_backward": [
        ([MAP, TAPS, (C,), None, MAP, None, (True, True, True), "torch"], {}, 2 * 2 * B * C * H * W * 15),
        ([MAP, TAPS, (C,), None, MAP, None, (False, True, True), "torch"], {}, 2 * B * C * H * W * 15),
        ([MAP, TAPS, (C,), MAP, MAP, "relu", (True, True, True), "torch"], {}, 2 * 2 * B * C * H * W * 15),
        ([MAP, TAPS, (C,), None, MAP, "gelu", (True, True, True), "torch"], {}, 3 * 2 * B * C * H * W * 15),
    ],
    "claritycore::route_top_k": [([(T, E), None, 2, "torch"], {}, (4 + 2) * T * E)],
    "claritycore::route_top_k_backward": [([(T, E), (T, 2), (T, 2), "torch"], {}, 4 * T * E)],
    "claritycore::expert_mlp": [([*EXPERTS, "gelu", "torch"], {}, 2 * PRODUCT)],
    "claritycore::expert_mlp_backward": [
        ([*EXPERTS, *GROUPS, (True,) * 6, "torch"], {}, 5 * PRODUCT),
        ([*EXPERTS, *GROUPS, (False, True, True, True, True, True), "torch"], {}, 4 * PRODUCT),
        ([*EXPERTS, *GROUPS, (False, False, False, False, True, True), "torch"], {}, 2 * PRODUCT),
    ],
    "claritycore::noise_bias_act": [
        ([MAP, (C,), None, None, None, "lrelu", 1.0, None, "torch"], {}, 6 * B * C * H * W)
    ],
    "claritycore::noise_bias_act_backward": [
        ([MAP, (C,), None, None, None, MAP, "lrelu", 1.0, None, (True,) * 5, "torch"], {}, 12 * B * C * H * W)
    ],
    "claritycore::noise_field": [([(B,), 7, 0, (H, W), (0, 0), torch.float32, "torch"], {}, 5 * B * H * W)],
    "claritycore::selective_scan": [(SCAN, {}, 9 * B * C * L * N)],
    "claritycore::selective_scan_backward": [(SCAN, {}, 22 * B * C * L * N)],
    "claritycore::selective_scan_2d": [(SCAN_2D, {}, 9 * K * B * H * W * C * N)],
    "claritycore::selective_scan_2d_backward": [(SCAN_2D, {}, 22 * K * B * H * W * C * N)],
    "claritycore::window_attention": [
        ([(B, H, W, 3 * C), None, TABLE, None, None, *WINDOWS, "torch"], {}, 4 * B * C * PAIRS),
        ([(B, H, W, C), (B, H, W, 2 * C), None, None, TOKENS, *WINDOWS, "torch"], {}, 4 * B * C * (PAIRS + 3 * H * W)),
    ],
    "claritycore::window_attention_backward": [
        ([(B, H, W, 3 * C), None, TABLE, None, None, *RESULTS, *WINDOWS, (True,) * 5, "torch"], {}, 10 * B * C * PAIRS),
    ],
}
FORMULAS = {packet._qualified_op_name: formula for packet, formula in flop_formulas().items()}


@pytest.mark.parametrize("name", FORMULAS)
def test_an_entry_has_its_closed_form(name):
    assert name in CLOSED_FORMS, "a new entry needs a row above"
    for shapes, named, flops in CLOSED_FORMS[name]:
        assert FORMULAS[name](*shapes, **named) == flops


def test_every_operator_of_ours_is_counted():
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    ours = {name for name in names if name.startswith("claritycore::")}
    assert len(ours) >= 2 * len(KERNELS)
    assert not ours - set(FORMULAS), "without a row its flops count as zero"
