"""Degrading files: a degraded picture for each clean one, and a line that says what was drawn for it."""

import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..deploy.places import Job, plan_jobs
from ..deploy.restore_files import NO_MORE_ROOM, RestoreReport, find_device
from ..images import Picture, imresize, read_image, write_image
from ..images.encoding import FORMATS
from ..images.reading import MAX_PIXELS
from ..nets.base import SCALES
from .data import mixed
from .degradations import degrade
from .recipes import Recipe, find_recipe

DRAWN = "degradations.jsonl"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class DegradeOptions:
    """How files are degraded.

    Args:
        recipe: the name of the recipe.
        scale: by which pictures become smaller: 1, 2, 3, 4 or 8; they are cropped to a multiple of it.
        seed: of what is drawn. A picture's own seed follows from it and from the picture's place in the folder.
        ext: format in the output folder: png, tif, webp or bmp; JPEG would compress once more.
        device: cpu, cuda, cuda:1, mps; auto takes cuda, then mps, then cpu.
        overwrite: replace files that exist.
        recursive: look into the folders of folders.
        max_pixels: refuse pictures of more pixels than this.

    Raises:
        ValueError: if there is no such recipe, scale or format.

    >>> DegradeOptions(recipe="jont")
    Traceback (most recent call last):
    ValueError: there is no recipe 'jont'; did you mean joint?
    """

    recipe: str = "joint"
    scale: int = 1
    seed: int = 0
    ext: str = "png"
    device: str = "auto"
    overwrite: bool = False
    recursive: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        find_recipe(self.recipe)
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(map(str, SCALES))}, got {self.scale!r}")
        object.__setattr__(self, "ext", f".{self.ext.lower().lstrip('.')}")
        if self.ext not in FORMATS or FORMATS[self.ext].name == "JPEG":
            raise ValueError(f"ext must be png, tif, webp or bmp, got {self.ext!r}")


def _silent(_: str) -> None:
    pass


def degrade_files(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: DegradeOptions | None = None,
    *,
    tell: Tell = _silent,
    note: Tell = _silent,
    progress: Tell = _silent,
) -> RestoreReport:
    """Degrade picture files; one that fails does not stop the others.

    Beside the pictures a file of JSON lines says for each where it came from, its seed, by which `degrade` makes the
    same again, and the numbers that were drawn, but for kernels: degradations.jsonl in the folder, or the name of the
    one picture with .jsonl. Before any work begins, all places are checked: nothing is overwritten unasked. Depth, ICC
    profile and EXIF stay; alpha is made smaller bicubically. Each picture appears whole or not at all. A full disk ends
    the run.

    Args:
        inputs: files, folders, and patterns with ``*``, ``?``, ``[...]`` and ``**``.
        output: a folder, made if it is missing, which gets the folders below the inputs too; for one file also a file.
        options: how.
        tell: called with a line for each file that was written.
        note: called with a line for each picture that failed, and for those of formats that are not read.
        progress: called with what is being done.

    Returns:
        What was written, the file of lines last, and which pictures failed, with the reasons. Where only one picture is
        given, a failure raises instead.

    Raises:
        FileNotFoundError: if an input does not exist.
        FileExistsError: if a result exists and ``options.overwrite`` is False.
        OSError: if the folder of a result cannot be written to.
        ValueError: if there is no picture, the device cannot be used, or the result cannot hold the picture.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_image(f"{folder}/a.png", Picture(torch.rand(1, 3, 9, 8)))
    ...     report = degrade_files([folder], f"{folder}/out", DegradeOptions("mild", scale=4))
    ...     [path.name for path in report.written], json.loads(report.written[1].read_text())["jpeg_quality"]
    (['a.png', 'degradations.jsonl'], 95.0)
    """
    options, output = options or DegradeOptions(), Path(output)
    device, recipe = find_device(options.device), find_recipe(options.recipe)
    different = {os.path.realpath(path) for path in inputs}
    to_file = len(different) == 1 and Path(inputs[0]).is_file() and bool(output.suffix) and not output.is_dir()
    ext, recursive = None if to_file else options.ext, options.recursive
    jobs = plan_jobs(inputs, output, ext=ext, recursive=recursive, overwrite=options.overwrite, note=note)
    if to_file and FORMATS[output.suffix.lower()].name == "JPEG":
        raise ValueError(f"{output} would be compressed once more: give a name that ends in .png or .tif")
    lines = output.with_suffix(".jsonl") if to_file else output / DRAWN
    if os.path.lexists(lines) and not options.overwrite:
        raise FileExistsError(f"{lines} exists: give --overwrite to replace it, or another --output")
    report, place = RestoreReport(), str(device)
    for number, job in enumerate(jobs, start=1):
        progress(f"{job.source} ({number} of {len(jobs)})")
        try:
            below = job.source.name if to_file else job.target.relative_to(output).as_posix()
            line = _degrade_file(job, below, options, recipe, place)
            with lines.open("a" if report.written else "w", encoding="utf-8") as drawn:
                drawn.write(json.dumps(line) + "\n")
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if len(jobs) == 1:
                raise
            told = str(error) or type(error).__name__
            report.failed[job.source] = told if str(job.source) in told else f"{job.source}: {told}"
            note(report.failed[job.source])
            if isinstance(error, OSError) and error.errno in NO_MORE_ROOM:
                left = [later.source for later in jobs[number:]]
                report.failed.update(dict.fromkeys(left, "not tried: there was no room left to write to"))
                break
        else:
            report.written.append(job.target)
            tell(f"{job.target}: degraded by {recipe.name}, seed {line['seed']}")
    report.written += [lines] if report.written else []
    return report


def _degrade_file(job: Job, below: str, options: DegradeOptions, recipe: Recipe, device: str) -> dict[str, Any]:
    """Degrade one file; return the line for it."""
    picture = read_image(job.source, max_pixels=options.max_pixels)
    scale = options.scale
    height, width = (side // scale * scale for side in picture.pixels.shape[2:])
    if not height or not width:
        size = " x ".join(str(side) for side in reversed(picture.pixels.shape[2:]))
        raise ValueError(f"{job.source} has {size} pixels, which cannot be made {scale} times smaller")
    seed = mixed(options.seed, zlib.crc32(Path(below).with_suffix("").as_posix().encode()))
    clean = picture.pixels[..., :height, :width].to(device)
    image, report = degrade(clean, recipe, [seed], scale=scale)
    alpha = picture.alpha
    if alpha is not None:
        alpha = imresize(alpha[..., :height, :width], 1 / scale, intermediate="float").clamp(0, 1)
    job.target.parent.mkdir(parents=True, exist_ok=True)
    degraded: Picture = replace(picture, pixels=image.cpu(), alpha=alpha)
    write_image(job.target, degraded, overwrite=options.overwrite)
    line: dict[str, Any] = {"target": str(job.target), "source": str(job.source), "recipe": recipe.name}
    line |= {"scale": scale, "seed": seed, "width": width, "height": height}
    # Kernels are hundreds of numbers, which follow from the seed.
    return line | {name: values[0].tolist() for name, values in report.items() if not name.endswith("kernel")}
