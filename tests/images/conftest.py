"""Photographs, profiles and EXIF that the image tests share."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image, ImageCms

from claritycore.images import Picture


@pytest.fixture(scope="session")
def data_folder():
    folder = os.environ.get("CLARITYCORE_DATA")
    if not folder:
        pytest.skip("CLARITYCORE_DATA does not name a folder with the test images")
    return Path(folder)


@pytest.fixture(scope="session")
def photo():
    """An RGB photograph, (1, 3, 120, 150), of 8-bit values."""
    return torch.from_numpy(skimage.data.astronaut()[20:140, 150:300].copy()).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="session")
def rgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.fixture(scope="session")
def grey_profile(rgb_profile):
    """A profile that says it is of grey pixels; nothing here looks further into it."""
    return rgb_profile[:16] + b"GRAY" + rgb_profile[20:]


@pytest.fixture(scope="session")
def cmyk_profile():
    """A profile of CMYK inks whose lightness falls with each ink: a table of 2 x 2 x 2 x 2 CIELAB colours."""
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(-1, 4)
    lightness = 255 * (1 - corners[:, :3].mean(1) * 0.8) * (1 - corners[:, 3])
    grid = np.stack([lightness, np.full(16, 128), np.full(16, 128)], 1).round().astype(np.uint8)
    ramp = bytes(range(256))
    identity = struct.pack(">9i", *(65536 * np.eye(3, dtype=int)).ravel())
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + 4 * ramp + grid.tobytes() + 3 * ramp
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(table))
    header = struct.pack(">I4sI4s4s4s12x4s", 144 + len(table), bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp")
    header += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)  # the illuminant D50
    return header.ljust(128, b"\0") + tags + table


@pytest.fixture(scope="session")
def make_exif():
    """Build an EXIF block with every kind of directory that restoration must carry over."""

    def make(orientation=None):
        exif = Image.Exif()
        exif[0x010F] = "Camera maker"
        if orientation is not None:
            exif[0x0112] = orientation
        exif.get_ifd(0x8769).update({0x829A: 0.01, 0x9286: b"ASCII\0\0\0a comment", 0xA434: "A lens"})
        exif.get_ifd(0x8825).update({1: "N", 2: (48.0, 12.0, 30.5)})
        return exif.tobytes().removeprefix(b"Exif\0\0")

    return make


@pytest.fixture(scope="session")
def random_picture():
    """Make a picture of random values that a file can hold exactly."""

    def make(channels, height, width, *, alpha=False, depth=8, seed=0, **extras):
        generator = torch.Generator().manual_seed(seed)
        samples = torch.randint(0, 2**depth, (1, channels + alpha, height, width), generator=generator) / (2**depth - 1)
        return Picture(samples[:, :channels], samples[:, channels:] if alpha else None, depth, **extras)

    return make


@pytest.fixture(scope="session")
def integers():
    """Give the samples (H, W, C) that a file of a picture stores."""

    def give(picture, depth=None):
        parts = [picture.pixels] if picture.alpha is None else [picture.pixels, picture.alpha]
        samples = torch.cat(parts, 1)[0].permute(1, 2, 0).double() * (2 ** (depth or picture.depth) - 1)
        return samples.round().numpy().astype(np.int64)

    return give
