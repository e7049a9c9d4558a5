"""Blocks of window attention as their programs define them, with the names of their tensors.

Written anew from what these programs compute: roll, cut into windows, mask, attend, put back, roll back. Only sizes
that windows divide.
"""

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F


def offsets(window: int, wider: int | None = None, sign: int = 1) -> Tensor:
    """(dy, dx) of each query (a pixel of a window) less each key, or of each key less each query: (N, M, 2)."""
    places = [torch.tensor([(i, j) for i in range(side) for j in range(side)]) for side in (window, wider or window)]
    return sign * (places[0][:, None] - places[1][None])


def index_of(window: int) -> Tensor:
    ways = offsets(window) + window - 1
    return ways[..., 0] * (2 * window - 1) + ways[..., 1]


def regions(height: int, width: int, window: int, shift: int) -> Tensor:
    """Number the parts that a roll brings side by side, and cut them into windows: (windows, N)."""
    numbers = torch.zeros(height, width)
    if shift:
        bounds = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
        for n, (rows, columns) in enumerate((a, b) for a in bounds for b in bounds):
            numbers[rows, columns] = n
    return rearrange(numbers, "(a i) (b j) -> (a b) (i j)", i=window, j=window)


class Rolled(nn.Module):
    """Windows of a rolled map (B, H, W, C), and the way back."""

    masked = -100.0

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.channels, self.heads, self.window, self.shift = channels, heads, window, shift

    def mask(self, height: int, width: int) -> Tensor:
        """(windows, 1, N, N)."""
        numbers = regions(height, width, self.window, self.shift)
        apart = numbers[:, None, :, None] != numbers[:, None, None, :]
        return torch.zeros(apart.shape, dtype=torch.float64).masked_fill(apart, self.masked)

    def windows(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        cut = rearrange(x, "b (h i) (w j) c -> (b h w) (i j) c", i=self.window, j=self.window)
        q, k, v = rearrange(self.projected(cut), "n p (three head d) -> three n head p d", three=3, head=self.heads)
        logits = self.logits(q, k) + self.bias()
        logits = logits.unflatten(0, (len(x), -1)) + self.mask(height, width)
        y = rearrange(logits.softmax(-1).flatten(0, 1) @ v, "n head p d -> n p (head d)")
        y = rearrange(y, "(b h w) (i j) c -> b (h i) (w j) c", b=len(x), h=height // self.window, i=self.window)
        return torch.roll(y, (self.shift, self.shift), (1, 2))

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT / math.sqrt(q.shape[-1])

    def projected(self, cut: Tensor) -> Tensor:
        return self.qkv(cut)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.windows(x))


class SwinAttention(Rolled):
    """Of Swin, SwinIR, HAT and, but for an index of one axis, torchvision."""

    flat_index = False

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__(channels, heads, window, shift)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        index = index_of(window)
        self.register_buffer("relative_position_index", index.flatten() if self.flat_index else index)

    def bias(self) -> Tensor:
        n = self.window**2
        return self.relative_position_bias_table[self.relative_position_index.flatten()].T.reshape(-1, n, n)


class FlatSwinAttention(SwinAttention):
    flat_index = True


class Cosine(Rolled):
    """What the second versions share: directions, and a bias computed from the logarithms of offsets."""

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__(channels, heads, window, shift)
        self.proj = nn.Linear(channels, channels)
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        side = torch.arange(1 - window, window, dtype=torch.float64) * 8 / max(window - 1, 1)
        side = side.sign() * (side.abs() + 1).log2() / 3
        self.register_buffer("relative_coords_table", torch.stack(torch.meshgrid(side, side, indexing="ij"), -1)[None])
        self.register_buffer("relative_position_index", index_of(window))

    def bias(self) -> Tensor:
        n = self.window**2
        table = self.cpb_mlp(self.relative_coords_table).reshape(-1, self.heads)
        return 16 * torch.sigmoid(table[self.relative_position_index.flatten()].T.reshape(-1, n, n))

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        return cosines * self.logit_scale.clamp(max=math.log(100.0)).exp()


class TorchvisionCosine(Cosine):
    """One bias, of which the keys' third counts as zero."""

    def __init__(self, channels: int, *sizes: int) -> None:
        super().__init__(channels, *sizes)
        self.qkv = nn.Linear(channels, 3 * channels)

    def projected(self, cut: Tensor) -> Tensor:
        kept = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(self.channels)
        return F.linear(cut, self.qkv.weight, self.qkv.bias * kept)


class TimmCosine(Cosine):
    """Two biases."""

    def __init__(self, channels: int, *sizes: int) -> None:
        super().__init__(channels, *sizes)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(channels)) for _ in range(2))

    def projected(self, cut: Tensor) -> Tensor:
        return F.linear(cut, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))


