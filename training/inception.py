"""The Inception network by whose features the Frechet inception distance is defined; its weights are a user's file."""

import re
from collections.abc import Sequence
from functools import partial
from os import PathLike

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nets.checkpoints import check_weights, read_checkpoint

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SIDE = 299
CLASSES = 1008  # of the published weights; torchvision's own have 1000

# A layer is "NAME WIDTH KERNEL": "3x3" is padded to keep the size, "3x3v" is not, "3x3/2" neither, at stride 2; or it
# is one of the poolings. A branch is a chain of layers; a tuple in it is layers side by side.
Branch = Sequence[str | tuple[str, ...]]
POOLINGS = {
    "avg": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
    "max": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    "max/2": partial(F.max_pool2d, kernel_size=3, stride=2),
}
STEM = [
    *("Conv2d_1a_3x3 32 3x3/2", "Conv2d_2a_3x3 32 3x3v", "Conv2d_2b_3x3 64 3x3", "max/2"),
    *("Conv2d_3b_1x1 80 1x1", "Conv2d_4a_3x3 192 3x3v", "max/2"),
]
TRIPLE = ("branch3x3dbl_1 64 1x1", "branch3x3dbl_2 96 3x3")


def _mixed_5(pooled: int) -> list[Branch]:
    return [
        ["branch1x1 64 1x1"],
        ["branch5x5_1 48 1x1", "branch5x5_2 64 5x5"],
        [*TRIPLE, "branch3x3dbl_3 96 3x3"],
        ["avg", f"branch_pool {pooled} 1x1"],
    ]


def _mixed_6(width: int) -> list[Branch]:
    turns = [f"branch7x7dbl_{place} {width} {kernel}" for place, kernel in enumerate(("7x1", "1x7", "7x1"), start=2)]
    return [
        ["branch1x1 192 1x1"],
        [f"branch7x7_1 {width} 1x1", f"branch7x7_2 {width} 1x7", "branch7x7_3 192 7x1"],
        [f"branch7x7dbl_1 {width} 1x1", *turns, "branch7x7dbl_5 192 1x7"],
        ["avg", "branch_pool 192 1x1"],
    ]


def _mixed_7(pooling: str) -> list[Branch]:
    return [
        ["branch1x1 320 1x1"],
        ["branch3x3_1 384 1x1", ("branch3x3_2a 384 1x3", "branch3x3_2b 384 3x1")],
        [
            "branch3x3dbl_1 448 1x1",
            "branch3x3dbl_2 384 3x3",
            ("branch3x3dbl_3a 384 1x3", "branch3x3dbl_3b 384 3x1"),
        ],
        [pooling, "branch_pool 192 1x1"],
    ]


BLOCKS: dict[str, list[Branch]] = {
    **{f"Mixed_5{letter}": _mixed_5(pooled) for letter, pooled in zip("bcd", (32, 64, 64), strict=True)},
    "Mixed_6a": [["branch3x3 384 3x3/2"], [*TRIPLE, "branch3x3dbl_3 96 3x3/2"], ["max/2"]],
    **{f"Mixed_6{letter}": _mixed_6(width) for letter, width in zip("bcde", (128, 160, 160, 192), strict=True)},
    "Mixed_7a": [
        ["branch3x3_1 192 1x1", "branch3x3_2 320 3x3/2"],
        ["branch7x7x3_1 192 1x1", "branch7x7x3_2 192 1x7", "branch7x7x3_3 192 7x1", "branch7x7x3_4 192 3x3/2"],
        ["max/2"],
    ],
    "Mixed_7b": _mixed_7("avg"),
    "Mixed_7c": _mixed_7("max"),  # so it was trained, unlike all other Inceptions
}


class Inception(nn.Module):
    """Give the 2048 features of an image that the Frechet inception distance (FID) compares; the weights are frozen.

    The image is resized to 299 x 299 bilinearly, without antialiasing, as those who published these weights for torch
    do. Its parameters have torchvision's names. Average pooling leaves the padding out of its means, and the last
    block pools by the maximum: in both the network differs from torchvision's.

    Shape:
        ``(B, C, H, W)``, C 1 or 3 -> ``(B, 2048)``.

    Args:
        weights: the file, pt_inception-2015-12-05-6726825d.pth.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or is of another network, torchvision's own Inception included.

    Source: Inception v3 (arXiv:1512.00567), section 6; FID (arXiv:1706.08500), section 3.

    >>> Inception("nowhere.pth")
    Traceback (most recent call last):
    FileNotFoundError: there is no checkpoint nowhere.pth
    """

    def __init__(self, weights: str | PathLike[str]) -> None:
        super().__init__()
        with torch.device("meta"):  # no memory, and no draw from the generator that the nets start from
            width = _add(self, 3, STEM)
            for name, branches in BLOCKS.items():
                block = nn.Module()
                width = sum(_add(block, width, branch) for branch in branches)
                self.add_module(name, block)
        self._load(weights)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        image = F.interpolate(image.float(), (SIDE, SIDE), mode="bilinear", align_corners=False)
        x = _run(self, 2 * image.expand(-1, 3, -1, -1) - 1, STEM)
        for name, branches in BLOCKS.items():
            x = torch.cat([_run(self.get_submodule(name), x, branch) for branch in branches], 1)
        return x.mean((2, 3))

    def _load(self, path: str | PathLike[str]) -> None:
        state = read_checkpoint(path).state
        classes = state.pop("fc.weight", torch.empty(0)).shape[0]
        if classes != CLASSES:
            raise ValueError(f"{path} does not hold the weights by which FID is defined, as {URL} does")
        state = {key: value.float() for key, value in state.items() if key != "fc.bias"}
        # The published file has no counters of batches, and they are of no use here.
        counters = [key for key in self.state_dict() if key.endswith("num_batches_tracked")]
        state |= {key: torch.zeros((), dtype=torch.long) for key in counters}
        check_weights(self, state, path)
        self.load_state_dict(state, assign=True)


class _ConvNorm(nn.Module):
    def __init__(self, inputs: int, width: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def _add(place: nn.Module, width: int, branch: Branch) -> int:
    """Add the layers of a branch to a module; return how many channels come out."""
    for layer in branch:
        if isinstance(layer, tuple):
            width = sum(_add(place, width, [part]) for part in layer)
        elif layer not in POOLINGS:
            name, wanted, kernel = layer.split()
            *sides, mark = re.fullmatch(r"(\d)x(\d)(v|/2|)", kernel).groups()  # pyright: ignore[reportOptionalMemberAccess]
            height, breadth = map(int, sides)
            padding = (0, 0) if mark else (height // 2, breadth // 2)
            stride = 2 if mark == "/2" else 1
            place.add_module(name, _ConvNorm(width, int(wanted), (height, breadth), stride, padding))
            width = int(wanted)
    return width


def _run(place: nn.Module, x: Tensor, branch: Branch) -> Tensor:
    for layer in branch:
        if isinstance(layer, tuple):
            x = torch.cat([_run(place, x, [part]) for part in layer], 1)
        elif layer in POOLINGS:
            x = POOLINGS[layer](x)
        else:
            x = place.get_submodule(layer.split()[0])(x)
    return x
