"""Which files of a folder are its images, and which of them cannot be used."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..images import read_image
from ..images.encoding import FORMATS
from ..images.reading import image_size

# Words in the names of folders, as data sets have them: DIV2K_train_LR_bicubic, DIV2K_valid_HR, Set5/LRbicx4.
LOW_RESOLUTION = ("lr", "lq")
HELD_OUT = ("valid", "validation", "val", "test")
TRAINING = ("train", "training")


def image_files(folder: Path, leave_out: Sequence[str] = ()) -> tuple[list[Path], dict[str, int]]:
    """Find the image files of a folder and of its sub-folders.

    Args:
        folder: where to look; its own name does not matter.
        leave_out: sub-folders with one of these words in their names are left out, with all that is in them.

    Returns:
        The files in order, and for each sub-folder that was left out how many it holds.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if nothing is found.

    >>> image_files(Path("nowhere"))
    Traceback (most recent call last):
    FileNotFoundError: there is no folder nowhere
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in FORMATS or not path.is_file():
            continue
        parts = path.relative_to(folder).parts[:-1]
        marked = next((n for n, part in enumerate(parts) if holds_word(part, leave_out)), None)
        if marked is None:
            found.append(path)
        else:
            left_out["/".join(parts[: marked + 1])] += 1
    if not found and left_out:
        names = ", ".join(left_out)
        told = "which are left out by their names: give such a folder itself to take what is in it"
        raise ValueError(f"{folder} holds no image file but in {names}, {told}")
    if not found:
        raise ValueError(f"{folder} holds no image file ({', '.join(FORMATS)})")
    return found, dict(left_out)


def holds_word(name: str, words: Sequence[str]) -> bool:
    """Say whether one of the words stands in a name by itself, or before bic or a scale.

    >>> [holds_word(name, LOW_RESOLUTION) for name in ("DIV2K_train_LR_bicubic", "LRbicx4", "lrx2", "colr", "HR")]
    [True, True, True, False, False]
    """
    wanted = "|".join(words)
    return bool(words) and re.search(rf"(?<![a-z])(?:{wanted})(?:(?![a-z])|bic|x\d)", name.lower()) is not None


def obstacle(path: Path, at_least: int, *, whole: bool) -> str:
    """Say what keeps an image from being used; only the head of the file is read, unless the whole is to be seen."""
    try:
        height, width = read_image(path).pixels.shape[-2:] if whole else image_size(path)
    except (ValueError, OSError) as error:
        return str(error).removeprefix(f"{path} ")
    return f"is {width} x {height}, and {at_least} x {at_least} are needed" if min(height, width) < at_least else ""
