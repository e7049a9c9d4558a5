"""Which expert each window of a photograph went to, as a picture: `python examples/expert_choice.py [PATH]`.

Four experts are trained for a moment to clean a photograph of which one quarter is blurred, one noisy, one compressed
and one left as it was; the router sees no more than the mean and the root mean square of each feature in a window.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

from claritycore.blocks import (
    ArtifactExpert,
    DeblurExpert,
    DenoiseExpert,
    DetailExpert,
    EntropyLoss,
    MoE2d,
    RouteResult,
    SwitchBalance,
    TopKRouter,
)
from claritycore.training.degradations import degrade

SIDE, WINDOW, CHANNELS, STEPS = 256, 16, 16, 300
EXPERTS = {"detail": DetailExpert, "deblur": DeblurExpert, "denoise": DenoiseExpert, "artifact": ArtifactExpert}


def photograph() -> Tensor:
    """A crop of scikit-image's Chelsea (CC0), (1, 3, SIDE, SIDE) in [0, 1]."""
    crop = data.chelsea()[20 : 20 + SIDE, 90 : 90 + SIDE]
    return torch.from_numpy(crop).permute(2, 0, 1)[None] / 255


def degraded(clean: Tensor, seed: int) -> Tensor:
    """Above clean and blurred, below noisy and compressed."""
    half = clean.shape[2] // 2
    kernel = torch.full((3, 1, 5, 5), 1 / 25)
    blurred = F.conv2d(F.pad(clean, (2, 2, 2, 2), mode="reflect"), kernel, groups=3)
    noisy = degrade(clean, "noise50", [seed], scale=1).image
    compressed = degrade(clean, "jpeg10", [seed], scale=1).image
    above = torch.cat([clean[..., :half, :half], blurred[..., :half, half:]], 3)
    below = torch.cat([noisy[..., half:, :half], compressed[..., half:, half:]], 3)
    return torch.cat([above, below], 2)


class Net(nn.Module):
    """A stem, a mixture over windows, and a convolution back to an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1), nn.GELU(), nn.Conv2d(CHANNELS, CHANNELS, 1))
        router = TopKRouter(2 * CHANNELS, 4, k=1, policies=(SwitchBalance(0.05), EntropyLoss(0.02, diversity=0.02)))
        experts = [expert(CHANNELS) for expert in EXPERTS.values()]
        self.moe = MoE2d(CHANNELS, experts, level="window", window_size=WINDOW, router=router)
        self.last = nn.Conv2d(CHANNELS, 3, 3, padding=1)

    def forward(self, image: Tensor) -> tuple[Tensor, RouteResult]:
        x, route = self.moe(self.stem(image))
        return image + self.last(x), route


def trained(clean: Tensor) -> Net:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(STEPS):
        restored, route = net(degraded(clean, step))
        loss = F.l1_loss(restored, clean) + route.total()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


def draw(path: Path) -> None:
    clean = photograph()
    image = degraded(clean, STEPS)
    net = trained(clean)
    with torch.no_grad():
        restored, route = net(image)
    choice = route.indices[:, 0].view(route.grid[1:])
    mpl.rcParams.update({"font.size": 9, "axes.titlesize": 10})
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    titles = "as it was, blurred, noisy, compressed", "restored"
    for axis, shown, title in zip(axes[:2], (image, restored), titles, strict=True):
        axis.imshow(shown[0].permute(1, 2, 0).clamp(0, 1).numpy())
        axis.set(title=title)
    axes[2].imshow(image[0].mean(0).numpy(), cmap="gray")
    colours = mpl.colormaps["tab10"]
    axes[2].imshow(colours(choice.numpy()), alpha=0.55, extent=(0, SIDE, SIDE, 0), interpolation="nearest")
    patches = [mpl.patches.Patch(color=colours(number), label=name) for number, name in enumerate(EXPERTS)]
    axes[2].legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize=7, frameon=False)
    axes[2].set(title="its expert, window by window")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    print(f"{path} ({path.stat().st_size / 1000:.0f} kB); load {[round(share, 2) for share in route.load().tolist()]}")


def main() -> None:
    mpl.use("Agg")
    root = Path(__file__).parents[1]
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else root / "docs" / "expert_choice.png")


if __name__ == "__main__":
    main()
