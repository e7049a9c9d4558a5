"""A convolution that is trained as many branches and shipped as one."""

import re
from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from .checks import check_choice, check_feature_map, check_positive
from .padding import PaddingMode, pad_same
from .rep_algebra import Affine, Size, affine_of, centred, neutralise
from .rep_branches import EDGES, Average, Branch, Chain, Common, Edge, Identity
from .reparam import Reparameterizable
from .same_conv import SameConv2d

Norm = Literal["none", "branch", "sum"]

# The sets of dilated branches that UniRepLKNet (arXiv:2311.15599, appendix) trains beside a large kernel.
DILATED_BRANCHES = {
    5: ("5x5", "3x3", "3x3@2"),
    7: ("7x7", "5x5", "3x3@2", "3x3@3"),
    9: ("9x9", "5x5", "5x5@2", "3x3@3", "3x3@4"),
    11: ("11x11", "5x5", "5x5@2", "3x3@3", "3x3@4", "3x3@5"),
    13: ("13x13", "5x5", "7x7@2", "3x3@3", "3x3@4", "3x3@5"),
    15: ("15x15", "5x5", "7x7@2", "3x3@3", "3x3@5", "3x3@7"),
    17: ("17x17", "5x5", "9x9@2", "3x3@4", "3x3@5", "3x3@7"),
}
_CHAIN = re.compile(r"(?P<sizes>\d+x\d+(-\d+x\d+)*)((@(?P<dilation>\d+))|(\*(?P<widening>\d+)))?")


