"""MSGDown, MSGUp, SkipFusion and OverlapPatchEmbed, forward and backward, against their formulas written out.

The peer of the ways down and up is Restormer's writing of them, a convolution and F.pixel_unshuffle, or
F.pixel_shuffle and a convolution; where they are gated, with our gate after it. The others have none: other libraries
write them as they are here.

python -m benchmarks.multi_scale
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from claritycore.blocks import ConvGate, MSGDown, MSGUp, OverlapPatchEmbed, SkipFusion

from .runner import Benchmark, Case, Work, main

LAYOUTS = (torch.contiguous_format, torch.channels_last)
DOWN_CASES = [
    {"channels": 48, "size": size, "form": form, "gated": gated, "memory_format": layout}
    for size in (48, 128)
    for form in ("strided", "unshuffle")
    for gated in (False, True)
    for layout in LAYOUTS
]
UP_CASES = [
    {"channels": 96, "size": size, "form": form, "gated": gated, "memory_format": layout}
    for size in (24, 64)
    for form in ("pixelshuffle", "dysample")
    for gated in (False, True)
    for layout in LAYOUTS
]
SKIP_CASES = [
    {"channels": 48, "size": size, "larger": larger, "memory_format": layout}
    for size in (47, 127)
    for larger in (0, 1, -1)
    for layout in LAYOUTS
]
EMBED_CASES = [
    {"embed_dim": 48, "size": size, "stride": stride, "memory_format": layout}
    for size in (64, 256)
    for stride in (1, 2)
    for layout in LAYOUTS
]


def noise(channels: int, size: int, case: Case, device: torch.device, dtype: torch.dtype) -> Tensor:
    x = torch.randn(1, channels, size, size, device=device, dtype=dtype)
    return x.contiguous(memory_format=case["memory_format"])


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": noise(case["channels"], case["size"], case, device, dtype)}


def image(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": noise(3, case["size"], case, device, dtype)}


def two_maps(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    c, size = case["channels"], case["size"]
    return {
        "x": noise(c, size + case["larger"], case, device, dtype),
        "skip": noise(c, size, case, device, dtype),
    }


def work(elements: int, products: int, dtype: torch.dtype, backward: bool) -> Work:
    """Elements in and out, once more with their gradients; the products of the convolutions, thrice with backward."""
    return Work(bytes=(2 if backward else 1) * elements * dtype.itemsize, flops=2 * (3 if backward else 1) * products)


def down_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    c, low = case["channels"], (case["size"] // 2) ** 2
    products = 9 * low * c * 2 * c  # of both forms: four times the pixels, a quarter of the channels
    gate = 9 * low * 2 * c * 4 * c if case["gated"] else 0
    return work(4 * low * c + low * 2 * c, products + gate, dtype, backward)


def up_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    c, high = case["channels"], (2 * case["size"]) ** 2
    width = c // 4 if case["form"] == "pixelshuffle" else c
    gate = 9 * high * (c // 2) * c if case["gated"] else 0
    return work(high // 4 * c + high * c // 2, 9 * high * width * (c // 2) + gate, dtype, backward)


def skip_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    c, pixels = case["channels"], case["size"] ** 2
    return work(3 * pixels * c, 2 * pixels * c * c, dtype, backward)


def embed_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    pixels, low = case["size"] ** 2, (case["size"] // case["stride"]) ** 2
    return work(3 * pixels + low * case["embed_dim"], 9 * low * 3 * case["embed_dim"], dtype, backward)


def gate_by_hand(gate: nn.Module, x: Tensor) -> Tensor:
    """Two convolutions, of the values and of the gate."""
    if not isinstance(gate, ConvGate):
        return x
    (value, gate_weight), (bias, gate_bias) = gate.conv.weight.chunk(2), gate.conv.bias.chunk(2)
    return F.conv2d(x, value, bias, padding=1) * torch.sigmoid(F.conv2d(x, gate_weight, gate_bias, padding=1))


def down_by_hand(block: MSGDown, x: Tensor) -> Tensor:
    y = F.conv2d(x, block.conv.weight, block.conv.bias, padding=1)
    cells = rearrange(y, "b c (h i) (w j) -> i j b c h w", i=2, j=2)
    y = cells[0, 0] if block.form == "strided" else rearrange(cells, "i j b c h w -> b (c i j) h w")
    return in_format_of(x, gate_by_hand(block.gate, y))


def down_as_published(block: MSGDown, x: Tensor) -> Tensor:
    y = block.conv(x)
    return block.gate(F.pixel_unshuffle(y, 2) if block.form == "unshuffle" else y)


def up_by_hand(block: MSGUp, x: Tensor) -> Tensor:
    y = block.upsample(x) if block.form == "dysample" else rearrange(x, "b (c i j) h w -> b c (h i) (w j)", i=2, j=2)
    return in_format_of(x, gate_by_hand(block.gate, F.conv2d(y, block.conv.weight, block.conv.bias, padding=1)))


def up_as_published(block: MSGUp, x: Tensor) -> Tensor:
    return block.gate(block.conv(block.upsample(x) if block.form == "dysample" else F.pixel_shuffle(x, 2)))


def fusion_by_hand(block: SkipFusion, x: Tensor, skip: Tensor) -> Tensor:
    """The convolution of the two, each by itself, added."""
    (height, width), c = skip.shape[2:], x.shape[1]
    beyond = [0, max(width - x.shape[3], 0), 0, max(height - x.shape[2], 0)]
    x = F.pad(x, beyond, mode="replicate")[..., :height, :width]
    weight, bias = block.project.weight, block.project.bias
    return in_format_of(skip, F.conv2d(x, weight[:, :c], bias) + F.conv2d(skip, weight[:, c:]))


def embedding_by_hand(block: OverlapPatchEmbed, x: Tensor) -> Tensor:
    """Every patch as a column, by one matrix product."""
    side = -(-x.shape[3] // block.proj.stride[0])
    patches = F.unfold(x, block.proj.kernel_size, padding=block.proj.padding, stride=block.proj.stride)
    return in_format_of(x, (block.proj.weight.flatten(1) @ patches).unflatten(2, (-1, side)))


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    return y.contiguous() if x.is_contiguous() else y.contiguous(memory_format=torch.channels_last)


DOWN = Benchmark(
    name="msg_down",
    cases=DOWN_CASES,
    inputs=feature_map,
    build=lambda case: MSGDown(case["channels"], 2 * case["channels"], form=case["form"], gated=case["gated"]),
    providers={
        "reference": lambda block: lambda x: down_by_hand(block, x),
        "ours": lambda block: block,
        "published": lambda block: lambda x: down_as_published(block, x),
    },
    peer="published",
    backward=True,
    work=down_work,
)

UP = Benchmark(
    name="msg_up",
    cases=UP_CASES,
    inputs=feature_map,
    build=lambda case: MSGUp(case["channels"], case["channels"] // 2, form=case["form"], gated=case["gated"]),
    providers={
        "reference": lambda block: lambda x: up_by_hand(block, x),
        "ours": lambda block: block,
        "published": lambda block: lambda x: up_as_published(block, x),
    },
    peer="published",
    backward=True,
    work=up_work,
)

SKIP = Benchmark(
    name="skip_fusion",
    cases=SKIP_CASES,
    inputs=two_maps,
    build=lambda case: SkipFusion(case["channels"]),
    providers={
        "reference": lambda block: lambda x, skip: fusion_by_hand(block, x, skip),
        "ours": lambda block: block,
    },
    backward=True,
    work=skip_work,
)

EMBED = Benchmark(
    name="overlap_patch_embed",
    cases=EMBED_CASES,
    inputs=image,
    build=lambda case: OverlapPatchEmbed(3, case["embed_dim"], stride=case["stride"]),
    providers={
        "reference": lambda block: lambda x: embedding_by_hand(block, x),
        "ours": lambda block: block,
    },
    backward=True,
    work=embed_work,
)

if __name__ == "__main__":
    raise SystemExit(main(DOWN, UP, SKIP, EMBED))
