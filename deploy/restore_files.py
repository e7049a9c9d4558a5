"""Restoring files: every one that can be, written atomically, and a line for each that cannot."""

import copy
import errno
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from ..blocks import reparameterize_model
from ..images import Picture, read_image, write_image
from ..images.encoding import FORMATS
from ..images.writing import LARGEST_SIDE
from ..nets.base import stated
from .ensemble import SelfEnsemble
from .places import Job, plan_jobs
from .progress import one_line
from .restore import NonFiniteOutput, choose_tiles, enlarged, image_channels, restore_picture
from .restore_options import RestoreOptions
from .tile import exact_overlap, is_out_of_memory

# After one of these, no further file can be written either.
NO_MORE_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
Tell = Callable[[str], None]


@dataclass
class RestoreReport:
    """What became of the files.

    Args:
        written: the files that were written.
        failed: the pictures that were not restored, each with the reason.

    >>> RestoreReport().failed
    {}
    """

    written: list[Path] = field(default_factory=list)
    failed: dict[Path, str] = field(default_factory=dict)


def _silent(_: str) -> None:
    pass


def restore_files(
    net: nn.Module,
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    options: RestoreOptions | None = None,
    *,
    tell: Tell = _silent,
    note: Tell = _silent,
    progress: Tell = _silent,
) -> RestoreReport:
    """Restore picture files; one that fails does not stop the others.

    Before any work begins, all places of results are checked: nothing is overwritten unasked, and nothing that is still
    to be read is overwritten at all. Files are written atomically. A full disk ends the run.

    Args:
        net: the net; it is set to eval, and a copy in its deployed form does the work.
        inputs: files, folders, and patterns with ``*``, ``?``, ``[...]`` and ``**``.
        output: a folder, made if it is missing, which gets the folders below the inputs too; for one file also a file.
        options: how.
        tell: called with a line for each file that was written.
        note: called with a line for whatever else should be known, a picture that failed above all.
        progress: called with what is being done, often.

    Returns:
        The report. A picture that fails is in it, with the reason; where only one picture is given, it raises instead.

    Raises:
        FileNotFoundError: if an input does not exist.
        FileExistsError: if a result exists and ``options`` has neither ``overwrite`` nor ``skip_existing``.
        OSError: if the folder of a result cannot be written to.
        ValueError: if the options do not fit the net or each other, the device cannot be used, or there is no picture.
        RuntimeError: if memory runs out for the only picture.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_image(f"{folder}/a.png", Picture(torch.rand(1, 3, 4, 6)))
    ...     report = restore_files(nn.Upsample(scale_factor=2), [folder], f"{folder}/out")
    ...     read_image(report.written[0]).pixels.shape
    torch.Size([1, 3, 8, 12])
    """
    options = options or RestoreOptions()
    names = {name: getattr(options, name) for name in ("suffix", "ext", "recursive", "overwrite", "skip_existing")}
    planned = plan_jobs(inputs, output, comparison=options.side_by_side, note=note, **names)
    jobs = [job for job in planned if not (options.skip_existing and job.done)]
    if len(jobs) < len(planned):
        note(f"{len(planned) - len(jobs)} of {len(planned)} left out: their results exist")
    restorer = _Restorer(net, options, note)
    report = RestoreReport(restorer.written)
    for number, job in enumerate(jobs, start=1):
        place = f"{job.source} ({number} of {len(jobs)})" if len(jobs) > 1 else str(job.source)
        try:
            with _named(job):
                line = restorer.restore(job, lambda share, place=place: progress(f"{place} {share:.0%}"))
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if len(planned) == 1:
                raise
            report.failed[job.source] = str(error)
            note(str(error))
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_MORE_ROOM:
                left = [later.source for later in jobs[number:]]
                report.failed.update(dict.fromkeys(left, "not tried: there was no room left to write to"))
                break
        else:
            tell(line)
    return report


