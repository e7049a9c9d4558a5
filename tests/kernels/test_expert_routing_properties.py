"""What holds of the routing whatever its numbers: dtypes, layouts, what nobody chose, order, repetition, memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from claritycore.kernels import expert_mlp, route_top_k
from claritycore.kernels.expert_routing import fallback
from tests.kernels.closeness import CPU, error
from tests.kernels.test_expert_routing import TENSORS, Case, assert_close, run

MIXED = Case(9, channels=6, hidden=5, experts=4)
PARAMETERS = ("w1", "b1", "w2", "b2")


@pytest.fixture(params=["torch", "triton"])
def form(request, device):
    """A fast form, and where it runs."""
    return request.param, device if request.param == "triton" else CPU


@pytest.fixture(params=["torch", "triton", "reference"])
def any_form(request, device):
    """Every form, and where it runs."""
    return request.param, device if request.param == "triton" else CPU


def wide(inputs):
    tensors = {name: inputs[name].cpu().double() for name in TENSORS}
    return inputs | tensors | {"indices": inputs["indices"].cpu()}


def test_float64_stays_float64(form):
    backend, device = form
    results = run(MIXED.inputs(device), backend)
    assert {value.dtype for value in results.values()} == {torch.float64}
    assert_close(results, run(MIXED.inputs(), "reference"), 1e-13, 1e-13)
    weights, _ = route_top_k(torch.randn(3, 4, dtype=torch.float64, device=device), 2, backend=backend)
    assert weights.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_no_more_than_the_cast(form, dtype):
    backend, device = form
    inputs = MIXED.inputs(device, torch.float32)
    half = inputs | {"x": inputs["x"].to(dtype)}
    results, truth = run(half, backend), run(wide(half), "reference")
    assert results["y"].dtype == results["gradient of x"].dtype == dtype
    assert results["gradient of w1"].dtype == results["gradient of weights"].dtype == torch.float32
    # Triton multiplies matrices in half precision: what passes between the layers is rounded too.
    y_of_float = run(half | {"x": half["x"].float()}, backend)["y"]
    casts = 1.1 if backend == "torch" else 5
    assert error(results["y"], truth["y"]) <= casts * error(y_of_float.to(dtype), truth["y"])
    assert_close(results, truth, 1e-2, 1e-2)
    everything = inputs | {name: inputs[name].to(dtype) for name in TENSORS}
    results = run(everything, backend)
    assert {value.dtype for value in results.values()} == {dtype}
    assert_close(results, run(wide(everything), "reference"), 1e-2, 2e-2)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_choice_of_half_precision_is_made_in_float32(any_form, dtype, k):
    backend, device = any_form
    logits = (4 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    weights, indices = route_top_k(logits, k, backend=backend)
    expected, chosen = route_top_k(logits.float(), k, backend=backend)
    assert weights.dtype == dtype
    assert torch.equal(indices, chosen)
    assert torch.equal(weights, expected.to(dtype))


def views_of(inputs):
    """The same numbers with tokens along columns, with gaps, and from the middle of larger tensors."""

    def spread(value, dim):
        return torch.stack([torch.full_like(value, float("nan")), value], dim).select(dim, 1)

    views = {"x": inputs["x"].T.contiguous().T, "weights": spread(inputs["weights"], 2)}
    views |= {"w1": inputs["w1"].mT.contiguous().mT, "b1": spread(inputs["b1"], 1)}
    views |= {"w2": spread(inputs["w2"], 1), "b2": inputs["b2"].T.contiguous().T}
    return inputs | views | {"indices": inputs["indices"].T.contiguous().T}


def test_views_are_accepted_and_left_alone(form):
    backend, device = form
    inputs = MIXED.inputs(device, torch.float32)
    truth, views = run(inputs, backend), views_of(inputs)
    kept = {name: views[name].clone() for name in (*TENSORS, "indices")}
    leaves = {name: views[name].detach().requires_grad_() for name in TENSORS}
    y = expert_mlp(**views | leaves, backend=backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    scattered = upstream.T.contiguous().T
    gradients = torch.autograd.grad(y, list(leaves.values()), scattered)
    results = {"y": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    assert_close(results, truth, 1e-6, 1e-6)
    assert all(torch.equal(views[name], kept[name]) for name in kept)
    y = expert_mlp(**inputs | leaves, backend=backend)
    ones = torch.ones((), device=device).expand_as(y), torch.ones_like(y)
    expanded, dense = (torch.autograd.grad(y, leaves["x"], g, retain_graph=True)[0] for g in ones)
    assert error(expanded, dense) <= 1e-6
    logits = torch.randn(5, 9, device=device).T
    assert not logits.is_contiguous()
    for got, want in zip(
        route_top_k(logits, 2, backend=backend), route_top_k(logits.contiguous(), 2, backend=backend), strict=True
    ):
        assert torch.equal(got, want)


# What nobody chose


def test_an_expert_that_nobody_chose_changes_nothing_were_it_nan(any_form):
    backend, device = any_form
    inputs = MIXED.inputs(device)
    inputs["indices"] = inputs["indices"].masked_fill(inputs["indices"] == 2, 3)
    poisoned = dict(inputs)
    for name in PARAMETERS:
        poisoned[name] = inputs[name].clone()
        poisoned[name][2] = float("nan")
    results = run(poisoned, backend)
    assert_close(results, run(wide(inputs), "reference"), 1e-13, 1e-13)
    for name in PARAMETERS:
        assert torch.count_nonzero(results[f"gradient of {name}"][2]) == 0


def test_nobody_adds_nothing_and_costs_nothing(any_form):
    backend, device = any_form
    inputs = MIXED.inputs(device)
    inputs["indices"] = inputs["indices"].clone()
    inputs["indices"][[0, 3]] = -1
    inputs["weights"][0] = float("nan")
    inputs["x"][3] = float("nan")
    results = run(inputs, backend)
    for name in ("y", "gradient of x", "gradient of weights"):
        assert torch.count_nonzero(results[name][[0, 3]]) == 0
    assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("k", [1, 2])
def test_no_token_at_all(any_form, k):
    backend, device = any_form
    results = run(Case(0, k=k).inputs(device), backend)
    assert results["y"].shape == (0, 5)
    for name in PARAMETERS:  # zeros, and not None: parameters of a rank without tokens still take part
        assert torch.count_nonzero(results[f"gradient of {name}"]) == 0
    logits = torch.zeros(0, 4, device=device, requires_grad=True)
    weights, indices = route_top_k(logits, k, backend=backend)
    assert weights.shape == indices.shape == (0, k)
    assert indices.dtype == torch.int64
    assert torch.autograd.grad(weights.sum(), logits)[0].shape == (0, 4)


def test_triton_makes_a_token_nan_whose_index_is_out_of_range(device):
    for wrong in (4, -2):
        inputs = MIXED.inputs(device)
        inputs["indices"] = inputs["indices"].clone()
        inputs["indices"][5, 1] = wrong
        y = expert_mlp(**inputs, backend="triton")
        assert y[5].isnan().all()
        assert y[[t for t in range(9) if t != 5]].isfinite().all()


# The choice


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equal_logits_go_to_the_lowest_index(any_form, k):
    backend, device = any_form
    logits = torch.zeros(3, 8, device=device)
    logits[1, 2:] = 1
    logits[2] = float("-inf")
    logits[2, 5] = 0
    weights, indices = route_top_k(logits, k, backend=backend)
    assert indices.tolist() == [[0, 1, 2, 3][:k], [2, 3, 4, 5][:k], [5, 0, 1, 2][:k]]
    assert weights[2].tolist() == [1.0, 0.0, 0.0, 0.0][:k]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("bad", ["nan", "inf", "all -inf"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_bad_logits_show(any_form, bad, k, biased):
    """Whichever logit is bad, and whether it is chosen or not."""
    backend, device = any_form
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(device)
    bias = torch.tensor([0.0, 3.0, 2.0, 0.0, -9.0], device=device) if biased else None
    expected, chosen = route_top_k(logits, k, bias=bias, backend=backend)
    for e in range(5):
        poisoned = logits.clone()
        if bad == "all -inf":
            poisoned[2] = float("-inf")
        else:
            poisoned[2, e] = float(bad)
        weights, indices = route_top_k(poisoned, k, bias=bias, backend=backend)
        others = [0, 1, 3, 4, 5]
        assert weights[2].isnan().all()
        assert ((indices[2] >= 0) & (indices[2] < 5)).all()
        assert torch.equal(weights[others], expected[others])
        assert torch.equal(indices[others], chosen[others])


def test_far_apart_logits_keep_their_weights(any_form):
    """Chosen by a bias, two experts may have probabilities of which each underflows."""
    backend, device = any_form
    logits = torch.tensor([[0.0, -200.0, -201.0]], device=device)
    weights, indices = route_top_k(logits, 2, bias=torch.tensor([0.0, 5.0, 4.0], device=device), backend=backend)
    assert indices.tolist() == [[1, 2]]
    torch.testing.assert_close(weights.cpu(), torch.softmax(torch.tensor([[0.0, -1.0]]), -1))


def test_one_expert_has_its_probability_and_the_router_its_gradient(any_form):
    backend, device = any_form
    logits = torch.tensor([[1.0, 2.0, 0.5]], device=device, requires_grad=True)
    weights, indices = route_top_k(logits, 1, backend=backend)
    p = logits.detach().softmax(-1)
    assert indices.tolist() == [[1]]
    torch.testing.assert_close(weights.detach(), p[:, 1:2])
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    torch.testing.assert_close(gradient, p[:, 1:2] * (torch.tensor([[0.0, 1.0, 0.0]], device=device) - p))


def test_the_bias_chooses_and_does_not_weigh(any_form):
    backend, device = any_form
    logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).to(device)
    bias = torch.tensor([0.0, 0.0, 0.0, 0.0, 10.0, 0.0], device=device)
    weights, indices = route_top_k(logits, 2, bias=bias, backend=backend)
    assert (indices[:, 0] == 4).all()
    torch.testing.assert_close(weights, logits.gather(1, indices).softmax(-1))


# Tokens


def permuted(inputs, order):
    return inputs | {name: inputs[name][order] for name in ("x", "weights", "indices")}


def test_tokens_in_another_order_have_the_same_results(form):
    backend, device = form
    inputs = MIXED.inputs(device, torch.float32)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    y, turned = (expert_mlp(**each, backend=backend) for each in (inputs, permuted(inputs, order.to(device))))
    assert error(turned, y[order.to(device)]) <= 1e-6
    logits = torch.randn(9, 4, device=device)
    chosen, turned = (route_top_k(each, 2, backend=backend)[1] for each in (logits, logits[order.to(device)]))
    assert torch.equal(turned, chosen[order.to(device)])


def test_a_token_does_not_depend_on_its_batch(form):
    backend, device = form
    inputs = MIXED.inputs(device, torch.float32)
    y = expert_mlp(**inputs, backend=backend)
    for t in (0, 4):
        alone = permuted(inputs, torch.tensor([t], device=device))
        assert error(expert_mlp(**alone, backend=backend), y[t : t + 1]) <= 1e-6


def test_it_repeats_bit_for_bit(form):
    backend, device = form
    inputs = MIXED.inputs(device, torch.float32)
    once, again = run(inputs, backend), run(inputs, backend)
    assert all(torch.equal(once[name], again[name]) for name in once)


# Compute and memory


class Largest(TorchDispatchMode):
    """The largest tensor that is made, and the rows that are multiplied by matrices."""

    def __init__(self):
        super().__init__()
        self.elements = self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.rows += result.shape[0]
        return result


def test_work_and_memory_follow_what_was_chosen():
    def watched(experts, k, skipped=0.0):
        inputs = Case(600, channels=4, hidden=64, experts=experts, k=k, skipped=skipped).inputs()
        indices = inputs.pop("indices")
        activation = inputs.pop("activation")
        operands = fallback.Operands(**inputs, indices=indices)
        with Largest() as watch:
            fallback.forward(operands, activation)
        return watch, int((indices >= 0).sum())

    for experts, k in ((2, 1), (16, 1), (16, 2)):
        watch, assignments = watched(experts, k)
        assert watch.rows == 2 * assignments == 2 * 600 * k
    watch, assignments = watched(16, 2, skipped=0.75)
    assert watch.rows == 2 * assignments < 1000


def test_buffers_do_not_grow_with_tokens(monkeypatch):
    monkeypatch.setattr(fallback, "ROWS", 50)
    inputs = Case(600, channels=2, hidden=64).inputs()
    activation = inputs.pop("activation")
    operands = fallback.Operands(**inputs)
    with Largest() as watch:
        _, groups = fallback.forward(operands, activation)
        fallback.backward(operands, groups, operands.x, activation, [True] * 6)
    assert watch.elements == max(3 * 50 * 64, 600 * 2 * 2)
