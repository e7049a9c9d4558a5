"""The names that SPAN is published under: the authors' repository and neosr, in training form and deployed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..blocks import reparameterize_model
from .renaming import Layout, Reading, State, count, inverse, own_names, rename, shuffled_channels

if TYPE_CHECKING:
    from .base import RestorationNet
    from .registry import BaseConfig

BLOCKS = 6
NO_NORM = "no_norm"  # neosr's mark of a net that takes the image as it is
CONVOLUTIONS = {"branches.0.convs.0": "conv.0", "branches.0.convs.1": "conv.1", "branches.0.convs.2": "conv.2"}
TRAINED = {**CONVOLUTIONS, "branches.1.convs.0": "sk"}
DEPLOYED = {"fused": "eval_conv"}
NO_MEAN = "what is subtracted from the image: the mean of DIV2K, and a range of 255, are assumed"


def _names(blocks: int, parts: Mapping[str, str]) -> dict[str, str]:
    """Names of our modules, and theirs; `parts` are those of one trained or deployed convolution."""
    convolutions = {"conv_first": "conv_1", "conv_body": "conv_2"}
    for i in range(blocks):
        convolutions |= {f"body.{i}.conv{n}": f"block_{i + 1}.c{n}_r" for n in (1, 2, 3)}
    names = {
        f"{ours}.{our}": f"{theirs}.{part}" for ours, theirs in convolutions.items() for our, part in parts.items()
    }
    return {**names, "conv_cat": "conv_cat", "conv_last": "upsampler.0"}


def _read_trained(state: State) -> Reading:
    # What lies in eval_conv is as old as the last evaluation: the trained branches are the weights.
    return _read({key: value for key, value in state.items() if ".eval_conv." not in key}, TRAINED)


def _read_deployed(state: State) -> Reading:
    return _read(state, DEPLOYED)


def _read(state: State, parts: Mapping[str, str]) -> Reading:
    normalize = NO_NORM not in state
    kernel = f"c1_r.{next(iter(parts.values()))}.weight"
    names = _names(count(state, "block_{}." + kernel, start=1), parts)
    renamed = rename({key: value for key, value in state.items() if key != NO_NORM}, inverse(names))
    return _reading(renamed, normalize, (NO_MEAN,) if normalize else ())


def _read_own(state: State) -> Reading:
    return _reading(state, True, ("whether the image is normalized: it is assumed",))


def _reading(state: State, normalize: bool, assumptions: tuple[str, ...]) -> Reading:
    part = "fused" if "conv_first.fused.weight" in state else "branches.1.convs.0"
    first = state[f"conv_first.{part}.weight"]
    out_channels, scale = shuffled_channels(state["conv_last.weight"].shape[0], first.shape[1])
    fields = {
        "in_channels": first.shape[1],
        "out_channels": out_channels,
        "scale": scale,
        "num_feat": first.shape[0],
        "num_block": count(state, "body.{}.conv1." + f"{part}.weight"),
        "normalize": normalize,
    }
    return Reading(state, fields, assumptions)


def _write_trained(net: "RestorationNet") -> State:
    state = _write(net.state_dict(), net.config, TRAINED)
    # The authors' code wants the fused convolutions beside the trained ones.
    return {**state, **_write(reparameterize_model(net).state_dict(), net.config, DEPLOYED)}


def _write_deployed(net: "RestorationNet") -> State:
    return _write(net.state_dict(), net.config, DEPLOYED)


def _write(state: State, config: "BaseConfig", parts: Mapping[str, str]) -> State:
    blocks, normalize, channels = (getattr(config, name) for name in ("num_block", "normalize", "in_channels"))
    if f"conv_first.{next(iter(parts))}.weight" not in state:
        wanted = "the deployed form: call reparameterize_model first" if parts is DEPLOYED else "the training form"
        raise ValueError(f"it is of {wanted}")
    if blocks != BLOCKS:
        raise ValueError(f"it has {BLOCKS} blocks, not {blocks}")
    if normalize and channels != 3:
        raise ValueError(f"it normalizes images of three channels alone, not of {channels}")
    renamed = rename(state, _names(BLOCKS, parts))
    return renamed if normalize else {NO_NORM: torch.zeros(1), **renamed}


SPAN_LAYOUTS = (
    Layout(
        name="span",
        title="SPAN under our names, in training form",
        family="span",
        required=("conv_first.branches.0.convs.1.weight", "conv_cat.weight", "conv_last.weight"),
        excluded=(),
        read=_read_own,
        write=own_names,
    ),
    Layout(
        name="span-deployed",
        title="SPAN under our names, deployed",
        family="span",
        required=("conv_first.fused.weight", "conv_cat.weight", "conv_last.weight"),
        excluded=(),
        read=_read_own,
        write=own_names,
    ),
    Layout(
        name="span-basicsr",
        title="SPAN of its authors and of neosr, in training form",
        family="span",
        required=("conv_1.conv.1.weight", "conv_1.sk.weight", "conv_cat.weight", "upsampler.0.weight"),
        excluded=(),
        read=_read_trained,
        write=_write_trained,
    ),
    Layout(
        name="span-basicsr-deployed",
        title="SPAN of its authors and of neosr, deployed",
        family="span",
        required=("conv_1.eval_conv.weight", "conv_cat.weight", "upsampler.0.weight"),
        excluded=("conv_1.conv.1.weight", "conv_1.sk.weight"),
        read=_read_deployed,
        write=_write_deployed,
    ),
)
