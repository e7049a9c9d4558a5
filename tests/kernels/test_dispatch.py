"""Which form of a kernel runs, and what is said when one cannot."""

import importlib.util

import pytest
import torch

from claritycore import kernels
from claritycore.kernels import KERNELS, Kernel
from claritycore.kernels.operand_rules import compute_dtype

CPU = torch.empty(0)
META = torch.empty(0, device="meta")
KERNEL = Kernel("some_op")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    monkeypatch.delenv("CLARITYCORE_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_auto_takes_the_fallback_away_from_cuda():
    assert KERNEL.choose("auto", CPU) == "torch"
    assert KERNEL.choose("auto", META) == "torch"
    assert Kernel("no_fallback", ("triton", "reference")).choose("auto", CPU) == "reference"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_takes_triton_on_cuda():
    assert KERNEL.choose("auto", CPU.cuda()) == "triton"
    assert Kernel("plain_op", ("reference",)).choose("auto", CPU.cuda()) == "reference"


def test_the_interpreter_is_never_taken_unasked(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert KERNEL.choose("triton", CPU) == "triton"
    assert KERNEL.choose("auto", CPU) == "torch"
    assert KERNEL.explain(torch.device("cpu"))[1].startswith("Triton's interpreter")


def test_a_named_backend_that_cannot_run_says_why(monkeypatch):
    pytest.importorskip("triton")
    with pytest.raises(NotImplementedError, match="some_op cannot run with backend='triton': its tensors are on cpu"):
        KERNEL.choose("triton", CPU)
    with pytest.raises(NotImplementedError, match="plain_op cannot run with backend='triton': it has no Triton form"):
        Kernel("plain_op", ("reference",)).choose("triton", CPU)
    monkeypatch.setattr("claritycore.kernels.dispatch.HAS_TRITON", False)
    with pytest.raises(NotImplementedError, match="triton is not installed"):
        KERNEL.choose("triton", CPU)


def test_a_choice_searches_for_no_package(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("importlib.util.find_spec", None)  # which torch 2.11 cannot compile
    assert KERNEL.choose("triton", CPU) == "triton"


def test_unknown_names_raise(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, reference, got 'cuda'"):
        KERNEL.choose("cuda", CPU)
    monkeypatch.setenv("CLARITYCORE_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"CLARITYCORE_BACKEND must be one of .*, got 'fast'"):
        KERNEL.choose("auto", CPU)


def test_the_variable_rules_auto_and_nothing_else(monkeypatch):
    monkeypatch.setenv("CLARITYCORE_BACKEND", "reference")
    assert KERNEL.choose("auto", CPU) == "reference"
    assert KERNEL.choose("torch", CPU) == "torch"


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_form_of_a_kernel_has_a_file(kernel):
    form = kernel.form("torch")
    assert form.__name__ == f"claritycore.kernels.{kernel.name}.fallback"
    pairs = [("forward", "backward")]
    if kernel.name == "frequency_split":  # linear maps, each the gradient of the other
        pairs = [("blur_split", "blur_split_adjoint"), ("haar_split", "haar_merge")]
    if kernel.name == "noise_field":  # which follows from no tensor that learns
        pairs = [("noise_field", "words")]
    assert all(callable(getattr(form, name)) for pair in pairs for name in pair)
    # Not imported here: it would run in Triton's interpreter, or not, for the rest of the process.
    assert importlib.util.find_spec(f"claritycore.kernels.{kernel.name}.fused")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32_and_float64_in_float64(dtype):
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert compute_dtype(torch.empty(0, dtype=dtype)) == wanted


def test_uninitialised_memory_is_nan_in_kernel_tests():
    for tensor in (torch.empty(1000), torch.empty_like(torch.ones(1000)), torch.ones(3).new_empty(1000)):
        assert tensor.isnan().all()


def forward_mode_calls():
    """A call of each op, by the name of its kernel, and the map that is followed."""
    x = torch.randn(1, 6, 4, 5)
    weight, table, u, A = torch.randn(6, 1, 3, 3), torch.randn(9, 2), torch.randn(1, 2, 5), -torch.rand(2, 3)
    B = torch.randn(1, 3, 5)
    w1 = torch.randn(3, 4, 3)
    pixels, B2 = torch.randn(1, 4, 5, 2), torch.randn(1, 1, 4, 5, 3)
    return {
        "depthwise_conv2d": (x, lambda x, **how: kernels.depthwise_conv2d(x, weight, **how)),
        "expert_routing": (
            A,
            lambda x, **how: kernels.expert_mlp(
                x, *(v.detach() for v in kernels.route_top_k(-x.detach(), 2)), w1, w1[..., 0], w1.mT, w1[:, 0], **how
            ),
        ),
        "frequency_split": (x, lambda x, **how: kernels.blur_split(x, 1.0, **how)[1]),
        "modulated_conv": (x, lambda x, **how: kernels.noise_bias_act(x, torch.rand(6), **how)),
        "selective_scan": (u, lambda u, **how: kernels.selective_scan(u, torch.rand(1, 2, 5), A, B, B, **how)),
        "selective_scan_2d": (
            pixels,
            lambda x, **how: kernels.selective_scan_2d(
                x, x[:, None].detach(), A[None], B2, B2, directions=("row",), **how
            ),
        ),
        "window_attention": (
            pixels.new_ones(1, 4, 5, 6) * 0.5,
            lambda x, **how: kernels.window_attention(x, table, num_heads=2, window_size=2, **how),
        ),
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, within jvp
@pytest.mark.parametrize("name", [kernel.name for kernel in KERNELS if kernel.name != "noise_field"])
def test_forward_mode_is_refused_where_the_tangent_would_be_lost(name):
    x, call = forward_mode_calls()[name]
    tangent = torch.randn_like(x)
    with pytest.raises(RuntimeError, match=f'{name} can be .* in forward mode only with backend="reference"'):
        torch.func.jvp(call, (x,), (tangent,))
    torch.manual_seed(0)
    _, slope = torch.func.jvp(lambda x: call(x, backend="reference"), (x.double(),), (tangent.double(),))
    assert slope.abs().max() > 0
    assert call(x).isfinite().all()
