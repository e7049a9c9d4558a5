"""Writes MODELS.md: the text of docs/models_template.md, filled in from the registry, the presets and the docstrings.

python docs/make_models.py
"""

import ast
import inspect
import re
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import torch

from claritycore.blocks import reparameterize_model
from claritycore.blocks.reparam import count_parameters
from claritycore.deploy import summarize
from claritycore.deploy.summary import REPORTED_SIZE
from claritycore.nets import AutoConfig, AutoModel, BaseConfig, RestorationNet, list_models
from claritycore.nets.base import SCALES
from claritycore.training.presets import PRESETS, find_preset
from claritycore.training.settings import TrainingSettings

TEMPLATE = Path(__file__).parent / "models_template.md"
PAGE = Path(__file__).parents[1] / "MODELS.md"
HEIGHT, WIDTH = REPORTED_SIZE
SHOWN_SCALES = tuple(scale for scale in SCALES if scale > 1)
QUOTED = 4
"""The scale of what is told for one scale alone."""
OURS = ("swin-unet", "hersr", "harmonic", "rsfmoe")
"""Families that are of no paper, but build on what papers have."""


def document() -> str:
    """Fill in the template: {{what: arguments}} becomes what the function of that name makes of the arguments."""

    def fill(place: re.Match[str]) -> str:
        return PARTS[place["part"]](*place["arguments"].split())

    return re.sub(r"\{\{(?P<part>\w+):?(?P<arguments>[^}]*)\}\}", fill, TEMPLATE.read_text(encoding="utf-8"))


def quick_reference(*families: str) -> str:
    """Fill in a line for each family: its sizes, and where to read on."""
    lines = [["net", "task", f"parameters at x{QUOTED}", "scales", "paper", "what it is"]]
    for family in families:
        names = _names_of(family)
        counts = ", ".join(
            f"{_millions(_counts(AutoConfig.from_name(name, scale=QUOTED))[0])} `{name}`" for name in names
        )
        net = type(_build(AutoConfig.from_name(family)))
        told = inspect.getdoc(net) or ""
        paper, place = re.search(r"Source:\s+(\w+) \(arXiv:([\d.]+)\)", told).groups()  # pyright: ignore[reportOptionalMemberAccess]
        link, page = (
            f"[{net.__name__}](#{net.__name__.lower()})",
            f"{'ours, after ' if family in OURS else ''}[{paper}](https://arxiv.org/abs/{place})",
        )
        scales = ", ".join(map(str, SCALES))
        lines.append([link, "super-resolution, restoration", counts, scales, page, told.partition("\n")[0]])
    return _table(lines)


def config_fields(family: str) -> str:
    """The fields of a config: type, default and what its docstring says of them."""
    config = AutoConfig.from_name(family)
    told = {name: text for kind in reversed(type(config).__mro__) for name, text in _arguments(kind).items()}
    return _table(
        [
            ["parameter", "type", "default", "description"],
            *([f"`{f.name}`", _type(f.type), f"`{f.default!r}`", told[f.name]] for f in fields(config)),  # pyright: ignore[reportArgumentType]
        ]
    )


def sizes(*names: str) -> str:
    """What the nets of some names cost: parameters by scale, and the rest at QUOTED."""
    costs = f"multiply-adds for {WIDTH} x {HEIGHT} at x{QUOTED}, deployed"
    header = ["name", "fields", *(f"x{scale}" for scale in SHOWN_SCALES), costs, "receptive radius", "tiles"]
    lines = [header]
    for name in names:
        counts = [_counted(name, scale) for scale in SHOWN_SCALES]
        net = _build(AutoConfig.from_name(name, scale=QUOTED)).eval()
        tiles = "exact" if net.tile_safe else "not exact"
        summary = summarize(reparameterize_model(net, inplace=True), (1, 3, HEIGHT // QUOTED, WIDTH // QUOTED))
        told = f"{summary.macs / 1e9:,.1f} G"
        lines.append(
            [f"`{name}`", _differences(AutoConfig.from_name(name)), *counts, told, f"{net.receptive_radius} px", tiles]
        )
    return _table(lines)


def presets(*families: str) -> str:
    """The presets of the nets of some names, with the command that starts each."""
    header = ["command", "scale", "parameters", "steps", "batch", "patch", "learning rate", "loss"]
    lines = [[*header, "degradation", "mixed precision", "EMA"]]
    for name in PRESETS:
        config, settings = find_preset(name)
        if re.fullmatch(rf"({'|'.join(families)})x\d", name):
            lines.append(
                [
                    f"`claritycore {name}`",
                    f"x{config.scale}",  # pyright: ignore[reportAttributeAccessIssue]
                    f"{_counts(config)[0]:,}",
                    f"{settings.steps:,}",
                    str(settings.batch_size),
                    f"{settings.patch_size} x {settings.patch_size}",
                    _rate(settings),
                    settings.loss,
                    settings.recipe,
                    "on" if settings.amp else "off",
                    "on" if settings.ema else "off",
                ]
            )
    return _table(lines)


def parameters(name: str, *overrides: str) -> str:
    """The number of parameters of a net, some fields given as KEY=VALUE."""
    given = {key: ast.literal_eval(value) for key, _, value in (override.partition("=") for override in overrides)}
    return f"{_counts(AutoConfig.from_name(name, **given))[0]:,}"


def training_flags() -> str:
    """The fields of the training settings."""
    told = _arguments(TrainingSettings)
    return _table(
        [
            ["flag", "default", "description"],
            *([f"`--{f.name.replace('_', '-')}`", f"`{f.default!r}`", told[f.name]] for f in fields(TrainingSettings)),
        ]
    )


PARTS = {part.__name__: part for part in (quick_reference, config_fields, sizes, presets, parameters, training_flags)}


def _names_of(family: str) -> list[str]:
    return [name for name in list_models() if AutoConfig.from_name(name).model_type == family]


def _build(config: BaseConfig) -> RestorationNet:
    with torch.device("meta"):
        return AutoModel.from_config(config)


@cache
def _counts(config: BaseConfig) -> tuple[int, int]:
    """The parameters of a net in training, and deployed."""
    net = _build(config).eval()
    return count_parameters(net), count_parameters(reparameterize_model(net, inplace=True))


def _counted(name: str, scale: int) -> str:
    trained, shipped = _counts(AutoConfig.from_name(name, scale=scale))
    return f"{trained:,}" if trained == shipped else f"{trained:,}, deployed {shipped:,}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _differences(config: BaseConfig) -> str:
    """The fields in which a size differs from its family."""
    base = AutoConfig.from_name(config.model_type).to_dict()
    changed = [f"`{key}={value!r}`" for key, value in config.to_dict().items() if value != base[key]]
    return ", ".join(changed) or "the defaults"


def _rate(settings: TrainingSettings) -> str:
    mantissa, exponent = f"{settings.lr:e}".split("e")
    rate = f"{float(mantissa):g}e{int(exponent)}"
    if settings.schedule == "multistep":
        shares = ", ".join(f"{100 * share:.3g}" for share in settings.milestones)
        return f"{rate}, times {settings.gamma:g} at {shares} %"
    return f"{rate}, {settings.schedule}"


def _arguments(documented: type) -> dict[str, str]:
    """What the Args: of a docstring says of each."""
    _, _, section = inspect.cleandoc(documented.__doc__ or "").partition("\nArgs:\n")
    section = re.split(r"\n(?=\S)", section)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _type(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f"`{choice!r}`" for choice in get_args(kind))
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("|", "or")


def _table(lines: list[list[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rows = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


if __name__ == "__main__":
    PAGE.write_text(document(), encoding="utf-8")
