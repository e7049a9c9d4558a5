"""The skeleton of the U-Nets: stages at several scales, ways down and up between them, and a long skip."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from ..blocks import BicubicUp, MSGDown, MSGUp, OverlapPatchEmbed, SkipFusion
from ..blocks.checks import check_choice
from ..blocks.multi_scale import DownForm, UpForm
from ..blocks.padding import cropped, pad_to_multiple
from ..blocks.tiling import Tiling, side_by_side, tiling_of
from .base import SCALES, RestorationNet, check_config, check_image
from .heads import EmbeddedScaleHead, ReconstructionHead, ScaleHeads, Upsampler
from .output import Aux, RestorationOutput
from .registry import BaseConfig
from .stage import Conditioned, Context, Stage


@dataclass(frozen=True)
class UNetConfig(BaseConfig):
    """What all U-Nets can be told; each net's config adds fields of its own.

    Args:
        in_channels: channels of the input image.
        out_channels: channels of the output image.
        scale: upscaling factor: 1, 2, 3, 4 or 8.
        scales: all factors that the net can enlarge by, `scale` among them; empty: that one alone.
        scale_head: with several scales "separate", a head for each, or "embedded", one that is told the scale.
        down: the way down between stages, "strided" or "unshuffle" (`MSGDown`).
        up: the way up, "pixelshuffle", "expand" or "dysample" (`MSGUp`).
        gated: whether a gated convolution follows each way.
        skip: how decoders join the maps of the encoder: "concat", "add" or "none".
        upsampler: of the heads, "pixelshuffle" or "dysample".
        long_skip: whether the net adds to the image, enlarged bicubically, and starts as that.

    Raises:
        ValueError: if a number is no integer or < 1, a choice is none of those, or `scale` is none of `scales`.

    >>> UNetConfig(scale=2, scales=(2, 4)).scale_head
    'separate'
    """

    in_channels: int = 3
    out_channels: int = 3
    scale: int = 1
    scales: tuple[int, ...] = ()
    scale_head: Literal["separate", "embedded"] = "separate"
    down: DownForm = "strided"
    up: UpForm = "pixelshuffle"
    gated: bool = True
    skip: Literal["concat", "add", "none"] = "concat"
    upsampler: Upsampler = "pixelshuffle"
    long_skip: bool = True

    def __post_init__(self) -> None:
        check_config(self, counts=("in_channels", "out_channels"))
        for scale in self.scales:
            check_choice("scales", scale, SCALES)
        if self.scales and (self.scale not in self.scales or len(set(self.scales)) < len(self.scales)):
            raise ValueError(f"scales must be different ones, scale = {self.scale} among them, got {self.scales}")


class UNet(RestorationNet):
    r"""Encoder and decoder of several scales around stages of any blocks.

    .. code-block:: text

        image -> stem -> encoder[0] ------------- fusion -> decoder[0] -> refinement -> head -> + bicubic(image)
                            down -> encoder[1] --- fusion -> decoder[1] -> up ^
                                      down -> bottleneck -> up ^

    The image is padded by reflection to a multiple of the stride of the coarsest stage, the result cropped. With the
    long skip the last convolution starts at zero, so that a fresh net returns the image, or `BicubicUp` of it.

    Shape:
        ``(B, in_channels, H, W)`` -> ``(B, out_channels, s H, s W)``, any H, W >= 1.

    Args:
        config: image channels, scales, and the form of all ways between stages.
        widths: channels of each scale, the finest first.
        encoder: a stage for each scale but the last: any module that keeps the shape of a map, `Stage` of several.
        bottleneck: the stage of the last scale.
        decoder: as many stages as the encoder has, of the same scales in the same order.
        refinement: a stage at the finest scale after the decoder.
        stem: from the padded image to the first map, of the same size; `OverlapPatchEmbed` where it is not given.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if the stages are not as many as the widths ask for, the image has another number of channels, or
            ``scale`` is none of the net's.

    Source:
        U-Net (arXiv:1505.04597), section 2; with a long skip as in Restormer (arXiv:2111.09881), section 3.

    >>> UNet(
    ...     UNetConfig(scale=2),
    ...     widths=(8, 16),
    ...     encoder=[nn.Conv2d(8, 8, 3, padding=1)],
    ...     bottleneck=nn.Conv2d(16, 16, 3, padding=1),
    ...     decoder=[nn.Conv2d(8, 8, 3, padding=1)],
    ... )(torch.rand(1, 3, 5, 7)).shape
    torch.Size([1, 3, 10, 14])
    """

    # What `features` makes, of scale and aux alone; a net whose parts ask for more has a context of its own.
    context_type: type[Context] = Context

    def __init__(
        self,
        config: UNetConfig,
        *,
        widths: Sequence[int],
        encoder: Sequence[nn.Module],
        bottleneck: nn.Module,
        decoder: Sequence[nn.Module],
        refinement: nn.Module | None = None,
        stem: nn.Module | None = None,
    ) -> None:
        super().__init__(config)
        if not len(encoder) == len(decoder) == len(widths) - 1:
            wanted = f"{len(widths) - 1} each, one less than widths"
            raise ValueError(f"encoder and decoder must be {wanted}, got {len(encoder)} and {len(decoder)}")
        self.in_channels, self.scale = config.in_channels, config.scale
        self.scales = config.scales or (config.scale,)
        self.stride = 2 ** len(encoder)
        steps = list(pairwise(widths))
        self.stem = OverlapPatchEmbed(config.in_channels, widths[0]) if stem is None else stem
        self.encoder = nn.ModuleList(Stage(stage) for stage in encoder)
        self.downs = nn.ModuleList(MSGDown(fine, wide, form=config.down, gated=config.gated) for fine, wide in steps)
        self.bottleneck = Stage(bottleneck)
        self.ups = nn.ModuleList(MSGUp(wide, fine, form=config.up, gated=config.gated) for fine, wide in steps)
        self.fusions = nn.ModuleList()
        if config.skip != "none":
            self.fusions.extend(SkipFusion(width, form=config.skip) for width in widths[:-1])
        self.decoder = nn.ModuleList(Stage(stage) for stage in decoder)
        self.refinement = Stage(*([] if refinement is None else [refinement]))
        self.head = _head(config, widths[0])
        self.adds_image = config.long_skip and config.in_channels == config.out_channels
        self.tile_safe, self.receptive_radius, self.tile_multiple = self._tiling()
        if self.adds_image:
            self._start_as_image()
        self._name_parts()

    def forward(
        self, image: Tensor, *, scale: int | None = None, return_aux: bool = False
    ) -> Tensor | RestorationOutput:
        """Restore an image; `scale` is one of the net's, its own where it is not given."""
        return self.restored(image, Context(self.known_scale(scale), Aux()), return_aux)

    def features(self, image: Tensor) -> list[Tensor]:
        """The decoder's maps, the finest first, and the bottleneck's: (B, widths[i], ceil(H / 2^i), ceil(W / 2^i))."""
        context, steps = self.context_type(self.scale, Aux()), [2**level for level in range(len(self.ups) + 1)]
        ceilings = [[(side + step - 1) // step for side in image.shape[2:]] for step in steps]
        maps = zip(self.maps(image, context), ceilings, strict=True)
        return [cropped(x, height, width) for x, (height, width) in maps]

    def restored(self, image: Tensor, context: Context, return_aux: bool) -> Tensor | RestorationOutput:
        """Run the net with a context that knows the conditions of this pass."""
        y = self.head(self.maps(image, context)[0], context.scale)
        y = cropped(y, context.scale * image.shape[2], context.scale * image.shape[3])
        if self.adds_image:
            y = y + BicubicUp(context.scale)(image)
        y = y.to(image.dtype)
        return RestorationOutput(y, context.aux) if return_aux else y

    def maps(self, image: Tensor, context: Context) -> list[Tensor]:
        """The maps of the decoder, the finest first, then the bottleneck's, all of the padded image."""
        check_image(image, self.in_channels, self)
        x = self.stem(pad_to_multiple(image, self.stride))
        skips: list[Tensor] = []
        for stage, down in zip(self.encoder, self.downs, strict=True):
            skips.append(stage(x, context))
            x = down(skips[-1])
        return self.decoded(self.bottleneck(x, context), skips, context)

    def decoded(self, x: Tensor, skips: list[Tensor], context: Context) -> list[Tensor]:
        """The maps of the decoder, the finest first, then the bottleneck's, of that and of the encoder's maps."""
        maps = [x]
        for level in reversed(range(len(self.ups))):
            x = self.ups[level](maps[0])
            if self.fusions:
                x = self.fusions[level](x, skips[level])
            maps.insert(0, self.decoder[level](x, context))
        return [self.refinement(maps[0], context), *maps[1:]]

    def known_scale(self, scale: int | None) -> int:
        """The scale of a pass: the net's own, or one of those that it has a head for."""
        if scale is not None:
            check_choice("scale", scale, self.scales)
        return self.scale if scale is None else scale

    def _tiling(self) -> Tiling:
        body = tiling_of(self.bottleneck)
        for level in reversed(range(len(self.ups))):
            below = tiling_of(body, self.ups[level]).times(2)
            body = tiling_of(self.encoder[level], self.downs[level], below, self.decoder[level])
        body = tiling_of(self.stem, body, self.refinement, self.head)
        # The pixel that a cell of the coarsest map begins with is not the pixel that asks.
        body = body._replace(receptive_radius=body.receptive_radius + self.stride - 1)
        return side_by_side(body, BicubicUp(max(self.scales)))

    def _name_parts(self) -> None:
        for name, part in self.named_modules():
            if isinstance(part, Conditioned):
                part.path = name

    @torch.no_grad()
    def _start_as_image(self) -> None:
        for conv in self.head.last_convolutions():
            for parameter in conv.parameters():
                parameter.zero_()


def _head(config: UNetConfig, channels: int) -> ReconstructionHead | ScaleHeads | EmbeddedScaleHead:
    if len(config.scales) > 1 and config.scale_head == "embedded":
        return EmbeddedScaleHead(channels, config.out_channels)
    if len(config.scales) > 1:
        return ScaleHeads(channels, config.out_channels, scales=config.scales, upsampler=config.upsampler)
    return ReconstructionHead(channels, config.out_channels, scale=config.scale, upsampler=config.upsampler)
