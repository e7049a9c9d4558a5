"""Weights of window attention blocks that others trained, under the names that `SwinBlock` and its parts give them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checks import check_choice

State = dict[str, Tensor]

TABLE = "attn.position_bias.relative_position_bias_table"


@dataclass(frozen=True)
class BlockSource:
    """How one program names the tensors of a block.

    Args:
        target: the block here that takes them.
        names: names there, or what they begin with up to a dot, and what that is here; others are refused.
        unused: tensors that are computed here, by the end of their names.
        change: what else differs, of those tensors that there are.

    >>> BLOCK_SOURCES["scunet"].names["msa.linear."]
    'attn.proj.'
    """

    target: str
    names: Mapping[str, str]
    unused: tuple[str, ...] = ()
    change: Callable[[State], State] = field(default=lambda state: state)


def _without_bias_of_keys(state: State) -> State:
    """Swin V2 gives keys no bias; torchvision holds one and takes it for zero."""
    if "attn.qkv.bias" in state:
        bias = state["attn.qkv.bias"].clone()
        bias.chunk(3)[1].zero_()
        state["attn.qkv.bias"] = bias
    if "attn.log_scale" in state:
        state["attn.log_scale"] = state["attn.log_scale"].flatten()
    return state


def _with_separate_biases(state: State) -> State:
    """Join the biases of queries and values that timm holds apart."""
    if {"attn.q_bias", "attn.v_bias"} <= state.keys():
        q, v = state.pop("attn.q_bias"), state.pop("attn.v_bias")
        state["attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return _without_bias_of_keys(state)


def _table_by_offset(state: State) -> State:
    """SCUNet holds (heads, 2W - 1, 2W - 1)."""
    return state | {TABLE: state[TABLE].flatten(1).T.contiguous()} if TABLE in state else state


def _table_from_the_other_end(state: State) -> State:
    """Bring the table of HAT's OCAB into order: it counts from keys to queries, and begins below zero.

    Its index is (ky - qy + W - K + 1) and likewise across, for windows W and K of queries and keys, and negative ones
    are taken from the end. HAT's K is half as large again as W.
    """
    if TABLE not in state:
        return state
    table = state[TABLE]
    side = round(len(table) ** 0.5)  # W + K - 1
    window = next((w for w in range(1, side + 1) if 2 * w + w // 2 - 1 == side and w // 2 % 2 == 0), None)
    if side * side != len(table) or window is None:
        raise ValueError(f"the table of HAT's OCAB must have (W + K - 1)^2 rows for K = 1.5 W, got {len(table)}")
    keys = window + window // 2
    return state | {TABLE: torch.roll(table, (keys - 2) * (window + keys), 0).flip(0)}


SWIN = {
    "norm1.": "norm1.",
    "attn.qkv.": "attn.qkv.",
    "attn.proj.": "attn.proj.",
    "attn.relative_position_bias_table": TABLE,
    "norm2.": "norm2.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
}
MLP_OF_TORCHVISION = {"mlp.0.": "mlp.fc1.", "mlp.3.": "mlp.fc2."}
COSINE = {"attn.logit_scale": "attn.log_scale", "attn.cpb_mlp.": "attn.position_bias.cpb_mlp."}
INDICES = ("relative_position_index", "relative_coords_table", "attn_mask")

PLAIN = "SwinBlock(C, WindowAttention2d(C, heads, window_size=W, shift=S))"
V2 = 'SwinBlock(C, WindowAttention2d(C, heads, window_size=W, shift=S, bias="cpb", cosine=True), post_norm=True)'

BLOCK_SOURCES: dict[str, BlockSource] = {
    "swin": BlockSource(PLAIN, SWIN, INDICES),
    "swinir": BlockSource(PLAIN[:-1] + ", mlp_ratio=2)", SWIN, INDICES),
    "torchvision": BlockSource(PLAIN, SWIN | MLP_OF_TORCHVISION, INDICES),
    "torchvision-v2": BlockSource(V2, SWIN | MLP_OF_TORCHVISION | COSINE, INDICES, _without_bias_of_keys),
    "timm-v2": BlockSource(
        V2, SWIN | COSINE | {"attn.q_bias": "attn.q_bias", "attn.v_bias": "attn.v_bias"}, INDICES, _with_separate_biases
    ),
    "scunet": BlockSource(
        PLAIN,
        {
            "ln1.": "norm1.",
            "msa.embedding_layer.": "attn.qkv.",
            "msa.linear.": "attn.proj.",
            "msa.relative_position_params": TABLE,
            "ln2.": "norm2.",
            "mlp.0.": "mlp.fc1.",
            "mlp.2.": "mlp.fc2.",
        },
        change=_table_by_offset,
    ),
    "hat": BlockSource(
        "SwinBlock(C, ConvAttention(C, WindowAttention2d(C, heads, window_size=W, shift=S)), mlp_ratio=2)",
        {name: here.replace("attn.", "attn.attn.") for name, here in SWIN.items()}
        | {
            "conv_block.cab.0.": "attn.conv1.",
            "conv_block.cab.2.": "attn.conv2.",
            "conv_block.cab.3.attention.1.": "attn.channel_attention.conv_du.0.",
            "conv_block.cab.3.attention.3.": "attn.channel_attention.conv_du.2.",
        },
        INDICES,
    ),
    "hat-ocab": BlockSource(
        "SwinBlock(C, OverlappingCrossAttention(C, heads, window_size=W, zero_border=True), mlp_ratio=2)",
        {
            "norm1.": "norm1.",
            "qkv.": "attn.qkv.",
            "proj.": "attn.proj.",
            "relative_position_bias_table": TABLE,
            "norm2.": "norm2.",
            "mlp.fc1.": "mlp.fc1.",
            "mlp.fc2.": "mlp.fc2.",
        },
        INDICES,
        _table_from_the_other_end,
    ),
}
"""By the names of programs: what a block of theirs is here, and how its tensors are called."""


def convert_block_state(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Rename the tensors of a block that another program trained, and bring them into the order used here.

    Args:
        state: the state dict of one block, without what stands before its own names.
        source: one of `BLOCK_SOURCES`: "swin" (Microsoft's and timm's first version), "swinir", "torchvision",
            "torchvision-v2", "timm-v2", "scunet" (its `trans_block`), "hat" (its HAB), "hat-ocab".

    Returns:
        A state dict for ``BLOCK_SOURCES[source].target``.

    Raises:
        ValueError: if no source has that name, a tensor has no place here, or a table has no such size.

    >>> from claritycore.blocks import SwinBlock, WindowAttention2d
    >>> state = SwinBlock(8, WindowAttention2d(8, 2)).state_dict()
    >>> theirs = {name.replace("position_bias.", ""): tensor for name, tensor in state.items()}
    >>> list(convert_block_state(theirs, "swinir")) == list(state)
    True
    """
    check_choice("source", source, BLOCK_SOURCES)
    layout = BLOCK_SOURCES[source]
    converted = {}
    for name, tensor in state.items():
        if name.endswith(layout.unused):
            continue
        here = _name_here(name, layout.names)
        if here is None:
            prefix = _prefix_of(name, layout.names)
            hint = f"cut {prefix!r} from all names" if prefix else f"known are {', '.join(layout.names)}"
            raise ValueError(f"{name!r} is no tensor of a block of {source}: {hint}")
        converted[here] = tensor
    return layout.change(converted)


def _name_here(name: str, names: Mapping[str, str]) -> str | None:
    """Return what a tensor is called here, None if it has no place."""
    for known, here in names.items():
        if name == known or (known.endswith(".") and name.startswith(known)):
            return here + name.removeprefix(known)
    return None


def _prefix_of(name: str, names: Mapping[str, str]) -> str:
    """Return what stands before a known name, empty if none is within."""
    starts = (at + 1 for at, letter in enumerate(name) if letter == ".")
    return next((name[:start] for start in starts if _name_here(name[start:], names)), "")
