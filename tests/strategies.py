"""What hypothesis draws: shapes of feature maps and images, tiny, odd and oblong ones first."""

import torch
from hypothesis import strategies as st
from torch import Tensor

SIDES = st.one_of(st.sampled_from([1, 2, 3, 5, 7]), st.integers(1, 20))


@st.composite
def feature_maps(draw, channels: int, *, max_batch: int = 2, sides=SIDES, dtype=torch.float32) -> Tensor:
    """Normal noise (B, channels, H, W)."""
    shape = (draw(st.integers(1, max_batch)), channels, draw(sides), draw(sides))
    return normal(shape, dtype=dtype, seed=draw(st.integers(0, 2**16)))


def normal(shape: tuple[int, ...], *, dtype=torch.float32, seed: int = 0) -> Tensor:
    """Normal noise, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
