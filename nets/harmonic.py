"""HARMONIC: a U-Net of windowed attention with a branch for low frequencies and one for high ones."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..blocks import BicubicUp, FreqSplit2d, NoiseField, TextureHead
from ..blocks.checks import check_odd, check_positive
from ..blocks.padding import cropped, pad_to_multiple
from ..blocks.tiling import Tiling, side_by_side, tiling_of
from .base import check_image
from .harmonic_branches import HARMONICContext, resized
from .harmonic_stages import EXPERTS, bottleneck, frequency_residual, fusion, high_branch, low_branch, window_stage
from .output import Aux, RestorationOutput
from .registry import register_config
from .stage import Stage, noise_of
from .unet import UNet
from .windowed import WindowedConfig

SIZES = {
    "harmonic-tiny": {"embed_dim": 16, "depths": (1, 1, 2), "refinement": 1, "head_dim": 8, "high_depth": 1},
    "harmonic-small": {"embed_dim": 32, "depths": (2, 2, 2), "refinement": 1},
    "harmonic-base": {},
}


@register_config("harmonic", sizes=SIZES)
@dataclass(frozen=True)
class HARMONICConfig(WindowedConfig):
    """Sizes and parts of a HARMONIC, besides what all U-Nets of windows have; the default is the base size.

    Args:
        overlap_ratio: by which the keys of the overlapping block of each stage reach further; 0 for no such block.
        ffn_expansion: hidden channels of the gated feed-forward networks, in multiples of the stage's.
        conv_gate: whether a gated convolution stands before ("pre") or after ("post") the attention of each stage.
        channel_attention: whether efficient channel attention ends each stage.
        long_range: windows of the bottleneck that reach further, "dilated" or "grid".
        global_size: side of the tokens of the map that its windows attend to besides; 0 for none.
        mixer: what follows each of its windows: "ssm", a selective scan, "deformable" attention, or "none".
        branches: "both", "low" (no texture), or "none", which leaves a U-Net.
        split: of the branches, "blur" or "laplacian".
        kernel_size: odd size of the large kernels of the low frequencies, and of all blocks of the fast path.
        low_depth: blocks of large kernels at each scale.
        low_ssm: whether a scan follows those of the coarsest scale.
        edges: of the high frequencies, "sobel", "laplacian" or "learned".
        high_depth: blocks of texture.
        moe: whether they are of experts.
        moe_level: what is routed: "token", pixels to pointwise experts, or "window", windows to spatial ones.
        top_k: of four experts that each is routed to.
        bypass: score of a pixel, or window, from which on it is hard enough for experts; 0 for all.
        noise: whether texture has noise.
        noise_clamp: the largest magnitude of noise.
        max_gain: bound of the weight of high frequencies, in every fusion.
        high_limit: bound of the high frequencies of the correction, before that weight.
        texture_head: whether generated texture is added at the end, gated by noise and sharpness of the image.
        fast_path: convolutions alone: large kernels in the place of attention and scan, plain ones in that of experts,
            and gates in that of cross attention.

    Raises:
        ValueError: if a number is out of its range, a choice is none of those, `head_dim` does not divide `embed_dim`,
            or no block can have the sizes.

    >>> HARMONICConfig(embed_dim=32).depths
    (2, 2, 4, 4)
    """

    embed_dim: int = 48
    depths: tuple[int, ...] = (2, 2, 4, 4)
    refinement: int = 2
    head_dim: int = 16
    overlap_ratio: float = 0.5
    ffn_expansion: float = 2.0
    conv_gate: Literal["pre", "post", "none"] = "post"
    channel_attention: bool = True
    long_range: Literal["dilated", "grid"] = "dilated"
    global_size: int = 4
    mixer: Literal["ssm", "deformable", "none"] = "ssm"
    branches: Literal["both", "low", "none"] = "both"
    split: Literal["blur", "laplacian"] = "blur"
    kernel_size: int = 13
    low_depth: int = 1
    low_ssm: bool = False
    edges: Literal["sobel", "laplacian", "learned"] = "sobel"
    high_depth: int = 2
    moe: bool = True
    moe_level: Literal["token", "window"] = "token"
    top_k: int = 2
    bypass: float = 0.5
    noise: bool = True
    noise_clamp: float = 3.0
    max_gain: float = 1.0
    high_limit: float = 0.5
    texture_head: bool = False
    fast_path: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(low_depth=self.low_depth, high_depth=self.high_depth, top_k=self.top_k)
        check_odd(kernel_size=self.kernel_size)
        if len(self.depths) < 2:
            raise ValueError(f"depths must be of two stages or more, got {self.depths}")
        if self.embed_dim % 2:
            raise ValueError(f"embed_dim must be even, got {self.embed_dim}")
        for name in ("ffn_expansion", "noise_clamp", "max_gain", "high_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        if self.top_k > EXPERTS:
            raise ValueError(f"top_k must be at most the {EXPERTS} experts, got {self.top_k}")
        if not 0 <= self.bypass < 1:
            raise ValueError(f"bypass must be at least 0 and below 1, got {self.bypass}")
        if self.texture_head and self.branches != "both":
            raise ValueError(f"branches must be 'both' for a texture_head, got {self.branches!r}")

    def build(self) -> "HARMONIC":
        return HARMONIC(self)


class HARMONIC(UNet):
    r"""U-Net of windowed attention that keeps structure and texture apart until its decoder fuses them.

    .. code-block:: text

        image -> stem -> windows ------------------------- skip -> fusion -> windows -> head -> + image
            |              MSG -> windows ---------- skip -> fusion -> windows ^         |        ^
            |                       MSG -> bottleneck -> MSG ^  ^                        |        |
            |-> low --> embed -> MSG -> large kernels -> MSG ---|----> coarse correction-|--> w_l LF
            '-> high -> edges -> experts, noise ----------------'                        '--> w_h HF

    The image is split once into low and high frequencies. Of the low ones an encoder of large kernels makes structure,
    at half the size and below; of the high ones and their edges, experts with modulated noise make texture. Neither
    learns of the other before the decoder: there, at each scale, they attend to each other and are added to its map.
    What the head makes is split again, so that :math:`y = x + w_l L + w_h H` with bounded H (`FrequencyResidual`).

    Pixels, or windows, of the high frequencies go to k of four experts, for noise, blur, compression and texture, and
    to a deterministic one, by their edges and how busy they are. Of pixels these are networks of one form, which
    training sets apart; with ``moe_level="window"`` each has a form of its own. What a gate finds easy, as all of a
    flat image, goes to none, gets no noise, and costs nothing; compiled, exported and on `meta`, all is computed.

    Noise is drawn in training, and in eval there is none, or that of `noise_seed`, the same for a pixel in any tile.
    With `fast_path` there are convolutions alone. Windows need no padding: those at a border are as large as the map
    lets them be. Deformable attention samples the whole of the bottleneck's map, not a neighbourhood: there it is
    small. As ONNX, for any height and width, the scan goes pixel by pixel, at which few runtimes are fast;
    ``mixer="none"`` is without it. Losses against targets and adversaries belong to training: ``lf``, ``hf``,
    ``lpips``, ``hinge``, ...

    Shape:
        ``(B, in_channels, H, W)`` -> ``(B, out_channels, s H, s W)``, any H, W >= 1.

    Args:
        config: sizes and parts; the default is the base size, scale 1.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if the image has another number of channels, ``scale`` is none of the net's, or ``noise_seed`` is
            given to a net without noise.

    Source:
        Restormer (arXiv:2111.09881), section 3, for the topology; windows that overlap as in HAT (arXiv:2205.04437),
        large kernels as in PLKSR (arXiv:2404.11848), experts by degradation as in MoCE-IR (arXiv:2411.18466). How they
        are put together is ours.

    >>> config = HARMONICConfig(scale=2, embed_dim=8, depths=(1, 1), refinement=0, head_dim=4, kernel_size=5)
    >>> HARMONIC(config)(torch.zeros(1, 3, 5, 7)).shape
    torch.Size([1, 3, 10, 14])
    """

    context_type = HARMONICContext

    def __init__(self, config: HARMONICConfig | None = None) -> None:
        config = config or HARMONICConfig()
        widths = [width for width, _ in config.stages]
        *outer, coarsest = config.stages
        has_low, has_high = config.branches != "none", config.branches == "both"
        fusions = [[fusion(config, width, level)] if has_low else [] for level, width in enumerate(widths[:-1])]
        super().__init__(
            config,
            widths=widths,
            encoder=[window_stage(config, *stage) for stage in outer],
            bottleneck=bottleneck(config, *coarsest),
            decoder=[Stage(*fused, window_stage(config, *stage)) for fused, stage in zip(fusions, outer, strict=True)],
            refinement=window_stage(config, config.embed_dim, config.refinement),
        )
        self.texture_layer = config.high_depth  # the noise after those of the blocks
        self.has_noise = has_high and (config.noise or config.texture_head)
        self.split = FreqSplit2d(config.in_channels, kind=config.split) if has_low else None
        self.low_branch = low_branch(config, widths) if has_low else None
        self.high_branch = high_branch(config, widths[:-1]) if has_high else None
        self.residual = frequency_residual(config) if has_high else None
        self.texture_head = TextureHead(config.embed_dim, config.out_channels) if config.texture_head else None
        self.tile_safe, self.receptive_radius, self.tile_multiple = self._tiling_with_branches()
        self._name_parts()

    def forward(
        self,
        image: Tensor,
        *,
        noise_seed: int | NoiseField | None = None,
        scale: int | None = None,
        return_aux: bool = False,
    ) -> Tensor | RestorationOutput:
        """Restore an image.

        Args:
            image: in [0, 1].
            noise_seed: of the texture's noise; a `NoiseField` says besides where in the whole a tile begins.
            scale: one of the net's, its own where it is not given.
            return_aux: whether losses and statistics of the routers, and the structure, come with the image.
        """
        noise = noise_of(noise_seed, has_noise=self.has_noise)
        return self.restored(image, HARMONICContext(self.known_scale(scale), Aux(), noise), return_aux)

    def structure(self, image: Tensor) -> Tensor:
        """What the branch of low frequencies makes of an image alone: (B, out_channels, ceil(H / 2), ceil(W / 2)).

        Raises:
            RuntimeError: if the net has no such branch.
            TypeError, ValueError: if the image is not one that the net takes.
        """
        if self.split is None or self.low_branch is None:
            raise RuntimeError("structure needs a net with branches, got branches='none'")
        check_image(image, self.in_channels, self)
        padded = pad_to_multiple(image, self.stride)
        return self._structure(image, padded, self.low_branch(self.split(padded).low)[1])

    def maps(self, image: Tensor, context: Any) -> list[Tensor]:
        check_image(image, self.in_channels, self)
        if self.split is not None and self.low_branch is not None:
            padded = pad_to_multiple(image, self.stride)
            low, high = self.split(padded)[:2]
            context.low, context.coarse = self.low_branch(low)
            context.aux.structure = self._structure(image, padded, context.coarse)
            if self.high_branch is not None:
                context.high = self.high_branch(high, context)
        return super().maps(image, context)

    def restored(self, image: Tensor, context: Any, return_aux: bool) -> Tensor | RestorationOutput:
        correction = self.head(self.maps(image, context)[0], context.scale)
        size = [context.scale * side for side in image.shape[2:]]
        correction = cropped(correction, *size)
        y = BicubicUp(context.scale)(image) if self.adds_image else torch.zeros_like(correction)
        coarse = None if context.coarse is None else resized(context.coarse, 2 * context.scale, *size)
        if self.residual is not None:
            y = self.residual(y, correction, coarse)
        else:
            y = y + (correction if coarse is None else correction + coarse)
        if self.texture_head is not None:
            features = resized(context.high[0], context.scale, *size)
            y = self.texture_head(features, y, context.noise_of(self.texture_layer, context.scale))
        y = y.to(image.dtype)
        return RestorationOutput(y, context.aux) if return_aux else y

    def _structure(self, image: Tensor, padded: Tensor, coarse: Tensor) -> Tensor:
        y = coarse + F.avg_pool2d(padded, 2) if self.adds_image else coarse
        return cropped(y, *((side + 1) // 2 for side in image.shape[2:])).to(image.dtype)

    def _tiling_with_branches(self) -> Tiling:
        """The U-Net's, or that of the branches and the decoder if they see further, and what comes after both."""
        own = Tiling(self.tile_safe, self.receptive_radius, self.tile_multiple)
        if self.low_branch is None:
            return own
        stages = [tiling_of(stage).times(2**level) for level, stage in enumerate(self.decoder)]
        ways = [tiling_of(way).times(2 ** (level + 1)) for level, way in enumerate(self.ups)]
        cells = Tiling(True, self.stride - 1, 1)
        branches = side_by_side(self.low_branch, self.high_branch)
        fused = tiling_of(self.split, branches, *stages, *ways, self.refinement, self.head, cells)
        own = side_by_side(own, fused)
        if self.residual is None:
            return own
        return tiling_of(own, self.residual.tiling(min(self.scales)), self.texture_head)
