"""ONNX of the kernels and of the blocks on them, run by onnxruntime at sizes other than the exported one."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import claritycore
from claritycore.blocks import (
    ConvAttention,
    DeformableAttention2d,
    DySample,
    GridAttention,
    HybridAttention,
    MSGDown,
    MSGUp,
    OverlappingCrossAttention,
    SelectiveScan2d,
    SkipFusion,
    SSMGlobalMixer,
    SwinBlock,
    TransposedAttention,
    WindowAttention2d,
)
from claritycore.kernels import (
    blur_split,
    depthwise_conv2d,
    fft_split,
    haar_merge,
    haar_split,
    modulated_conv2d,
    noise_bias_act,
    noise_field,
    overlapping_window_attention,
    selective_scan,
    selective_scan_2d,
    window_attention,
)
from tests.strategies import normal

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from claritycore.deploy.onnx_ops import to_onnx  # noqa: E402  (after what it needs is known to be there)

DYNAMIC = torch.export.Dim.DYNAMIC

# What the exporter says that no caller can help: optional packages that are not there, and torch's own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def run(program: torch.onnx.ONNXProgram, arguments) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    feeds = {node.name: x.numpy() for node, x in zip(session.get_inputs(), arguments, strict=True)}
    return session.run(None, feeds)


def check(module: nn.Module, make, sizes, dynamic_shapes, tolerance: float = 1e-5) -> None:
    """Export at the first size; compare with eager at all of them."""
    program = to_onnx(module.eval(), make(sizes[0]), dynamic_shapes=dynamic_shapes)
    for size in sizes:
        arguments = make(size)
        with torch.no_grad():
            expected = module(*arguments)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for actual, wanted in zip(run(program, arguments), expected, strict=True):
            np.testing.assert_allclose(actual, wanted.numpy(), rtol=tolerance, atol=tolerance)


class Scan(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, u, delta, A, B, C, D, z, delta_bias, initial_state):
        return selective_scan(
            *(u, delta, A, B, C, D, z, delta_bias, True, True), initial_state=initial_state, **self.options
        )


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("projections", ["grouped", "ungrouped", "B constant"])
def test_the_scan_at_other_lengths(reverse, projections):
    def make(length):
        over_time = {
            "grouped": [normal((2, 3, 4, length), seed=2), normal((2, 3, 4, length), seed=3)],
            "ungrouped": [normal((2, 4, length), seed=2), normal((2, 4, length), seed=3)],
            "B constant": [normal((6, 4), seed=2), normal((2, 3, 4, length), seed=3)],
        }[projections]
        u, delta, z = (normal((2, 6, length), seed=seed) for seed in (0, 1, 4))
        return u, delta, -normal((6, 4)).abs(), *over_time, normal((6,)), z, normal((6,)), normal((2, 6, 4))

    lengths = tuple({x.ndim - 1: DYNAMIC} if x.shape[-1] == 11 else {} for x in make(11))
    check(Scan(reverse=reverse), make, [11, 1, 30], lengths)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float16, 5e-3)])
def test_the_scan_in_other_dtypes(dtype, tolerance):
    def make(length):
        u, delta, z = (normal((2, 6, length), seed=seed, dtype=dtype) for seed in (0, 1, 4))
        B, C = (normal((2, 3, 4, length), seed=seed, dtype=dtype) for seed in (2, 3))
        A, D = -normal((6, 4), dtype=dtype).abs(), normal((6,), dtype=dtype)
        return u, delta, A, B, C, D, z, D, normal((2, 6, 4), dtype=dtype)

    check(Scan(), make, [11], None, tolerance)


class Scan2d(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, x, delta, A, B, C, D, delta_bias, order=None):
        return selective_scan_2d(x, delta, A, B, C, D, delta_bias=delta_bias, order=order, **self.options)


def images(directions: int):
    def make(size):
        height, width = size
        x, delta = normal((2, height, width, 3)), normal((2, directions, height, width, 3), seed=1)
        B, C = (normal((2, directions, height, width, 4), seed=seed) for seed in (2, 3))
        return x, delta, -normal((directions, 3, 4)).abs(), B, C, normal((directions, 3)), normal((directions, 3))

    return make


SIDES = {1: DYNAMIC, 2: DYNAMIC}
SIDES_OF_EACH = {2: DYNAMIC, 3: DYNAMIC}


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(
    "directions", [("row",), ("column_reversed", "row"), ("row", "column", "row_reversed", "column_reversed")]
)
def test_the_scan_over_images_at_other_sizes(directions, merge):
    shapes = (SIDES, SIDES_OF_EACH, {}, SIDES_OF_EACH, SIDES_OF_EACH, {}, {})
    module = Scan2d(directions=directions, merge=merge, delta_softplus=True)
    check(module, images(len(directions)), [(5, 7), (3, 2), (8, 9)], shapes)


def test_the_scan_over_images_in_an_order_of_its_own():
    def make(size):
        orders = [torch.randperm(size[0] * size[1], generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        return *images(2)(size), torch.stack(orders)

    check(Scan2d(directions=("row", "row_reversed"), delta_softplus=True), make, [(4, 6)], None)


BLOCKS = [
    SelectiveScan2d(8, d_state=4),
    SSMGlobalMixer(8, d_state=4, gate=1.0),
    DySample(8, dyscope=True),
    DySample(8, style="pl"),
    MSGDown(8, form="unshuffle"),
    MSGUp(8, form="dysample"),
    TransposedAttention(8, num_heads=2),
    DeformableAttention2d(8, num_heads=4, groups=2),
    DeformableAttention2d(8, num_heads=2, stride=2),
    WindowAttention2d(8, 2, window_size=(3, 4), shift=(2, 1), bias="cpb", cosine=True),
    WindowAttention2d(8, 2, window_size=3, dilation=2, bias="dynamic"),
    OverlappingCrossAttention(8, 2, window_size=4, zero_border=True),
    GridAttention(8, 2, grid_size=(4, 3)),
    HybridAttention(8, 2, window_size=4, shift=2, global_size=3),
    HybridAttention(8, 2, window_size=4, form="grid", global_size=2),
    SwinBlock(8, WindowAttention2d(8, 2, window_size=4, shift=2)),
    ConvAttention(8, WindowAttention2d(8, 2, window_size=4), scale=0.5),
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: type(block).__name__)
def test_the_blocks_at_other_sizes(block):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    sizes = (dict.fromkeys((0, 2, 3), DYNAMIC),)
    check(block, lambda size: (normal((size[0], 8, *size[1:])),), [(2, 5, 7), (1, 8, 3), (3, 12, 12)], sizes)


def test_every_attention_of_the_table_of_support_is_exported():
    page = (Path(claritycore.__file__).parent / "docs" / "attention.md").read_text()
    rows = re.findall(r"^\| `(\w+)` .* (yes|no) \| one graph", page, re.MULTILINE)
    assert len(rows) == 10
    exported = {type(block).__name__ for block in BLOCKS}
    exported |= {"CrossAttention2d", "FrequencyCrossAttention"}  # in test_onnx_conditioning.py, test_onnx_frequency.py
    assert {name for name, onnx in rows if onnx == "yes"} <= exported


def test_window_attention_with_logits_scaled_from_outside():
    block = SwinBlock(8, WindowAttention2d(8, 2, window_size=4, shift=2, cosine=True), post_norm=True)

    def make(size):
        return normal((size[0], 8, *size[1:])), 1 + normal((size[0], 2), seed=1).abs()

    sizes = dict.fromkeys((0, 2, 3), DYNAMIC), {0: DYNAMIC}
    check(block, make, [(2, 5, 7), (1, 8, 3), (3, 12, 12)], sizes)


def test_a_skip_of_another_size():
    def make(size):
        return normal((1, 4, *size[0])), normal((1, 4, *size[1]), seed=1)

    pairs = [((6, 8), (5, 7)), ((4, 4), (5, 5)), ((9, 9), (9, 9))]
    check(SkipFusion(4), make, pairs, (SIDES_OF_EACH, SIDES_OF_EACH))


class DepthwiseConv(nn.Module):
    def __init__(self, activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x, weight, bias=None):
        return depthwise_conv2d(x, weight, bias, activation=self.activation)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "gelu", "silu"])
def test_the_depthwise_convolution_at_other_sizes(activation):
    bias = activation != "relu"

    def make(size):
        x = normal((size[0], 6, *size[1:]))
        return x, normal((6, 1, 3, 17), seed=1) / 4, *([normal((6,), seed=2)] if bias else [])

    shapes = (dict.fromkeys((0, 2, 3), DYNAMIC), {}, *([{}] if bias else []))
    check(DepthwiseConv(activation), make, [(2, 9, 20), (1, 1, 3), (3, 16, 8)], shapes)


def test_the_depthwise_convolution_in_half_precision():
    arguments = normal((1, 4, 7, 9), dtype=torch.float16), normal((4, 1, 5, 5), seed=1, dtype=torch.float16)
    check(DepthwiseConv("gelu"), lambda size: arguments, [()], None, 5e-3)


class WindowAttention(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, qkv, bias_table, logit_scale=None, tokens=None):
        if "key_window_size" in self.options:
            return overlapping_window_attention(qkv, bias_table, **self.options)
        return window_attention(qkv, bias_table, logit_scale=logit_scale, tokens=tokens, **self.options)


@pytest.mark.parametrize(
    ("options", "offsets", "further"),
    [
        ({"window_size": 4, "shift": 2}, 49, 1),
        ({"window_size": (3, 4), "shift": (1, 3), "dilation": (2, 3), "cosine": True}, 35, 2),
        ({"window_size": 4, "key_window_size": 6}, 81, 0),
        ({"window_size": (2, 4), "key_window_size": (6, 6), "zero_border": True}, 63, 0),
    ],
    ids=str,
)
def test_window_attention_at_other_sizes(options, offsets, further):
    def make(size):
        batch, height, width = size
        more = normal((batch, 2), seed=2) + 1, normal((batch, 3, 12), seed=3)
        return normal((batch, height, width, 18)), normal((offsets, 2), seed=1), *more[:further]

    shapes = (dict.fromkeys((0, 1, 2), DYNAMIC), {}, *[{0: DYNAMIC}] * further)
    check(WindowAttention(num_heads=2, **options), make, [(2, 9, 7), (1, 1, 3), (3, 16, 8)], shapes)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match="SelectiveScan2d must be in eval mode to be exported"):
        to_onnx(SelectiveScan2d(4), (normal((1, 4, 3, 3)),))


SPLITS = {
    "fft": lambda x: fft_split(x, 0.25),
    "butterworth": lambda x: fft_split(x, 0.3, mask="butterworth"),
    "learned fft": lambda x: fft_split(x, x.new_tensor([0.2, 0.5])),
    "blur": lambda x: blur_split(x, 1.5),
    "haar": lambda x: haar_split(x)[0],
    "haar and back": lambda x: haar_merge(*haar_split(x)),
}


class Split(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.split = SPLITS[name]

    def forward(self, x):
        return self.split(x)


@pytest.mark.parametrize("size", [(2, 2, 12, 10), (1, 2, 13, 7)], ids=str)
@pytest.mark.parametrize("name", SPLITS)
def test_frequency_splits(name, size):
    check(Split(name), lambda size: (normal(size),), [size], None)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("fft", 2e-4), ("blur", 1e-5), ("haar", 1e-5), ("haar and back", 1e-5)]
)
def test_frequency_splits_with_any_size(name, tolerance):
    """A size that is left open is not rounded: `fft_split` says what that does at the borders."""
    sizes = [(2, 2, 12, 10), (1, 2, 13, 9), (1, 2, 7, 31)]
    check(Split(name), lambda size: (normal(size),), sizes, {"x": dict.fromkeys((0, 2, 3), DYNAMIC)}, tolerance)


def test_a_blur_of_channels_by_deviations_of_their_own():
    class Blur(nn.Module):
        def forward(self, x):
            return torch.ops.claritycore.blur_split(x, [0.5, 2.0], "torch")

    check(Blur(), lambda size: (normal(size),), [(1, 2, 12, 10)], None)


class Noise(nn.Module):
    def forward(self, x):
        samples = torch.arange(x.shape[0], device=x.device)
        return x + noise_field(2**40 + 3, x.shape[2:], samples=samples, layer=2, offset=(1, -3))


def test_the_noise_field():
    shapes = (dict.fromkeys((0, 2, 3), DYNAMIC),)
    check(Noise(), lambda size: (normal((size[0], 3, *size[1:])),), [(2, 5, 8), (1, 3, 13)], shapes)


class Modulated(nn.Module):
    def forward(self, x, style, noise, weight, bias):
        y = modulated_conv2d(x, weight, style)
        return noise_bias_act(y, bias, noise, bias.mean(), style.abs(), clamp=1.5)


def test_the_modulated_convolution_and_its_epilogue():
    def make(size):
        noise = normal((size[0], 1, *size[1:]), seed=1)
        return normal((size[0], 4, *size[1:])), normal((size[0], 4)), noise, normal((4, 4, 3, 3)), normal((4,), seed=2)

    shapes = dict.fromkeys((0, 2, 3), DYNAMIC), {0: DYNAMIC}, dict.fromkeys((0, 2, 3), DYNAMIC), {}, {}
    check(Modulated(), make, [(2, 5, 8), (3, 4, 13)], shapes)
