"""Images in and out of tensors: files, MATLAB's bicubic resize, luma, PSNR and SSIM.

Images are ``(B, C, H, W)`` in [0, 1], RGB or grey. ``read_image`` and ``write_image`` keep what a file is: its bit
depth, alpha, ICC profile and EXIF travel in a `Picture`.
"""

from .colour import rgb_to_y
from .metrics import psnr, ssim
from .picture import Picture
from .reading import read_image
from .resize import imresize
from .writing import write_image

__all__ = ["Picture", "imresize", "psnr", "read_image", "rgb_to_y", "ssim", "write_image"]
