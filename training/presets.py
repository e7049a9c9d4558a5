"""Training presets by name: a net, and the settings that it is trained with."""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from ..nets import AutoConfig, BaseConfig, register_presets
from ..nets.registry import nearest, registered_presets
from .settings import INPUT_PATCH, TrainingSettings

# PLKSR's authors train for 450,000 steps and halve the learning rate after these.
PLKSR_STEPS, PLKSR_HALVINGS = 450_000, (100_000, 200_000, 300_000, 400_000, 425_000)
PLKSR_INPUT_PATCH = 96

# Nets that restore photographs, at these scales too.
U_NETS = (
    *("swin-unet", "swin-unet-tiny", "hersr", "hersr-small", "hersr-tiny"),
    *("harmonic", "harmonic-tiny", "rsfmoe", "rsfmoe-tiny"),
)


class Preset(NamedTuple):
    """A net and how it is trained.

    Args:
        config: of the net.
        settings: of the training.

    >>> find_preset("spanx2").config.scale
    2
    """

    config: BaseConfig
    settings: TrainingSettings


def find_preset(name: str) -> Preset:
    """Find a preset, ours or one that `register_presets` made known; its run has its name unless it says otherwise.

    Raises:
        ValueError: if there is none of that name; it offers the nearest.
        TypeError: if its settings are neither `TrainingSettings` nor a mapping of their fields.

    >>> preset = find_preset("rrdbnet-litex4")
    >>> preset.config.num_feat, preset.settings.steps
    (32, 200000)
    """
    known = registered_presets()
    if name not in known:
        raise ValueError(f"there is no preset {name!r}{nearest(name, known)}")
    config, settings = known[name]
    if isinstance(settings, Mapping):
        settings = TrainingSettings(**settings)
    if not isinstance(settings, TrainingSettings):
        raise TypeError(f"the settings of the preset {name!r} must be TrainingSettings, got {settings!r}")
    return Preset(config, replace(settings, name=settings.name or name))


def preset_names() -> list[str]:
    """Names that `find_preset` knows: ours family by family, then those that were registered.

    >>> preset_names()[:2]
    ['rrdbnetx2', 'rrdbnetx3']
    """
    return list(registered_presets())


def _rrdbnet(name: str, scale: int, steps: int, batch_size: int) -> Preset:
    return Preset(
        AutoConfig.from_name(name, scale=scale),
        TrainingSettings(
            steps=steps * 5 // 4 if scale == 8 else steps,
            batch_size=batch_size // 2 if scale == 8 else batch_size,
            patch_size=INPUT_PATCH * scale,
            lr=2e-4,
            loss="l1",
            amp=True,
            ema=False,
        ),
    )


def _plksr(name: str, scale: int) -> Preset:
    return Preset(
        AutoConfig.from_name(name, scale=scale),
        TrainingSettings(
            steps=PLKSR_STEPS,
            batch_size=64,
            patch_size=PLKSR_INPUT_PATCH * scale,
            lr=2e-4,
            loss="l1",
            optimizer="adam",
            beta2=0.99,
            schedule="multistep",
            milestones=tuple(step / PLKSR_STEPS for step in PLKSR_HALVINGS),
            gamma=0.5,
        ),
    )


def _realplksr(scale: int) -> Preset:
    """The first stage of a net for photographs as they come: what Real-ESRNet is trained with."""
    return Preset(
        AutoConfig.from_name("realplksr", scale=scale),
        TrainingSettings(
            recipe="real-esrgan",
            steps=1_000_000,
            batch_size=48,
            patch_size=INPUT_PATCH * scale,
            lr=2e-4,
            loss="l1",
            beta2=0.99,
            schedule="constant",
            ema=True,
            ema_decay=0.999,
        ),
    )


def _span(scale: int) -> Preset:
    return Preset(
        # Without the factor of 255 in front, training is more stable; released weights need it, fresh ones do not.
        AutoConfig.from_name("span", scale=scale, normalize=False),
        TrainingSettings(
            steps=1_000_000,
            batch_size=64,
            patch_size=INPUT_PATCH * scale,
            lr=5e-4,
            loss="l1",
            schedule="multistep",
            milestones=(0.2, 0.4, 0.6, 0.8),
            gamma=0.5,
        ),
    )


def _photographs(name: str, scale: int) -> Preset:
    """For photographs with more than one fault; the routers of some want batches of many images to tell apart."""
    return Preset(
        AutoConfig.from_name(name, scale=scale),
        TrainingSettings(
            recipe="joint",
            steps=500_000,
            batch_size=32,
            patch_size=2 * INPUT_PATCH * scale,
            lr=3e-4,
            loss="charbonnier",
            amp=True,
            ema=True,
            ema_decay=0.999,
        ),
    )


PRESETS: dict[str, Preset] = {
    **{f"rrdbnetx{scale}": _rrdbnet("rrdbnet", scale, 400_000, 16) for scale in (2, 3, 4, 8)},
    **{f"rrdbnet-litex{scale}": _rrdbnet("rrdbnet-lite", scale, 200_000, 32) for scale in (2, 3, 4, 8)},
    **{f"plksrx{scale}": _plksr("plksr", scale) for scale in (2, 3, 4)},
    **{f"plksr-tinyx{scale}": _plksr("plksr-tiny", scale) for scale in (2, 3, 4)},
    "realplksrx4": _realplksr(4),
    **{f"spanx{scale}": _span(scale) for scale in (2, 4)},
    **{f"{name}x{scale}": _photographs(name, scale) for name in U_NETS for scale in (1, 2, 4)},
}
register_presets(PRESETS)
