"""What a router does besides choosing: noise, temperature, warm-up, and losses that keep its experts in use."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_not_negative, check_positive
from .processes import token_mean

LEAST_TEMPERATURE = 0.1


class Routed(NamedTuple):
    """What a loss of the router is computed from.

    Args:
        logits: ``(T, E)``.
        probabilities: their softmax.
        indices: of the chosen experts, ``(T, k)``.

    >>> Routed(torch.zeros(5, 4), torch.full((5, 4), 0.25), torch.zeros(5, 2).long()).token_entropies().shape
    torch.Size([5])
    """

    logits: Tensor
    probabilities: Tensor
    indices: Tensor

    def token_entropies(self) -> Tensor:
        return -(self.probabilities * self.logits.log_softmax(-1)).sum(-1)


@dataclass(frozen=True)
class RouterPolicy:
    """Base of the policies of a `TopKRouter`: derive from it, and override what the policy is about.

    `horizon` is for how many steps of the optimiser it changes; the router counts them, if any policy has one.

    >>> class Sharper(RouterPolicy):
    ...     def on_logits(self, logits, steps, training):
    ...         return 2 * logits
    >>> Sharper().on_logits(torch.ones(1), None, True)
    tensor([2.])
    """

    @property
    def horizon(self) -> int:
        return 0

    def on_logits(self, logits: Tensor, steps: Tensor | None, training: bool) -> Tensor:
        """Change the logits (T, E) before anything is chosen."""
        return logits

    def losses(self, routed: Routed, steps: Tensor | None) -> dict[str, Tensor]:
        """Losses of training, by name, weighted."""
        return {}


@dataclass(frozen=True)
class RouterNoise(RouterPolicy):
    """Add normal noise to the logits, in training alone, so that experts are tried out.

    Args:
        std: standard deviation.

    >>> RouterNoise(0.5).on_logits(torch.zeros(1), None, training=False)
    tensor([0.])
    """

    std: float = 1.0

    def __post_init__(self) -> None:
        _check_number("std", self.std, 0)

    def on_logits(self, logits: Tensor, steps: Tensor | None, training: bool) -> Tensor:
        return logits + self.std * torch.randn_like(logits) if training else logits


@dataclass(frozen=True)
class Temperature(RouterPolicy):
    """Divide the logits by a temperature, which may cool down over the first steps of training.

    Args:
        value: the temperature, at least 0.1; eval has that of the step which training has reached.
        start: the temperature at step 0.
        steps: after which it is `value`; in between it falls (or rises) geometrically.

    >>> Temperature(0.5).on_logits(torch.ones(1), None, training=False)
    tensor([2.])
    """

    value: float = 1.0
    start: float | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        _check_number("value", self.value, LEAST_TEMPERATURE)
        if (self.start is None) != (self.steps == 0):
            raise ValueError(f"start and steps must come together, got {self.start} and {self.steps}")
        if self.start is not None:
            _check_number("start", self.start, LEAST_TEMPERATURE)
            check_positive(steps=self.steps)

    @property
    def horizon(self) -> int:
        return self.steps

    def on_logits(self, logits: Tensor, steps: Tensor | None, training: bool) -> Tensor:
        if self.start is None or steps is None:
            return logits / self.value
        left = 1 - _progress(steps, self.steps, logits)
        return logits / (self.value * (self.start / self.value) ** left)


@dataclass(frozen=True)
class WarmUp(RouterPolicy):
    """Let every region go to all experts for the first steps of training, and then to k.

    Args:
        steps: of the optimiser, as counted by `TopKRouter.step`.

    >>> WarmUp(1000).horizon
    1000
    """

    steps: int

    def __post_init__(self) -> None:
        check_positive(steps=self.steps)

    @property
    def horizon(self) -> int:
        return self.steps


@dataclass(frozen=True)
class RouterLoss(RouterPolicy):
    """Base of the policies that are a loss with a weight.

    Args:
        weight: of the loss.
        warm_up: steps over which the weight grows from zero.

    >>> RouterLoss(0.1).horizon
    0
    """

    weight: float
    warm_up: int = 0

    def __post_init__(self) -> None:
        _check_number("weight", self.weight, 0)
        check_not_negative(warm_up=self.warm_up)

    @property
    def horizon(self) -> int:
        return self.warm_up

    def weighted(self, loss: Tensor, steps: Tensor | None) -> Tensor:
        if self.warm_up == 0 or steps is None:
            return self.weight * loss
        return self.weight * _progress(steps, self.warm_up, loss) * loss


@dataclass(frozen=True)
class SwitchBalance(RouterLoss):
    r"""Balance the load: :math:`E \sum_e f_e P_e`, f the share of choices and P the mean probability of an expert.

    It is 1 when both are uniform, and E when one expert gets everything with certainty.

    Source: Switch Transformers (arXiv:2101.03961), section 2.2.

    >>> uniform = Routed(torch.zeros(4, 4), torch.full((4, 4), 0.25), torch.arange(4)[:, None])
    >>> SwitchBalance(1.0).losses(uniform, None)
    {'balance': tensor(1.)}
    """

    weight: float = 0.01

    def losses(self, routed: Routed, steps: Tensor | None) -> dict[str, Tensor]:
        chosen = _shares(routed)
        loss = routed.logits.shape[1] * (token_mean(chosen).detach() * token_mean(routed.probabilities)).sum()
        return {"balance": self.weighted(loss, steps)}


@dataclass(frozen=True)
class ImportanceBalance(RouterLoss):
    """Balance the importance: the squared coefficient of variation of the mean weights, for k = 1 probabilities.

    Source: Outrageously Large Neural Networks (arXiv:1701.06538), section 4.

    >>> certain = Routed(torch.zeros(4, 2), torch.tensor([[1.0, 0.0]]).expand(4, 2), torch.zeros(4, 1).long())
    >>> ImportanceBalance(1.0).losses(certain, None)
    {'importance': tensor(1.)}
    """

    weight: float = 0.01

    def losses(self, routed: Routed, steps: Tensor | None) -> dict[str, Tensor]:
        weights = routed.probabilities * torch.zeros_like(routed.probabilities).scatter(1, routed.indices, 1.0)
        if routed.indices.shape[1] > 1:
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
        mean = token_mean(weights)
        spread = (mean - mean.mean()).square().mean()
        return {"importance": self.weighted(spread / mean.mean().square().clamp(min=1e-9), steps)}


@dataclass(frozen=True)
class ZLoss(RouterLoss):
    """Keep the logits small: the mean square of their log-sum-exp.

    Source: ST-MoE (arXiv:2202.08906), section 3.

    >>> ZLoss(1.0).losses(Routed(torch.zeros(3, 1), torch.ones(3, 1), torch.zeros(3, 1).long()), None)
    {'z': tensor(0.)}
    """

    weight: float = 1e-3

    def losses(self, routed: Routed, steps: Tensor | None) -> dict[str, Tensor]:
        return {"z": self.weighted(token_mean(routed.logits.logsumexp(-1).square()), steps)}


@dataclass(frozen=True)
class EntropyLoss(RouterLoss):
    r"""Make each region sure of its experts, and all of them together use every expert.

    :math:`\lambda \, \mathrm{mean}_t H(p_t) - \mu \, H(\mathrm{mean}_t p_t)`, with entropies as parts of the largest
    possible one.

    Args:
        weight: :math:`\lambda`, of the entropy of a region.
        warm_up: steps over which both weights grow from zero.
        diversity: :math:`\mu`, of the entropy of the mean.

    >>> uniform = Routed(torch.zeros(3, 4), torch.full((3, 4), 0.25), torch.zeros(3, 1).long())
    >>> EntropyLoss(0.5, diversity=0.2).losses(uniform, None)
    {'entropy': tensor(0.3000)}
    """

    weight: float = 0.01
    diversity: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("diversity", self.diversity, 0)

    def losses(self, routed: Routed, steps: Tensor | None) -> dict[str, Tensor]:
        most = math.log(max(routed.logits.shape[1], 2))
        mean = token_mean(routed.probabilities)
        of_mean = -(mean * mean.clamp(min=1e-9).log()).sum() / most
        loss = self.weight * token_mean(routed.token_entropies()) / most - self.diversity * of_mean
        return {"entropy": loss if self.warm_up == 0 or steps is None else loss * _progress(steps, self.warm_up, loss)}


@dataclass(frozen=True)
class BiasBalance(RouterPolicy):
    """Balance without a loss: a bias of each expert, for the choice alone, that rises while its load is below average.

    Experts are chosen by probability plus bias and weighted by probability. `TopKRouter.step` changes the bias.

    Args:
        rate: by how much a step changes it.

    Source: Auxiliary-Loss-Free Load Balancing (arXiv:2408.15664).

    >>> BiasBalance(0.5).stepped(torch.zeros(2), torch.tensor([3.0, 1.0]))
    tensor([-0.5000,  0.5000])
    """

    rate: float = 1e-3

    def __post_init__(self) -> None:
        _check_number("rate", self.rate, 0)

    def stepped(self, bias: Tensor, counts: Tensor) -> Tensor:
        """The bias after a step in which the experts were chosen so often."""
        return bias + self.rate * (counts.mean() - counts).sign()


def _shares(routed: Routed) -> Tensor:
    """What each token adds to the shares of the experts, (T, E): 1 / k for those it goes to."""
    numbers = torch.arange(routed.logits.shape[1], device=routed.indices.device)
    chosen = (routed.indices[..., None] == numbers).sum(1)
    return chosen.to(routed.probabilities.dtype) / routed.indices.shape[1]


def _progress(steps: Tensor, horizon: int, like: Tensor) -> Tensor:
    """How much of the horizon is done, from 0 to 1: a tensor, so that a compiled router needs no second graph."""
    return (steps.to(like.dtype) / horizon).clamp(max=1)


def _check_number(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be at least {least} and finite, got {value}")