class RepConv2d(Reparameterizable):
    r"""Convolve by the sum of parallel linear branches, which `switch_to_deploy` turns into one convolution.

    :math:`y = \sum_i (W_i * x + b_i)`, deployed :math:`y = (\sum_i W_i) * x + \sum_i b_i` with each kernel padded to
    the largest; "same" padding. The input is padded once, before all branches, so that both forms are equal at the
    border too. Kernels are composed in float64 and rounded once. A branch is written as

    - ``"5x5"``, ``"1x1"``, ``"17x5"``: a kernel of so many rows and columns, at most ``kernel_size``
    - ``"3x3@4"``: the same, dilated by 4: it spans 9 pixels
    - ``"1x1-3x3"``, ``"1x1-3x3-1x1*2"``: convolutions in sequence, with twice the channels between them
    - ``"identity"``: the input times a factor for each channel
    - ``"average"``: the mean over ``kernel_size``, then 1x1
    - ``"sobel-x"``, ``"sobel-y"``, ``"laplacian"``: 1x1, then a fixed edge filter times a factor for each channel

    Branches that form a cross of strips, such as 17x5 and 5x17, deploy as two strips: one square would cost more.
    `to_training_form` puts what was deployed into a branch of that very size, undilated, with at most 1x1 convolutions
    beside it that are wide enough; for two strips into one for each. Where none is trained there is no way back.

    Shape:
        ``(B, C_in, H, W)`` -> ``(B, C_out, ceil(H / stride), ceil(W / stride))``.

    Args:
        in_channels: number of channels ``C_in``.
        out_channels: number of channels ``C_out``; ``in_channels`` where it is not given.
        kernel_size: odd size of the largest kernel, or its rows and columns.
        stride: of the output.
        groups: groups of channels that do not see each other, in every branch.
        padding_mode: "zeros", "reflect", "replicate" or "circular"; where reflection runs out, the far edge.
        branches: what is trained; by default the whole kernel, 1x1 and, where shapes allow it, identity.
        norm: "none", or a batch norm in each "branch", after every convolution of it, or one after the "sum".

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1 or a kernel even, groups do not divide the channels, a branch is unknown, larger
            than ``kernel_size`` or an identity between different shapes, or the input has another number of channels.

    Source:
        RepVGG (arXiv:2101.03697), section 3.3; Diverse Branch Block (arXiv:2103.13425), section 3.2; UniRepLKNet
        (arXiv:2311.15599), section 3.1; ECBSR (doi:10.1145/3474085.3475291), section 3; norm after the sum: QARepVGG
        (arXiv:2212.01593).

    >>> RepConv2d(8, kernel_size=7, groups=8, branches=("7x7", "5x5", "3x3@3"))(torch.zeros(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    >>> block = RepConv2d(8, kernel_size=7, groups=8, branches=("7x7", "identity"))
    >>> block.switch_to_deploy()
    >>> block
    RepConv2d(
      (fused): SameConv2d(8, 8, kernel_size=(7, 7), stride=(1, 1), padding=(3, 3), groups=8)
    )
    """

    tile_safe = True
    branches: nn.ModuleList
    norm: nn.BatchNorm2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        kernel_size: int | tuple[int, int] = 3,
        stride: int = 1,
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        branches: Sequence[str] | None = None,
        norm: Norm = "none",
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = in_channels if out_channels is None else out_channels
        self.kernel_size = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
        self.stride, self.groups = stride, groups
        self.padding_mode: PaddingMode = padding_mode
        self.branch_names, self.norm_place = tuple(branches or self._default_branches()), norm
        self._check()
        for name, module in self._fresh_modules().items():
            self.add_module(name, module)
        sizes = [branch.size for branch in self._parts()]
        self.radius = max(rows for rows, _ in sizes) // 2, max(columns for _, columns in sizes) // 2
        self.receptive_radius = max(self.radius)
        self.tile_multiple = stride

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.in_channels, self)
        parts = self._parts()
        padded = x if all(part.pads_itself for part in parts) else pad_same(x, self.radius, self.padding_mode)
        y = parts[0](x if parts[0].pads_itself else self._around(padded, parts[0].size))
        for part in parts[1:]:
            y = y + part(x if part.pads_itself else self._around(padded, part.size))
        return y if self.deployed or self.norm_place != "sum" else self.norm(y)

    def fused_modules(self) -> dict[str, nn.Module]:
        branches = cast(list[Branch], self._parts())
        boxes = _boxes([branch.size for branch in branches])
        kernels = [torch.zeros(())] * len(boxes)
        bias = torch.zeros(())
        for branch in branches:
            affine = branch.affine()
            box = next(number for number, box in enumerate(boxes) if _fits(branch.size, box))
            kernels[box] = kernels[box] + centred(affine.weight, boxes[box])
            bias = bias + affine.bias
        if self.norm_place == "sum":
            whole = [Affine(kernel, bias).normalised(self.norm) for kernel in kernels]
            kernels, bias = [affine.weight for affine in whole], whole[0].bias
        names = ("fused", "fused_wide")[: len(boxes)]
        return {
            name: self._convolution(kernel, bias if name == "fused" else None)
            for name, kernel in zip(names, kernels, strict=True)
        }

    def training_modules(self) -> dict[str, nn.Module]:
        fused = [affine_of(conv) for conv in self._parts()]
        boxes = [(affine.weight.shape[2], affine.weight.shape[3]) for affine in fused]
        like = next(self.parameters())
        modules = {name: module.to(like.device, like.dtype) for name, module in self._fresh_modules().items()}
        branches = cast(list[Branch], list(cast(nn.ModuleList, modules["branches"])))
        if self.norm_place == "sum":
            neutralise(cast(nn.BatchNorm2d, modules["norm"]), fused[0].bias)
        for branch in branches:
            for parameter in branch.last_factor():
                nn.init.zeros_(parameter)
        for box, affine in zip(boxes, fused, strict=True):
            able = (branch for branch in branches if isinstance(branch, Chain) and branch.can_absorb(box))
            holder = next(able, None)
            if holder is None:
                raise ValueError(
                    f"none of the branches {', '.join(self.branch_names)} can hold a whole {box[0]}x{box[1]} kernel: "
                    "the deployed form has no exact training form"
                )
            holder.absorb(affine)
        return modules

    def extra_repr(self) -> str:
        if self.deployed:
            return ""
        channels = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{channels}, branches={self.branch_names}, norm={self.norm_place!r}"

    def _parts(self) -> list[Any]:
        """What is added up: the branches, or the fused convolutions."""
        return list(self.children() if self.deployed else self.branches)

    def _around(self, padded: Tensor, size: Size) -> Tensor:
        """Cut a padded map down to what a kernel of this size needs."""
        rows, columns = self.radius[0] - size[0] // 2, self.radius[1] - size[1] // 2
        return padded[:, :, rows : padded.shape[2] - rows, columns : padded.shape[3] - columns]

    def _default_branches(self) -> tuple[str, ...]:
        keeps_shape = self.in_channels == self.out_channels and self.stride == 1
        whole = "x".join(map(str, self.kernel_size))
        return tuple(dict.fromkeys((whole, "1x1", *(["identity"] if keeps_shape else []))))

    def _check(self) -> None:
        check_positive(
            in_channels=self.in_channels, out_channels=self.out_channels, stride=self.stride, groups=self.groups
        )
        if len(self.kernel_size) != 2 or any(type(n) is not int or n < 1 or n % 2 == 0 for n in self.kernel_size):
            raise ValueError(f"kernel_size must be odd and positive, or two such numbers, got {self.kernel_size}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            channels = f"in_channels {self.in_channels} and out_channels {self.out_channels}"
            raise ValueError(f"groups must divide {channels}, got {self.groups}")
        check_choice("padding_mode", self.padding_mode, get_args(PaddingMode))
        check_choice("norm", self.norm_place, get_args(Norm))

    def _fresh_modules(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = {"branches": nn.ModuleList(map(self._branch, self.branch_names))}
        if self.norm_place == "sum":
            modules["norm"] = nn.BatchNorm2d(self.out_channels)
        return modules

    def _branch(self, text: str) -> Branch:
        zeros, norm, bias = self.padding_mode == "zeros", self.norm_place == "branch", self.norm_place == "none"
        common = Common(self.stride, self.groups, zeros, norm, bias)
        channels = self.in_channels, self.out_channels
        if text == "identity":
            if channels[0] != channels[1] or self.stride != 1:
                raise ValueError("branch 'identity' needs as many channels out as in, and stride 1")
            return Identity(self.in_channels, common)
        if text == "average":
            return Average(*channels, self.kernel_size, common)
        if text in EDGES:
            branch: Branch = Edge(*channels, text, common)
        else:
            branch = self._chain(text, common)
        if not _fits(branch.size, self.kernel_size):
            spans = "x".join(map(str, branch.size))
            raise ValueError(f"branch {text!r} spans {spans} pixels, more than kernel_size {self.kernel_size}")
        return branch

    def _chain(self, text: str, common: Common) -> Chain:
        read = _CHAIN.fullmatch(text) if isinstance(text, str) else None
        pairs = [size.split("x") for size in read["sizes"].split("-")] if read else []
        sizes = [(int(rows), int(columns)) for rows, columns in pairs]
        if not read or not all(n % 2 for size in sizes for n in size) or "0" in (read["dilation"], read["widening"]):
            known = "'5x5', '3x3@2', '1x1-3x3*2' (odd sizes), 'identity', 'average', " + ", ".join(map(repr, EDGES))
            raise ValueError(f"branch must be like one of {known}; got {text!r}")
        wide = int(read["widening"] or 1)
        # The widened channels follow the input until the first kernel that is not 1x1, and the output from it on.
        spatial = next((number for number, size in enumerate(sizes) if size != (1, 1)), len(sizes) - 1)
        hidden = [wide * (self.in_channels if i < spatial else self.out_channels) for i in range(len(sizes) - 1)]
        widths = [self.in_channels, *hidden, self.out_channels]
        return Chain(widths, sizes, int(read["dilation"] or 1), common)

    def _convolution(self, kernel: Tensor, bias: Tensor | None) -> SameConv2d:
        size = kernel.shape[2], kernel.shape[3]
        padding = (size[0] // 2, size[1] // 2) if self.padding_mode == "zeros" else 0
        options = {"stride": self.stride, "padding": padding, "groups": self.groups, "bias": bias is not None}
        channels = self.in_channels, self.out_channels
        conv = SameConv2d(*channels, size, **options, device="meta")  # where nothing is drawn
        conv.weight = nn.Parameter(kernel)
        if bias is not None:
            conv.bias = nn.Parameter(bias)
        return conv


def _fits(size: Size, box: Size) -> bool:
    return size[0] <= box[0] and size[1] <= box[1]


def _boxes(sizes: Sequence[Size]) -> list[Size]:
    """The kernels that hold all branches: one, or a tall and a wide one where these have fewer taps together."""
    whole = _around_all(sizes)
    tall, wide = [size for size in sizes if size[0] > size[1]], [size for size in sizes if size[0] < size[1]]
    if tall and wide:
        strips = [_around_all(tall), _around_all(wide)]
        if all(_fits(size, strips[0]) or _fits(size, strips[1]) for size in sizes):
            taps = [rows * columns for rows, columns in (*strips, whole)]
            if taps[0] + taps[1] < taps[2]:
                return strips
    return [whole]


def _around_all(sizes: Sequence[Size]) -> Size:
    return max(rows for rows, _ in sizes), max(columns for _, columns in sizes)
