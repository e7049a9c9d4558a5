"""Choosing experts for each region of a map."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.expert_routing import route_top_k
from .checks import check_feature_map, check_not_negative, check_positive
from .initialisation import fill
from .moe_dispatch import computes_all
from .precision import at_least_float32, without_autocast
from .processes import over_processes
from .route_result import RouteResult, counts_of
from .router_policies import BiasBalance, Routed, RouterPolicy, SwitchBalance, WarmUp

EPS = 1e-5
FINENESS = 2**20
"""Shares are rounded to parts of this, so that an exported program counts in whole numbers."""


class TopKRouter(nn.Module):
    r"""Choose k of E experts for each pixel of a map; what is to be one region, `MoE2d` makes one pixel of first.

    .. math::
        u = \big[x / \mathrm{rms}(x), \; \log \mathrm{rms}(x), \; d\big], \qquad
        p = \mathrm{softmax}(W u), \qquad
        w_j = \frac{p_j}{\sum_{i \in \mathrm{top\,}k} p_i} \ \text{for } j \in \mathrm{top\,}k, \qquad
        w = p_{\max} \ \text{for } k = 1

    with conditions d such as the prompt of a degradation, the logarithm of the local variance or the code of a blur
    kernel. Ties go to the expert of the lowest number. All of it is computed in float32, and in float64 for float64.
    Eval is deterministic, and whatever is chosen for a region depends on no other image of the batch.

    With `keep` < 1, a gate scores all regions, :math:`s = \sigma(v \cdot u + c)`; of each image the share with the
    highest scores is routed, and weighted by s, through which the gate learns; the rest is easy, and left alone. With
    `bypass` > 0 it is regions with a score below it that are left alone, however many these are: an easy image costs
    less than a hard one. Compiled, exported or traced, these have the weight 0, and count in the losses.

    Logits that are NaN give weights that are NaN: what is wrong stays visible. Under
    ``torch.autograd.detect_anomaly()`` they raise at once.

    Shape:
        - x: ``(B, C, H, W)``
        - conditions: each ``(B, D)`` or ``(B, D, H, W)``, `condition_channels` in all
        - returns: `RouteResult` of T = B H W regions, row by row

    Args:
        in_channels: number of channels ``C``.
        num_experts: number of experts ``E``.
        k: how many of them each region goes to.
        condition_channels: length of d, 0 for none.
        keep: the share of regions, rounded up, that is routed; 1 for all, without a gate.
        bypass: the score from which on a region is routed, less than 1; 0 for all, without a gate.
        policies: what happens besides: `RouterNoise`, `Temperature`, `WarmUp`, `SwitchBalance`, `ImportanceBalance`,
            `BiasBalance`, `ZLoss`, `EntropyLoss`, or further ones that derive from `RouterPolicy`. `WarmUp`,
            `BiasBalance` and whatever changes with the steps of the optimiser need `step` to be called after each,
            as `claritycore train` does.

    Raises:
        TypeError: if the input is not floating point, or a policy is no `RouterPolicy`.
        ValueError: if a number is < 1, ``k`` > ``num_experts``, ``keep`` is not above 0 and at most 1, ``bypass`` not
            at least 0 and below 1, or both are given, there are two policies of one kind, the input has another number
            of channels, or conditions have another width or shape; where anomalies are detected, if a logit is NaN.

    Source:
        Outrageously Large Neural Networks (arXiv:1701.06538), section 2; order of softmax and choice as in Switch
        Transformers (arXiv:2101.03961), so that k = 1 has a gradient; the gate: Mixture-of-Depths (arXiv:2404.02258),
        by images.

    >>> TopKRouter(8, 4, k=2)(torch.randn(1, 8, 5, 7)).indices.shape
    torch.Size([35, 2])
    """

    tile_multiple = 1
    receptive_radius = 0

    def __init__(
        self,
        in_channels: int,
        num_experts: int,
        *,
        k: int = 2,
        condition_channels: int = 0,
        keep: float = 1.0,
        bypass: float = 0.0,
        policies: Sequence[RouterPolicy] = (SwitchBalance(),),
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, num_experts=num_experts, k=k)
        if k > num_experts:
            raise ValueError(f"k must be at most num_experts = {num_experts}, got {k}")
        check_not_negative(condition_channels=condition_channels)
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
        if not 0 <= bypass < 1 or (bypass and keep < 1):
            raise ValueError(f"bypass must be at least 0 and below 1, and 0 with a keep, got {bypass} with {keep}")
        _check_policies(policies)
        self.in_channels, self.num_experts, self.k = in_channels, num_experts, k
        self.condition_channels, self.keep, self.bypass = condition_channels, keep, bypass
        self.policies = tuple(policies)
        self.tile_safe = keep == 1
        width = in_channels + 1 + condition_channels
        self.linear = nn.Linear(width, num_experts, bias=False)
        self.gate = nn.Linear(width, 1) if keep < 1 or bypass else None
        self.bias_balance = next((policy for policy in self.policies if isinstance(policy, BiasBalance)), None)
        self.warm_up = next((policy.steps for policy in self.policies if isinstance(policy, WarmUp)), 0)
        counts_steps = any(policy.horizon for policy in self.policies)
        self.register_buffer("bias", torch.zeros(num_experts) if self.bias_balance else None)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64) if counts_steps else None)
        # Not a buffer: DistributedDataParallel would overwrite what the other processes have counted.
        self.seen: Tensor | None = None
        self.warming_up = self.warm_up > 0
        self.reset_parameters()

    bias: Tensor | None
    steps: Tensor | None

    def reset_parameters(self) -> None:
        """Start almost undecided, and with a gate that is half open."""
        for linear in filter(None, (self.linear, self.gate)):
            fill(linear.weight, nn.init.normal_, std=0.02)
        if self.gate is not None:
            fill(self.gate.bias, nn.init.zeros_)

    def forward(self, x: Tensor, conditions: Sequence[Tensor] = ()) -> RouteResult:
        check_feature_map(x, self.in_channels, self)
        images, rows, columns = x.shape[0], x.shape[2], x.shape[3]
        with without_autocast(x):
            features = self._features(x, conditions)
            regions, gate = self._kept(features, images)
            features = features if regions is None else features[regions]
            logits = F.linear(features, self.linear.weight.to(features.dtype))
            for policy in self.policies:
                logits = policy.on_logits(logits, self.steps, self.training)
            _check_logits(logits)
            probabilities = logits.softmax(-1)
            weights, indices = self._choose(logits)
            losses = self._losses(Routed(logits, probabilities, indices)) if self.training else {}
        return RouteResult(indices, weights, probabilities, (images, rows, columns), losses, regions, gate)

    @torch.no_grad()
    def step(self) -> None:
        """Count a step of the optimiser: call it after each, in all processes. Policies go on by it."""
        if self.bias_balance is not None and self.bias is not None:
            counts = torch.zeros_like(self.bias) if self.seen is None else self.seen.to(self.bias)
            self.bias.copy_(self.bias_balance.stepped(self.bias, over_processes(counts)))
            self.seen = None
        if self.steps is not None:
            self.steps += 1
            self._look_at_steps()

    def extra_repr(self) -> str:
        condition = f", condition_channels={self.condition_channels}" if self.condition_channels else ""
        keep = f", keep={self.keep}" if self.keep < 1 else f", bypass={self.bypass}" if self.bypass else ""
        policies = ", ".join(map(repr, self.policies))
        return f"{self.in_channels}, {self.num_experts}, k={self.k}{condition}{keep}, policies=({policies})"

    def _features(self, x: Tensor, conditions: Sequence[Tensor]) -> Tensor:
        """(T, C + 1 + D): what a region looks like, how strong it is, and its conditions."""
        pixels = at_least_float32(x.permute(0, 2, 3, 1))
        power = pixels.square().mean(-1, keepdim=True) + EPS
        features = [pixels * power.rsqrt(), 0.5 * power.log()]
        sizes = x.shape[:1], (x.shape[0], *x.shape[2:])
        for condition in conditions:
            if condition.ndim not in (2, 4) or condition.shape[:1] + condition.shape[2:] not in sizes:
                wanted = f"(B, D) or (B, D, H, W) with B, H, W = {x.shape[0]}, {x.shape[2]}, {x.shape[3]}"
                raise ValueError(f"conditions must be {wanted}, got shape {tuple(condition.shape)}")
            last = condition.permute(0, 2, 3, 1) if condition.ndim == 4 else condition[:, None, None]
            features.append(last.to(pixels.dtype).expand(*pixels.shape[:3], last.shape[-1]))
        width = sum(condition.shape[1] for condition in conditions)
        if width != self.condition_channels:
            raise ValueError(f"conditions must have condition_channels = {self.condition_channels} in all, got {width}")
        return torch.cat(features, -1).flatten(0, 2)

    def _kept(self, features: Tensor, images: int) -> tuple[Tensor | None, Tensor | None]:
        """Places and weights of the regions that the gate keeps: as many of each image, or those above a score."""
        if self.gate is None:
            return None, None
        weight, bias = (parameter.to(features.dtype) for parameter in (self.gate.weight, self.gate.bias))
        if self.bypass:
            return self._above(F.linear(features, weight, bias).flatten().sigmoid())
        scores = F.linear(features, weight, bias).view(images, features.shape[0] // max(images, 1))
        each = scores.shape[1]
        kept = (each * max(1, round(self.keep * FINENESS)) + FINENESS - 1) // FINENESS
        # A stable sort: of equal regions the first ones, on every device.
        order = scores.sort(dim=1, descending=True, stable=True).indices.narrow(1, 0, kept)
        regions = (order.sort(dim=1).values + each * torch.arange(images, device=order.device)[:, None]).flatten()
        return regions, torch.sigmoid(scores.flatten()[regions])

    def _above(self, gate: Tensor) -> tuple[Tensor | None, Tensor]:
        """Places and weights of the regions whose gate is open; where all are computed, 0 for the others."""
        kept = gate >= self.bypass
        if computes_all(gate):
            return None, torch.where(kept, gate, 0)
        regions = kept.nonzero().flatten()
        return regions, gate[regions]

    def _choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        k = self.num_experts if self.training and self.warming_up else self.k
        return route_top_k(logits, k, bias=self.bias)

    def _losses(self, routed: Routed) -> dict[str, Tensor]:
        if self.bias_balance is not None:
            counts = counts_of(routed.indices, routed.probabilities)
            # Where activations are computed anew, all is counted twice: the same order, and the same step.
            self.seen = counts if self.seen is None else self.seen + counts
        found: dict[str, Tensor] = {}
        for policy in self.policies:
            found.update(policy.losses(routed, self.steps))
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move and cast, as `to` and `bfloat16` do, but keep the bias in float32: half would round its steps away."""
        bias = self.bias
        super()._apply(fn, recurse)
        if bias is not None and self.bias is not None and self.bias.dtype.itemsize < bias.dtype.itemsize:
            self.bias = bias.to(self.bias.device, torch.float32)
        return self

    def _look_at_steps(self) -> None:
        # A number of Python's, not the tensor: a compiled router has two graphs, and waits for no device.
        if self.warm_up and self.steps is not None and not self.steps.is_meta:
            self.warming_up = bool(self.steps < self.warm_up)

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._look_at_steps()


def _check_policies(policies: Sequence[RouterPolicy]) -> None:
    for policy in policies:
        if not isinstance(policy, RouterPolicy):
            raise TypeError(f"policies must be of RouterPolicy, got {policy!r}")
    kinds = [type(policy).__name__ for policy in policies]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise ValueError(f"policies must have one of each kind, got {kind} twice")


def _check_logits(logits: Tensor) -> None:
    """Where anomalies are looked for, raise for logits that are NaN."""
    if not torch.compiler.is_compiling() and torch.is_anomaly_enabled() and bool(logits.isnan().any()):
        regions = int(logits.isnan().any(1).sum())
        raise ValueError(f"logits of the router must be numbers, got NaN for {regions} of {len(logits)} regions")
