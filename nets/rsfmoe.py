"""RSFMoENet: large kernels, selective scans, window attention and texture experts in a U-Net, for any degradation."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ..blocks import NoiseField
from ..blocks.checks import check_not_negative, check_odd, check_positive
from ..blocks.degradation_features import JPEG_BLOCK
from ..blocks.padding import pad_to_multiple
from ..blocks.plk import Form
from .base import check_image
from .busyness import busyness
from .output import Aux, RestorationOutput
from .registry import register_config
from .rsfmoe_exit import ExitConfidence, Skippable
from .rsfmoe_parts import EXPERTS, RSFMoEContext
from .rsfmoe_prompt import faults
from .rsfmoe_stages import (
    CODE_CHANNELS,
    bottleneck_stage,
    decoder_stage,
    degradation_prompt,
    encoder_stage,
    residual_gate,
)
from .stage import Stage, noise_of
from .unet import UNet, UNetConfig

SIZES = {
    "rsfmoe-tiny": {
        "embed_dim": 12,
        "depths": (1, 1),
        "head_dim": 8,
        "kernel_size": 9,
        "d_state": 8,
        "prompt_channels": 16,
    },
    "rsfmoe-small": {"embed_dim": 16, "depths": (1, 1, 1), "kernel_size": 9, "d_state": 8, "prompt_channels": 16},
    "rsfmoe-base": {},
}


@register_config("rsfmoe", sizes=SIZES)
@dataclass(frozen=True)
class RSFMoEConfig(UNetConfig):
    """Sizes and parts of an RSFMoENet, besides what all U-Nets have; the default is the base size.

    Args:
        embed_dim: channels of the finest stage; each coarser one has twice as many.
        depths: how often a stage of the encoder, and that of the decoder, repeats its blocks, the finest first.
        bottleneck: blocks of scan and experts at the coarsest scale, 2 to 4.
        kernel_size: of the large kernels.
        kernel_form: of the large kernels, see `PartialLargeKernelConv`.
        d_state: numbers that the state of a channel has in a scan.
        global_mixer: "ssm", a selective scan; "window", attention in its place wherever there may be one; or "none".
        head_dim: channels of an attention head, a divisor of 2 `embed_dim`.
        window_size: of attention, in pixels of each stage.
        mlp_ratio: hidden channels of the gated network after attention, in multiples of the stage's.
        deformable: whether the attention of the coarsest stage but the bottleneck is deformable.
        split: into low and high frequencies, see `FreqSplit2d`, or "none": then there are no experts either.
        hf_gain: bound of the weight of what is made of the high frequencies.
        moe: whether texture is made by experts that a router chooses, or by one for all.
        k: experts of a window, of the four.
        moe_window: side of the windows that are routed, in pixels of each stage.
        bypass: score of a window from which on it is hard enough for experts; 0 for all.
        decoder_moe: whether the stages of the decoder have experts too.
        warm_up: steps of training in which all windows go to all experts; 0 for none.
        prompt_channels: of the prompt that tells routers and attention of the degradation, 0 for none.
        kernel_prior: whether codes of the blur kernel around each place do so too.
        blur_kernel: odd side of the kernels that codes stand for, for training to supervise; 0 for no supervision.
        noise: whether noise is added to the high frequencies.
        noise_clamp: its largest magnitude, in deviations.
        severe_blur: deviation of a blur, as the prompt tells it, in pixels, below which there is no noise.
        early_exit: whether images of which the net is confident pass by the blocks of the decoder, in eval.
        exit_confidence: from which on they do.

    Raises:
        ValueError: if a number is no integer or < 1 or out of its range, a choice is none of those, ``head_dim`` does
            not divide 2 ``embed_dim``, or a part is asked for without what it needs: experts a split, noise experts
            and a prompt, supervised kernels a prior, deformable attention two stages.

    >>> RSFMoEConfig(embed_dim=32).depths
    (1, 1, 2)
    """

    embed_dim: int = 40
    depths: tuple[int, ...] = (1, 1, 2)
    bottleneck: int = 2
    kernel_size: int = 17
    kernel_form: Form = "dilated"
    d_state: int = 16
    global_mixer: Literal["ssm", "window", "none"] = "ssm"
    head_dim: int = 16
    window_size: int = 8
    mlp_ratio: float = 2.0
    deformable: bool = False
    split: Literal["fft", "dct", "blur", "haar", "none"] = "fft"
    hf_gain: float = 0.5
    moe: bool = True
    k: int = 2
    moe_window: int = 8
    bypass: float = 0.5
    decoder_moe: bool = False
    warm_up: int = 1000
    prompt_channels: int = 32
    kernel_prior: bool = False
    blur_kernel: int = 0
    noise: bool = False
    noise_clamp: float = 2.0
    severe_blur: float = 2.0
    early_exit: bool = False
    exit_confidence: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("embed_dim", "bottleneck", "d_state", "head_dim", "window_size", "k", "moe_window")
        check_positive(**{name: getattr(self, name) for name in counts})
        check_odd(kernel_size=self.kernel_size, **({"blur_kernel": self.blur_kernel} if self.blur_kernel else {}))
        if not self.depths or any(type(depth) is not int or depth < 1 for depth in self.depths):
            raise ValueError(f"depths must be integers of at least 1, one or more, got {self.depths}")
        if not 2 <= self.bottleneck <= 4:
            raise ValueError(f"bottleneck must be 2 to 4, got {self.bottleneck}")
        if self.embed_dim % 4 or 2 * self.embed_dim % self.head_dim:
            wanted = f"a multiple of 4 and of half of head_dim = {self.head_dim}"
            raise ValueError(f"embed_dim must be {wanted}, got {self.embed_dim}")
        if self.k > len(EXPERTS):
            raise ValueError(f"k must be at most the {len(EXPERTS)} experts, got {self.k}")
        check_not_negative(warm_up=self.warm_up, prompt_channels=self.prompt_channels)
        for name in ("hf_gain", "noise_clamp", "severe_blur", "exit_confidence", "mlp_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        self._check_parts()

    def _check_parts(self) -> None:
        needs = {
            "moe": (self.moe, self.split != "none", "a split"),
            "decoder_moe": (self.decoder_moe, self.moe, "moe"),
            "noise": (self.noise, self.moe and self.prompt_channels > 0, "moe and prompt_channels"),
            "blur_kernel": (self.blur_kernel > 0, self.kernel_prior, "kernel_prior"),
            "deformable": (self.deformable, len(self.depths) > 1, "depths of two stages or more"),
        }
        for name, (wanted, given, what) in needs.items():
            if wanted and not given:
                raise ValueError(f"{name} needs {what}")

    @property
    def condition_channels(self) -> int:
        """Length of prompt and code together."""
        return self.prompt_channels + (CODE_CHANNELS if self.kernel_prior else 0)

    def build(self) -> "RSFMoENet":
        return RSFMoENet(self)


class RSFMoENet(UNet):
    r"""U-Net that keeps structure and texture apart, and spends its experts on the texture that is hard.

    .. code-block:: text

        encoder stage   n x [PLKBlock, SSMGlobalMixer, attention + GatedFFN], FreqSep(LF: structure, HF: experts)
        bottleneck      n x [SSMGlobalMixer, FreqSep(LF, HF: experts)]
        decoder stage   n x [attention + GatedFFN, PLKBlock], with `decoder_moe` FreqSep(LF, HF: experts)

    - Attention is left out at full resolution, in the place of a scan (``global_mixer="window"``) too.
    - A prompt is made of what image and first map tell of noise, blur and JPEG, see `DegradationPrompt`. It says, too,
      how far the last map counts, see `ResidualGate`: a good photograph is left as it is.
    - Windows of the high frequencies go to k of a detail, a texture, a deblurring and a denoising expert by prompt,
      local variance and code of the blur kernel; those that a gate holds for easy go to none, at no cost. Prompt and
      code scale the logits of attention too, and scale and shift what large kernels make: so one net tells faint noise
      from strong.
    - Noise, if at all, is added to high frequencies alone, as far as the router is sure and the prompt says that blur
      is severe; in eval none without a ``noise_seed``.
    - With `early_exit`, blocks of the decoder are passed by, in eval, by images of which a head at the bottleneck is
      confident; what it is trained by lies in ``aux``. Which images do is known when it runs: compiled and exported
      programs compute all blocks for all images, and choose.

    A prompt, a scan and a Fourier transform see the whole image: without these three the net is `tile_safe`. For
    runtimes that lack them there are ``global_mixer="window"``, and ``split="dct"``, "blur" or "haar".

    Under `torch.export` and on `meta`, where MACs are counted by `summarize`, all experts are computed for all windows:
    what an image costs in eager depends on the image. Perceptual, adversarial and frequency losses are no part of the
    net: `claritycore.training` has them.

    Shape:
        - image: ``(B, in_channels, H, W)``, any H, W >= 1
        - prompt: ``(B, prompt_channels)``, in the place of the one that the net makes
        - noise_seed: a number, or a `NoiseField`, which says besides where in the whole a tile begins
        - returns: ``(B, out_channels, s H, s W)``

    Args:
        config: sizes and parts; the default is the base size, scale 1.

    Raises:
        TypeError: if the image is not floating point.
        ValueError: if the image has another number of channels, ``prompt`` another shape, ``scale`` is none of the
            net's, or a prompt or a noise seed is given to a net without.

    Source:
        PLKSR (arXiv:2404.11848) for large kernels, MambaIR (arXiv:2402.15648) for scans, Restormer (arXiv:2111.09881)
        for the gated network, PromptIR (arXiv:2306.13090) for prompts, FiLM (arXiv:1709.07871) for what they modulate,
        IKC (arXiv:1904.03377) for codes of kernels,
        MoCE-IR (arXiv:2411.18466) for experts in restoration, StyleGAN2 (arXiv:1912.04958) for noise; the combination
        is ours.

    >>> config = RSFMoEConfig(scale=2, embed_dim=8, depths=(1,), kernel_size=5, d_state=4, warm_up=0)
    >>> RSFMoENet(config)(torch.zeros(1, 3, 5, 7)).shape
    torch.Size([1, 3, 10, 14])
    >>> output = RSFMoENet(config).eval()(torch.rand(1, 3, 16, 24), return_aux=True)
    >>> output.image.shape, output.aux.statistics["bottleneck.blocks.0.blocks.1.separation.texture.kept_share"]
    (torch.Size([1, 3, 32, 48]), tensor(1.))
    """

    context_type = RSFMoEContext

    def __init__(self, config: RSFMoEConfig | None = None) -> None:
        config = config or RSFMoEConfig()
        widths = [config.embed_dim * 2**level for level in range(len(config.depths) + 1)]
        levels = range(len(config.depths))
        encoder = [encoder_stage(config, level) for level in levels]
        if config.condition_channels:
            encoder[0].insert(0, degradation_prompt(config))
        bottleneck = bottleneck_stage(config, len(config.depths))
        decoder = [decoder_stage(config, level) for level in levels]
        super().__init__(
            config,
            widths=widths,
            encoder=[Stage(*blocks) for blocks in encoder],
            bottleneck=Stage(*bottleneck),
            decoder=[Skippable(blocks) if config.early_exit else Stage(*blocks) for blocks in decoder],
            refinement=residual_gate(config),
        )
        if config.prompt_channels:  # what tells a JPEG looks for its blocks from the corner on
            self.tile_multiple = math.lcm(self.tile_multiple, JPEG_BLOCK)
        self.prompt_channels, self.takes_noise, self.early_exit = (
            config.prompt_channels,
            config.noise,
            config.early_exit,
        )

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
        self._check(image, prompt, noise_seed)
        noise = noise_of(noise_seed)
        context = RSFMoEContext(self.known_scale(scale), Aux(), prompt, noise=noise)
        return self.restored(image, context, return_aux)

    def maps(self, image: Tensor, context: RSFMoEContext) -> list[Tensor]:
        """As of every `UNet`, with a context that knows how busy the image is."""
        check_image(image, self.in_channels, self)
        context.busyness = busyness(pad_to_multiple(image, self.stride))
        context.faults = faults(image) if self.prompt_channels and context.prompt is None else None
        return super().maps(image, context)

    def decoded(self, x: Tensor, skips: list[Tensor], context: RSFMoEContext) -> list[Tensor]:
        """As of every `UNet`; in training also without the blocks of the decoder, for the losses of an early exit."""
        maps = super().decoded(x, skips, context)
        if self.early_exit and self.training and context.confidence is not None:
            early = super().decoded(x, skips, replace(context, plain=True))[0]
            images = (self.head(y, context.scale) for y in (early, maps[0]))
            found = ExitConfidence.losses(context.confidence, *images)
            context.aux.losses.update({f"exit.{name}": loss for name, loss in found.items()})
        return maps

    def _check(self, image: Tensor, prompt: Tensor | None, noise_seed: int | NoiseField | None) -> None:
        if noise_seed is not None and not self.takes_noise:
            raise ValueError("noise_seed must be None for a net without noise in its config")
        if prompt is not None and prompt.shape != (len(image), self.prompt_channels):
            wanted = f"(B, {self.prompt_channels}) = ({len(image)}, {self.prompt_channels})"
            raise ValueError(f"prompt must be {wanted}, got shape {tuple(prompt.shape)}")
