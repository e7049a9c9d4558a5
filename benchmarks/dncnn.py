"""DnCNN, the convolution net that restoration is measured by: what comparisons train beside ours, and never shipped."""

from dataclasses import dataclass, replace

from torch import Tensor, nn

from claritycore.nets import BaseConfig, RestorationNet, RestorationOutput, register_config
from claritycore.training import TrainingSettings


@dataclass(frozen=True)
class DnCNNConfig(BaseConfig):
    """Sizes of DnCNN: those of its colour net."""

    num_feat: int = 64
    depth: int = 17

    def build(self) -> "DnCNN":
        return DnCNN(self)


class DnCNN(RestorationNet):
    """Convolutions with batch norm and ReLU that find the residual (arXiv:1608.03981, section III): the yardstick."""

    tile_multiple, tile_safe = 1, True

    def __init__(self, config: DnCNNConfig) -> None:
        super().__init__(config)
        self.receptive_radius = config.depth
        width = config.num_feat
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(config.depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        last = nn.Conv2d(width, 3, 3, padding=1)
        # As the nets of this kit it starts as the image. Drawn as usual, what it says first is as large as the image;
        # learning to say less than that leaves its last rectifiers dead, and then it never learns again.
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
        self.body = nn.Sequential(*layers, last)

    def forward(self, image: Tensor, *, return_aux: bool = False) -> Tensor | RestorationOutput:
        restored = image - self.body(image).to(image.dtype)
        return RestorationOutput(restored) if return_aux else restored


def suited(config: BaseConfig, settings: TrainingSettings) -> TrainingSettings:
    """Of the settings that all nets of a comparison are trained by, those for this one: DnCNN takes smaller steps.

    At a rate that suits the others a chain of so many batch norms hardly learns in the steps that a comparison has.
    """
    share = 0.25 if isinstance(config, DnCNNConfig) else 1.0
    return replace(settings, lr=settings.lr * share, min_lr=settings.min_lr * share)


def register() -> None:
    """Make its files readable by name; not done at import: who imports a benchmark only looks."""
    register_config("dncnn")(DnCNNConfig)
