"""Blocks in the form they are trained in and in the form they are shipped in: what deploying saves.

"reference" is the training form in eval mode; "deployed" is what `reparameterize_model` makes of it.

python -m benchmarks.reparameterization
"""

import torch
from torch import Tensor, nn

from claritycore.blocks import (
    SPAB,
    DoubleConvChannelMixer,
    PartialLargeKernelConv,
    PLKBlock,
    RepConv2d,
    reparameterize_model,
)
from claritycore.blocks.rep_conv import DILATED_BRANCHES

from .runner import Benchmark, Case, Work, main

SIZES = [{"channels": 64, "size": 64}, {"channels": 64, "size": 96}]
FORMS = ("dilated", "rectangular", "depthwise")
# Of the mixer's convolutions: ECBSR's, in a form that is exact at the border.
MIXER_BRANCHES = ("3x3", "1x1", "1x1-3x3", "sobel-x", "sobel-y", "laplacian")


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": torch.randn(1, case["channels"], case["size"], case["size"], device=device, dtype=dtype)}


def deployed_work(case: Case, dtype: torch.dtype, backward: bool) -> Work | None:
    return None  # the floor of a whole block says little: its convolutions have one of their own


def deployed(block: nn.Module) -> nn.Module:
    return reparameterize_model(block, inplace=True)


def compare(name: str, cases, build) -> Benchmark:
    return Benchmark(
        name=name,
        cases=cases,
        inputs=feature_map,
        build=lambda case: build(case).eval(),
        providers={"reference": lambda block: block, "deployed": deployed},
        work=deployed_work,
    )


BENCHMARKS = [
    compare(
        "plk_block",
        [{"form": form, **size} for size in SIZES for form in FORMS],
        lambda case: PLKBlock(case["channels"], form=case["form"]),
    ),
    compare(
        "plk_block_mixer_branches",
        [{"form": "dilated", **size} for size in SIZES],
        lambda case: PLKBlock(
            case["channels"],
            form=case["form"],
            mixer=DoubleConvChannelMixer(case["channels"], branches=MIXER_BRANCHES),
        ),
    ),
    compare(
        "partial_large_kernel",
        [{"form": form, **size} for size in SIZES for form in FORMS],
        lambda case: PartialLargeKernelConv(case["channels"], form=case["form"]),
    ),
    compare("spab", [{**size, "channels": 48} for size in SIZES], lambda case: SPAB(case["channels"])),
    compare(
        "rep_conv",
        [{"kernel_size": kernel_size, **SIZES[1]} for kernel_size in (7, 13, 17)],
        lambda case: RepConv2d(
            case["channels"],
            kernel_size=case["kernel_size"],
            groups=case["channels"],
            branches=DILATED_BRANCHES[case["kernel_size"]],
            norm="branch",
        ),
    ),
]

if __name__ == "__main__":
    raise SystemExit(main(*BENCHMARKS))
