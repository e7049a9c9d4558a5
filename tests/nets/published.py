"""The published nets written down once more in plain torch, under the tensor names of their releases: the oracles.

Nothing of the package is used here. Each is written from its paper and the names in its released files.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def same(in_channels: int, out_channels: int, size: int = 3, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, padding=dilation * (size // 2), dilation=dilation)


def lrelu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


class Dense(nn.Module):
    """Five densely connected convolutions; in the first release each lies in a sequence of its own."""

    def __init__(self, features: int, growth: int, nested: bool) -> None:
        super().__init__()
        for k in range(1, 6):
            conv = same(features + (k - 1) * growth, growth if k < 5 else features)
            self.add_module(f"conv{k}", nn.Sequential(conv) if nested else conv)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for k in range(1, 5):
            parts.append(lrelu(self.get_submodule(f"conv{k}")(torch.cat(parts, 1))))
        return 0.2 * self.conv5(torch.cat(parts, 1)) + x


class ResidualInResidual(nn.Module):
    def __init__(self, features: int, growth: int, *, prefix: str, nested: bool = False) -> None:
        super().__init__()
        self.prefix = prefix
        for j in (1, 2, 3):
            self.add_module(f"{prefix}{j}", Dense(features, growth, nested))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for j in (1, 2, 3):
            y = self.get_submodule(f"{self.prefix}{j}")(y)
        return 0.2 * y + x


# Names of the parts: body, its last convolution, stages, and the convolution at full size.
ESRGAN_NAMES = ("RRDB_trunk", "trunk_conv", "upconv", "HRconv", "RDB")
BASICSR_NAMES = ("body", "conv_body", "conv_up", "conv_hr", "rdb")


class ESRGAN(nn.Module):
    """ESRGAN under the names of its repository, or those of BasicSR, there with an unshuffling stem."""

    def __init__(self, names, *, channels=3, features=8, blocks=1, growth=4, stages=2, unshuffle=1) -> None:
        super().__init__()
        self.names, self.stages, self.unshuffle = names, stages, unshuffle
        body, conv_body, up, conv_hr, prefix = names
        self.conv_first = same(channels * unshuffle**2, features)
        self.add_module(
            body, nn.Sequential(*(ResidualInResidual(features, growth, prefix=prefix) for _ in range(blocks)))
        )
        self.add_module(conv_body, same(features, features))
        for n in range(1, stages + 1):
            self.add_module(f"{up}{n}", same(features, features))
        self.add_module(conv_hr, same(features, features))
        self.conv_last = same(features, channels)

    def forward(self, x: Tensor) -> Tensor:
        body, conv_body, up, conv_hr, _ = self.names
        x = self.conv_first(F.pixel_unshuffle(x, self.unshuffle))
        x = x + self.get_submodule(conv_body)(self.get_submodule(body)(x))
        for n in range(1, self.stages + 1):
            x = lrelu(self.get_submodule(f"{up}{n}")(doubled(x)))
        return self.conv_last(lrelu(self.get_submodule(conv_hr)(x)))


class Shortcut(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.sub = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sub(x)


class OldESRGAN(nn.Module):
    """The first release of ESRGAN: one long sequence, in which the upsampling layers count too."""

    def __init__(self, *, channels=3, features=8, blocks=1, growth=4, stages=2, factor=2) -> None:
        super().__init__()
        body = [ResidualInResidual(features, growth, prefix="RDB", nested=True) for _ in range(blocks)]
        layers = [same(channels, features), Shortcut(*body, same(features, features))]
        for _ in range(stages):
            layers += [nn.Upsample(scale_factor=factor, mode="nearest"), same(features, features), nn.LeakyReLU(0.2)]
        self.model = nn.Sequential(*layers, same(features, features), nn.LeakyReLU(0.2), same(features, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class LargeKernel(nn.Module):
    """PLKSR's partial large kernel: whole, as dilated branches ("sparse"), or as strips ("rect")."""

    def __init__(self, channels: int, size: int, kind: str, dilated: tuple[int, ...], whole: bool) -> None:
        super().__init__()
        self.channels, self.kind = channels, kind
        if kind == "plain":
            self.conv = same(channels, channels, size)
        elif kind == "sparse":
            branches = [same(channels, channels, k, dilation) for dilation, k in enumerate(dilated, start=1)]
            self.convs = nn.ModuleList([*branches, *([same(channels, channels, size)] if whole else [])])
        else:
            short = size // 3
            self.mn_conv = nn.Conv2d(channels, channels, (size, short), padding=(size // 2, short // 2))
            self.nm_conv = nn.Conv2d(channels, channels, (short, size), padding=(short // 2, size // 2))
            self.nn_conv = same(channels, channels, short)

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x[:, : self.channels], x[:, self.channels :]
        if self.kind == "plain":
            first = self.conv(first)
        elif self.kind == "sparse":
            first = sum(conv(first) for conv in self.convs)
        else:
            first = self.mn_conv(first) + self.nm_conv(first) + self.nn_conv(first)
        return torch.cat([first, rest], 1)


class Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f = nn.Sequential(same(channels, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.f(x)


class ChannelLayerNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        normal = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return normal * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class PLKBlock(nn.Module):
    def __init__(self, channels: int, large: LargeKernel, *, real: bool, attention: bool, norm: str) -> None:
        super().__init__()
        self.real, self.norm_kind = real, norm
        activation = nn.Mish() if real else nn.GELU()
        mixer = nn.Sequential(same(channels, 2 * channels), activation, same(2 * channels, channels))
        self.add_module("channel_mixer" if real else "channe_mixer", mixer)
        self.lk = large
        self.attn = Gate(channels) if attention else nn.Identity()
        self.refine = nn.Conv2d(channels, channels, 1)
        if norm == "layer":
            self.layer_norm = ChannelLayerNorm(channels)
        elif norm == "group":
            self.norm = nn.GroupNorm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm(x) if self.norm_kind == "layer" else x
        y = (self.channel_mixer if self.real else self.channe_mixer)(y)
        y = self.refine(self.attn(self.lk(y)))
        return x + (self.norm(y) if self.norm_kind == "group" else y)


class DySample(nn.Module):
    """The head of RealPLKSR: samples at learned places, then a 1x1 convolution unless the scale is 1."""

    def __init__(self, channels: int, out_channels: int, scale: int, groups: int) -> None:
        super().__init__()
        self.scale, self.groups = scale, groups
        self.offset = nn.Conv2d(channels, 2 * groups * scale**2, 1)
        self.scope = nn.Conv2d(channels, 2 * groups * scale**2, 1, bias=False)
        self.end_conv = nn.Conv2d(channels, out_channels, 1) if scale > 1 else nn.Identity()
        place = (torch.arange(scale) - (scale - 1) / 2) / scale
        across, down = place.repeat(scale), place.repeat_interleave(scale)
        self.register_buffer("init_pos", torch.cat([across.repeat(groups), down.repeat(groups)])[None, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        offsets = F.pixel_shuffle(self.offset(x) * self.scope(x).sigmoid() * 0.5 + self.init_pos, self.scale)
        offsets = offsets.view(batch, 2, self.groups, *offsets.shape[2:])
        sampled = torch.zeros(batch, channels, height * self.scale, width * self.scale, dtype=x.dtype)
        columns = torch.arange(width, dtype=x.dtype).repeat_interleave(self.scale)
        rows = torch.arange(height, dtype=x.dtype).repeat_interleave(self.scale)[:, None]
        share = channels // self.groups
        for group in range(self.groups):
            across = 2 * (columns + offsets[:, 0, group] + 0.5) / width - 1
            down = 2 * (rows + offsets[:, 1, group] + 0.5) / height - 1
            own = slice(group * share, (group + 1) * share)
            grid = torch.stack([across, down], dim=-1)
            sampled[:, own] = F.grid_sample(x[:, own], grid, "bilinear", "border", align_corners=False)
        return self.end_conv(sampled)


class PLKSR(nn.Module):
    """PLKSR, and with `real` RealPLKSR, whose last convolution stands one place later, behind a dropout."""

    def __init__(
        self, *, channels=3, features=16, blocks=1, size=5, scale=2, split=0.25, attention=True,
        kind="plain", dilated=(5, 5), whole=False, real=False, norm="none", dysample=False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale = scale

        def block() -> PLKBlock:
            large = LargeKernel(int(features * split), size, kind, dilated, whole)
            return PLKBlock(features, large, real=real, attention=attention, norm=norm)

        dropout = [nn.Dropout2d(0.0)] if real else []
        last = same(features, channels * scale**2)
        self.feats = nn.Sequential(same(channels, features), *(block() for _ in range(blocks)), *dropout, last)
        groups = channels if scale % 2 else 4
        self.to_img = DySample(channels * scale**2, channels, scale, groups) if dysample else nn.PixelShuffle(scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_img(self.feats(x) + x.repeat_interleave(self.scale**2, dim=1))


class Conv3XC(nn.Module):
    """Three convolutions beside one of 1x1, over an image padded once; `eval_conv` holds what they amount to."""

    def __init__(self, in_channels: int, out_channels: int, deployed: bool) -> None:
        super().__init__()
        self.deployed = deployed
        if not deployed:
            self.sk = nn.Conv2d(in_channels, out_channels, 1)
            widths = [in_channels, 2 * in_channels, 2 * out_channels, out_channels]
            self.conv = nn.Sequential(*(nn.Conv2d(*widths[i : i + 2], (1, 3, 1)[i]) for i in range(3)))
        self.eval_conv = same(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.eval_conv(x) if self.deployed else self.conv(F.pad(x, (1, 1, 1, 1))) + self.sk(x)


class SPAB(nn.Module):
    def __init__(self, features: int, deployed: bool) -> None:
        super().__init__()
        self.c1_r, self.c2_r, self.c3_r = (Conv3XC(features, features, deployed) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = F.silu(self.c1_r(x))
        last = self.c3_r(F.silu(self.c2_r(first)))
        return (last + x) * (torch.sigmoid(last) - 0.5), first


class SPAN(nn.Module):
    """SPAN, in training form or deployed; without `normalize` it carries neosr's mark."""

    def __init__(self, *, channels=3, features=8, scale=2, normalize=True, deployed=False) -> None:
        super().__init__()
        self.scale, self.normalize = scale, normalize
        if not normalize:
            self.register_buffer("no_norm", torch.zeros(1))
        self.conv_1 = Conv3XC(channels, features, deployed)
        for i in range(1, 7):
            self.add_module(f"block_{i}", SPAB(features, deployed))
        self.conv_cat = nn.Conv2d(4 * features, features, 1)
        self.conv_2 = Conv3XC(features, features, deployed)
        self.upsampler = nn.Sequential(same(features, channels * scale**2), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        if self.normalize:
            x = 255.0 * (x - torch.tensor((0.4488, 0.4371, 0.4040))[:, None, None].to(x.dtype))
        x = first = self.conv_1(x)
        ends = []
        for i in range(1, 7):
            x, inner = self.get_submodule(f"block_{i}")(x)
            ends.append((x, inner))
        return self.upsampler(self.conv_cat(torch.cat([first, self.conv_2(x), ends[0][0], ends[-1][1]], 1)))
