"""Window attention is right: every form against a loop over pixels in float64, outputs and all gradients.

Errors are relative to the largest value of the truth, or to a hundredth of the largest gradient where a gradient is
less: that of the logits of a single key is zero.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from claritycore.kernels import overlapping_window_attention, window_attention
from claritycore.kernels.window_attention import fallback
from tests.kernels.closeness import CPU, GRADIENT_ERROR, OUTPUT_ERROR, error

TENSORS = ("qkv", "kv", "bias_table", "logit_scale", "tokens")


@dataclass(frozen=True)
class Case:
    """One combination of sizes and options; with `beyond`, keys reach so far beyond their window."""

    height: int
    width: int
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    batch: int = 1
    heads: int = 2
    head_dim: int = 3
    bias: bool = True
    logit_scale: bool = False
    cosine: bool = False
    other_map: bool = False
    tokens: int | None = None
    scale: float | None = None
    beyond: tuple[int, int] | None = None
    zero_border: bool = False

    def inputs(self, device=CPU, dtype=torch.float64):
        """The arguments of one call; the same numbers whatever the device and dtype."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        channels, (rows, columns), (down, across) = self.heads * self.head_dim, self.window, self.beyond or (0, 0)
        size = self.batch, self.height, self.width
        offsets = (2 * (rows + down) - 1) * (2 * (columns + across) - 1)
        options = {"num_heads": self.heads, "window_size": self.window, "scale": self.scale}
        if self.beyond:
            keys = rows + 2 * down, columns + 2 * across
            options |= {"key_window_size": keys, "zero_border": self.zero_border}
            tensors = {"qkv": draw(*size, 3 * channels), "bias_table": draw(offsets, self.heads)}
        else:
            options |= {"shift": self.shift, "dilation": self.dilation, "cosine": self.cosine}
            tensors = {
                "qkv": draw(*size, channels if self.other_map else 3 * channels),
                "kv": draw(*size, 2 * channels) if self.other_map else None,
                "bias_table": draw(offsets, self.heads),
                "logit_scale": draw(self.batch, self.heads) + 1 if self.logit_scale else None,
                "tokens": None if self.tokens is None else draw(self.batch, self.tokens, 2 * channels),
            }
        return options | tensors | ({} if self.bias else {"bias_table": None})


@st.composite
def cases(draw, sides, windows, reach=2, heads=3):
    def pair(numbers):
        return draw(st.tuples(numbers, numbers))

    window, flag = pair(windows), st.booleans()
    sizes = {
        "height": draw(sides),
        "width": draw(sides),
        "window": window,
        "bias": draw(st.sampled_from([True, False])),
    }
    sizes |= {
        "batch": draw(st.integers(1, 2)),
        "heads": draw(st.integers(1, heads)),
        "head_dim": draw(st.integers(1, 5)),
    }
    sizes["scale"] = draw(st.sampled_from([None, 0.7]))
    if draw(st.integers(0, 2)) == 0:
        return Case(**sizes, beyond=pair(st.integers(0, reach)), zero_border=draw(flag))
    return Case(
        **sizes,
        shift=(draw(st.integers(0, window[0] - 1)), draw(st.integers(0, window[1] - 1))),
        dilation=pair(st.sampled_from([1, 1, 2, 3])),
        logit_scale=draw(flag),
        cosine=draw(flag),
        other_map=draw(flag),
        tokens=draw(st.sampled_from([None, None, 0, 1, 3])),
    )


def tensors(inputs):
    return {name: inputs[name] for name in TENSORS if inputs.get(name) is not None}


def wide(inputs):
    return inputs | {name: value.cpu().double() for name, value in tensors(inputs).items()}


def attend(backend="auto", **inputs):
    """y, by the function that has the options."""
    op = overlapping_window_attention if "key_window_size" in inputs else window_attention
    return op(**inputs, backend=backend)


