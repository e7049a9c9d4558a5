"""Attention from the pixels of a map to a sequence of tokens: words, prompts, or whatever describes the image."""

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor
from torch.nn import functional as F

from ..kernels.memory_format import channels_last, in_format_of
from .checks import check_feature_map, check_heads, check_positive
from .norm import LayerNorm2d


class CrossAttention2d(nn.Module):
    r"""Let each pixel attend to tokens, and add what it finds.

    .. math::
        y = x + W_{out} \, \mathrm{softmax}(q k^T / \sqrt{d}) \, v, \qquad
        q = W_q \hat x, \quad [k, v] = [W_k, W_v] \, t

    with :math:`\hat x` normalised over the channels of each pixel. :math:`W_{out}` and its bias start at zero: a fresh
    block is the identity, bit by bit. Tokens have no place: their order does not matter. The cost is H W L for L
    tokens, so that nothing has to be cut into windows.

    A mask says which tokens count. An image for which none counts is refused; a program that was compiled or exported
    cannot look, nor can vmap, and takes all tokens of such an image. On a CPU it can be differentiated once, unless
    `torch.nn.attention.sdpa_kernel` chooses the kernel MATH.

    Shape:
        - x: ``(B, C, H, W)``
        - tokens: ``(B, L, D)``, L >= 1
        - mask: ``(B, L)``, boolean, true for the tokens that count
        - returns: ``(B, C, H, W)``, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        token_channels: width ``D`` of the tokens.
        num_heads: heads that the channels are shared out to, with ``d = C / num_heads``.
        qkv_bias: whether queries, keys and values have one.

    Raises:
        TypeError: if the input is not floating point, or the mask not boolean.
        ValueError: if a number is < 1, ``num_heads`` does not divide ``channels``, the input has another number of
            channels, tokens or mask have another shape, or no token of an image counts.

    Source:
        High-Resolution Image Synthesis with Latent Diffusion Models (arXiv:2112.10752), section 3.3; started at zero as
        in ControlNet (arXiv:2302.05543), section 3.1.

    >>> x = torch.randn(2, 8, 5, 7)
    >>> CrossAttention2d(8, 16, num_heads=2)(x, torch.randn(2, 3, 16)).equal(x)
    True
    """

    tile_safe = True
    receptive_radius = 0
    tile_multiple = 1

    def __init__(self, channels: int, token_channels: int, *, num_heads: int = 1, qkv_bias: bool = False) -> None:
        super().__init__()
        check_positive(token_channels=token_channels)
        check_heads(channels, num_heads)
        self.channels, self.token_channels, self.num_heads = channels, token_channels, num_heads
        self.norm = LayerNorm2d(channels)
        self.q = nn.Linear(channels, channels, bias=qkv_bias)
        self.kv = nn.Linear(token_channels, 2 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        for parameter in self.proj.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        check_feature_map(x, self.channels, self)
        self._check(tokens, x)
        pixels = self.norm(channels_last(x)).permute(0, 2, 3, 1).flatten(1, 2)
        k, v = self.kv(tokens.to(self.kv.weight.dtype)).chunk(2, dim=2)
        q, k, v = (t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (self.q(pixels), k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(mask, tokens))
        # A copy, whichever kernel ran and whatever layout it left: exported, the view after it holds for all of them.
        y = self.proj(y.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2))
        y = y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return in_format_of(x + y.to(x.dtype), x)

    def _check(self, tokens: Tensor, x: Tensor) -> None:
        batch, width = x.shape[0], self.token_channels
        if tokens.ndim != 3 or (tokens.shape[0], tokens.shape[2]) != (batch, width) or tokens.shape[1] == 0:
            raise ValueError(f"tokens must be ({batch}, L, {width}) with L >= 1, got shape {tuple(tokens.shape)}")

    def _mask(self, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
        """Return what each head lets each pixel see (B, 1, 1, L)."""
        if mask is None:
            return None
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean, true for the tokens that count, got {mask.dtype}")
        if mask.shape != tokens.shape[:2]:
            raise ValueError(f"mask must be {tuple(tokens.shape[:2])}, as the tokens, got shape {tuple(mask.shape)}")
        some = mask.any(1, keepdim=True)
        hidden = torch.compiler.is_compiling() or mask.is_meta or is_batchedtensor(mask)
        if not hidden and not bool(some.all()):
            row = int((~some[:, 0]).nonzero()[0, 0])
            raise ValueError(f"mask must let a token of each image count, none does in row {row}")
        return (mask | ~some)[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.token_channels}, num_heads={self.num_heads}"
