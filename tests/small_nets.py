"""The nets at sizes small enough to try every property, and at sizes that learn on a CPU while one waits."""

from collections.abc import Callable

import torch
from torch import nn

from claritycore import nets

# For each scale.
NETS: dict[str, Callable[..., nn.Module]] = {
    "PLKSR": lambda **fields: small_plksr(**fields),
    "PLKSR dilated": lambda **fields: small_plksr(form="dilated", norm="layer", **fields),
    "RealPLKSR": lambda **fields: small_plksr(activation="mish", norm="group", upsampler="dysample", **fields),
    "SPAN": lambda **fields: nets.SPAN(nets.SPANConfig(**{"num_feat": 4, "num_block": 1, **fields})),
    "RRDBNet": lambda **fields: small_rrdbnet("pixelshuffle", **fields),
    "RRDBNet nearest+conv": lambda **fields: small_rrdbnet("nearest+conv", **fields),
    "RRDBNet nearest+conv plain stem": lambda **fields: small_rrdbnet("nearest+conv", unshuffle_stem=False, **fields),
    "SwinUNet": lambda **fields: small_swin_unet(**fields),
    "SwinUNet strided": lambda **fields: small_swin_unet(
        **{"down": "strided", "up": "pixelshuffle", "gated": True, "skip": "add", "ffn": "gated", **fields}
    ),
    "SwinUNet dysample": lambda **fields: small_swin_unet(
        **{"up": "dysample", "upsampler": "dysample", "skip": "none", "residual_scale": 0.5, **fields}
    ),
    "HERSR": lambda **fields: small_hersr(**fields),
    "HERSR local": lambda **fields: small_hersr(**{**LOCAL_HERSR, "kernel_size": 3, "window_size": 2, **fields}),
    "HARMONIC": lambda **fields: small_harmonic(**fields),
    "HARMONIC fast path": lambda **fields: small_harmonic(**{"fast_path": True, **fields}),
    # All four experts for every window: at near ties rounding decides on the choice.
    "RSFMoENet": lambda **fields: small_rsfmoe(
        **{"k": 4, "kernel_prior": True, "noise": True, "severe_blur": 1.0, "early_exit": True, **fields}
    ),
}

# The switches that make a HERSR see no further than its receptive radius.
LOCAL_HERSR = {"statistics": "local", "level": "window", "bypass": 0.5, "split": "haar", "prompt": "generated"}


def small_hersr(**fields) -> nets.HERSR:
    sizes = {"widths": (4, 8), "depths": (1,), "head_dim": 4, "norm_groups": 2, "kernel_size": 5, "window_size": 4}
    return nets.HERSR(nets.HERSRConfig(**{**sizes, **fields}))


# The U-Nets at sizes that learn on a CPU while one waits.
LEARNERS: dict[str, Callable[..., nn.Module]] = {
    "SwinUNet": lambda **fields: small_swin_unet(
        **{"embed_dim": 16, "depths": (2, 2), "refinement": 2, "window_size": 8, "ffn": "gated", **fields}
    ),
    "HERSR": lambda **fields: small_hersr(
        **{"widths": (16, 32), "head_dim": 8, "norm_groups": 4, "window_size": 8, **fields}
    ),
    "HARMONIC": lambda **fields: small_harmonic(
        **{"embed_dim": 16, "depths": (1, 2), "refinement": 1, "head_dim": 8, "window_size": 8, **fields}
    ),
    "RSFMoENet": lambda **fields: small_rsfmoe(
        **{"embed_dim": 8, "head_dim": 8, "window_size": 8, "moe_window": 8, "warm_up": 0, **fields}
    ),
}


def small_swin_unet(**fields) -> nets.SwinUNet:
    sizes = {"embed_dim": 8, "depths": (2, 1), "refinement": 1, "head_dim": 4, "window_size": 3}
    return nets.SwinUNet(nets.SwinUNetConfig(**{**sizes, **fields}))


def small_plksr(**fields) -> nets.PLKSR:
    return nets.PLKSR(nets.PLKSRConfig(**{"num_feat": 8, "num_block": 1, "kernel_size": 5, **fields}))


def small_rrdbnet(upsampler: str, **fields) -> nets.RRDBNet:
    config = nets.RRDBNetConfig(**{"num_feat": 6, "num_block": 1, "num_grow_ch": 2, "upsampler": upsampler, **fields})
    return nets.RRDBNet(config)


def small_harmonic(**fields) -> nets.HARMONIC:
    sizes = {"embed_dim": 4, "depths": (1, 1), "refinement": 0, "head_dim": 2, "window_size": 4, "global_size": 2}
    return nets.HARMONIC(nets.HARMONICConfig(**{**sizes, "kernel_size": 5, "high_depth": 1, **fields}))


def small_rsfmoe(**fields) -> nets.RSFMoENet:
    sizes = {"embed_dim": 4, "depths": (1, 1), "kernel_size": 3, "d_state": 2, "head_dim": 4, "window_size": 2}
    return nets.RSFMoENet(nets.RSFMoEConfig(**{**sizes, "moe_window": 2, "prompt_channels": 4, **fields}))


def made(build, seed: int = 0, **fields):
    """A net none of whose layers is zero, as those are that a net starts as the image by."""
    torch.manual_seed(seed)
    net = build(**fields).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net
