"""The U-Nets over images of growing size: time and memory a pixel stay what they are, and the attention is fast.

"reference" is the same net with each window attention written as Swin's authors do: rolled, cut into windows, masked,
attended with the logits in memory, put back and rolled back.

python -m benchmarks.unet --plot
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from claritycore.blocks import WindowAttention2d
from claritycore.deploy import summarize
from claritycore.nets import SwinUNet, SwinUNetConfig, UNet
from claritycore.nets.swin_unet import SIZES

from .runner import Benchmark, Case, Work, main
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


BENCHMARK = Benchmark(
    name="unet",
    cases=CASES,
    inputs=image,
    build=build,
    providers={"reference": rolled, "ours": lambda net: net, "channels_last": channels_last},
    backward=False,
    work=work,
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
