"""The files of a run: its checkpoint, from which it goes on to the bit, its log, and its weights."""

import io
import pickle
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..nets import AutoConfig, BaseConfig
from ..nets.checkpoints import DEFAULT_NAME, write_whole
from .settings import TrainingSettings

# The weights have the name that makes the folder of a run a checkpoint for whatever takes one.
CHECKPOINT, WEIGHTS, BEST = "last.ckpt", DEFAULT_NAME, "best.safetensors"


@dataclass(frozen=True)
class RunState:
    """All that a run goes on from.

    Args:
        step: how many steps were made.
        config: of the net.
        settings: of the training.
        net: its state dict.
        average: the state dict of the moving average, if there is one.
        optimizer: its state dict.
        critic: the discriminators and their optimiser, if a loss has any.
        scaler: the state dict of float16's loss scaling, if there is one.
        best: the highest PSNR of a validation so far.
        images: how many it was trained on; their number decides which is drawn.
        validated: the step after which it was last validated.
    """

    step: int
    config: BaseConfig
    settings: TrainingSettings
    net: dict[str, Any]
    average: dict[str, Any] | None
    optimizer: dict[str, Any]
    critic: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    best: float | None = None
    images: int | None = None
    validated: int | None = None


def write_state(folder: Path, state: RunState) -> None:
    """Write the checkpoint of a run: whole and on the disk, or the one before stays.

    Raises:
        OSError: if it cannot be written; the checkpoint before is untouched.
    """
    described = {
        **{field.name: getattr(state, field.name) for field in fields(state)},
        "config": {"model_type": state.config.model_type, **state.config.to_dict()},
        "settings": asdict(state.settings),
        "version": __version__,
    }
    memory = io.BytesIO()
    torch.save(described, memory)
    write_whole(folder / CHECKPOINT, memory.getbuffer())


def read_state(folder: str | PathLike[str]) -> RunState:
    """Read the checkpoint of a run.

    Raises:
        FileNotFoundError: if the folder holds none.
        ValueError: if it is damaged, or of a net or settings that are not known.

    >>> read_state("runs/nothing")
    Traceback (most recent call last):
    FileNotFoundError: there is no checkpoint runs/nothing/last.ckpt: nothing to resume
    """
    path = Path(folder) / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: nothing to resume")
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
        read.pop("version")
        config, settings = dict(read.pop("config")), dict(read.pop("settings"))
        config = AutoConfig.from_name(config.pop("model_type"), **config)
        return RunState(config=config, settings=TrainingSettings(**settings), **read)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than tensors and numbers") from error
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint of a run") from error
