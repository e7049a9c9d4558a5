"""Files of weights that say what they are: safetensors with a description of the net in the metadata."""

import json
import pickle
import secrets
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

METADATA_KEY = "claritycore"
DEFAULT_NAME = "model.safetensors"


class Checkpoint(NamedTuple):
    """What a file of weights holds.

    Args:
        state: tensors by name.
        model_type: the registered name of the net's family; None where the file does not say.
        config: the fields of the net's config.
    """

    state: dict[str, Tensor]
    model_type: str | None = None
    config: dict[str, Any] = {}  # noqa: RUF012 - never mutated


def write_checkpoint(path: str | PathLike[str], checkpoint: Checkpoint) -> Path:
    """Write a checkpoint; the file appears whole or not at all.

    Args:
        path: a file ending in .safetensors, or a folder, in which the file is called model.safetensors.
        checkpoint: what to write.

    Returns:
        The path of the file.

    Raises:
        ValueError: if the path has another suffix.
    """
    path = Path(path)
    if path.is_dir() or not path.suffix:
        path = path / DEFAULT_NAME
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors, or be a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    description = json.dumps({"model_type": checkpoint.model_type, "config": checkpoint.config})
    state = {key: value.detach().cpu().contiguous() for key, value in checkpoint.state.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        save_file(state, temporary, metadata={"format": "pt", METADATA_KEY: description})
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Read a file of weights without running any code that it may hold.

    Args:
        path: a safetensors file, a folder with a model.safetensors, or a .pth, .pt or .ckpt file of tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, of an unknown kind, or holds more than tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = path / DEFAULT_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pth", ".pt", ".ckpt"):
        return _read_pickle(path)
    raise ValueError(f"{path} must end in .safetensors, .pth, .pt or .ckpt")


def check_weights(model: nn.Module, state: dict[str, Tensor], source: str | PathLike[str]) -> None:
    """Compare the names and shapes of `state` with those of `model`, and say in one sentence what does not fit.

    Args:
        model: the net.
        state: tensors by name.
        source: where they come from, for the message.

    Raises:
        ValueError: if a tensor is missing, left over or of another shape.
    """
    own = model.state_dict()
    complaints = {
        "missing": [key for key in own if key not in state],
        "unknown": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and own[key].shape != state[key].shape],
    }
    told = [f"{len(keys)} {what} (first {keys[0]})" for what, keys in complaints.items() if keys]
    if told:
        raise ValueError(f"{source} does not fit {type(model).__name__}: of its tensors {', '.join(told)}")


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
    if METADATA_KEY not in metadata:
        return Checkpoint(state)
    try:
        description = json.loads(metadata[METADATA_KEY])
        config = {key: _with_tuples(value) for key, value in description["config"].items()}
        return Checkpoint(state, str(description["model_type"]), config)
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} describes itself unreadably: {metadata[METADATA_KEY]!r}") from error


def _with_tuples(value: Any) -> Any:
    """JSON has no tuples, and the configs no lists."""
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _read_pickle(path: Path) -> Checkpoint:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is refused: it holds more than tensors, and reading that could run code") from error
    except Exception as error:  # a damaged pickle may fail in any way
        raise ValueError(f"{path} is damaged or no torch checkpoint") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        inner = [key for key, value in state.items() if isinstance(value, dict)] if isinstance(state, dict) else []
        hint = f"; its weights may be under {inner[0]!r}: save that part alone" if inner else ""
        raise ValueError(f"{path} must hold a plain mapping of names to tensors{hint}")
    return Checkpoint(state)