class SCUNetAttention(Rolled):
    """Its table has a plane for each head; its mask is a hard one, made from the side on which a pixel lies."""

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__(channels, heads, window, shift)
        self.embedding_layer, self.linear = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.relative_position_params = nn.Parameter(torch.zeros(heads, 2 * window - 1, 2 * window - 1))

    def bias(self) -> Tensor:
        ways = offsets(self.window) + self.window - 1
        return self.relative_position_params[:, ways[..., 0], ways[..., 1]]

    def mask(self, height: int, width: int) -> Tensor:
        down, across, w = height // self.window, width // self.window, self.window
        apart = torch.zeros(down, across, w, w, w, w, dtype=torch.bool)
        if self.shift:
            s = w - self.shift
            apart[-1, :, :s, :, s:] = apart[-1, :, s:, :, :s] = True
            apart[:, -1, :, :s, :, s:] = apart[:, -1, :, s:, :, :s] = True
        apart = apart.reshape(down * across, 1, w * w, w * w)
        return torch.zeros(apart.shape, dtype=torch.float64).masked_fill(apart, -math.inf)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.windows(x))

    def projected(self, cut: Tensor) -> Tensor:
        return self.embedding_layer(cut)


class TheirMLP(nn.Module):
    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, ratio * channels), nn.Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Swin(nn.Module):
    """Of Microsoft and timm; shifted blocks hold their mask."""

    mlp_ratio = 4

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn, self.mlp = SwinAttention(channels, heads, window, shift), TheirMLP(channels, self.mlp_ratio)
        self.register_buffer("attn_mask", self.attn.mask(2 * window, 2 * window) if shift else None)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SwinIR(Swin):
    mlp_ratio = 2


def torchvision_mlp(channels: int) -> nn.Sequential:
    inner = nn.Linear(channels, 4 * channels), nn.GELU(), nn.Dropout(0.0)
    return nn.Sequential(*inner, nn.Linear(4 * channels, channels), nn.Dropout(0.0))


class Torchvision(Swin):
    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__(channels, heads, window, shift)
        self.attn, self.mlp = FlatSwinAttention(channels, heads, window, shift), torchvision_mlp(channels)
        self.attn_mask = None


class TimmV2(Swin):
    """Norms come last."""

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__(channels, heads, window, shift)
        self.attn = TimmCosine(channels, heads, window, shift)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norm1(self.attn(x))
        return x + self.norm2(self.mlp(x))


class TorchvisionV2(TimmV2):
    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__(channels, heads, window, shift)
        self.attn, self.mlp = TorchvisionCosine(channels, heads, window, shift), torchvision_mlp(channels)
        self.attn_mask = None


class SCUNet(nn.Module):
    """The transformer half of its blocks."""

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.msa = SCUNetAttention(channels, heads, window, shift)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.msa(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class HATChannelAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = nn.Conv2d(channels, channels // 30, 1), nn.ReLU(), nn.Conv2d(channels // 30, channels, 1)
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), *squeezed, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attention(x)


class HATConvBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        convs = nn.Conv2d(channels, channels // 3, 3, 1, 1), nn.GELU(), nn.Conv2d(channels // 3, channels, 3, 1, 1)
        self.cab = nn.Sequential(*convs, HATChannelAttention(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.cab(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class HAT(nn.Module):
    """Its HAB; the index is the whole net's."""

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn, self.mlp = SwinAttention(channels, heads, window, shift), TheirMLP(channels, 2)
        del self.attn._buffers["relative_position_index"]
        self.attn.relative_position_index = index_of(window)
        self.conv_block = HATConvBlock(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y) + 0.01 * self.conv_block(y)
        return x + self.mlp(self.norm2(x))


class HATOverlapping(nn.Module):
    """Its OCAB: keys unfolded with zeros around the map, and an index from keys to queries that begins below zero."""

    def __init__(self, channels: int, heads: int, window: int, _: int) -> None:
        super().__init__()
        self.heads, self.window, self.wider = heads, window, window + window // 2
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.unfold = nn.Unfold(self.wider, stride=window, padding=(self.wider - window) // 2)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((window + self.wider - 1) ** 2, heads))
        self.mlp = TheirMLP(channels, 2)

    def bias(self) -> Tensor:
        ways = offsets(self.window, self.wider, -1) + self.window - self.wider + 1
        index = ways[..., 0] * (self.window + self.wider - 1) + ways[..., 1]
        assert index.min() < 0
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        size = {"b": len(x), "h": x.shape[1] // self.window, "i": self.window}
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        q = rearrange(
            q, "b (h i) (w j) (head d) -> (b h w) head (i j) d", i=self.window, j=self.window, head=self.heads
        )
        k, v = (
            rearrange(
                self.unfold(t.permute(0, 3, 1, 2)), "b (head d p) n -> (b n) head p d", head=self.heads, p=self.wider**2
            )
            for t in (k, v)
        )
        weights = (q @ k.mT / math.sqrt(q.shape[-1]) + self.bias()).softmax(-1)
        y = rearrange(weights @ v, "(b h w) head (i j) d -> b (h i) (w j) (head d)", **size)
        x = x + self.proj(y)
        return x + self.mlp(self.norm2(x))


PUBLISHED = {
    "swin": Swin,
    "swinir": SwinIR,
    "torchvision": Torchvision,
    "torchvision-v2": TorchvisionV2,
    "timm-v2": TimmV2,
    "scunet": SCUNet,
    "hat": HAT,
    "hat-ocab": HATOverlapping,
}
