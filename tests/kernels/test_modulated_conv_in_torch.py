"""The modulated convolution and its epilogue as torch sees them: derivatives, compile, vmap, and what they refuse."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from claritycore.deploy import flop_formulas
from claritycore.kernels import modulate, modulated_conv2d, noise_bias_act
from claritycore.kernels.modulated_conv import GAINS, modulated_conv2d_flops, noise_bias_act_bytes, noise_bias_act_flops
from tests.kernels.closeness import CPU
from tests.kernels.test_modulated_conv import epilogue, inputs
from tests.strategies import normal

OP, BACKWARD = torch.ops.claritycore.noise_bias_act, torch.ops.claritycore.noise_bias_act_backward


@pytest.mark.parametrize("form", ["scale", "grouped", "folded", "reference"])
@pytest.mark.parametrize("demodulate", [True, False])
def test_gradients_of_the_convolution(form, demodulate):
    leaves = [v.requires_grad_() for v in inputs(1 if form == "folded" else 2, 2, 2, (2, 3))]

    def convolve(*operands):
        return modulated_conv2d(*operands, demodulate=demodulate, form=form)

    assert gradcheck(convolve, leaves)
    assert gradgradcheck(convolve, leaves)


@pytest.mark.parametrize("activation", GAINS)
@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_of_the_epilogue(backend, activation, clamp):
    leaves = [v.requires_grad_() for v in epilogue((2, 2), channels=2).values()]

    def activate(*operands):
        return noise_bias_act(*operands, activation=activation, clamp=clamp, backend=backend)

    assert gradcheck(activate, leaves)
    assert gradgradcheck(activate, leaves)


def test_second_derivatives_of_triton(device):
    leaves = [v.to(device).requires_grad_() for v in epilogue((2, 2)).values()]
    assert gradgradcheck(lambda *v: noise_bias_act(*v, backend="triton"), leaves, fast_mode=True)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_it_meets_the_rules_of_torch(form, device):
    tensors = [v.requires_grad_() for v in epilogue((2, 3), device=device if form == "triton" else CPU).values()]
    opcheck(OP, (*tensors, "lrelu", 1.5, 1.0, form))
    opcheck(OP, (*tensors[:2], None, None, None, "relu", 1.0, None, form))
    tensors = [v.detach() for v in tensors]
    wanted = [True, True, False, True, True]
    opcheck(BACKWARD, (*tensors, tensors[0].clone(), "lrelu", 1.5, 1.0, wanted, form))


@pytest.mark.parametrize("dynamic", [False, True])
def test_they_compile_in_one_graph(dynamic):
    def layer(x, weight, style, noise, strength, bias):
        kernel, in_scale, out_scale = modulate(weight, style)
        y = torch.nn.functional.conv2d(x * in_scale[:, :, None, None], kernel, padding=1)
        fused = noise_bias_act(y, bias, noise, strength, out_scale, clamp=2.0)
        return fused + modulated_conv2d(x, weight, style)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((5, 6), (4, 7)):
        x, weight, style = inputs(channels=4, size=size)
        leaves = [x, weight, style, *(epilogue(size, channels=4)[name] for name in ("noise", "strength", "bias"))]
        leaves = [v.requires_grad_() for v in leaves]
        y, expected = compiled(*leaves), layer(*leaves)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        for got, want in zip(*(torch.autograd.grad(v.square().sum(), leaves) for v in (y, expected)), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dims", [(0, None, 0, None, 0), (1, 0, None, None, 0), (0, None, None, 0, None)], ids=str)
def test_vmap_keeps_calls_apart(dims):
    operands = list(epilogue((2, 3)).values())
    many = [v if d is None else torch.stack([v, v * 0.5, v * 2], d) for v, d in zip(operands, dims, strict=True)]
    leaves = [v.clone().requires_grad_() for v in many]
    y = torch.vmap(noise_bias_act, in_dims=dims)(*leaves)
    calls = [[v if d is None else v.select(d, i) for v, d in zip(leaves, dims, strict=True)] for i in range(3)]
    expected = torch.stack([noise_bias_act(*call, backend="reference") for call in calls])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)
    for got, want in zip(*(torch.autograd.grad(v.square().sum(), leaves) for v in (y, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_vmap_over_gradients_and_convolutions():
    operands = list(epilogue((2, 3)).values())
    pulls = normal((2, *operands[0].shape), dtype=torch.float64)

    def gradients(pull):
        return BACKWARD(*operands, pull, "lrelu", 1.5, 1.0, [True] * 5, "torch")

    for together, *each in zip(torch.vmap(gradients)(pulls), *map(gradients, pulls), strict=True):
        torch.testing.assert_close(together, torch.stack(each), rtol=0, atol=1e-12)
    x, weight, style = inputs()
    mapped = torch.vmap(lambda x, s: modulated_conv2d(x[None], weight, s[None])[0])(x, style)
    torch.testing.assert_close(mapped, modulated_conv2d(x, weight, style), rtol=0, atol=1e-12)


def test_vmap_shares_the_noise_of_one_with_each_sample_of_its_own_call():
    x, bias, _, strength, demodulation = epilogue((2, 3)).values()
    noise = normal((3, 1, 1, 2, 3), dtype=torch.float64)
    y = torch.vmap(lambda n: noise_bias_act(x, bias, n, strength, demodulation))(noise)
    expected = [noise_bias_act(x, bias, n, strength, demodulation, backend="reference") for n in noise]
    torch.testing.assert_close(y, torch.stack(expected), rtol=0, atol=1e-14)


class Convolves(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(inputs(channels=3)[1])

    def forward(self, x, style):
        return modulated_conv2d(x, self.weight, style)


def test_exported_samples_share_a_kernel():
    """One sample too, whose kernel is scaled where nothing is exported."""
    x, _, style = inputs(1, size=(9, 9))
    program = torch.export.export(Convolves(), (x, style))
    made = [node.meta["val"] for node in program.graph.nodes if node.op == "call_function" and "val" in node.meta]
    assert any(torch.is_tensor(tensor) for tensor in made)
    assert all(tensor.ndim <= 4 for tensor in made if torch.is_tensor(tensor))


def test_autocast_keeps_styles_and_demodulation_wide():
    x, weight, style = inputs(2, 64, 8, dtype=torch.float32)
    style = 1e5 * style
    expected = modulated_conv2d(x, weight, style)
    with torch.autocast("cpu", torch.bfloat16):
        y = modulated_conv2d(x, weight, style)
        inside = modulate(weight, style)
    assert inside.out_scale.dtype == torch.float32
    for got, want in zip(inside, modulate(weight, style), strict=True):
        assert torch.equal(got, want)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).abs().max() <= 3e-2 * expected.abs().max()
    operands = epilogue(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = noise_bias_act(**operands)
    assert torch.equal(inside, noise_bias_act(**operands))


def test_they_run_on_meta_and_on_nothing():
    meta = {name: v.to("meta") for name, v in epilogue().items()}
    assert noise_bias_act(**meta).shape == (2, 3, 3, 5)
    assert modulated_conv2d(*(v.to("meta") for v in inputs())).shape == (2, 4, 5, 6)
    x, weight, style = inputs()
    assert modulated_conv2d(x[:0], weight, style[:0]).shape == (0, 4, 5, 6)
    bias = torch.zeros(3).double().requires_grad_()
    y = noise_bias_act(x[:0], bias)
    assert y.shape == (0, 3, 5, 6)
    y.sum().backward()
    assert torch.equal(bias.grad, torch.zeros_like(bias))


X, W, S = torch.zeros(2, 3, 4, 5), torch.zeros(6, 3, 3, 3), torch.zeros(2, 3)
NOISE, ONE = torch.zeros(2, 1, 4, 5), torch.zeros(())
REFUSED = [
    (lambda: modulated_conv2d(X, W, S[:, :2]), ValueError, r"style must be \(B, I\) with I = 3, got shape \(2, 2\)"),
    (lambda: modulated_conv2d(X, W, S[:1]), ValueError, r"style must be \(B, I\) = \(2, 3\), got shape \(1, 3\)"),
    (lambda: modulated_conv2d(X, W[:, :2], S), ValueError, r"weight must be \(O, I, k, k\) with I = 3, got shape"),
    (lambda: modulated_conv2d(X, W, S, eps=-1.0), ValueError, "eps must be at least 0, got -1.0"),
    (lambda: modulated_conv2d(X[:, :, :0], W, S), ValueError, r"x must be .* H, W >= 1, got shape \(2, 3, 0, 5\)"),
    (lambda: modulated_conv2d(X, W[..., :2, :2], S), ValueError, r"an odd k, got shape \(6, 3, 2, 2\)"),
    (lambda: modulated_conv2d(X[0], W, S), ValueError, r"x must be \(B, C, H, W\) with H, W >= 1, got shape"),
    (lambda: modulated_conv2d(X.long(), W, S), TypeError, "x must be floating-point, got torch.int64"),
    (lambda: modulated_conv2d(X, W, S, form="folded"), ValueError, "form 'folded' takes one sample, got 2"),
    (lambda: modulated_conv2d(X, W, S, form="fast"), ValueError, "form must be one of auto, scale, .* got 'fast'"),
    (lambda: modulate(W, S[:, :2]), ValueError, r"style must be \(B, I\) with I = 3, got shape \(2, 2\)"),
    (lambda: modulate(W[0], S), ValueError, r"weight must be \(O, I, k, k\), none of them 0, got shape \(3, 3, 3\)"),
    (lambda: modulate(W[:0], S), ValueError, r"weight must be .* got shape \(0, 3, 3, 3\)"),
    (lambda: modulate(W, S.long()), TypeError, "style must be floating-point, got torch.int64"),
    (lambda: modulate(W.tolist(), S), TypeError, "weight must be a tensor, got"),
    (lambda: modulate(W, S, eps=-1.0), ValueError, "eps must be at least 0, got -1.0"),
    (lambda: noise_bias_act(X[0]), ValueError, r"x must be \(B, C, H, W\), got shape"),
    (lambda: noise_bias_act(X, torch.zeros(2)), ValueError, r"bias must be \(C,\) = \(3,\), got shape \(2,\)"),
    (lambda: noise_bias_act(X, None, NOISE[..., :4], ONE), ValueError, r"noise must be .* got shape \(2, 1, 4, 4\)"),
    (lambda: noise_bias_act(X, None, NOISE), ValueError, "noise and strength must be given together, got no strength"),
    (lambda: noise_bias_act(X, None, None, ONE), ValueError, "noise and strength must be .* got no noise"),
    (lambda: noise_bias_act(X, None, NOISE, torch.zeros(2)), ValueError, r"strength must be .* got shape \(2,\)"),
    (lambda: noise_bias_act(X, demodulation=S[:1]), ValueError, r"demodulation must be \(B, C\) = \(2, 3\), got shape"),
    (lambda: noise_bias_act(X, activation="gelu"), ValueError, "activation must be one of lrelu, relu, linear, got"),
    (lambda: noise_bias_act(X, gain=0.0), ValueError, "gain must be above 0, got 0.0"),
    (lambda: noise_bias_act(X, clamp=-1.0), ValueError, "clamp must be above 0, got -1.0"),
    (lambda: noise_bias_act(X, backend="cuda"), ValueError, "backend must be one of auto, triton, torch, reference"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="modulated_conv cannot run with backend='triton': its tensors are on cpu"):
        noise_bias_act(X, backend="triton")


def test_they_count_their_work():
    assert noise_bias_act_flops(2, 3, 4, 5) == 6 * 2 * 3 * 4 * 5
    assert noise_bias_act_bytes(2, 3, 4, 5, itemsize=2) == 2 * 2 * 4 * 5 * (2 * 3 + 1)
    assert modulated_conv2d_flops(2, 3, 6, 4, 5, 3) == 2 * 2 * 6 * 3 * 20 * 9 + 2 * 9 * 20 + 2 * 6 * 3 * (9 + 2)
    x = X.clone().requires_grad_()
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        noise_bias_act(x).sum().backward()
    assert counter.get_total_flops() == 3 * noise_bias_act_flops(2, 3, 4, 5)
