"""A mixture in training: activations computed anew, several processes, and experts that stay alive."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from claritycore.blocks import (
    BiasBalance,
    DetailExpert,
    EntropyLoss,
    ImportanceBalance,
    MoE2d,
    PointwiseExpert,
    SwitchBalance,
    TopKRouter,
    ZLoss,
)
from tests.strategies import normal

POLICIES = (SwitchBalance(0.5), ImportanceBalance(0.3), ZLoss(0.1), EntropyLoss(0.2, diversity=0.4), BiasBalance(0.1))


def mixture(level: str) -> MoE2d:
    torch.manual_seed(0)
    experts = [PointwiseExpert(4) if level == "token" else DetailExpert(4) for _ in range(4)]
    router = TopKRouter(4 if level == "token" else 8, 4, k=1, policies=POLICIES)
    moe = MoE2d(4, experts, level=level, window_size=4, router=router).double()
    with torch.no_grad():
        moe.router.linear.weight.normal_()
        if level == "token":  # pixels of a flat image stay equal, up to its border
            moe.prepare.weight.zero_()[..., 1, 1] = 1
    return moe


def batch() -> torch.Tensor:
    """Four images, of which the last two are flat: all of their regions go to one expert."""
    x = normal((4, 4, 8, 8), dtype=torch.float64)
    return torch.cat([x[:2], x[:1, :, :1, :1].expand(2, 4, 8, 8)])


def loss_of(moe, x):
    y, route = moe(x)
    return y.square().mean() + route.total()


@pytest.mark.parametrize("level", ["token", "window", "image"])
def test_activations_computed_anew_count_losses_once(level):
    x = batch()
    plain, anew = mixture(level), mixture(level)
    loss_of(plain, x).backward()
    y, route = checkpoint(anew, x, use_reentrant=False)
    assert route.losses.keys() == {"balance", "importance", "z", "entropy"}
    (y.square().mean() + route.total()).backward()
    for a, b in zip(plain.parameters(), anew.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)
    plain.router.step()
    anew.router.step()
    assert torch.equal(plain.router.bias, anew.router.bias)
    assert plain.router.bias.any()


SCRIPT = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tests.blocks.test_moe_training import batch, loss_of, mixture
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
found = {}
for level in ("token", "window", "image"):
    moe = mixture(level)
    shared = DistributedDataParallel(moe)
    loss = loss_of(shared, batch().chunk(2)[rank])
    loss.backward()
    counts = moe.router.seen.clone()
    moe.router.step()
    grads = {name: parameter.grad for name, parameter in moe.named_parameters()}
    found[level] = {"grads": grads, "bias": moe.router.bias, "counts": counts, "loss": loss.detach()}
torch.save(found, f"{folder}/{rank}.pt")
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Though in one of them experts get no region at all; balance is that of both."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT]
    runs = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for level in ("token", "window", "image"):
        moe = mixture(level)
        loss = loss_of(moe, batch())
        loss.backward()
        counts = moe.router.seen
        moe.router.step()
        assert (ranks[1][level]["counts"] == 0).any()
        assert torch.equal(ranks[0][level]["counts"] + ranks[1][level]["counts"], counts)
        torch.testing.assert_close(sum(rank[level]["loss"] for rank in ranks) / 2, loss.detach())
        for rank in ranks:
            assert torch.equal(rank[level]["bias"], moe.router.bias)
            for name, parameter in moe.named_parameters():
                torch.testing.assert_close(rank[level]["grads"][name], parameter.grad, rtol=1e-10, atol=1e-13)


def balance_after_training(policies, seed: int) -> tuple[float, float, int]:
    """Tokens of four clusters with one large offset, each to be mapped by a matrix of its own: 200 steps of Adam."""
    torch.manual_seed(seed)
    centres, offset = torch.randn(4, 16), 3 * torch.randn(16)
    maps = torch.randn(4, 16, 16) / 4
    router = TopKRouter(16, 4, k=2, policies=policies)
    moe = MoE2d(16, [PointwiseExpert(16, mlp_ratio=1) for _ in range(4)], router=router)
    optimizer = torch.optim.Adam(moe.parameters(), 1e-2)

    def tokens(count: int):
        cluster = torch.randint(4, (count,))
        x = centres[cluster] + offset + 0.3 * torch.randn(count, 16)
        return x.T[None, :, None], torch.einsum("nij,nj->ni", maps[cluster], x).T[None, :, None]

    for _ in range(200):
        x, wanted = tokens(256)
        y, route = moe(x)
        loss = F.mse_loss(y, wanted) + route.total()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moe.router.step()
    route = moe.eval()(tokens(2048)[0])[1]
    return route.utilisation().item(), route.max_violation().item(), int(route.dead_experts())


@pytest.mark.slow
@pytest.mark.parametrize("policies", [(SwitchBalance(0.1),), (BiasBalance(1e-2),)], ids=["switch", "bias"])
def test_balancing_keeps_all_experts_alive(policies):
    found = [balance_after_training(policies, seed) for seed in range(3)]
    entropy, violation, dead = (sum(each) / 3 for each in zip(*found, strict=True))
    assert entropy > 0.85
    assert violation < 0.7
    assert dead == 0


def test_the_picture_of_choices_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib").use("Agg")
    place = Path(__file__).parents[2] / "examples" / "expert_choice.py"
    spec = importlib.util.spec_from_file_location("expert_choice", place)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for name, value in {"SIDE": 48, "STEPS": 1}.items():
        monkeypatch.setattr(example, name, value)
    example.draw(tmp_path / "docs" / "choice.png")
    assert (tmp_path / "docs" / "choice.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("level", ["token", "window", "image"])
def test_vmap_is_a_loop(level):
    torch.manual_seed(0)
    expert = PointwiseExpert if level == "token" else DetailExpert
    moe = MoE2d(4, [expert(4) for _ in range(3)], k=2, level=level, window_size=4).double().eval()
    x = normal((3, 2, 4, 9, 6), dtype=torch.float64)
    expected = torch.stack([moe(each)[0] for each in x])
    torch.testing.assert_close(torch.vmap(lambda each: moe(each)[0])(x), expected, rtol=0, atol=1e-12)
