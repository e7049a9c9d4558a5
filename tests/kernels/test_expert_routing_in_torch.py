"""The routing as torch sees it: compile, export, vmap, autocast, gradient checks, and what it refuses."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from claritycore.deploy import flop_formulas
from claritycore.kernels import expert_mlp, expert_mlp_reference, route_top_k
from claritycore.kernels.expert_routing import (
    KERNEL,
    expert_mlp_bytes,
    expert_mlp_flops,
    group_by_expert,
    route_top_k_flops,
)
from tests.kernels.closeness import CPU, error
from tests.kernels.test_expert_routing import ACTIVATIONS, TENSORS, Case

OURS = torch.ops.claritycore
MIXED = Case(7, channels=3, hidden=4, experts=3)
TINY = Case(2, channels=1, hidden=2, experts=2, k=1, activation="relu", skipped=0)


def leaves_of(case, device=CPU, dtype=torch.float32):
    inputs = case.inputs(device, dtype)
    return [inputs[name].requires_grad_() for name in TENSORS], inputs["indices"]


def compute(x, weights, w1, b1, w2, b2, indices, *, backend, activation="gelu"):
    """y from the tensors in the order of TENSORS."""
    return expert_mlp(x, weights, indices, w1, b1, w2, b2, activation=activation, backend=backend)


def routed(x, logits, w1, b1, w2, b2, *, k=2, bias=None, backend="auto"):
    """Both operators, one after the other."""
    return expert_mlp(x, *route_top_k(logits, k, bias=bias, backend=backend), w1, b1, w2, b2, backend=backend)


def routed_leaves(case, device=CPU, dtype=torch.float32, shift=0.0):
    (x, _, *experts), _ = leaves_of(case, device, dtype)
    logits = torch.randn(case.tokens, case.experts, generator=torch.Generator().manual_seed(2)) + shift
    return [x, logits.to(device, dtype).requires_grad_(), *experts]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_of_everything(backend, activation):
    leaves, indices = leaves_of(Case(4, 2, 2, 3, activation=activation), dtype=torch.float64)
    assert gradcheck(lambda *x: compute(*x, indices, backend=backend, activation=activation), leaves)
    if backend == "reference":
        assert gradgradcheck(lambda *x: compute(*x, indices, backend=backend, activation=activation), leaves)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_of_the_choice(backend, biased, k):
    logits = torch.tensor([[0.3, -1.0, 2.0], [1.5, 1.0, 0.2]], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([0.0, 0.4, 0.1], dtype=torch.float64) if biased else None
    assert gradcheck(lambda x: route_top_k(x, k, bias=bias, backend=backend)[0], logits)
    if backend == "reference":
        assert gradgradcheck(lambda x: route_top_k(x, k, bias=bias, backend=backend)[0], logits)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_second_derivative_is_refused(backend, device):
    leaves, indices = leaves_of(TINY, device if backend == "triton" else CPU)
    y = compute(*leaves, indices, backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), leaves[2], create_graph=True)
    with pytest.raises(RuntimeError, match=r'expert_mlp can be .* twice only with backend="reference"'):
        gradient.sum().backward()
    logits = torch.zeros(2, 3, device=leaves[0].device, requires_grad=True)
    weights, _ = route_top_k(logits, 2, backend=backend)
    (gradient,) = torch.autograd.grad(weights[:, 0].sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r'route_top_k can be .* twice only with backend="reference"'):
        gradient.sum().backward()


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_it_meets_the_rules_of_torch(form, device):
    case = MIXED if form == "torch" else TINY
    (x, weights, *experts), indices = leaves_of(case, device if form == "triton" else CPU)
    opcheck(OURS.expert_mlp, (x, weights, indices, *experts, "gelu", form))
    operands = [v.detach() for v in (x, weights, indices, *experts)]
    groups = group_by_expert(indices, case.experts)
    wanted = [True, False, True, True, False, True]
    opcheck(OURS.expert_mlp_backward, (*operands, *groups, operands[0], "gelu", wanted, form))
    logits = torch.randn(3, 4, device=x.device)
    opcheck(OURS.route_top_k, (logits.clone().requires_grad_(), torch.zeros(4, device=x.device), 2, form))
    chosen, grad = logits.topk(2).indices, torch.ones(3, 2, device=x.device)
    opcheck(OURS.route_top_k_backward, (logits, chosen, grad, form))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_in_one_graph(backend, dynamic, device):
    compiled = torch.compile(routed, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (2, 5):
        leaves = routed_leaves(Case(tokens, 3, 4, 3), CPU if backend == "auto" else device)
        y, expected = compiled(*leaves, backend=backend), routed(*leaves, backend=backend)
        assert torch.equal(y, expected)
        gradients = torch.autograd.grad(y.sum(), leaves)
        for got, want in zip(gradients, torch.autograd.grad(expected.sum(), leaves), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("strict", [False, True])
def test_it_exports_with_any_number_of_tokens(strict):
    class Routed(torch.nn.Module):
        def forward(self, x, logits, w1, b1, w2, b2):
            return routed(x, logits, w1, b1, w2, b2)

    def inputs(tokens):
        return tuple(v.detach() for v in routed_leaves(Case(tokens, 3, 4, 3)))

    tokens = {0: torch.export.Dim("tokens", min=1)}
    shapes = (tokens, tokens, None, None, None, None)
    program = torch.export.export(Routed(), inputs(6), dynamic_shapes=shapes, strict=strict)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(OURS.route_top_k.default) == targets.count(OURS.expert_mlp.default) == 1
    for count in (1, 13):
        assert torch.equal(program.module()(*inputs(count)), Routed()(*inputs(count)))


def test_it_runs_on_meta():
    y = routed(*(v.to("meta") for v in routed_leaves(MIXED)))
    assert (y.shape, y.dtype, y.device.type) == ((7, 3), torch.float32, "meta")


DIMS = [(0, None, None, None, None, None), (0, 1, 0, 2, 1, 0), (None, None, 1, None, 0, None)]


@pytest.mark.parametrize("mapped", [False, True], ids=["indices for all", "indices for each"])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_vmap_keeps_calls_apart(dims, mapped):
    leaves, indices = leaves_of(MIXED, dtype=torch.float64)
    many = [x if d is None else torch.stack([x, x * 0.5, x * 2], d) for x, d in zip(leaves, dims, strict=True)]
    chosen = torch.stack([indices, indices.flip(0), indices.flip(1)]) if mapped else indices
    leaves = [x.detach().clone().requires_grad_() for x in many]
    y = torch.vmap(lambda *x: compute(*x, backend="torch"), in_dims=(*dims, 0 if mapped else None))(*leaves, chosen)
    calls = [
        compute(
            *(x if d is None else x.select(d, i) for x, d in zip(leaves, dims, strict=True)),
            chosen[i] if mapped else chosen, backend="reference",
        )
        for i in range(3)
    ]  # fmt: skip
    expected = torch.stack(calls)
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    assert error(y, expected) <= 1e-12
    gradients = (torch.autograd.grad(v, leaves, upstream) for v in (y, expected))
    for got, want in zip(*gradients, strict=True):
        assert error(got, want) <= 1e-12


def test_vmap_over_gradients_keeps_those_of_experts_apart():
    leaves, indices = leaves_of(MIXED, dtype=torch.float64)
    y = compute(*leaves, indices, backend="torch")
    upstream = torch.linspace(-1, 1, 3 * y.numel(), dtype=y.dtype).view(3, *y.shape)
    got = torch.vmap(lambda g: torch.autograd.grad(y, leaves, g, retain_graph=True))(upstream)
    each = [torch.autograd.grad(y, leaves, g, retain_graph=True) for g in upstream]
    for of_all, of_each in zip(got, zip(*each, strict=True), strict=True):
        assert error(of_all, torch.stack(of_each)) <= 1e-12


@pytest.mark.parametrize("dims", [(1, None), (0, 0), (None, 1)], ids=str)
def test_vmap_of_the_choice(dims):
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = torch.tensor([0.3, 0.0, -0.2, 0.1], dtype=torch.float64)
    many = [x if d is None else torch.stack([x, -x, x.flip(0)], d) for x, d in zip((logits, bias), dims, strict=True)]
    leaf = many[0].clone().requires_grad_()

    def call(x, b, backend="torch"):
        return route_top_k(x, 2, bias=b, backend=backend)

    weights, indices = torch.vmap(call, in_dims=dims)(leaf, many[1])
    for i in range(3):
        x, b = (v if d is None else v.select(d, i) for v, d in zip((leaf, many[1]), dims, strict=True))
        expected, chosen = call(x, b, "reference")
        assert torch.equal(indices[i], chosen)
        assert error(weights[i], expected) <= 1e-14
    assert gradcheck(lambda x: torch.vmap(call, in_dims=dims)(x, many[1])[0], leaf)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_the_tokens_alone(compiled):
    call = torch.compile(routed, fullgraph=True, backend="aot_eager") if compiled else routed
    leaves = routed_leaves(MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(*leaves)
    assert y.dtype == torch.bfloat16
    assert {g.dtype for g in torch.autograd.grad(y.sum(), leaves)} == {torch.float32}
    assert torch.equal(y, routed(leaves[0].bfloat16(), *leaves[1:]))


def test_autocast_leaves_float64_and_the_reference_right():
    leaves, floats = routed_leaves(MIXED, dtype=torch.float64), routed_leaves(MIXED)
    with torch.autocast("cpu", torch.bfloat16):
        y = routed(*leaves)
        reference, fast = (routed(*floats, backend=backend) for backend in ("reference", "torch"))
    assert torch.equal(y, routed(*leaves))
    assert reference.dtype == fast.dtype == torch.bfloat16
    assert error(fast, reference) <= 1e-2


def test_backward_under_autocast_is_no_less_exact():
    leaves = routed_leaves(MIXED)
    y = routed(*leaves, backend="torch")
    expected = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(got, want) for got, want in zip(gradients, expected, strict=True))


def test_the_environment_may_ask_for_the_reference(monkeypatch):
    monkeypatch.setenv("CLARITYCORE_BACKEND", "reference")
    leaves = routed_leaves(MIXED)
    (gradient,) = torch.autograd.grad(routed(*leaves).sum(), leaves[1], create_graph=True)
    gradient.sum().backward()  # which only the reference can do
    assert leaves[1].grad is not None


def test_mixed_dtypes_follow_the_tokens():
    (x, *rest), indices = leaves_of(MIXED)
    y = compute(x, *(v.double() for v in rest), indices, backend="torch")
    assert y.dtype == torch.float32
    assert torch.equal(y, compute(x, *rest, indices, backend="torch"))
    doubled = compute(x.double(), *rest, indices, backend="torch")
    assert doubled.dtype == torch.float64
    assert torch.autograd.grad(doubled.sum(), rest[1])[0].dtype == torch.float32


REFUSED = [
    ({"x": torch.zeros(7)}, ValueError, r"x must be \(T, C\), got shape \(7,\)"),
    ({"x": torch.zeros(6, 3)}, ValueError, r"indices must be \(T, k\) = \(6, 2\), got shape \(7, 2\)"),
    ({"x": torch.zeros(7, 4)}, ValueError, r"w1 must be \(E, H, C\) = \(3, 4, 4\), got shape \(3, 4, 3\)"),
    ({"weights": torch.zeros(7, 1)}, ValueError, r"weights must be \(T, k\) = \(7, 2\), got shape \(7, 1\)"),
    ({"indices": torch.zeros(14, dtype=torch.int64)}, ValueError, r"indices must be \(T, k\), got shape \(14,\)"),
    ({"indices": torch.zeros(7, 0, dtype=torch.int64)}, ValueError, "k and E must be at least 1, got k = 0 and E = 3"),
    ({"indices": torch.zeros(7, 2, dtype=torch.int32)}, TypeError, "indices must be a tensor of int64, got torch.int3"),
    ({"indices": None}, TypeError, "indices must be a tensor of int64, got None"),
    ({"indices": torch.full((7, 2), 3)}, ValueError, "indices must be from -1 to 2, got 3 to 3"),
    ({"indices": torch.full((7, 2), -2)}, ValueError, "indices must be from -1 to 2, got -2 to -2"),
    ({"w1": torch.zeros(4, 3)}, ValueError, r"w1 must be \(E, H, C\), got shape \(4, 3\)"),
    ({"b1": torch.zeros(3, 3)}, ValueError, r"b1 must be \(E, H\) = \(3, 4\), got shape \(3, 3\)"),
    ({"w2": torch.zeros(3, 4, 3)}, ValueError, r"w2 must be \(E, C, H\) = \(3, 3, 4\), got shape \(3, 4, 3\)"),
    ({"b2": torch.zeros(2, 3)}, ValueError, r"b2 must be \(E, C\) = \(3, 3\), got shape \(2, 3\)"),
    ({"activation": "tanh"}, ValueError, "activation must be one of relu, leaky_relu, gelu, silu, got 'tanh'"),
    ({"activation": None}, ValueError, "activation must be one of .*, got None"),
    ({"weights": None}, TypeError, "weights must be a tensor, got None"),
    ({"x": torch.zeros(7, 3, dtype=torch.uint8)}, TypeError, "x must be floating-point, got torch.uint8"),
    ({"w2": torch.zeros(3, 3, 4, dtype=torch.complex64)}, TypeError, "w2 must be real, got torch.complex64"),
    ({"b1": torch.zeros(3, 4, device="meta")}, ValueError, "b1 must be on the device of x, cpu, got meta"),
    ({"indices": torch.zeros(7, 2, dtype=torch.int64, device="meta")}, ValueError, "indices must be on the device of"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, reference, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED, ids=[message[:50] for _, _, message in REFUSED])
def test_bad_input_is_named(change, kind, message):
    with pytest.raises(kind, match=message):
        expert_mlp(**MIXED.inputs(dtype=torch.float32) | change)


def test_the_reference_refuses_indices_out_of_range():
    inputs = MIXED.inputs() | {"indices": torch.full((7, 2), 3)}
    with pytest.raises(ValueError, match="indices must be from -1 to 2, got 3 to 3"):
        expert_mlp(**inputs, backend="reference")


REFUSED_CHOICES = [
    ({"k": 5}, ValueError, "k must be from 1 to the number of experts, 4, got 5"),
    ({"k": 0}, ValueError, "k must be from 1 to the number of experts, 4, got 0"),
    ({"k": 2.0}, TypeError, "k must be an integer, got 2.0"),
    ({"k": True}, TypeError, "k must be an integer, got True"),
    ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"logits must be \(T, E\), got shape \(2, 3, 4\)"),
    ({"logits": torch.zeros(3, 0)}, ValueError, "k must be from 1 to the number of experts, 0, got 2"),
    ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "logits must be floating-point, got torch.int64"),
    ({"logits": None}, TypeError, "logits must be a tensor, got None"),
    ({"bias": torch.zeros(3)}, ValueError, r"bias must be \(E,\) = \(4,\), got shape \(3,\)"),
    ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias must be on the device of logits, cpu, got meta"),
    ({"bias": torch.zeros(4, requires_grad=True)}, ValueError, "bias must not require a gradient: it only chooses"),
    ({"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, reference, got 'cuda'"),
]


@pytest.mark.parametrize(("change", "kind", "message"), REFUSED_CHOICES, ids=[m[:50] for _, _, m in REFUSED_CHOICES])
def test_a_bad_choice_is_named(change, kind, message):
    with pytest.raises(kind, match=message):
        route_top_k(**{"logits": torch.zeros(3, 4), "k": 2} | change)


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="expert_routing cannot run with backend='triton': its tensors are on cpu"):
        route_top_k(torch.zeros(3, 4), 2, backend="triton")


def test_it_counts_its_work():
    assert KERNEL.name == "expert_routing"
    assert expert_mlp_flops(100, 6, 10, 2) == 2 * (2 * 100 * 2 * 6 * 10)
    assert route_top_k_flops(100, 8, 2) == 100 * 8 * 6
    parameters = 4 * (2 * 6 * 10 + 6 + 10)
    assert expert_mlp_bytes(100, 6, 10, 2, 4) == 4 * (2 * 100 * 6 + 200 + parameters) + 8 * 200
    backward = expert_mlp_bytes(100, 6, 10, 2, 4, itemsize=2, backward=True)
    assert backward == 2 * 2 * (2 * 100 * 6 + 200 + parameters) + 8 * 200


def counted(call):
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        call()
    return counter.get_total_flops()


def test_the_counter_of_torch_counts_the_same():
    leaves, indices = leaves_of(MIXED)
    step = counted(lambda: compute(*leaves, indices, backend="torch").sum().backward())
    assert 2 * step == 7 * expert_mlp_flops(7, 3, 4, 2)
    frozen = [leaves[0].detach(), *leaves[1:]]
    without = counted(lambda: compute(*frozen, indices, backend="torch").sum().backward())
    assert 2 * without == 6 * expert_mlp_flops(7, 3, 4, 2)


def test_flops_grow_with_k_and_not_with_experts():
    """Those that torch counts of the products themselves, in the reference: nothing is taken on trust."""

    def products(experts, k):
        inputs = Case(16, experts=experts, k=k, skipped=0).inputs()
        return counted(lambda: expert_mlp_reference(**inputs))

    one = products(4, 1)
    assert [products(4, k) for k in (1, 2, 3, 4)] == [one, 2 * one, 3 * one, 4 * one]
    assert {products(experts, 1) for experts in (1, 2, 8, 40)} == {one}
