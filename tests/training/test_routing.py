"""Routers in training: their losses and statistics, what they do after a step, and what validation tells of them."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from claritycore.blocks import BiasBalance, EntropyLoss, MoE2d, PointwiseExpert, SwitchBalance, TopKRouter, WarmUp
from claritycore.nets import AutoModel, BaseConfig, RestorationNet, RestorationOutput, register_config
from claritycore.training.data import ImageFolder
from claritycore.training.degradations import degrade
from claritycore.training.evaluation import Evaluation
from claritycore.training.loop import train
from claritycore.training.run_files import read_state
from claritycore.training.validation import cropped, evaluate

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

POLICIES = (SwitchBalance(0.1, warm_up=3), EntropyLoss(0.05), BiasBalance(0.01), WarmUp(2))


class Mixed(RestorationNet):
    """Two mixtures between two convolutions."""

    def __init__(self, config):
        super().__init__(config)
        self.scale, self.in_channels = 1, 3
        self.tile_safe, self.receptive_radius, self.tile_multiple = True, 4, 1
        self.stem, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.body = nn.ModuleList(
            MoE2d(8, [PointwiseExpert(8) for _ in range(4)], router=TopKRouter(8, 4, k=1, policies=POLICIES))
            for _ in range(2)
        )

    def forward(self, image, *, return_aux=False):
        output = RestorationOutput(image)
        x = self.stem(image)
        for number, mixture in enumerate(self.body):
            x, route = mixture(x)
            output.aux.add_route(f"body.{number}", route)
        output.image = image + self.last(x)
        return output if return_aux else output.image


@pytest.fixture
def mixed():
    @register_config("mixed")
    @dataclass(frozen=True)
    class MixedConfig(BaseConfig):
        scale: int = 1

        def build(self):
            return Mixed(self)

    return MixedConfig()


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_losses_of_routers_reach_the_loop_once(mixed):
    net = AutoModel.from_config(mixed).train()
    output = net(torch.rand(2, 3, 8, 8), return_aux=True)
    names = {f"body.{number}.{loss}" for number in range(2) for loss in ("balance", "entropy")}
    assert output.aux.losses.keys() == names
    torch.testing.assert_close(output.aux.total(), sum(output.aux.losses.values()))
    assert output.aux.statistics["body.1.load"].shape == (4,)
    assert output.aux.total().requires_grad
    assert not any(value.requires_grad for value in output.aux.statistics.values())
    assert net.eval()(torch.rand(2, 3, 8, 8), return_aux=True).aux.losses == {}


def test_a_run_logs_them_moves_the_biases_and_goes_on_with_the_warm_ups(make_settings, mixed, photos):
    settings = {
        "steps": 5,
        "validation": str(photos),
        "validate_every": 5,
        "pictures": 0,
        "loss": "l1",
        "schedule": "constant",
    }
    folder = train(mixed, make_settings(name="whole", **settings))
    lines = [line for line in log_of(folder) if "loss" in line]
    for line in lines:
        aux = sum(value for name, value in line.items() if name.startswith("body."))
        assert line["loss"] == pytest.approx(line["l1"] + aux, rel=1e-4)
    assert [line["body.0.balance"] == 0 for line in lines] == [True, False, False, False, False]
    assert lines[1]["body.0.balance"] == pytest.approx(0.1 / 3, rel=0.05)
    state = read_state(folder).net
    assert state["body.1.router.steps"] == 5
    assert state["body.1.router.bias"].abs().max() > 0.005
    (validated,) = [line for line in log_of(folder) if "validation_psnr" in line]
    assert 0 < validated["validation_router_entropy"] <= 1
    assert 0 < validated["validation_router_utilisation"] <= 1
    assert 0 <= validated["validation_dead_experts"] <= 8

    first = train(mixed, make_settings(name="parts", **{**settings, "steps": 3}))
    train(mixed, make_settings(name="parts", **settings), state=read_state(first))
    resumed = read_state(first).net
    assert all(torch.equal(resumed[name], value) for name, value in state.items())


def test_checkpointing_counts_losses_once_and_gives_the_same_weights(make_settings, mixed):
    runs = [train(mixed, make_settings(name=f"run{on}", steps=4, checkpointing=on)) for on in (False, True)]
    states = [read_state(folder).net for folder in runs]
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    losses = [[(line["loss"], line["body.0.balance"]) for line in log_of(folder) if "loss" in line] for folder in runs]
    assert losses[0] == losses[1]


def test_validation_tells_how_routers_share_out_the_work_over_all_images(mixed, photos):
    torch.manual_seed(0)
    net, images = AutoModel.from_config(mixed).eval(), ImageFolder(str(photos))
    nn.init.normal_(net.body[0].router.linear.weight)
    found = evaluate(net, images, recipes=["clean", "noise25"])
    counts, entropies = torch.zeros(2, 4, dtype=torch.float64), [[], []]
    with torch.no_grad():
        for number in range(len(images)):
            image = degrade(cropped(images[number], 1), "clean", [0], scale=1).image
            x = net.stem(image)
            for place, mixture in enumerate(net.body):
                x, route = mixture(x)
                counts[place] += torch.bincount(route.indices.flatten(), minlength=4)
                p = route.probabilities.double()
                entropies[place].append(-(p * p.log()).sum(1) / torch.tensor(4.0).double().log())
    load = counts / counts.sum(1, keepdim=True)
    figures = found.means()["clean"]
    expected = sum(torch.cat(each).mean() for each in entropies) / 2
    assert figures["router_entropy"] == pytest.approx(expected.item(), rel=1e-5)
    used = -torch.special.xlogy(load, load).sum(1) / torch.tensor(4.0).double().log()
    assert figures["router_utilisation"] == pytest.approx(used.mean().item(), rel=1e-9)
    assert figures["dead_experts"] == (load < 0.025).sum()
    assert not any(module._forward_hooks for module in net.modules())
    parts = [evaluate(net, images, recipes=["clean", "noise25"], rank=rank, processes=2) for rank in range(2)]
    for recipe, means in Evaluation.merge(parts).means().items():
        assert means == pytest.approx(found.means()[recipe])
    assert "dead_experts" in str(found)


def test_nets_without_routers_have_no_such_figures(photos):
    figures = evaluate(nn.Identity(), ImageFolder(str(photos)), max_images=1).means()["clean"]
    assert not any("router" in name or "expert" in name for name in figures)
