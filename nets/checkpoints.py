"""Files of weights that describe their net: safetensors with its config in the metadata."""

import json
import os
import pickle
import re
import secrets
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .shipped import located, shipped_weights

METADATA, METADATA_KEY = "__metadata__", "claritycore"
DEFAULT_NAME = "model.safetensors"

# Where files keep their weights beside counters and optimisers: of several, the averaged ones are the better.
WRAPPERS = ("params_ema", "params-ema", "params", "state_dict", "model_state_dict", "model", "net")
# What DataParallel, torch.compile, Lightning and nets within nets put before every name.
PREFIXES = ("module.", "netG.", "_orig_mod.", "generator.", "model.", "net.")
# What lies beside the weights of a net in such a state: AveragedModel's counter, and the net's opponent.
COUNTER = "n_averaged"
OPPONENTS = ("netD.", "discriminator.")
DEEPEST_WRAPPING = 4  # a file may hold a mapping that holds itself


class Checkpoint(NamedTuple):
    """What a file of weights holds.

    Args:
        state: tensors by name.
        model_type: the registered name of the net's family; None where the file does not name it.
        config: the fields of the net's config.
        wrapping: what was removed around the tensors: names of mappings, then prefixes, which end in a dot.
        beside: tensors that lay beside the net's: an average's counter, the weights of a discriminator.
    """

    state: dict[str, Tensor]
    model_type: str | None = None
    config: dict[str, Any] = {}  # noqa: RUF012 - never mutated
    wrapping: tuple[str, ...] = ()
    beside: dict[str, Tensor] = {}  # noqa: RUF012 - never mutated


