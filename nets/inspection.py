"""Inspecting files of weights without making their nets; and weights under the names that other programs use."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from .checkpoints import read_checkpoint
from .layouts import LAYOUTS, nearest_layout, recognize
from .registry import BaseConfig, describe, draft, is_deployed, nearest

if TYPE_CHECKING:
    from .base import RestorationNet


@dataclass(frozen=True)
class CheckpointInfo:
    """What a file of weights holds; `str()` gives it in a few lines.

    Args:
        path: the file.
        wrapping: what lay around the tensors: names of mappings, then prefixes of names, which end in a dot.
        layout: the name of the public layout; None for a file of this package, and for an unknown one.
        title: the same in words.
        config: the net's config; None where it cannot be determined.
        assumptions: what the file leaves open, with the value that is assumed; a clause each.
        refusal: why the file does not load by itself; None where it does.
        parameters: how many numbers the tensors hold that the net takes.
        dtypes: how many of these tensors there are of each type.

    >>> info = CheckpointInfo(Path("net.pth"), ("params_ema",), None, "of no known layout", None, (), None, 64, {})
    >>> print(info)
    net.pth
      layout      of no known layout, found under params_ema
      weights     64 in 0 tensors
    """

    path: Path
    wrapping: tuple[str, ...]
    layout: str | None
    title: str
    config: BaseConfig | None
    assumptions: tuple[str, ...]
    refusal: str | None
    parameters: int
    dtypes: Mapping[str, int]

    def __str__(self) -> str:
        found = f", found under {' '.join(self.wrapping)}" if self.wrapping else ""
        named = f" ({self.layout})" if self.layout else ""
        rows = [("layout", f"{self.title}{named}{found}")]
        if self.config is not None:
            fields = ", ".join(f"{key}={value!r}" for key, value in self.config.to_dict().items())
            rows += [("net", self.config.model_type), ("config", fields)]
        types = f", {', '.join(self.dtypes)}" if self.dtypes else ""
        rows += [("weights", f"{self.parameters:,} in {sum(self.dtypes.values())} tensors{types}")]
        rows += [("assumed", clause) for clause in self.assumptions]
        rows += [("refused", self.refusal)] if self.refusal else []
        return "\n".join([str(self.path), *(f"  {name:<12}{text}" for name, text in rows)])


def inspect_checkpoint(path: str | PathLike[str]) -> CheckpointInfo:
    """Say what a file of weights is: its layout, net, config and size, and what it leaves open. No net is made.

    Args:
        path: as `AutoModel.from_pretrained` takes it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or holds objects that would run code.

    >>> import tempfile
    >>> from claritycore.nets import AutoConfig, AutoModel
    >>> net = AutoModel.from_config(AutoConfig.from_name("rrdbnet-lite", num_block=1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     inspect_checkpoint(net.save_pretrained(folder)).config == net.config
    True
    """
    checkpoint = read_checkpoint(path)
    state, assumptions, config, refusal = checkpoint.state, (), None, None
    layout, title = None, f"of no known layout{nearest_layout(state)}"
    if checkpoint.model_type is not None:
        title = "of this package" + (", deployed" if is_deployed(state) else "")
    elif found := recognize(state):
        layout, title = found.layout.name, found.layout.title
        assumptions = found.reading.assumptions if found.reading else ()
    try:
        config, state = describe(checkpoint, path, None, {})
        draft(config, state, path)
    except ValueError as error:
        refusal = str(error)
    numbers = sum(value.numel() for value in state.values())
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in state.values())
    details = layout, title, config, assumptions, refusal, numbers, dict(dtypes.most_common())
    return CheckpointInfo(Path(path), checkpoint.wrapping, *details)


def convert_state(net: "RestorationNet", layout: str) -> dict[str, Tensor]:
    """Give a net's weights the names that another program uses: the way back from a public layout.

    Args:
        net: a net of the layout's family.
        layout: "rrdbnet-basicsr", "rrdbnet-esrgan", "rrdbnet-esrgan-old", "plksr-original", "realplksr-neosr",
            "span-basicsr" or "span-basicsr-deployed".

    Returns:
        Tensors by name, for `torch.save` or safetensors; they share the net's memory.

    Raises:
        ValueError: if there is no such layout, it is one of another family, or it cannot hold this net.

    >>> from claritycore.nets import AutoConfig, AutoModel
    >>> config = AutoConfig.from_name("rrdbnet", num_feat=4, num_block=1, upsampler="nearest+conv")
    >>> next(iter(convert_state(AutoModel.from_config(config), "rrdbnet-esrgan-old")))
    'model.0.weight'
    """
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout!r}{nearest(layout, LAYOUTS)}")
    chosen = LAYOUTS[layout]
    if net.config.model_type != chosen.family:
        raise ValueError(f"layout {layout} is one of {chosen.family}, not of {net.config.model_type}")
    try:
        state = chosen.write(net)
    except ValueError as error:
        raise ValueError(f"layout {layout} cannot hold this {type(net).__name__}: {error}") from error
    return {key: value.detach() for key, value in state.items()}
