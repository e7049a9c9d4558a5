"""Which experts a router chooses, and what its policies make of it."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from claritycore.blocks import (
    BiasBalance,
    EntropyLoss,
    ImportanceBalance,
    RouteResult,
    RouterNoise,
    RouterPolicy,
    SwitchBalance,
    Temperature,
    TopKRouter,
    WarmUp,
    ZLoss,
)
from claritycore.blocks.router_policies import Routed
from tests.strategies import normal

X = normal((2, 6, 5, 7), dtype=torch.float64)


def router(experts=5, channels=6, *, seed=0, **options) -> TopKRouter:
    """One whose choices are not near each other."""
    torch.manual_seed(seed)
    made = TopKRouter(channels, experts, **options).double()
    with torch.no_grad():
        made.linear.weight.normal_(std=1.0)
    return made


def routed(logits: torch.Tensor, k: int) -> Routed:
    return Routed(logits, logits.softmax(-1), logits.sort(dim=1, descending=True, stable=True).indices[:, :k])


# The choice


@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_choice_is_that_of_the_formula(k):
    made = router(k=k, condition_channels=4)
    conditions = [normal((2, 1), dtype=torch.float64), normal((2, 3, 5, 7), dtype=torch.float64)]
    route = made(X, conditions)
    for t in range(70):
        b, i, j = t // 35, t % 35 // 7, t % 7
        x = X[b, :, i, j]
        power = (x**2).mean() + 1e-5
        u = torch.cat([x / power.sqrt(), power.sqrt().log()[None], conditions[0][b], conditions[1][b, :, i, j]])
        p = torch.softmax(made.linear.weight @ u, 0)
        order = p.argsort(descending=True)[:k]
        torch.testing.assert_close(route.probabilities[t], p)
        assert torch.equal(route.indices[t], order)
        torch.testing.assert_close(route.weights[t], p[order] if k == 1 else p[order] / p[order].sum())


def test_ties_go_to_the_lowest_number():
    made = TopKRouter(6, 8, k=3).double()
    torch.nn.init.zeros_(made.linear.weight)
    assert torch.equal(made(X).indices, torch.arange(3).expand(70, 3))


def test_the_gradient_of_one_expert_is_not_zero():
    made = router(k=1)
    made(X).weights.sum().backward()
    assert made.linear.weight.grad.abs().max() > 1e-3


def test_half_precision_is_routed_in_float32():
    made = router(k=2).bfloat16().eval()
    half = X.bfloat16()
    route, exact = made(half), copy.deepcopy(made).float()(half.float())
    assert route.probabilities.dtype == torch.float32
    torch.testing.assert_close(route.probabilities, exact.probabilities)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = copy.deepcopy(made).float()(half.float())
    assert torch.equal(inside.probabilities, exact.probabilities)
    assert router()(X).probabilities.dtype == torch.float64


def test_the_choice_for_a_region_depends_on_no_other_region():
    made = router(k=2).eval()
    whole, alone = made(X), made(X[1:, :, 2:3, 3:4])
    place = 35 + 2 * 7 + 3
    assert torch.equal(whole.indices[place], alone.indices[0])
    torch.testing.assert_close(whole.weights[place], alone.weights[0])
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    shuffled = X.flatten(2)[..., order].view_as(X)
    assert torch.equal(made(shuffled).indices, whole.indices.view(2, 35, 2)[:, order].flatten(0, 1))


def test_no_image_is_routed_to_nothing():
    route = router(policies=(SwitchBalance(), ImportanceBalance(), ZLoss(), EntropyLoss()), keep=0.5)(X[:0])
    assert route.indices.shape == route.weights.shape == (0, 2)
    assert route.total() == 0
    assert all(value.isfinite().all() for value in route.statistics().values())


# The gate


@pytest.mark.parametrize("keep", [0.25, 0.1, 0.999, 1e-9])
def test_a_gate_keeps_the_share_with_the_highest_scores_of_each_image(keep):
    made = router(keep=keep)
    route = made(X)
    kept = math.ceil(35 * keep)
    u = made._features(X, ())
    scores = (u @ made.gate.weight.T + made.gate.bias).view(2, 35)
    expected = torch.cat([scores[b].topk(kept).indices.sort().values + 35 * b for b in range(2)])
    assert torch.equal(route.regions, expected)
    torch.testing.assert_close(route.gate, torch.sigmoid(scores.flatten()[expected]))
    assert route.indices.shape == (2 * kept, 2)
    assert route.kept_share() == kept / 35
    torch.testing.assert_close(route.probabilities, torch.softmax(u[expected] @ made.linear.weight.T, 1))


@pytest.mark.parametrize("bypass", [0.3, 0.5, 0.999])
def test_a_bypass_leaves_alone_whatever_scores_below_it(bypass):
    made = router(bypass=bypass)
    torch.nn.init.normal_(made.gate.weight)
    route, every = made(X), router()
    scores = torch.sigmoid(made._features(X, ()) @ made.gate.weight.T + made.gate.bias).flatten()
    expected = (scores >= bypass).nonzero().flatten()
    assert torch.equal(route.regions, expected)
    torch.testing.assert_close(route.gate, scores[expected])
    every.linear.load_state_dict(made.linear.state_dict())
    torch.testing.assert_close(route.probabilities, every(X).probabilities[expected])
    program = torch.export.export(made, (X,)).module()(X)
    torch.testing.assert_close(program.gate, torch.where(scores >= bypass, scores, 0))
    torch.testing.assert_close(program.statistics()["kept_share"].item(), route.kept_share())
    assert program.kept_share() == route.kept_share() == len(expected) / 70


def test_confidence_is_what_the_entropy_leaves_times_the_gate():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    gate, places = torch.tensor([0.5, 0.5, 1.0], dtype=torch.float64), torch.tensor([0, 2, 3])
    sure = RouteResult(torch.zeros(3, 1).long(), torch.ones(3, 1), p, (1, 2, 2), {}, places, gate).confidence()
    expected = 1 + (0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    torch.testing.assert_close(sure, torch.tensor([[[0, 0], [0.5, expected]]], dtype=torch.float64))
    sure.sum().backward()
    assert p.grad.isfinite().all()


def test_a_gate_keeps_the_first_of_equal_regions():
    assert router(keep=0.2)(torch.ones(1, 6, 5, 4).double()).regions.tolist() == [0, 1, 2, 3]


# The policies


def test_noise_is_for_training_alone():
    made = router(policies=(RouterNoise(0.5),))
    assert not torch.equal(made(X).probabilities, made(X).probabilities)
    expected = router(policies=()).eval()(X).probabilities
    state = torch.get_rng_state()
    assert torch.equal(made.eval()(X).probabilities, expected)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    assert abs(RouterNoise(0.5).on_logits(torch.zeros(10_000), None, True).std() - 0.5) < 0.02


def test_the_temperature_cools_down_geometrically():
    made = router(policies=(Temperature(0.5, start=2.0, steps=4),))
    sharp = router(policies=())
    for temperature in (2.0, math.sqrt(2), 1.0, math.sqrt(0.5), 0.5, 0.5):
        logits = sharp(X).probabilities.log()
        torch.testing.assert_close(made(X).probabilities, torch.softmax(logits / temperature, 1))
        made.step()
    assert torch.equal(made.eval()(X).probabilities, made.train()(X).probabilities)
    torch.testing.assert_close(
        router(policies=(Temperature(0.5),))(X).probabilities, torch.softmax(sharp(X).probabilities.log() / 0.5, 1)
    )


def test_warm_up_goes_to_all_experts_and_its_end_survives_a_checkpoint():
    made = router(policies=(WarmUp(2),))
    assert made(X).indices.shape == (70, 5)
    assert made.eval()(X).indices.shape == (70, 2)
    for _ in range(2):
        assert made.train()(X).indices.shape == (70, 5)
        made.step()
    assert made(X).indices.shape == (70, 2)
    fresh = router(policies=(WarmUp(2),))
    fresh.load_state_dict(made.state_dict())
    assert fresh(X).indices.shape == (70, 2)
    made.load_state_dict(router(policies=(WarmUp(2),)).state_dict())
    assert made(X).indices.shape == (70, 5)


def test_a_router_without_data_takes_a_checkpoint_that_is_assigned():
    made = router(policies=(WarmUp(2),))
    for _ in range(2):
        made.step()
    with torch.device("meta"):
        fresh = router(policies=(WarmUp(2),))
    fresh.load_state_dict(fresh.state_dict())  # of which nothing is known yet
    assert fresh.warming_up
    fresh.load_state_dict(made.state_dict(), assign=True)
    assert fresh(X).indices.shape == (70, 2)


def test_a_router_that_warms_up_compiles_as_two_graphs_and_no_more():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    policies = (WarmUp(2), Temperature(0.5, start=2.0, steps=10), SwitchBalance(warm_up=5))
    made = router(policies=policies)
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    expected = router(policies=policies)
    for _ in range(5):
        torch.testing.assert_close(compiled(X).total(), expected(X).total())
        made.step()
        expected.step()
    assert len(graphs) == 2


def test_losses_grow_with_their_warm_up():
    made = router(policies=(SwitchBalance(0.1, warm_up=4), EntropyLoss(0.1, warm_up=2)))
    full = router(policies=(SwitchBalance(0.1), EntropyLoss(0.1)))(X).losses
    for step in range(6):
        found = made(X).losses
        torch.testing.assert_close(found["balance"], full["balance"] * min(step / 4, 1))
        torch.testing.assert_close(found["entropy"], full["entropy"] * min(step / 2, 1))
        made.step()
    assert made.eval()(X).losses == {}
    assert made(X).total() == 0


def test_the_losses_are_those_of_their_formulas():
    logits = normal((11, 4), dtype=torch.float64)
    given = routed(logits, 2)
    p = logits.softmax(1)
    counts = torch.bincount(given.indices.flatten(), minlength=4) / 22
    torch.testing.assert_close(SwitchBalance(0.3).losses(given, None)["balance"], 0.3 * 4 * (counts * p.mean(0)).sum())
    torch.testing.assert_close(ZLoss(0.3).losses(given, None)["z"], 0.3 * (logits.exp().sum(1).log() ** 2).mean())
    weights = torch.zeros_like(p).scatter(1, given.indices, p.gather(1, given.indices))
    importance = (weights / weights.sum(1, keepdim=True)).sum(0)
    expected = 0.3 * (importance.std(correction=0) / importance.mean()) ** 2
    torch.testing.assert_close(ImportanceBalance(0.3).losses(given, None)["importance"], expected)
    of_token, mean = -(p * p.log()).sum(1).mean() / math.log(4), p.mean(0)
    of_mean = -(mean * mean.log()).sum() / math.log(4)
    found = EntropyLoss(0.3, diversity=0.2).losses(given, None)["entropy"]
    torch.testing.assert_close(found, 0.3 * of_token - 0.2 * of_mean)


@pytest.mark.parametrize("k", [1, 2])
def test_balance_is_1_when_uniform_and_grows_when_experts_collapse(k):
    even = routed(8 * torch.eye(4, dtype=torch.float64).repeat(5, 1), 1)
    uniform = even._replace(probabilities=torch.full((20, 4), 0.25, dtype=torch.float64))
    torch.testing.assert_close(SwitchBalance(1.0).losses(uniform, None)["balance"], torch.tensor(1.0).double())
    logits = torch.tensor([[90.0, 40, 0, 0]]).double().expand(20, 4)
    collapsed = SwitchBalance(1.0).losses(routed(logits, k), None)["balance"]
    torch.testing.assert_close(collapsed, torch.tensor(4.0 / k).double())
    assert ImportanceBalance(1.0).losses(routed(logits, k), None)["importance"] > 2.9


@pytest.mark.parametrize("policy", [SwitchBalance(1.0), ImportanceBalance(1.0), ZLoss(1.0), EntropyLoss(1.0)], ids=str)
@pytest.mark.parametrize("k", [1, 2])
def test_every_loss_has_a_gradient(policy, k):
    logits = normal((20, 4), dtype=torch.float64).requires_grad_()
    (loss,) = policy.losses(Routed(logits, logits.softmax(-1), logits.topk(k).indices), None).values()
    loss.backward()
    assert logits.grad.abs().max() > 1e-4


def test_biases_move_by_small_steps_in_a_net_of_half_precision():
    made = router(k=1, policies=(BiasBalance(1e-3),)).bfloat16()
    for _ in range(1000):
        made.bias.copy_(made.bias_balance.stepped(made.bias, torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0])))
    assert made.linear.weight.dtype == torch.bfloat16
    torch.testing.assert_close(made.bias, torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0]), rtol=1e-4, atol=0)
    assert made.double().bias.dtype == torch.float64
    assert made.half().bias.dtype == torch.float32


def test_a_bias_changes_the_choice_and_not_the_weights():
    made = router(k=1, policies=(BiasBalance(0.1),))
    before = made(X)
    made.bias[3] += 10
    after = made(X)
    assert (after.indices == 3).all()
    torch.testing.assert_close(after.weights[:, 0], before.probabilities[:, 3])
    made.bias.zero_()
    made.seen = None
    made(X)
    made(X.flip(0))
    counts = before.counts()
    made.step()
    torch.testing.assert_close(made.bias, 0.1 * (counts.mean() - counts).sign())
    kept = made.bias.clone()
    made.eval()(X)
    assert made.seen is None
    made.step()
    assert torch.equal(made.bias, kept)
    assert not made.bias.requires_grad


def test_a_policy_of_ones_own_is_taken():
    class Sharper(RouterPolicy):
        def on_logits(self, logits, steps, training):
            return 3 * logits

        def losses(self, routed, steps):
            return {"mine": routed.logits.mean()}

    route = router(policies=(Sharper(),))(X)
    torch.testing.assert_close(route.probabilities, F.softmax(3 * router()(X).probabilities.log(), 1))
    assert torch.equal(route.total(), route.losses["mine"])


# The statistics


def test_the_statistics_are_those_of_their_formulas():
    indices = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])
    probabilities = normal((4, 4), dtype=torch.float64).softmax(1)
    route = RouteResult(indices, torch.ones(4, 2), probabilities, (2, 2, 4))
    found = route.statistics()
    load = torch.tensor([4, 3, 1, 0]).double() / 8
    torch.testing.assert_close(found["load"], load)
    torch.testing.assert_close(found["max_violation"], torch.tensor(1.0).double())
    torch.testing.assert_close(found["utilisation"], -torch.special.xlogy(load, load).sum() / math.log(4))
    torch.testing.assert_close(found["entropy"], -(probabilities * probabilities.log()).sum(1).mean() / math.log(4))
    assert (found["dead_experts"], found["kept_share"]) == (1, 0.25)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 6}, "k must be at most num_experts = 5, got 6"),
        ({"k": 0}, "k must be an integer of at least 1, got 0"),
        ({"experts": 0}, "num_experts must be an integer of at least 1, got 0"),
        ({"keep": 0.0}, "keep must be above 0 and at most 1, got 0.0"),
        ({"keep": 1.5}, "keep must be above 0 and at most 1, got 1.5"),
        ({"condition_channels": -1}, "condition_channels must be an integer of at least 0, got -1"),
        ({"policies": (ZLoss(), ZLoss())}, "policies must have one of each kind, got ZLoss twice"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        router(**options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RouterNoise(-1.0), "std must be at least 0 and finite, got -1.0"),
        (lambda: Temperature(0.05), "value must be at least 0.1 and finite, got 0.05"),
        (lambda: Temperature(1.0, start=0.0, steps=2), "start must be at least 0.1 and finite, got 0.0"),
        (lambda: Temperature(1.0, start=2.0), "start and steps must come together, got 2.0 and 0"),
        (lambda: WarmUp(0), "steps must be an integer of at least 1, got 0"),
        (lambda: SwitchBalance(math.inf), "weight must be at least 0 and finite, got inf"),
        (lambda: ZLoss(0.1, warm_up=-1), "warm_up must be an integer of at least 0, got -1"),
        (lambda: EntropyLoss(diversity=-1.0), "diversity must be at least 0 and finite, got -1.0"),
        (lambda: BiasBalance(-1.0), "rate must be at least 0 and finite, got -1.0"),
    ],
)
def test_wrong_policies_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_what_is_no_policy_is_refused():
    with pytest.raises(TypeError, match=r"^policies must be of RouterPolicy, got 'switch'$"):
        TopKRouter(6, 4, policies=("switch",))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 4)], r"conditions must have condition_channels = 3 in all, got 4"),
        ([], r"conditions must have condition_channels = 3 in all, got 0"),
        ([(1, 3)], r"conditions must be \(B, D\) or \(B, D, H, W\) with B, H, W = 2, 5, 7, got shape \(1, 3\)"),
        ([(2, 3, 5, 5)], r"conditions must be .*, got shape \(2, 3, 5, 5\)"),
        ([(2,)], r"conditions must be .*, got shape \(2,\)"),
    ],
)
def test_conditions_of_another_width_or_shape_are_refused(shapes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        router(condition_channels=3)(X, [torch.zeros(shape) for shape in shapes])


def test_nan_is_seen_where_anomalies_are_looked_for_and_never_routed_in_silence():
    x = X.clone()
    x[0, 0, 0, 0] = math.nan
    route = router(k=2)(x)
    assert route.weights[0].isnan().all()
    assert route.weights[1:].isfinite().all()
    assert (route.indices[0] >= 0).all()
    assert (route.indices[0] < 5).all()
    with (
        pytest.warns(UserWarning, match="Anomaly Detection"),
        torch.autograd.detect_anomaly(),
        pytest.raises(ValueError, match=r"^logits of the router must be numbers, got NaN for 1 of 70 regions$"),
    ):
        router(k=2)(x)
