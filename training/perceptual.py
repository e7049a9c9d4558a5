"""Perceptual losses: how differently VGG or AlexNet see two images, or the texture of these alone."""

from collections.abc import Mapping, Sequence
from os import PathLike

import torch
from torch import Tensor, nn

from ..blocks.checks import check_not_negative
from ..nets.checkpoints import read_checkpoint
from .feature_nets import FILES, STAGES, URL, FeatureNet, read_feature_net, standardize
from .pixel_losses import ImageLoss
from .pyramid import texture

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
# LPIPS shifts and scales images in [-1, 1]; here are the same numbers for images in [0, 1].
LPIPS_MEAN = tuple((shift + 1) / 2 for shift in (-0.030, -0.088, -0.188))
LPIPS_STD = tuple(scale / 2 for scale in (0.458, 0.448, 0.450))
LPIPS_LAYERS = {
    "vgg16": ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"),
    "alexnet": ("relu1_1", "relu2_1", "relu3_1", "relu3_2", "relu3_3"),
}
LPIPS_HEADS = "https://github.com/richzhang/PerceptualSimilarity/tree/master/lpips/weights/v0.1"
LPIPS_EPS = 1e-10


class FeatureLoss(ImageLoss):
    """Base of the losses that compare what a `FeatureNet` finds in two images, or in their texture.

    Args:
        net: the network, with its weights.
        mean: what is subtracted from each channel of the images.
        std: what each channel is then divided by.
        high_pass: look only at what this many halvings lose of the images, on mid-grey; 0 looks at the images.

    >>> loss = FeatureLoss(FeatureNet("vgg16", ["conv1_1"]), mean=(0, 0, 0), std=(1, 1, 1), high_pass=1)
    >>> loss.features(torch.zeros(1, 1, 4, 4))[0].shape
    torch.Size([1, 64, 4, 4])
    """

    def __init__(self, net: FeatureNet, *, mean: Sequence[float], std: Sequence[float], high_pass: int) -> None:
        super().__init__()
        self.net = net
        self.mean, self.std = mean, std
        self.high_pass = high_pass

    def features(self, image: Tensor) -> list[Tensor]:
        """Give the maps of the network's layers.

        Raises:
            ValueError: if the image has neither 1 nor 3 channels, or is too small.
        """
        if image.shape[1] not in (1, 3):
            raise ValueError(f"{type(self).__name__} takes images of 1 or 3 channels, got {image.shape[1]}")
        return self.net(standardize(texture(image, self.high_pass), self.mean, self.std))

    def extra_repr(self) -> str:
        return f"high_pass={self.high_pass}"


class VGGLoss(FeatureLoss):
    r"""Mean absolute error of the features that VGG finds in two images, summed over some of its layers.

    :math:`\sum_l \lambda_l \, \mathrm{mean}(|\phi_l(a) - \phi_l(b)|)`, with the features :math:`\phi_l` taken before
    the nonlinearity unless the name of the layer says otherwise.

    Shape:
        two of ``(B, C, H, W)``, C 1 or 3, H and W >= 16 with the usual layers -> scalar.

    Args:
        weights: a file of VGG16 or VGG19 in torchvision's layout; which of the two it is shows in it.
        layers: the weight :math:`\lambda_l` of each layer by name, see `FeatureNet`; without them 0.1 for conv1_2
            and conv2_2, and 1 for the last convolution of the third, fourth and fifth stage.
        high_pass: look only at what this many halvings lose of the images, on mid-grey; 0 looks at the images.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if ``layers`` is no mapping, or an image is not floating point.
        ValueError: if ``weights`` is not given or another file, a layer is unknown, a number negative, or the images
            are not ``(B, C, H, W)`` of one shape with 1 or 3 channels, or too small for the layers.

    Source: Johnson et al. (arXiv:1603.08155), section 3.2; before the nonlinearity: ESRGAN (arXiv:1809.00219),
        section 3.3; the weights of the layers: Real-ESRGAN (arXiv:2107.10833), section 4.1.

    >>> VGGLoss()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: VGGLoss needs weights=FILE, vgg19 or vgg16 in torchvision's layout, as https://.../vgg19-dcbb9e9d.pth
    """

    def __init__(
        self,
        weights: str | PathLike[str] | None = None,
        *,
        layers: Mapping[str, float] | None = None,
        high_pass: int = 0,
    ) -> None:
        check_not_negative(high_pass=high_pass)
        if not isinstance(layers, Mapping | None):
            raise TypeError(f"layers must map names to weights, got {layers!r}")
        for name, weight in (layers or {}).items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of layer {name!r} must be positive and finite, got {weight!r}")
        net = read_feature_net(
            _given("VGGLoss", weights, ("vgg19", "vgg16")),
            lambda architecture: _usual_layers(architecture) if layers is None else layers,
            ("vgg19", "vgg16"),
        )
        super().__init__(net, mean=MEAN, std=STD, high_pass=high_pass)
        self.layers = _usual_layers(net.architecture) if layers is None else dict(layers)

    def compare(self, restored: Tensor, target: Tensor) -> Tensor:
        pairs = zip(self.layers.values(), self.features(restored), self.features(target), strict=True)
        return torch.stack([weight * (a - b).abs().mean() for weight, a, b in pairs]).sum()

    def extra_repr(self) -> str:
        return f"layers={self.layers}, high_pass={self.high_pass}"


