"""Low and high frequencies of a feature map: six ways to part them, each of which adds up to the map again."""

import copy
import math
from collections.abc import Sequence
from numbers import Real
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.frequency_split import (
    HIGHEST_CUTOFF,
    Mask,
    blur_split,
    fft_split,
    gaussian_sigma,
    haar_merge,
    padding_of,
)
from .checks import check_choice, check_feature_map, check_positive
from .frequency_bands import (
    Parts,
    avgpool_parts,
    check_pyramid,
    dct_parts,
    enlarged,
    haar_parts,
    laid_out,
    laplacian_parts,
)
from .initialisation import fill
from .precision import at_least_float32, without_autocast
from .pyramid import merge_laplacian_pyramid

Kind = Literal["fft", "blur", "haar", "avgpool", "dct", "laplacian"]

LOWEST = 0.1
"""That a cutoff can be learned down to: three deviations of its Gaussian are ten pixels."""


class FreqBands(NamedTuple):
    """The two halves of a split map, both at full size, and the smaller bands of those kinds that have some.

    Args:
        low: low frequencies, ``(B, C, H, W)``.
        high: high frequencies, ``(B, C, H, W)``: whatever the low ones leave.
        pyramid: "haar": LL, LH, HL, HH at half the size; "avgpool": what pooling loses, and the pooled map;
            "laplacian": what each halving loses, finest first, and the coarsest map.

    >>> x = torch.randn(1, 8, 5, 7)
    >>> torch.allclose(FreqSplit2d(8)(x).merge(), x, atol=1e-6)
    True
    """

    low: Tensor
    high: Tensor
    pyramid: tuple[Tensor, ...] = ()

    def merge(self) -> Tensor:
        """Add low and high frequencies: the map, where neither was changed."""
        return self.low + self.high


