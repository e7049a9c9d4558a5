"""HERSR: two paths at every scale, experts at the coarsest, and texture in the last stage alone."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import NoiseField
from ..blocks.checks import check_choice, check_odd, check_positive
from ..blocks.padding import pad_to_multiple
from ..blocks.plk import Form
from .base import check_image
from .busyness import busyness
from .hersr_stages import HERSRContext, TextureStage, bottleneck, decoder_stage, encoder_stage
from .output import Aux, RestorationOutput
from .registry import register_config
from .stage import noise_of
from .unet import UNet, UNetConfig

EXPERTS = ("conv", "attention", "frequency")

SIZES = {
    "hersr-tiny": {"widths": (8, 16, 24, 24, 32), "head_dim": 8, "kernel_size": 9},
    "hersr-small": {"widths": (16, 32, 48, 64, 96), "head_dim": 16},
    "hersr-base": {},
}


@register_config("hersr", sizes=SIZES)
@dataclass(frozen=True)
class HERSRConfig(UNetConfig):
    """Sizes of a HERSR, besides what all U-Nets have; the default is the base size.

    Args:
        widths: channels of each scale, the finest first; the last is the bottleneck's.
        depths: blocks of each scale but the last, in the encoder and again in the decoder.
        split: of the first map, and of the decoder's: "avgpool", "haar", or "none" for no frequencies at all.
        kernel_size: odd size of the large kernel.
        form: of the large kernel: "depthwise", "dense", "dilated" or "rectangular".
        statistics: of the local paths: "map", group norms and means of the whole map, or "local", norms of each pixel
            and means of windows; with "local" the texture has no style that follows from the map, and generated
            prompts are those of each pixel. Tiles need "local".
        norm_groups: of the group norms, a divisor of all `widths`.
        head_dim: channels of an attention head, a divisor of all `widths`.
        window_size: side of the windows, in pixels of each scale; every other block shifts them by half.
        overlap_ratio: by how much larger the windows of keys are, in a further block at the end of each context path;
            0 for no such block.
        mlp_ratio: hidden channels of the gated network after attention, in multiples of the scale's.
        experts: those of the bottleneck, of "conv", "attention" and "frequency", each as often as wanted; empty for a
            bottleneck that passes on its map.
        level: what an expert is chosen for: each "image", or each "window".
        k: how many experts each goes to; None for all of them, weighted.
        bypass: score of a window from which on it is hard enough for experts, with the level "window"; 0 for all.
        frequency: how the frequency expert of images transforms: "fft" the whole map, "dct" each window, as that of
            windows always does.
        balance: weight of the loss that keeps all experts in use.
        prompt: "none", "generated" from the map of the bottleneck, or "given" with each image.
        prompt_dim: width of a prompt; 1 for a map of uncertainty.
        texture: whether the last stage is a modulated convolution with noise.

    Raises:
        ValueError: if a number is no integer or < 1, a choice is none of those, a width is no multiple of what it must
            be, there are not as many depths as widths but one, or there is a prompt for no experts.

    >>> HERSRConfig(k=1).experts
    ('conv', 'attention', 'frequency')
    """

    skip: Literal["concat", "add", "none"] = "add"
    widths: tuple[int, ...] = (32, 64, 128, 192, 256)
    depths: tuple[int, ...] = (1, 1, 2, 2)
    split: Literal["avgpool", "haar", "none"] = "avgpool"
    kernel_size: int = 13
    form: Form = "depthwise"
    statistics: Literal["map", "local"] = "map"
    norm_groups: int = 4
    head_dim: int = 16
    window_size: int = 8
    overlap_ratio: float = 0.0
    mlp_ratio: float = 2.0
    experts: tuple[str, ...] = EXPERTS
    level: Literal["image", "window"] = "image"
    k: int | None = None
    bypass: float = 0.0
    frequency: Literal["fft", "dct"] = "fft"
    balance: float = 0.01
    prompt: Literal["none", "generated", "given"] = "none"
    prompt_dim: int = 16
    texture: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = {name: getattr(self, name) for name in ("norm_groups", "head_dim", "window_size", "prompt_dim")}
        check_positive(**counts, **{f"widths[{i}]": width for i, width in enumerate(self.widths)})
        check_positive(**{f"depths[{i}]": depth for i, depth in enumerate(self.depths)})
        check_odd(kernel_size=self.kernel_size)
        for expert in self.experts:
            check_choice("experts", expert, EXPERTS)
        if not self.depths or len(self.widths) != len(self.depths) + 1:
            raise ValueError(f"widths must be one more than depths, got {self.widths} and {self.depths}")
        multiple = math.lcm(4, self.head_dim, self.norm_groups)
        if any(width % multiple for width in self.widths):
            raise ValueError(f"widths must be multiples of 4, head_dim and norm_groups, {multiple}, got {self.widths}")
        if self.k is not None and not (type(self.k) is int and 1 <= self.k <= len(self.experts)):
            raise ValueError(f"k must be None or an integer from 1 to the {len(self.experts)} experts, got {self.k!r}")
        if not 0 <= self.bypass < 1 or (self.bypass and not (self.experts and self.level == "window")):
            wanted = "at least 0 and below 1, and 0 but for experts of windows"
            raise ValueError(f"bypass must be {wanted}, got {self.bypass}")
        if self.prompt != "none" and not self.experts:
            raise ValueError(f"prompt must be 'none' where there are no experts, got {self.prompt!r}")
        for name, least in (("overlap_ratio", 0), ("balance", 0), ("mlp_ratio", 1 / min(self.widths))):
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least {least:.3g} and finite, got {getattr(self, name)}")
        if int(self.overlap_ratio * self.window_size) % 2:
            raise ValueError(
                f"overlap_ratio must enlarge {self.window_size} by an even number, got {self.overlap_ratio}"
            )

    def build(self) -> "HERSR":
        return HERSR(self)


class HERSR(UNet):
    r"""Large kernels beside window attention at every scale, experts at the bottleneck, texture in the last stage.

    .. code-block:: text

        image -> conv, GELU, conv = F0 -> split -> L0 (low), H0 (high)
        encoder   F + W [local, context] at each scale: the local path is PLKBlock and NAFBlock, the context path window
                  attention and gated network. In the first block the local path reads H0, the context path L0, and F
                  is F0; in all others each path reads the map of the scale.
        bottleneck  F + sum_i gate_i(F, prompt) expert_i(F): convolution, attention, frequencies
        decoder   skips added, the same blocks, then low and high frequencies weighted anew (FreqSep)
        texture   modulated convolution with noise, then head, + bicubic(image)

    Experts are chosen for whole images, by means of the map and softly, so that what an image costs is known before it
    comes; ``level="window"`` chooses them for regions, k of them with `k`, and none where `bypass` finds a window easy:
    then a flat image costs less than a textured one. Single pixels are not routed: each of the experts looks around.

    Nothing attends at the size of the image: context paths of the finest scale run at half of it. Noise is in the
    texture stage alone: drawn in training, and in eval none, or that of `noise_seed`, a number or a `NoiseField`, which
    says besides where in the whole a tile begins: so a pixel has the same noise in any tile.

    Group norms, means of channels, experts of images and the style of the texture see the whole map, so tiles are not
    exact. They are with ``statistics="local", level="window"``, and no "dysample".

    As ONNX it takes any height and width; for runtimes without a Fourier transform, such as TensorRT, the expert for
    frequencies has ``frequency="dct"``.

    Shape:
        - image: ``(B, in_channels, H, W)``, any H, W >= 1
        - prompt: what is known of the degradation, for a net that takes it, zero where it is not given:
          ``(B, prompt_dim)``, or a map ``(B, prompt_dim, H, W)``, such as one of uncertainty
        - returns: ``(B, out_channels, s H, s W)``

    Args:
        config: sizes; the default is the base size, scale 1.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if the image has another number of channels, ``scale`` is none of the net's, ``prompt`` has another
            shape or the net takes none, or ``noise_seed`` is given to a net without texture.

    Source:
        PLKSR (arXiv:2404.11848), section 3, NAFNet (arXiv:2204.04676), section 3, Swin (arXiv:2103.14030), section 3,
        Restormer (arXiv:2111.09881), section 3.2, and StyleGAN2 (arXiv:1912.04958), section 2, for the parts; prompts
        at the bottleneck: PromptIR (arXiv:2306.13090), section 3.2. The topology is ours.

    >>> config = HERSRConfig(scale=2, widths=(8, 16), depths=(1,), head_dim=4, kernel_size=5)
    >>> HERSR(config)(torch.zeros(1, 3, 5, 7)).shape
    torch.Size([1, 3, 10, 14])
    """

    context_type = HERSRContext

    def __init__(self, config: HERSRConfig | None = None) -> None:
        config = config or HERSRConfig()
        first, scales = config.widths[0], range(len(config.depths))
        super().__init__(
            config,
            widths=config.widths,
            stem=nn.Sequential(
                nn.Conv2d(config.in_channels, first, 3, padding=1), nn.GELU(), nn.Conv2d(first, first, 3, padding=1)
            ),
            encoder=[encoder_stage(config, scale) for scale in scales],
            bottleneck=bottleneck(config) if config.experts else nn.Identity(),
            decoder=[decoder_stage(config, scale) for scale in scales],
            refinement=TextureStage(first, constant=config.statistics == "local") if config.texture else None,
        )
        self.prompt_dim = config.prompt_dim if config.prompt == "given" else 0
        self.gated, self.has_noise = config.bypass > 0, config.texture

    def forward(
        self,
        image: Tensor,
        *,
        prompt: Tensor | None = None,
        noise_seed: int | NoiseField | None = None,
        scale: int | None = None,
        return_aux: bool = False,
    ) -> Tensor | RestorationOutput:
        """Restore an image; the class says what the conditions are."""
        noise = noise_of(noise_seed, has_noise=self.has_noise)
        prompt = None if prompt is None else self._prompt(prompt, image)
        return self.restored(image, HERSRContext(self.known_scale(scale), Aux(), prompt, noise), return_aux)

    def maps(self, image: Tensor, context: HERSRContext) -> list[Tensor]:
        """As of every `UNet`, with a context that knows how busy the image is, where experts are to be passed by."""
        check_image(image, self.in_channels, self)
        if self.gated:
            context.busyness = F.avg_pool2d(busyness(pad_to_multiple(image, self.stride)), self.stride)
        return super().maps(image, context)

    def _prompt(self, prompt: Tensor, image: Tensor) -> Tensor:
        """Check a prompt; of a map, the means over what becomes a pixel of the bottleneck."""
        wanted = (image.shape[0], self.prompt_dim)
        if not self.prompt_dim:
            raise ValueError("prompt must be None for a net whose config has not prompt='given'")
        if tuple(prompt.shape) not in (wanted, (*wanted, *image.shape[2:])):
            raise ValueError(f"prompt must be {wanted}, or such a map of the image's size, got {tuple(prompt.shape)}")
        prompt = prompt.to(image.dtype)
        return prompt if prompt.ndim == 2 else F.avg_pool2d(pad_to_multiple(prompt, self.stride), self.stride)