def write_checkpoint(path: str | PathLike[str], checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, atomically.

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
    write_whole(path, _in_order(save(state, metadata={"format": "pt", METADATA_KEY: description})))
    return path


def _in_order(data: bytes) -> bytes:
    """Sort the metadata of a safetensors file, which come in an order by chance: equal nets give equal files."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header = {METADATA: dict(sorted(header.pop(METADATA).items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(end - 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(data)[end:]])


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically: what was there before stays until the new one is complete and on the disk.

    Raises:
        OSError: if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk does not say which file it was
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | PathLike[str]) -> Checkpoint:
    """Read a file of weights without running any code that it may hold.

    Weights that lie under one of `WRAPPERS`, or whose names all start with one of `PREFIXES`, come without these;
    numbers and words beside the tensors are left out.

    Args:
        path: a safetensors file, a folder with a model.safetensors, or a .pth, .pt or .ckpt file of tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        PermissionError: if it may not be read.
        ValueError: if the file is damaged, of an unknown kind, or holds more than tensors.
    """
    path = Path(path)
    try:
        path = located(path)
        path = path / DEFAULT_NAME if path.is_dir() else path
        is_file = path.is_file()
        if is_file:
            path.open("rb").close()  # safetensors would say that there is none
        elif path.exists():
            raise ValueError(f"{path} is no regular file")
    except PermissionError as error:
        raise PermissionError(f"{path} cannot be read: {error.strerror}") from error
    if not is_file:
        shipped = "" if path.suffix else f"; shipped are {', '.join(shipped_weights()) or 'none'}"
        raise FileNotFoundError(f"there is no checkpoint {path}{shipped}")
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
        "unexpected": [key for key in state if key not in own],
        "of another shape": [key for key in own if key in state and own[key].shape != state[key].shape],
        "of no floating-point type": [
            key for key in own if key in state and own[key].is_floating_point() and not state[key].is_floating_point()
        ],
    }
    misfits = [f"{len(keys)} {what} (first {keys[0]})" for what, keys in complaints.items() if keys]
    if misfits:
        raise ValueError(f"{source} does not fit {type(model).__name__}: of its tensors {', '.join(misfits)}")


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - the file is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
    if METADATA_KEY not in metadata:
        state, prefixes, beside = _without_prefixes(state)
        return Checkpoint(state, wrapping=prefixes, beside=beside)
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
    with path.open("rb") as file:
        start = file.read(2)
    if not start.startswith((b"PK", b"\x80")):  # zip, or the pickle that torch wrote before 1.6
        raise ValueError(f"{path} is damaged or no torch checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):  # of the file's age
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({kind[1]})" if kind else ""
        raise ValueError(
            f"{path} is refused: it holds more than tensors{what}, and reading that could run code"
        ) from error
    except Exception as error:  # a damaged pickle may fail in any way
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is refused: it is a TorchScript program, not a file of tensors") from error
        raise ValueError(f"{path} is damaged or no torch checkpoint") from error
    checkpoint = unwrap(content, path)
    # One stored number may claim any shape: the net would be made that large.
    if max(value.nbytes for value in checkpoint.state.values()) > path.stat().st_size:
        raise ValueError(f"{path} is refused: one of its tensors claims to be larger than the whole file")
    return checkpoint


def unwrap(content: Any, source: str | PathLike[str]) -> Checkpoint:
    """Find the tensors among what a training loop keeps beside them.

    Args:
        content: a mapping of names to tensors, or one that holds such a mapping under one of `WRAPPERS`.
        source: where it comes from, for the message.

    Raises:
        ValueError: if there is no such mapping, or it holds more than tensors, numbers and words.
    """
    names: list[str] = []
    for _ in range(DEEPEST_WRAPPING):
        inner = [name for name in WRAPPERS if isinstance(content, Mapping) and _is_filled(content.get(name))]
        if not inner:
            break
        names.append(inner[0])
        content = content[inner[0]]
    entries = dict(content) if isinstance(content, Mapping) else {}
    state = {key: value.detach() for key, value in entries.items() if _is_plain(value)}
    beside = int | float | str | None
    others = {key: value for key, value in entries.items() if key not in state and not isinstance(value, beside)}
    if not state or others or not all(isinstance(key, str) for key in state):
        mappings = [key for key, value in others.items() if isinstance(value, Mapping)]
        hint = f"; its weights may be under {mappings[0]!r}: save that part alone" if mappings else ""
        raise ValueError(f"{source} must hold a plain mapping of names to tensors{hint}")
    state, prefixes, beside = _without_prefixes(state)
    return Checkpoint(state, wrapping=(*names, *prefixes), beside=beside)


def put_back_prefixes(checkpoint: Checkpoint, model: nn.Module) -> Checkpoint:
    """Give the tensors prefixes back that the model's own names have: it may have a part called `generator`."""
    names = [part for part in checkpoint.wrapping if not part.endswith(".")]
    prefixes = checkpoint.wrapping[len(names) :]
    own = model.state_dict()
    if checkpoint.beside.keys() & own.keys():
        whole = {"".join(prefixes) + key: value for key, value in checkpoint.state.items()}
        return checkpoint._replace(state=whole | checkpoint.beside, wrapping=tuple(names), beside={})

    def known(kept: int) -> int:
        return sum("".join(prefixes[kept:]) + key in own for key in checkpoint.state)

    kept = max(range(len(prefixes), -1, -1), key=known)  # of equals the first: nothing is put back
    state = {"".join(prefixes[kept:]) + key: value for key, value in checkpoint.state.items()}
    return checkpoint._replace(state=state, wrapping=(*names, *prefixes[:kept]))


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def _is_filled(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) > 0


def _without_prefixes(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...], dict[str, Tensor]]:
    """Remove the prefixes that every name has, however many; return them too, and what lies beside these names."""
    taken: list[str] = []
    beside: dict[str, Tensor] = {}
    while state:
        aside = {key for key in state if key == COUNTER or key.startswith(OPPONENTS)} if not taken else set()
        names = [key for key in state if key not in aside]
        prefix = next((prefix for prefix in PREFIXES if names and all(key.startswith(prefix) for key in names)), None)
        # The first ESRGAN calls its layers model.0, model.1, ...
        if prefix is None or (prefix == "model." and names[0][len(prefix) :][:1].isdigit()):
            break
        taken.append(prefix)
        beside |= {key: state[key] for key in aside}
        state = {key[len(prefix) :]: state[key] for key in names}
    return state, tuple(taken), beside
