"""The U-Nets over images of growing size: time and memory a pixel stay what they are, and the attention is fast.

"reference" is the same net with each window attention written as Swin's authors do: rolled, cut into windows, masked,
attended with the logits in memory, put back and rolled back.

The hybrid nets at their tiny sizes follow: as trained, deployed, and channels last. They have no peer: no other program
has them. RSFMoENet goes to all four experts here, since at near ties rounding would decide on the choice.

python -m benchmarks.unet --plot
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from claritycore.blocks import WindowAttention2d
from claritycore.deploy import summarize
from claritycore.nets import (
    HARMONIC,
    HERSR,
    HARMONICConfig,
    HERSRConfig,
    RSFMoEConfig,
    RSFMoENet,
    SwinUNet,
    SwinUNetConfig,
    UNet,
)
from claritycore.nets.harmonic import SIZES as HARMONIC_SIZES
from claritycore.nets.hersr import SIZES as HERSR_SIZES
from claritycore.nets.rsfmoe import SIZES as RSFMOE_SIZES
from claritycore.nets.swin_unet import SIZES

from .runner import Benchmark, Case, Work, main
from .span_plksr import net_benchmark
from .window_attention import shifted

CASES = [{"net": "swin-unet-tiny", "size": size} for size in (256, 512, 1024)]


class Rolled(nn.Module):
    """A window attention in the form of Swin's authors, with the weights of one of ours."""

    def __init__(self, attention: WindowAttention2d) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        own = self.attention
        shift = own.shift[0] if min(x.shape[2:]) > own.window_size[0] else 0
        y = shifted(own.projected(x), own.position_bias(), own.num_heads, own.window_size[0], shift)
        return own.returned(y, x)


def image(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"image": torch.rand(1, 3, case["size"], case["size"], device=device, dtype=dtype)}


def build(case: Case) -> UNet:
    net = SwinUNet(SwinUNetConfig(**SIZES[case["net"]]))
    for parameter in net.head.parameters():  # which start at zero: then every provider returns the image
        nn.init.normal_(parameter, std=0.02)
    return net.eval()


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    macs = summarize(build(case), (1, 3, case["size"], case["size"])).macs
    return Work(bytes=2 * 3 * case["size"] ** 2 * dtype.itemsize, flops=2 * macs)


def rolled(net: nn.Module) -> Callable[[Tensor], Tensor]:
    for part in list(net.modules()):
        if isinstance(getattr(part, "attn", None), WindowAttention2d):
            part.attn = Rolled(part.attn)
    return net


def channels_last(net: nn.Module) -> Callable[[Tensor], Tensor]:
    net = net.to(memory_format=torch.channels_last)
    return lambda image: net(image.contiguous(memory_format=torch.channels_last)).contiguous()


def rsfmoe(case: Case) -> RSFMoENet:
    return RSFMoENet(RSFMoEConfig(scale=case["scale"], k=4, **RSFMOE_SIZES["rsfmoe-tiny"]))


def hersr(case: Case) -> HERSR:
    return HERSR(HERSRConfig(scale=case["scale"], **HERSR_SIZES["hersr-tiny"]))


def harmonic(case: Case, *, fast_path: bool = False) -> HARMONIC:
    return HARMONIC(HARMONICConfig(scale=case["scale"], fast_path=fast_path, **HARMONIC_SIZES["harmonic-tiny"]))


UNET = Benchmark(
    name="unet",
    cases=CASES,
    inputs=image,
    build=build,
    providers={"reference": rolled, "ours": lambda net: net, "channels_last": channels_last},
    backward=False,
    work=work,
)

BENCHMARKS = [
    UNET,
    net_benchmark("rsfmoe", rsfmoe, 1e-4),
    net_benchmark("hersr", hersr, 1e-4),
    net_benchmark("harmonic", harmonic, 1e-4),
    net_benchmark("harmonic_fast_path", lambda case: harmonic(case, fast_path=True), 1e-4),
]

if __name__ == "__main__":
    raise SystemExit(main(*BENCHMARKS))