def run(inputs, backend):
    """y and the gradient of every input, by name; the oracle is a backend here."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in tensors(inputs).items()}
    y = pixel_by_pixel(**inputs | leaves) if backend == "oracle" else attend(**inputs | leaves, backend=backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_close(results, truths, output_error=OUTPUT_ERROR, gradient_error=GRADIENT_ERROR):
    assert results.keys() == truths.keys()
    largest = {name: truth.abs().max().item() if truth.numel() else 0.0 for name, truth in truths.items()}
    least, wrong = max(value for name, value in largest.items() if name != "y") / 100, {}
    for name, truth in truths.items():
        allowed = output_error * largest[name] if name == "y" else gradient_error * max(largest[name], least)
        result = results[name].cpu().double()
        assert result.shape == truth.shape
        if truth.numel() and not (difference := (result - truth.cpu()).abs().max().item()) <= allowed:
            wrong[name] = difference
    assert not wrong


def assert_right(case, backend, device):
    assert_close(run(case.inputs(device, torch.float32), backend), run(case.inputs(), "reference"))


def pixels_seen(pixel, length, window, shift=0, dilation=1, beyond=0):
    """The pixels that one sees along an axis, and the row or column of the table for each; some are beyond the map."""
    token, residue = pixel // dilation, pixel % dilation
    first = (token - shift) // window * window + shift - beyond
    tokens = torch.arange(first, first + window + 2 * beyond)
    return tokens * dilation + residue, token - tokens - beyond + window + 2 * beyond - 1


def directions(vectors):
    return vectors / vectors.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-12)


def pixel_by_pixel(
    qkv, bias_table, *, num_heads, window_size, shift=(0, 0), dilation=(1, 1), scale=None, logit_scale=None,
    cosine=False, kv=None, tokens=None, key_window_size=None, zero_border=False,
):  # fmt: skip
    """The formula: for each pixel, the softmax over the pixels that it sees."""
    q, k, v = qkv.chunk(3, -1) if kv is None else (qkv, *kv.chunk(2, -1))
    (batch, height, width, channels), (rows, columns) = q.shape, window_size
    keys = key_window_size or window_size
    down, across = ((k - w) // 2 for k, w in zip(keys, window_size, strict=True))
    scale = scale or (1 if cosine else (channels // num_heads) ** -0.5)
    y = []
    for row in range(height):
        for column in range(width):
            i, table_rows = pixels_seen(row, height, rows, shift[0], dilation[0], down)
            j, table_columns = pixels_seen(column, width, columns, shift[1], dilation[1], across)
            inside = ((i >= 0) & (i < height))[:, None] & ((j >= 0) & (j < width))
            at = i.clamp(0, height - 1)[:, None], j.clamp(0, width - 1)
            seen_k, seen_v = ((x[:, at[0], at[1]] * inside[..., None]).flatten(1, 2) for x in (k, v))
            offsets = (table_rows[:, None] * (columns + keys[1] - 1) + table_columns).flatten()
            if not zero_border:
                there = inside.flatten()
                seen_k, seen_v, offsets = seen_k[:, there], seen_v[:, there], offsets[there]
            bias = torch.zeros(len(offsets), num_heads).double() if bias_table is None else bias_table[offsets]
            if tokens is not None:
                seen_k, seen_v = (torch.cat(p, 1) for p in zip((seen_k, seen_v), tokens.chunk(2, -1), strict=True))
                bias = F.pad(bias, (0, 0, 0, tokens.shape[1]))
            query = q[:, row, column].unflatten(-1, (num_heads, -1))
            seen_k, seen_v = (x.unflatten(-1, (num_heads, -1)) for x in (seen_k, seen_v))
            if cosine:
                query, seen_k = directions(query), directions(seen_k)
            logits = scale * torch.einsum("bhd,bnhd->bnh", query, seen_k)
            logits = logits if logit_scale is None else logits * logit_scale[:, None]
            y.append(torch.einsum("bnh,bnhd->bhd", (logits + bias).softmax(1), seen_v).flatten(1))
    return torch.stack(y, 1).view(batch, height, width, channels)


@given(case=cases(st.integers(1, 8), st.integers(1, 5)))
def test_the_reference_is_the_formula(case):
    assert_close(run(case.inputs(), "reference"), run(case.inputs(), "oracle"), 1e-13, 1e-13)


@given(case=cases(st.integers(1, 8), st.integers(1, 5)))
def test_the_fallback_is_the_formula(case):
    assert_close(run(case.inputs(), "torch"), run(case.inputs(), "oracle"), 1e-13, 1e-13)


@given(case=cases(st.integers(1, 30), st.integers(1, 12), reach=9))
def test_the_fallback_agrees(case):
    assert_right(case, "torch", CPU)


@settings(max_examples=6)
@given(case=cases(st.integers(1, 2), st.integers(1, 3), reach=1, heads=1))
def test_triton_agrees(case, device):
    assert_right(case, "triton", device)


@pytest.fixture(params=["torch", "triton"])
def form(request, device):
    """A fast form, and where it runs."""
    return request.param, device if request.param == "triton" else CPU


SEAMS = [
    Case(1, 1, (1, 1)),
    Case(1, 1, (4, 3), (3, 1), cosine=True, tokens=2),
    Case(2, 3, (5, 7), (2, 6), logit_scale=True),  # windows larger than the map
    Case(1, 5, (1, 3), (0, 2), heads=1),  # strips
    Case(5, 1, (3, 1), (1, 0), heads=1),
    Case(5, 3, (2, 3), (1, 0), (3, 2), heads=1, other_map=True),  # the dilation divides neither side
    Case(2, 2, (2, 2), (1, 1), (4, 3), heads=1),  # and is larger than the map
    Case(3, 3, (2, 1), beyond=(0, 0), heads=1),
    Case(2, 3, (3, 2), beyond=(1, 3), heads=1),
    Case(2, 3, (3, 2), beyond=(1, 3), zero_border=True, heads=1),
    Case(2, 2, (2, 2), tokens=0, logit_scale=True, batch=2, heads=1),
    Case(2, 2, (2, 2), (0, 1), heads=3, head_dim=17, tokens=1),  # an odd number of channels
]


@pytest.mark.parametrize("case", SEAMS, ids=str)
def test_every_form_agrees_at_the_seams(case, form):
    assert_close(run(case.inputs(), "reference"), run(case.inputs(), "oracle"), 1e-13, 1e-13)
    assert_right(case, *form)


BLOCKS = [
    Case(5, 6, (5, 5), (2, 3), heads=1),
    Case(6, 4, (5, 4), (2, 2), heads=1, tokens=18, logit_scale=True, cosine=True),
    Case(4, 6, (4, 5), heads=1, other_map=True, logit_scale=True, batch=2),
    Case(5, 6, (3, 4), heads=1, beyond=(2, 1)),
    Case(4, 5, (3, 4), heads=1, beyond=(2, 1), zero_border=True),
]


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_triton_agrees_with_windows_of_one_block_and_of_several(case, block, device, monkeypatch):
    fused = pytest.importorskip("claritycore.kernels.window_attention.fused")
    monkeypatch.setattr(fused, "BLOCK", block)
    assert_right(case, "triton", device)


def test_triton_agrees_where_the_bias_does_not_fit_registers(device, monkeypatch):
    fused_backward = pytest.importorskip("claritycore.kernels.window_attention.fused_backward")
    monkeypatch.setattr(fused_backward, "BIAS_ELEMENTS", 500)
    assert_right(Case(5, 5, (5, 5), (2, 2), heads=1, logit_scale=True), "triton", device)


@pytest.mark.parametrize("programs", [6, 1000])  # three, three and two windows each; one each
def test_triton_divides_the_windows(programs, device, monkeypatch):
    fused_backward = pytest.importorskip("claritycore.kernels.window_attention.fused_backward")
    monkeypatch.setattr(fused_backward, "PROGRAMS_PER_PROCESSOR", programs)
    assert_right(Case(3, 7, (2, 2), (1, 1), heads=1, batch=2, tokens=2, logit_scale=True), "triton", device)
    assert_right(Case(3, 5, (2, 2), heads=1, beyond=(1, 1)), "triton", device)


@pytest.mark.parametrize("piece", [1, 300, 2000])
def test_the_fallback_agrees_whatever_it_cuts(piece, monkeypatch):
    monkeypatch.setattr(fallback, "PIECE", piece)
    options = {"batch": 3, "tokens": 2, "logit_scale": True}
    assert_right(Case(13, 11, (3, 4), (1, 2), **options), "torch", CPU)
    assert_right(Case(13, 11, (3, 2), (2, 1), (2, 3), **options, cosine=True), "torch", CPU)
    assert_right(Case(13, 11, (3, 2), beyond=(2, 3), batch=3), "torch", CPU)


@pytest.mark.parametrize(
    "case",
    [
        Case(21, 35, (16, 16), (8, 8)),
        Case(21, 35, (16, 16), beyond=(4, 4), zero_border=True, heads=1),
        Case(40, 50, (8, 8), (4, 4), heads=6, head_dim=16, tokens=5),
    ],
    ids=str,
)
def test_large_windows_agree(case):
    assert_right(case, "torch", CPU)


def test_triton_agrees_with_large_windows(device):
    assert_right(Case(3, 16, (16, 16), (2, 0), heads=1), "triton", device)


def test_more_windows_than_a_launch_of_two_axes_takes():
    """65,535 is the most that CUDA takes on any axis but the first."""
    case = Case(256, 259, (1, 1), heads=1, head_dim=1, bias=False)
    results = run(case.inputs(dtype=torch.float32), "torch")
    qkv = case.inputs(dtype=torch.float32)["qkv"]
    assert torch.equal(results["y"], qkv[..., 2:])
    assert not results["gradient of qkv"][..., :2].any()
    assert_right(Case(257, 257, (2, 1), (1, 0), heads=1, head_dim=1), "torch", CPU)


def test_the_first_and_the_last_row_of_the_table():
    """By hand: two pixels, each of which attends to both; logits are the bias alone."""
    qkv = torch.tensor([[[0.0, 0.0, 3.0]], [[0.0, 0.0, 5.0]]]).double()[None]
    table = torch.tensor([[2.0], [7.0], [4.0]]).double()  # for a query above its key, at it, below it
    upper, lower = (torch.tensor(logits).double().softmax(0) for logits in ((7.0, 2.0), (4.0, 7.0)))
    expected = torch.stack([weights @ qkv[0, :, 0, 2] for weights in (upper, lower)])
    y = window_attention(qkv, table, num_heads=1, window_size=(2, 1), backend="reference")
    assert error(y.flatten(), expected) <= 1e-15


@pytest.mark.parametrize(
    "change", [lambda x: x | {"bias_table": x["bias_table"].flip(0)}, lambda x: x | {"shift": (1, 2)}]
)
def test_wrong_numbers_would_be_seen(change):
    inputs = Case(6, 7, (3, 4), (2, 2)).inputs()
    assert error(attend(**change(inputs)), run(inputs, "oracle")["y"]) > 1e3 * OUTPUT_ERROR
