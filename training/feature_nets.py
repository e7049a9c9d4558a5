"""The convolutions of VGG and AlexNet, for losses that compare what they see: weights come from a user's file."""

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from os import PathLike

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks.checks import check_choice
from ..nets.checkpoints import check_weights, read_checkpoint

VGG_WIDTHS = (64, 128, 256, 512, 512)
# Of each stage, its convolutions: (output channels, kernel, stride, padding); a pooling (size, stride) ends a stage.
STAGES = {
    "vgg16": [[(width, 3, 1, 1)] * n for width, n in zip(VGG_WIDTHS, (2, 2, 3, 3, 3), strict=True)],
    "vgg19": [[(width, 3, 1, 1)] * n for width, n in zip(VGG_WIDTHS, (2, 2, 4, 4, 4), strict=True)],
    "alexnet": [[(64, 11, 4, 2)], [(192, 5, 1, 2)], [(384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1)]],
}
POOLING = {"vgg16": (2, 2), "vgg19": (2, 2), "alexnet": (3, 2)}
URL = "https://download.pytorch.org/models/"
FILES = {"vgg16": "vgg16-397923af.pth", "vgg19": "vgg19-dcbb9e9d.pth", "alexnet": "alexnet-owt-7be5be79.pth"}


class FeatureNet(nn.Module):
    """Give what layers of VGG16, VGG19 or AlexNet make of an image; the weights are frozen.

    The network ends at the deepest of these layers. Its parameters have torchvision's names, ``features.N.weight``
    and ``features.N.bias``, and are cast to the dtype of the image. `read_feature_net` takes them from a file.

    Shape:
        ``(B, 3, H, W)`` -> a map for each layer.

    Args:
        architecture: "vgg16", "vgg19" or "alexnet".
        layers: their names, such as "conv1_2", the second convolution of the first stage, and "relu1_2", what the
            nonlinearity after it gives. Poolings end the stages, so "relu3_1" is the third of AlexNet.

    Raises:
        ValueError: if ``architecture`` or a layer is unknown, there is no layer, or an image is too small for the
            poolings.

    Source: VGG (arXiv:1409.1556), section 2; AlexNet as in arXiv:1404.5997.

    >>> net = FeatureNet("vgg16", ["relu1_2", "conv2_1"])
    >>> [features.shape[1:] for features in net(torch.rand(1, 3, 8, 8))]
    [torch.Size([64, 8, 8]), torch.Size([128, 4, 4])]
    """

    def __init__(self, architecture: str, layers: Iterable[str]) -> None:
        super().__init__()
        check_choice("architecture", architecture, STAGES)
        known = _layers(architecture)
        self.architecture = architecture
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("layers must name at least one layer, got none")
        for layer in self.layers:
            if layer not in known:
                raise ValueError(f"{architecture} has no layer {layer!r}; it has {', '.join(known)}")
        self.indices = [list(known).index(layer) for layer in self.layers]
        needed = list(known.values())[: max(self.indices) + 1]
        self.features = nn.Sequential(*(make() for make in needed)).requires_grad_(False)
        self.smallest = _smallest_side(self.features, *POOLING[architecture])

    def forward(self, image: Tensor) -> list[Tensor]:
        if min(image.shape[2:]) < self.smallest:
            raise ValueError(
                f"{self.architecture} to the depth of {', '.join(self.layers)} takes images of at least "
                f"{self.smallest} x {self.smallest} pixels, got {image.shape[2]} x {image.shape[3]}"
            )
        seen = []
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                weight, bias = layer.weight.to(image.dtype), layer.get_parameter("bias").to(image.dtype)
                image = F.conv2d(image, weight, bias, layer.stride, layer.padding)
            else:
                image = layer(image)
            seen.append(image)
        return [seen[index] for index in self.indices]


def read_feature_net(
    path: str | PathLike[str], layers: Callable[[str], Iterable[str]], allowed: Sequence[str] = tuple(STAGES)
) -> FeatureNet:
    """Make the net whose weights a file holds, as torchvision names them; further tensors in it are left.

    Args:
        path: a .pth or .safetensors file.
        layers: says, for the architecture that the file turns out to be of, which layers are looked at.
        allowed: the architectures that may come.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, holds more than tensors, or is of another network.
    """
    state = read_checkpoint(path).state
    state = {key: value.float() for key, value in state.items() if re.fullmatch(r"features\.\d+\.(weight|bias)", key)}
    indices = {int(key.split(".")[1]) for key in state}
    for architecture in allowed:
        if indices == {place for place, make in enumerate(_layers(architecture).values()) if isinstance(make, partial)}:
            break
    else:
        files = " or ".join(URL + FILES[name] for name in allowed)
        raise ValueError(f"{path} is not in torchvision's layout of {' or '.join(allowed)}, as {files} would be")
    with torch.device("meta"):  # no memory, and no draw from the generator that the nets start from
        net = FeatureNet(architecture, layers(architecture))
    state = {key: value for key, value in state.items() if key in net.state_dict()}
    check_weights(net, state, path)
    net.load_state_dict(state, assign=True)
    return net


def standardize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract the mean of each channel and divide by its deviation; a grey image becomes RGB.

    >>> standardize(torch.full((1, 1, 1, 1), 0.5), (0.5, 0.25, 0.0), (0.5, 0.5, 0.5)).flatten()
    tensor([0.0000, 0.5000, 1.0000])
    """
    channels = image.expand(-1, 3, -1, -1).unbind(1)
    return torch.stack([(x - m) / s for x, m, s in zip(channels, mean, std, strict=True)], 1)


def _layers(architecture: str) -> dict[str, Callable[[], nn.Module]]:
    """What makes each layer, by name in torchvision's order; that of a convolution is a partial."""
    layers: dict[str, Callable[[], nn.Module]] = {}
    inputs = 3
    for stage, convolutions in enumerate(STAGES[architecture], start=1):
        for place, (width, kernel, stride, padding) in enumerate(convolutions, start=1):
            layers[f"conv{stage}_{place}"] = partial(nn.Conv2d, inputs, width, kernel, stride, padding)
            layers[f"relu{stage}_{place}"] = nn.ReLU
            inputs = width
        layers[f"pool{stage}"] = lambda: nn.MaxPool2d(*POOLING[architecture])
    return layers


def _smallest_side(features: nn.Sequential, pooling_size: int, pooling_stride: int) -> int:
    """Side of the smallest image of which a pixel is left: what each layer asks for, from the last to the first."""
    side = 1
    for layer in reversed(features):
        if isinstance(layer, nn.Conv2d):
            side = max((side - 1) * layer.stride[0] + layer.kernel_size[0] - 2 * int(layer.padding[0]), 1)
        elif isinstance(layer, nn.MaxPool2d):
            side = (side - 1) * pooling_stride + pooling_size
    return side
