"""Which files a run restores, and where each result goes: settled, or refused, before any work begins."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from ..images.encoding import FORMATS

KINDS = "PNG, TIFF, JPEG, WebP or BMP"
UNREAD = (
    *(".gif", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".jfif", ".psd", ".exr", ".ppm", ".pgm", ".tga"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
)
"""Endings of pictures that are not read: passing over one of them is told, of other files it is not."""
COMPARISON = "_comparison"
WILD = {"*", "?", "["}


class Job(NamedTuple):
    """One picture: where it is read, where its result goes, and where the comparison, if there is one."""

    source: Path
    target: Path
    comparison: Path | None

    @property
    def targets(self) -> list[Path]:
        return [self.target, *filter(None, [self.comparison])]

    @property
    def done(self) -> bool:
        """Whether its result exists."""
        return os.path.lexists(self.target)


class Found(NamedTuple):
    """A file and its place below the folder that was given; a file that was given by name has no folder."""

    source: Path
    below: Path
    by_name: bool

    @property
    def ending(self) -> str:
        """The end of its name, as formats have it."""
        return self.source.suffix.lower()


def plan_jobs(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    suffix: str = "",
    ext: str | None = None,
    comparison: bool = False,
    recursive: bool = False,
    overwrite: bool = False,
    skip_existing: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> list[Job]:
    """Find the pictures and decide where their results go.

    A folder stands for the pictures in it, and with ``recursive`` in its folders; a pattern (``*``, ``?``, ``[...]``,
    ``**`` for any folders) for those that match. The result of a single file goes to the file ``output``, all other
    results into the folder ``output``, in the same folders below it as the pictures.

    Args:
        inputs: files, folders and patterns.
        output: a folder; for one file also a file.
        suffix: what is added to the names in the folder.
        ext: the format in the folder, as an extension; by default that of each picture.
        comparison: whether a comparison is written beside each result.
        recursive: look into the folders of folders.
        overwrite: results may replace files; else one that exists is refused.
        skip_existing: pictures whose results exist are not refused: `Job.done` says which they are.
        note: called with a line for pictures of a folder or pattern that are of other formats.

    Raises:
        FileNotFoundError: if an input does not exist.
        FileExistsError: if a result exists and may not be replaced.
        ValueError: if a path is empty, nothing is found, two pictures have one result, a result would replace another
            input, or ``output`` cannot hold the results.
        PermissionError: if a folder cannot be looked into, or that of a result cannot be written to.
    """
    for flag, given in (*(("--input", given) for given in inputs), ("--output", output)):
        if not os.fspath(given):
            raise ValueError(f"{flag} must be a path, got ''; the current folder is '.'")
    output = Path(output)
    found = _found(inputs, output, recursive, note)
    to_file = len(found) == 1 and found[0].by_name and bool(output.suffix) and not output.is_dir()
    if to_file:
        if suffix or ext:
            raise ValueError(
                f"--suffix and --ext name files in a folder: leave them out, or give a folder for {output}"
            )
        targets = [output]
    else:
        targets = [output / _renamed(item.below, suffix, ext) for item in found]
    jobs = [
        Job(item.source, target, target.with_stem(target.stem + COMPARISON) if comparison else None)
        for item, target in zip(found, targets, strict=True)
    ]
    _check(jobs, overwrite, skip_existing)
    return jobs


def _found(
    inputs: Sequence[str | os.PathLike[str]], output: Path, recursive: bool, note: Callable[[str], None]
) -> list[Found]:
    """List the pictures, each once, in the order that they were given in."""
    found: dict[str, Found] = {}
    for given in inputs:
        matches = _matches(Path(given), output, recursive)
        items = [item for item in matches if item.by_name or item.ending in FORMATS]
        if not items:
            hint = "" if recursive or not Path(given).is_dir() else "; --recursive looks into its folders"
            raise ValueError(f"{given}: no {KINDS} file there{hint}")
        if others := [item.source.name for item in matches if not item.by_name and item.ending in UNREAD]:
            more = f" and {len(others) - 1} more" if others[1:] else ""
            note(f"{given}: {others[0]}{more} left out: only {KINDS} is read")
        for item in items:
            found.setdefault(os.path.realpath(item.source), item)
    if not found:
        raise ValueError("there must be at least one input")
    return list(found.values())


def _matches(path: Path, output: Path, recursive: bool) -> list[Found]:
    """All files that an input stands for, pictures or not, but hidden ones and results."""
    if path.is_dir():
        base, paths = path, _below(path) if recursive else path.iterdir()
    elif os.path.lexists(path):
        return [Found(path, Path(path.name), by_name=True)]
    elif any(set(part) & WILD for part in path.parts):
        first = next(number for number, part in enumerate(path.parts) if set(part) & WILD)
        base = Path(*path.parts[:first])
        paths = base.glob(str(Path(*path.parts[first:])))
    else:
        raise FileNotFoundError(f"{path} does not exist: check the path")
    # Results of an earlier run are no inputs of this one.
    out, root = output.resolve(), base.resolve()
    results = out if out != root and out.is_relative_to(root) else None
    return [
        Found(path, below, by_name=False)
        for path, below in sorted((path, path.relative_to(base)) for path in paths)
        if not path.is_dir()
        and not any(part.startswith(".") for part in below.parts)
        and not (results and path.resolve().is_relative_to(results))
    ]


def _below(folder: Path) -> Iterator[Path]:
    """All files in a folder and in its folders; one that cannot be looked into is not passed over in silence."""

    def refuse(error: OSError) -> NoReturn:
        raise PermissionError(f"{error.filename} cannot be read: {error.strerror}") from error

    return (Path(parent, name) for parent, _, names in os.walk(folder, onerror=refuse) for name in names)


def _renamed(below: Path, suffix: str, ext: str | None) -> Path:
    kept = below.suffix if below.suffix.lower() in FORMATS else ".png"
    return below.with_name(below.stem + suffix + (ext or kept))


def _check(jobs: Sequence[Job], overwrite: bool, skip_existing: bool) -> None:
    sources = {os.path.realpath(job.source): job for job in jobs}
    taken: dict[str, Job] = {}
    existing = []
    for job in jobs:
        for target in job.targets:
            _check_place(target)
            real = os.path.realpath(target)
            if real in taken:
                raise ValueError(
                    f"{taken[real].source} and {job.source} would both become {target}: restore them into two folders"
                )
            if real in sources and (sources[real] is not job or target is job.comparison):
                raise ValueError(
                    f"the result of {job.source} would replace {target}, an input: give another folder or suffix"
                )
            taken[real] = job
            if os.path.lexists(target) and not (skip_existing and job.done):
                existing.append(target)
    if existing and not overwrite:
        more = f" (and {len(existing) - 1} more)" if len(existing) > 1 else ""
        leave = "" if skip_existing else "--skip-existing to leave it, "
        raise FileExistsError(f"{existing[0]} exists{more}: give --overwrite to replace it, {leave}or another --output")


def _check_place(target: Path) -> None:
    if target.suffix.lower() not in FORMATS:
        raise ValueError(
            f"{target} must end in one of {', '.join(FORMATS)}; to name a folder, make it or end it without a dot"
        )
    if target.is_dir():
        raise ValueError(f"{target} is a folder: give another name for the result")
    folder = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: it cannot hold {target.name}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} may not be written to: give another --output")
