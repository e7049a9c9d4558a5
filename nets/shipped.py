"""The weights that come with the package, by name and by scale."""

from os import PathLike
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "weights"


def shipped_weights() -> dict[str, Path]:
    """The shipped files by name; beside each lies its card, which says what it is for and how it was trained.

    >>> "claritycore-x4" in shipped_weights()
    True
    """
    return {path.stem: path for path in sorted(FOLDER.glob("*.safetensors"))}


def purpose(name: str) -> str:
    """What shipped weights are for, as their card begins.

    >>> purpose("claritycore-x4")
    'Bicubic super-resolution by 4'
    """
    _, first, *_ = (FOLDER / f"{name}.md").read_text(encoding="utf-8").split("\n\n")
    return " ".join(first.partition(":")[0].split())


def shipped_for(scale: int) -> Path:
    """Find the shipped file that enlarges by `scale`.

    Raises:
        ValueError: if there is none; it says which scales there are.

    >>> shipped_for(4).name
    'claritycore-x4.safetensors'
    """
    by_scale = {int(name.rpartition("-x")[2]): path for name, path in shipped_weights().items() if "-x" in name}
    if scale not in by_scale:
        known = ", ".join(map(str, sorted(by_scale))) or "none"
        raise ValueError(f"no weights for scale {scale} are shipped, only for {known}: give --model CHECKPOINT")
    return by_scale[scale]


def located(path_or_name: str | PathLike[str]) -> Path:
    """Give the path of what is shipped under a name, where no file has it; any other path is given back.

    >>> located("claritycore-x4").name
    'claritycore-x4.safetensors'
    """
    path = Path(path_or_name)
    return path if path.exists() else shipped_weights().get(str(path_or_name), path)