class LPIPSLoss(FeatureLoss):
    r"""Learned perceptual distance of two images (LPIPS): squared errors of normalised features, weighted by channel.

    :math:`\sum_l \mathrm{mean}_{h,w} \sum_c w_{l,c} (\hat\phi_l(a) - \hat\phi_l(b))_{c,h,w}^2` of each image, and the
    mean over the batch, with :math:`\hat\phi = \phi / \|\phi\|` over the channels of a pixel.

    Shape:
        two of ``(B, C, H, W)``, C 1 or 3, H and W >= 16 for VGG16 and >= 31 for AlexNet -> scalar.

    Args:
        weights: a file of VGG16 or AlexNet in torchvision's layout; which of the two it is shows in it.
        heads: the file of the :math:`w_l` for that network, under the public names ``lin0.model.1.weight`` and so on.
        high_pass: look only at what this many halvings lose of the images, on mid-grey; 0 looks at the images.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if an image is not floating point.
        ValueError: if ``weights`` or ``heads`` is not given or another file, ``high_pass`` negative, or the images
            are not ``(B, C, H, W)`` of one shape with 1 or 3 channels, or too small for the network.

    Source: LPIPS (arXiv:1801.03924), section 3, in its version 0.1.

    >>> LPIPSLoss()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: LPIPSLoss needs weights=FILE, alexnet or vgg16 in torchvision's layout, as https://...
    """

    def __init__(
        self,
        weights: str | PathLike[str] | None = None,
        heads: str | PathLike[str] | None = None,
        *,
        high_pass: int = 0,
    ) -> None:
        check_not_negative(high_pass=high_pass)
        path = _given("LPIPSLoss", weights, ("alexnet", "vgg16"))
        if heads is None:
            raise ValueError(f"LPIPSLoss needs heads=FILE, alex.pth or vgg.pth of {LPIPS_HEADS}")
        net = read_feature_net(path, lambda architecture: LPIPS_LAYERS[architecture], ("alexnet", "vgg16"))
        super().__init__(net, mean=LPIPS_MEAN, std=LPIPS_STD, high_pass=high_pass)
        self.heads = _read_heads(heads, net)

    def compare(self, restored: Tensor, target: Tensor) -> Tensor:
        distances = []
        for head, a, b in zip(self.heads, self.features(restored), self.features(target), strict=True):
            errors = (_normalized(a) - _normalized(b)).square().mean((2, 3))
            distances.append((errors * head.to(errors.dtype)).sum(1).mean())
        return torch.stack(distances).sum()


def _given(loss: str, weights: str | PathLike[str] | None, architectures: Sequence[str]) -> str | PathLike[str]:
    if weights is None:
        wanted = " or ".join(architectures)
        raise ValueError(
            f"{loss} needs weights=FILE, {wanted} in torchvision's layout, as {URL}{FILES[architectures[0]]}"
        )
    return weights


def _usual_layers(architecture: str) -> dict[str, float]:
    third, fourth, fifth = (f"conv{stage}_{len(STAGES[architecture][stage - 1])}" for stage in (3, 4, 5))
    return {"conv1_2": 0.1, "conv2_2": 0.1, third: 1.0, fourth: 1.0, fifth: 1.0}


def _normalized(features: Tensor) -> Tensor:
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + LPIPS_EPS)


def _read_heads(path: str | PathLike[str], net: FeatureNet) -> nn.ParameterList:
    state = read_checkpoint(path).state
    heads = nn.ParameterList()
    for place, index in enumerate(net.indices):
        width = len(net.features[index - 1].get_parameter("weight"))  # of the convolution before the nonlinearity
        key, shape = f"lin{place}.model.1.weight", (1, width, 1, 1)
        found = tuple(state[key].shape) if key in state else None
        if found != shape:
            told = "is missing" if found is None else f"has the shape {found}, not {shape}"
            raise ValueError(f"{path} does not hold the LPIPS heads of {net.architecture}: {key} {told}")
        heads.append(nn.Parameter(state[key].float().flatten(), requires_grad=False))
    return heads
