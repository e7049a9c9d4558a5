"""Shifted and overlapping window attention, against the forms that Swin and HAT are written in.

`shifted` pads to whole windows, rolls, cuts, masks, puts back and crops, as torchvision's `shifted_window_attention`
does (its way to compute, in our own code); `unfolded` takes its key windows by `unfold`, as HAT does. `sdpa` is
`shifted` around torch's fused attention, the mask added to the bias. Maps are whole windows here, where all agree.

python -m benchmarks.window_attention
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from claritycore.kernels import overlapping_window_attention, window_attention
from claritycore.kernels.window_attention import window_attention_bytes, window_attention_flops
from claritycore.kernels.window_attention.operands import Layout

from .runner import Benchmark, Case, Work, main

CASES = [
    {"batch": 1, "size": 64, "channels": 180, "heads": 6, "window": 8, "shift": 0},
    {"batch": 1, "size": 64, "channels": 180, "heads": 6, "window": 8, "shift": 4},
    {"batch": 1, "size": 64, "channels": 180, "heads": 6, "window": 16, "shift": 8},
    {"batch": 1, "size": 128, "channels": 96, "heads": 6, "window": 8, "shift": 4},
]
OVERLAPPING_CASES = [{"batch": 1, "size": 64, "channels": 180, "heads": 6, "window": 16, "keys": 24}]


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | int]:
    window, size = case["window"], case["size"]
    keys = case.get("keys", window)
    given = {"num_heads": case["heads"], "window_size": window}
    given |= {"key_window_size": keys} if "keys" in case else {"shift": case["shift"]}
    return given | {
        "qkv": torch.randn(case["batch"], size, size, 3 * case["channels"], device=device, dtype=dtype),
        "bias_table": torch.randn((window + keys - 1) ** 2, case["heads"], device=device, dtype=dtype),
    }


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    window, keys = [case["window"]] * 2, [case.get("keys", case["window"])] * 2
    shift = [case.get("shift", 0)] * 2
    layout = Layout(window, keys, shift, [1, 1], case["heads"], 1.0, False, "keys" in case)
    sizes = case["batch"], case["size"], case["size"], case["channels"]
    flops = window_attention_flops(layout, *sizes)
    return Work(
        bytes=window_attention_bytes(*sizes, itemsize=dtype.itemsize, backward=backward),
        flops=flops + flops * 5 // 2 * backward,
    )


def offsets(window: int, keys: int, device: torch.device) -> Tensor:
    """Return the row of the table for each query and key of a window."""
    across = torch.arange(window, device=device)[:, None] - torch.arange(keys, device=device) + keys - 1
    rows = across[:, None, :, None] * (window + keys - 1) + across[None, :, None, :]
    return rows.reshape(window * window, keys * keys)


def windows_of(x: Tensor, window: int) -> Tensor:
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, channels)


def map_of(windows: Tensor, batch: int, height: int, width: int, window: int) -> Tensor:
    x = windows.view(batch, height // window, width // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)


def shifted_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Forbid what the roll brought together: (windows, pixels, pixels)."""
    region = torch.zeros(height, width, device=device)
    bounds = (0, -window), (-window, -shift), (-shift, None)
    for row, (top, bottom) in enumerate(bounds):
        for column, (left, right) in enumerate(bounds):
            region[top:bottom, left:right] = 3 * row + column
    of_windows = windows_of(region[None, ..., None], window)[..., 0]
    forbidden = of_windows[:, :, None] != of_windows[:, None]
    return torch.zeros(forbidden.shape, device=device).masked_fill(forbidden, -100.0)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Attend in windows, (B * windows, heads, pixels, d), with logits in memory."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    if mask is not None:
        logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None].to(q.dtype)).flatten(0, 1)
    return torch.softmax(logits, -1) @ v


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    both = bias if mask is None else (bias + mask[:, None]).to(q.dtype).repeat(len(q) // len(mask), 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=both)


def shifted(
    qkv: Tensor, bias_table: Tensor, num_heads: int, window_size: int, shift: int, attention=softmax_attention
) -> Tensor:
    batch, height, width, _ = qkv.shape
    padded = F.pad(qkv, (0, 0, 0, -width % window_size, 0, -height % window_size))
    size = padded.shape[1:3]
    windows = windows_of(torch.roll(padded, (-shift, -shift), (1, 2)) if shift else padded, window_size)
    q, k, v = windows.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    rows = offsets(window_size, window_size, qkv.device)
    bias = bias_table[rows.flatten()].view(*rows.shape, -1).permute(2, 0, 1)[None]
    mask = shifted_mask(*size, window_size, shift, qkv.device) if shift else None
    y = map_of(attention(q, k, v, bias, mask).transpose(1, 2).flatten(2), batch, *size, window_size)
    y = torch.roll(y, (shift, shift), (1, 2)) if shift else y
    return y[:, :height, :width].contiguous()


def unfolded(qkv: Tensor, bias_table: Tensor, num_heads: int, window_size: int, key_window_size: int) -> Tensor:
    batch, height, width, channels = qkv.shape
    queries, keys_and_values = qkv.split([channels // 3, 2 * channels // 3], -1)
    q = windows_of(queries, window_size).unflatten(-1, (num_heads, -1)).transpose(1, 2)
    margin = (key_window_size - window_size) // 2
    windows = F.unfold(keys_and_values.permute(0, 3, 1, 2), key_window_size, stride=window_size, padding=margin)
    windows = windows.view(batch, 2, num_heads, -1, key_window_size**2, windows.shape[-1])
    k, v = windows.permute(1, 0, 5, 2, 4, 3).flatten(1, 2)
    rows = offsets(window_size, key_window_size, qkv.device)
    bias = bias_table[rows.flatten()].view(*rows.shape, -1).permute(2, 0, 1)
    y = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias, -1) @ v
    return map_of(y.transpose(1, 2).flatten(2), batch, height, width, window_size)


WINDOW_ATTENTION = Benchmark(
    name="window_attention",
    cases=CASES,
    inputs=inputs,
    providers={
        "reference": partial(window_attention, backend="reference"),
        "torch": partial(window_attention, backend="torch"),
        "triton": partial(window_attention, backend="triton"),
        "shifted": shifted,
        "sdpa": partial(shifted, attention=fused_attention),
    },
    peer="shifted",
    cuda_only=["triton"],
    backward=True,
    work=work,
)

OVERLAPPING = Benchmark(
    name="overlapping_window_attention",
    cases=OVERLAPPING_CASES,
    inputs=inputs,
    providers={
        "reference": partial(overlapping_window_attention, zero_border=True, backend="reference"),
        "torch": partial(overlapping_window_attention, zero_border=True, backend="torch"),
        "triton": partial(overlapping_window_attention, zero_border=True, backend="triton"),
        "unfolded": unfolded,
    },
    peer="unfolded",
    cuda_only=["triton"],
    backward=True,
    work=work,
)

if __name__ == "__main__":
    raise SystemExit(main(WINDOW_ATTENTION, OVERLAPPING))
