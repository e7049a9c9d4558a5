"""Kernels in the operators of torch alone, for runtimes that do not know ours: what becomes of them in ONNX.

A scan over images becomes one scan whose groups of channels are the directions; a blur becomes a padded Conv along each
side, a Haar transform the sums of its reference. The choice of experts becomes that of its reference; the experts are
all computed for all tokens, and masked: products of matrices are what every runtime is fast at, and numbers of tokens
stay dynamic.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.activations import ACTIVATIONS
from ..kernels.expert_routing.operands import Operands as ExpertOperands
from ..kernels.expert_routing.reference import route_top_k_reference
from ..kernels.frequency_split.operands import mirror, radius_of, taps_of
from ..kernels.frequency_split.reference import haar_merge_reference, haar_split_reference
from ..kernels.modulated_conv.operands import Operands as Epilogue
from ..kernels.modulated_conv.reference import noise_bias_act_reference
from ..kernels.noise_field.reference import noise_field_reference
from ..kernels.operand_rules import compute_dtype
from ..kernels.selective_scan_2d.operands import Operands2d, pixels_of_steps


def torch_forms() -> dict[Any, Callable[..., Any]]:
    """Our operators, each with a function of torch's own, as `ExportedProgram.run_decompositions` takes them.

    >>> torch.ops.claritycore.blur_split.default in torch_forms()
    True
    """
    return {
        torch.ops.claritycore.blur_split.default: _by_convolutions,
        torch.ops.claritycore.expert_mlp.default: _by_all_experts,
        torch.ops.claritycore.haar_merge.default: _by_merging,
        torch.ops.claritycore.haar_split.default: _by_sums,
        torch.ops.claritycore.route_top_k.default: lambda logits, bias, k, _: route_top_k_reference(logits, k, bias),
        torch.ops.claritycore.noise_bias_act.default: _by_steps,
        torch.ops.claritycore.noise_field.default: lambda *inputs: noise_field_reference(*inputs[:-1]),
        torch.ops.claritycore.selective_scan_2d.default: _by_one_scan,
    }


def _by_convolutions(x: Tensor, sigma: Sequence[float], form: str) -> tuple[Tensor, Tensor]:
    """Write `claritycore::blur_split` as convolutions along each side of a padded map."""
    wide, radius, channels = x.to(compute_dtype(x)), radius_of(sigma), x.shape[1]
    taps = taps_of(sigma, wide.dtype, x.device).expand(channels, -1)[:, None, None]
    low = F.conv2d(mirror(wide, radius, radius, radius, radius), taps.mT, groups=channels)
    low = F.conv2d(low, taps, groups=channels)
    return low.to(x.dtype), (wide - low).to(x.dtype)


def _by_sums(x: Tensor, repeat: bool, form: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write `claritycore::haar_split` by its reference."""
    return haar_split_reference(x, repeat)


def _by_merging(ll: Tensor, lh: Tensor, hl: Tensor, hh: Tensor, size: Sequence[int], fold: bool, form: str) -> Tensor:
    """Write `claritycore::haar_merge` by its reference."""
    return haar_merge_reference((ll, lh, hl, hh), size, fold)


def _by_all_experts(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Write `claritycore::expert_mlp` as products of all tokens with each expert; no groups are formed."""
    x, activation = ExpertOperands(*inputs[:-2]), inputs[-2]
    tokens, weights, w1, b1, w2, b2 = (v.to(x.dtype) for v in x.differentiable.values())
    y = torch.zeros_like(tokens)
    for e in range(len(w1)):
        chosen = x.indices == e
        gate = torch.where(chosen, weights, 0).sum(1, keepdim=True)
        expert = ACTIVATIONS[activation](tokens @ w1[e].T + b1[e]) @ w2[e].T + b2[e]
        y = y + torch.where(chosen.any(1, keepdim=True), gate * expert, 0)
    return y.to(x.x.dtype), x.indices.new_empty(x.indices.numel()), x.indices.new_empty(len(w1) + 1)


def _by_steps(*inputs: Any) -> Tensor:
    """Write `claritycore::noise_bias_act` by its reference."""
    operands, (activation, gain, clamp, _) = Epilogue(*inputs[:-4]), inputs[-4:]
    return noise_bias_act_reference(operands, activation, gain, clamp)


def _by_one_scan(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Write `claritycore::selective_scan_2d` as gathers around `claritycore::selective_scan`."""
    operands, (directions, delta_softplus, merge, form) = Operands2d(*inputs[:-4]), inputs[-4:]
    x, delta, A, B, C, D, delta_bias, order = operands
    _, height, width, channels = x.shape
    pixels = pixels_of_steps(directions, height, width, x.device, order)
    steps = _steps_of_pixels(directions, height, width, x.device, order)

    def visited(values: Tensor) -> Tensor:
        """(B, H, W, D) or (B, K, H, W, D) -> (B, K, D, L) in the order of the scan."""
        each = values.unbind(1) if values.ndim == 5 else [values] * len(directions)
        return torch.stack([_taken(v.flatten(1, 2), pixels[:, k]) for k, v in enumerate(each)], dim=1).mT

    D, delta_bias = (None if v is None else v.flatten() for v in (D, delta_bias))
    y, _, checkpoints = torch.ops.claritycore.selective_scan(
        *(visited(x).flatten(1, 2), visited(delta).flatten(1, 2), A.flatten(0, 1), visited(B), visited(C)),
        *(D, None, delta_bias, None, delta_softplus, False, None, form),
    )
    rows = y.unflatten(1, (len(directions), channels)).mT
    each = [_taken(v, steps[:, k]).unflatten(1, (height, width)) for k, v in enumerate(rows.unbind(1))]
    return torch.stack(each, dim=1).sum(1) if merge else torch.stack(each, dim=1), checkpoints


def _steps_of_pixels(
    directions: Sequence[int], height: int, width: int, device: torch.device, order: Tensor | None
) -> Tensor:
    """The inverse of `pixels_of_steps`: the step at which each pixel is visited."""
    if order is not None:
        return pixels_of_steps(directions, height, width, device, order).argsort(dim=-1)
    # The way back through columns is the way through the columns of an image with its sides exchanged.
    forward = pixels_of_steps([code & 1 for code in directions], width, height, device).unbind(1)
    last = height * width - 1
    return torch.stack([last - way if code & 2 else way for code, way in zip(directions, forward, strict=True)], dim=1)


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """Take rows of (B, L, D) by (1, L), or by (B, L) for each sample."""
    if index.shape[0] == 1:
        return rows.index_select(1, index[0])
    return rows.gather(1, index[..., None].expand_as(rows))
