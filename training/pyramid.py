"""What Burt and Adelson's pyramid makes of an image: the low frequencies of it, and the high ones."""

from torch import Tensor

from ..blocks.pyramid import double, halve


def low_pass(image: Tensor, levels: int) -> Tensor:
    """Keep what is left of an image that is halved `levels` times and doubled again: structure, no texture.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    >>> low_pass(torch.ones(1, 1, 5, 7), 2).unique()
    tensor([1.])
    """
    if levels == 0:
        return image
    return double(low_pass(halve(image), levels - 1), *image.shape[2:])


def high_pass(image: Tensor, levels: int) -> Tensor:
    """Keep what `low_pass` takes away: edges and texture about zero.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    >>> high_pass(torch.ones(1, 1, 5, 7), 2).unique()
    tensor([0.])
    """
    return image - low_pass(image, levels)


def texture(image: Tensor, levels: int) -> Tensor:
    """Put what `high_pass` keeps on mid-grey, so that it looks like an image; with 0 levels it is the image itself.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``.

    >>> texture(torch.ones(1, 1, 5, 7), 2).unique()
    tensor([0.5000])
    """
    return high_pass(image, levels) + 0.5 if levels else image