class FreqSplit2d(nn.Module):
    r"""Split a map into low and high frequencies that add up to it, whatever the kind and the size.

    :math:`H = x - L`, and for L:

    - ``"fft"``: :math:`L = F^{-1}(M \odot F x)` with :math:`M = \exp(-\tfrac12 (r / c)^2)` at r cycles per two pixels
      (other masks: ``mask``); the map is mirrored beyond its border first. It sees the whole map: not `tile_safe`
    - ``"dct"``: the same mask on the orthonormal DCT-II, by matrix products alone, for runtimes without a Fourier
      transform; H + W products a pixel and axis, so for maps of up to about 64 x 64. Not `tile_safe` either
    - ``"blur"``: a Gaussian of :math:`\sigma = 1 / (\pi c)` pixels, cut at :math:`3 \sigma`
    - ``"haar"``: the mean of each 2x2 cell
    - ``"avgpool"``: the same, and bilinear between the cells
    - ``"laplacian"``: the coarsest map of a Laplacian pyramid, at full size

    "fft" and "dct" learn the cutoff of each channel, :math:`c = c_{min} + (c_{max} - c_{min}) \, \sigma(a)`, between
    0.1 and the highest there is. With a condition, such as the embedding of a degradation,
    :math:`a + W d` takes the place of a, and W starts at zero. Autocast is off inside; half precision is computed in
    float32 where rounding would show, and L + H is x to one rounding.

    Shape:
        - x: ``(B, C, H, W)``
        - condition: ``(B, condition_channels)``
        - returns: `FreqBands`, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        kind: one of those above.
        cutoff: c, in cycles per two pixels (1 for a checkerboard of lines), or one for each channel; in (0, 1.42],
            and between 0.1 and 1.42 to be learned; "fft", "dct" and "blur" alone.
        learnable: whether each channel learns its own; None where the kind can ("fft", "dct").
        condition_channels: length of the vector d that shifts the cutoffs, 0 for none.
        mask: of "fft": "gaussian", "butterworth" or "ideal"; the last two ring at edges, by 3 and by 8 % of the step,
            and "ideal" has no cutoff to learn.
        levels: halvings of "laplacian": one is about a cutoff of 0.25, each further one halves it.

    Raises:
        TypeError: if the input is not floating point, or the cutoff no number.
        ValueError: if a number or a word is none of those, there is no cutoff to learn, the condition is missing, not
            wanted or of another shape, or the input has another number of channels.

    Source:
        Gaussian low-pass filters: Gonzalez and Woods, Digital Image Processing, chapter 4; two branches by frequency:
        SFHformer (ECCV 2024); pyramid: Burt and Adelson (1983); content-dependent cutoffs: AdaIR (arXiv:2403.14614).

    >>> FreqSplit2d(8)(torch.randn(1, 8, 5, 7)).high.shape
    torch.Size([1, 8, 5, 7])
    >>> bands = FreqSplit2d(8, kind="haar")(torch.randn(1, 8, 5, 7))
    >>> bands.low.shape, bands.high.shape, bands.pyramid[0].shape
    (torch.Size([1, 8, 5, 7]), torch.Size([1, 8, 5, 7]), torch.Size([1, 8, 3, 4]))
    """

    def __init__(
        self,
        channels: int,
        *,
        kind: Kind = "fft",
        cutoff: float | Sequence[float] = 0.25,
        learnable: bool | None = None,
        condition_channels: int = 0,
        mask: Mask = "gaussian",
        levels: int = 1,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, levels=levels)
        check_choice("kind", kind, get_args(Kind))
        check_choice("mask", mask, get_args(Mask) if kind == "fft" else ("gaussian",))
        can_learn = kind in ("fft", "dct") and mask != "ideal"
        if learnable and not can_learn:
            raise ValueError(f"learnable must be False for kind {kind!r} with mask {mask!r}: no cutoff to learn")
        learnable = can_learn if learnable is None else learnable
        if type(condition_channels) is not int or condition_channels < 0 or (condition_channels and not learnable):
            wanted = "an integer of at least 0" if learnable else "0 where no cutoff is learned"
            raise ValueError(f"condition_channels must be {wanted}, got {condition_channels!r}")
        self.channels, self.levels = channels, levels
        self.kind: Kind = kind
        self.mask: Mask = mask
        self.learnable, self.condition_channels = learnable, condition_channels
        self.cutoff = _checked_cutoff(cutoff, channels, learnable)
        self.cutoff_logit = nn.Parameter(torch.empty(channels)) if learnable else None
        self.condition = nn.Linear(condition_channels, channels, bias=False) if condition_channels else None
        self.tile_safe = kind not in ("fft", "dct")
        self.tile_multiple = {"haar": 2, "avgpool": 2, "laplacian": 2**levels}.get(kind, 1)
        self.receptive_radius = self._radius()
        self.padding = padding_of(LOWEST if learnable else _least(self.cutoff))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start every cutoff at the one that was asked for, whatever the condition."""
        if self.cutoff_logit is not None:
            fill(self.cutoff_logit, self._start_at_cutoff)
        if self.condition is not None:
            fill(self.condition.weight, nn.init.zeros_)

    def _start_at_cutoff(self, logit: Tensor) -> None:
        start = torch.tensor(self.cutoff, dtype=torch.float64)
        logit.copy_(torch.logit((start - LOWEST) / (HIGHEST_CUTOFF - LOWEST)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> FreqBands:
        check_feature_map(x, self.channels, self)
        cutoffs = self.cutoffs(condition)
        if condition is not None and condition.shape[0] != x.shape[0]:
            raise ValueError(f"condition must have a row for each of {x.shape[0]} maps, got {condition.shape[0]}")
        with without_autocast(x):
            low, high, pyramid = self._parts(x, cutoffs)
        return FreqBands(laid_out(low, x), laid_out(high, x), tuple(laid_out(band, x) for band in pyramid))

    def cutoffs(self, condition: Tensor | None = None) -> Tensor | float | tuple[float, ...]:
        """The cutoffs in use: those that were asked for, or the learned ones, (C,) or with a condition (B, C)."""
        self._check_condition(condition)
        if self.cutoff_logit is None:
            return self.cutoff
        logits = at_least_float32(self.cutoff_logit)
        if self.condition is not None and condition is not None:
            with without_autocast(condition):
                logits = logits + F.linear(condition.to(logits.dtype), self.condition.weight.to(logits.dtype))
        return LOWEST + (HIGHEST_CUTOFF - LOWEST) * torch.sigmoid(logits)

    def merge_pyramid(self, bands: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        """Put the map together from the bands of a pyramid: the inverse for "haar", "avgpool" and "laplacian".

        Args:
            bands: as `FreqBands.pyramid` holds them, changed or not.
            size: height and width of the map.

        Raises:
            ValueError: if the kind has no pyramid, or the bands are not as many or of another size.
        """
        if self.kind not in ("haar", "avgpool", "laplacian"):
            raise ValueError(f"kind must be haar, avgpool or laplacian to have a pyramid, got {self.kind!r}")
        if self.kind == "haar":
            return haar_merge(bands, size)
        check_pyramid(bands, size, 2 if self.kind == "avgpool" else self.levels + 1)
        if self.kind == "avgpool":
            return bands[0] + enlarged(bands[1], size[0], size[1])
        return merge_laplacian_pyramid(bands)

    def export_form(self, kind: Literal["dct", "blur"]) -> "FreqSplit2d":
        r"""Make the split for a runtime without a Fourier transform, with the cutoffs that were learned.

        Both compute with Gaussian masks as "fft" does, and differ from it where they approximate:

        - "dct" repeats the edge where "fft" mirrors beyond it: they differ by less than the largest difference of
          neighbouring pixels, and further than three deviations from the border, for cutoffs up to 0.3, by 0.5 % of the
          largest magnitude. It keeps the parameters: cutoffs may follow a condition, and go on learning
        - "blur" samples the Gaussian and cuts it: they differ by 1 % of the largest magnitude for cutoffs up to 0.3,
          4 % up to 0.35, 25 % up to 0.5, and 75 % beyond. Its cutoffs are numbers, fixed

        Raises:
            ValueError: if this is no "fft" of a Gaussian mask, or "blur" would have to follow a condition.

        >>> split = FreqSplit2d(8)
        >>> split.export_form("dct").kind, round(split.export_form("blur").cutoff[0], 6)
        ('dct', 0.25)
        """
        check_choice("kind", kind, ("dct", "blur"))
        if (self.kind, self.mask) != ("fft", "gaussian"):
            raise ValueError(
                f"only kind 'fft' with mask 'gaussian' has an export form, got {self.kind!r}, {self.mask!r}"
            )
        if kind == "dct":
            made = copy.deepcopy(self)
            made.kind = kind
            return made
        if self.condition is not None:
            raise ValueError("condition_channels must be 0 for kind 'blur', whose cutoffs are fixed; take 'dct'")
        learned = self.cutoffs()
        cutoffs = learned.tolist() if isinstance(learned, Tensor) else learned
        return FreqSplit2d(self.channels, kind=kind, cutoff=cutoffs).train(self.training)

    def extra_repr(self) -> str:
        cutoff = "" if self.kind in ("haar", "avgpool", "laplacian") else f", cutoff={self.cutoff}"
        mask = "" if self.mask == "gaussian" else f", mask={self.mask!r}"
        return f"{self.channels}, kind={self.kind!r}{cutoff}{mask}{', learnable=True' if self.learnable else ''}"

    def _parts(self, x: Tensor, cutoffs: Tensor | float | tuple[float, ...]) -> Parts:
        if self.kind == "haar":
            return haar_parts(x)
        if self.kind == "blur":
            return *blur_split(x, _sigmas(self.cutoff)), ()
        if isinstance(cutoffs, tuple):
            cutoffs = torch.tensor(cutoffs, dtype=torch.float64, device=x.device).to(at_least_float32(x).dtype)
        if self.kind == "fft":
            return *fft_split(x, cutoffs, mask=self.mask, padding=self.padding), ()
        wide = at_least_float32(x)
        if self.kind == "dct":
            return dct_parts(wide, cutoffs)
        return avgpool_parts(wide) if self.kind == "avgpool" else laplacian_parts(wide, self.levels)

    def _radius(self) -> int:
        """Pixels to each side; of those that see the whole map, three deviations."""
        if self.kind == "laplacian":
            return 4 * (2**self.levels - 1)  # two to halve and two to double, of pixels twice as wide at each level
        if self.kind in ("haar", "avgpool"):
            return 1 if self.kind == "haar" else 2
        return math.ceil(3 * gaussian_sigma(_least(self.cutoff)))

    def _check_condition(self, condition: Tensor | None) -> None:
        if (condition is None) != (self.condition is None):
            wanted = f"a vector of {self.condition_channels} for each map" if self.condition_channels else "None"
            raise ValueError(f"condition must be {wanted}, got {'None' if condition is None else 'a tensor'}")
        if condition is not None and (condition.ndim != 2 or condition.shape[1] != self.condition_channels):
            raise ValueError(f"condition must be (B, {self.condition_channels}), got shape {tuple(condition.shape)}")


def _checked_cutoff(cutoff: float | Sequence[float], channels: int, learnable: bool) -> float | tuple[float, ...]:
    values = tuple(cutoff) if isinstance(cutoff, Sequence) else (cutoff,)
    if not all(isinstance(value, Real) for value in values):
        raise TypeError(f"cutoff must be a number or a sequence of numbers, got {cutoff!r}")
    if isinstance(cutoff, Sequence) and len(values) != channels:
        raise ValueError(f"cutoff must be one number or {channels}, one for each channel, got {len(values)}")
    for value in values:
        if learnable and not LOWEST < value < HIGHEST_CUTOFF:
            raise ValueError(f"cutoff must be above {LOWEST} and below {HIGHEST_CUTOFF} to be learned, got {value}")
        if not 0 < value <= HIGHEST_CUTOFF:
            raise ValueError(f"cutoff must be above 0 and at most {HIGHEST_CUTOFF}, got {value}")
    return values if isinstance(cutoff, Sequence) else cutoff


def _least(cutoff: float | tuple[float, ...]) -> float:
    return min(cutoff) if isinstance(cutoff, tuple) else cutoff


def _sigmas(cutoff: float | tuple[float, ...]) -> float | list[float]:
    return [gaussian_sigma(c) for c in cutoff] if isinstance(cutoff, tuple) else gaussian_sigma(cutoff)