class _Restorer:
    """A net made ready, with one in float32 to fall back on."""

    def __init__(self, net: nn.Module, options: RestoreOptions, note: Tell) -> None:
        image_channels(net)
        scale = stated(net, "scale", 1)
        if options.scale not in (None, scale):
            raise ValueError(f"scale must be {scale}, by which the net enlarges, got {options.scale}")
        self.options, self.note, self.scale = options, note, scale
        self.written: list[Path] = []
        self.device, dtype = find_device(options.device), getattr(torch, options.dtype)
        net = reparameterize_model(net.eval())
        self.exact = (SelfEnsemble(net) if options.tta else net).eval()
        self.net = self.exact.to(self.device)
        if dtype is not torch.float32:
            self.net = copy.deepcopy(self.exact).to(dtype)

    def restore(self, job: Job, progress: Callable[[float], None]) -> str:
        """Restore one file; return the line to print."""
        options = self.options
        progress(0.0)
        picture = read_image(job.source, max_pixels=options.max_pixels)
        if options.depth:
            picture = replace(picture, depth=options.depth)
        self._check_fits(job, picture)
        tile, overlap = choose_tiles(self.net, picture, options.tile, options.overlap)

        def run(net: nn.Module) -> Picture:
            return restore_picture(
                net,
                picture,
                tile=tile,
                overlap=overlap,
                batch=options.batch,
                alpha=options.alpha,
                noise_seed=options.noise_seed,
                progress=lambda done, total: progress(done / total),
            )

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                restored = run(self.net)
            except NonFiniteOutput:
                if self.net is self.exact:
                    raise
                self.note(f"{job.source}: {options.dtype} gives NaN or infinity, so it is restored in float32")
                restored = run(self.exact)
        for message in dict.fromkeys(str(warning.message) for warning in caught if warning.category is UserWarning):
            self.note(f"{job.source}: {message}")
        self._write(job.target, restored)
        if job.comparison:
            self._write(job.comparison, side_by_side(picture, restored))
        height, width = restored.pixels.shape[-2:]
        return f"{job.target}: {width} x {height}, {self._how(picture, tile, overlap)} on {self.device}"

    def _check_fits(self, job: Job, picture: Picture) -> None:
        """Refuse before the work what could not be written after it."""
        format = FORMATS[job.target.suffix.lower()]
        if picture.alpha is not None and self.options.alpha != "drop" and not format.alpha:
            raise ValueError(f"{format.name} cannot hold its transparency: give --ext png, or --alpha drop")
        if picture.depth not in format.depths:
            raise ValueError(f"{format.name} cannot hold its {picture.depth} bits: give --ext png, or --depth 8")
        height, width = (self.scale * side for side in picture.pixels.shape[-2:])
        side, largest = max(height, width * len(job.targets)), LARGEST_SIDE.get(format.name)
        if largest and side > largest:
            raise ValueError(f"{format.name} holds sides of up to {largest} pixels, not {side}: give --ext png")

    def _write(self, path: Path, picture: Picture) -> None:
        format, quality = FORMATS[path.suffix.lower()], self.options.quality
        if quality is not None and not format.lossy:
            self.note(f"{path}: --quality is of JPEG and WebP; {format.name} keeps every value")
            quality = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, picture, quality=quality, overwrite=self.options.overwrite)
        except OSError as error:
            if error.errno is None:  # a sentence of our own
                raise
            raise OSError(f"{path} cannot be written: {error.strerror}") from error
        self.written.append(path)

    def _how(self, picture: Picture, tile: int, overlap: int) -> str:
        if tile >= max(picture.pixels.shape[-2:]):
            return "whole"
        exact = exact_overlap(self.net)
        seams = "exact" if exact is not None and overlap >= exact else "blended"
        return f"in tiles of {tile} with {overlap} pixels around each ({seams})"


def side_by_side(picture: Picture, restored: Picture) -> Picture:
    """Put a picture, enlarged bicubically, to the left of its restored form.

    >>> side_by_side(Picture(torch.rand(1, 3, 2, 3)), Picture(torch.rand(1, 3, 4, 6))).pixels.shape
    torch.Size([1, 3, 4, 12])
    """
    scale = restored.pixels.shape[-1] // picture.pixels.shape[-1]
    alpha = None
    if picture.alpha is not None and restored.alpha is not None:
        alpha = torch.cat([enlarged(picture.alpha, scale), restored.alpha], dim=3)
    return replace(restored, pixels=torch.cat([enlarged(picture.pixels, scale), restored.pixels], dim=3), alpha=alpha)


def find_device(name: str) -> torch.device:
    """Find the device of that name; "auto" takes CUDA, then Apple's GPU, then the CPU.

    Raises:
        ValueError: if it cannot be used here.

    >>> find_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device {name!r} cannot be used here: {one_line(error)}") from error
    return device


@contextmanager
def _named(job: Job) -> Iterator[None]:
    """Let errors name the picture, and say what a lack of memory means."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        _raise_named(job, error)


def _raise_named(job: Job, error: BaseException) -> NoReturn:
    message, kind = str(error) or type(error).__name__, ValueError
    if is_out_of_memory(error):
        kind = RuntimeError
        if not message.startswith("out of memory"):
            message = f"out of memory ({message}): give a smaller picture, or --tile with a small number"
    elif isinstance(error, OSError):
        kind = OSError
        if error.errno is not None:
            message = f"{job.source} cannot be read: {error.strerror}"
    if not any(str(path) in message for path in (job.source, *job.targets)):
        message = f"{job.source}: {message}"
    raise kind(message) from (error.__cause__ if isinstance(error.__cause__, OSError) else error)
