"""What the configs of the U-Nets of window attention have in common: widths that double, heads and windows."""

from dataclasses import dataclass

from ..blocks.checks import check_positive
from ..blocks.multi_scale import DownForm
from .unet import UNetConfig


@dataclass(frozen=True)
class WindowedConfig(UNetConfig):
    """Sizes of a U-Net whose stages are blocks of window attention, besides what all U-Nets have.

    Args:
        embed_dim: channels of the finest stage; each coarser one has twice as many.
        depths: blocks of each stage, the finest first; the last is the bottleneck's.
        refinement: blocks after the decoder, at the finest scale.
        head_dim: channels of an attention head, a divisor of `embed_dim`.
        window_size: side of the windows, in pixels of each stage; every other block shifts them by half.

    Raises:
        ValueError: if a number is no integer or < 1, a choice is none of those, or `head_dim` does not divide
            `embed_dim`.

    >>> WindowedConfig(embed_dim=16, depths=(1, 2), head_dim=8).stages
    [(16, 1), (32, 2)]
    """

    down: DownForm = "unshuffle"
    gated: bool = False
    embed_dim: int = 64
    depths: tuple[int, ...] = (4, 4, 6, 8)
    refinement: int = 4
    head_dim: int = 32
    window_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(embed_dim=self.embed_dim, head_dim=self.head_dim, window_size=self.window_size)
        if not self.depths or any(type(depth) is not int or depth < 0 for depth in (*self.depths, self.refinement)):
            raise ValueError(
                f"depths and refinement must be integers of at least 0, got {self.depths} and {self.refinement}"
            )
        if self.embed_dim % self.head_dim:
            raise ValueError(f"embed_dim must be a multiple of head_dim {self.head_dim}, got {self.embed_dim}")

    @property
    def stages(self) -> list[tuple[int, int]]:
        """Channels and blocks of each stage, the finest first; the last is the bottleneck."""
        return [(self.embed_dim * 2**level, depth) for level, depth in enumerate(self.depths)]
