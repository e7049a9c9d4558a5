"""One net on its way into a file: its forms, the sizes it is checked at, and the program that torch makes of it."""

import contextlib
import copy
import dataclasses
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import reparameterize_model
from ..nets.base import stated
from .export_report import SizeCheck, compared

# Dimensions of an image that may stay open in a program, by their names there.
OPEN = {0: "batch", 2: "height", 3: "width"}
CHECKS = 2
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Subject:
    """A net in the form that it was trained in, against which a file is checked, and in the one that is shipped.

    Args:
        trained: in eval mode and float32, on the CPU.
        shipped: the same net fused, in `dtype`.
        size: height and width of the image that is traced.
        dtype: of what is shipped.
        static: whether nothing may stay open.
        tolerance: the largest relative error.
    """

    trained: nn.Module
    shipped: nn.Module
    size: tuple[int, int]
    dtype: torch.dtype
    static: bool
    tolerance: float

    @property
    def name(self) -> str:
        return type(self.trained).__name__

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the image that is traced; a batch of one would be traced as one for ever."""
        return (1 if self.static else 2, stated(self.trained, "in_channels", 3), *self.size)

    def takes(self, size: tuple[int, ...]) -> bool:
        """Whether the net itself runs for images of a size."""
        try:
            with torch.no_grad():
                return bool(self.trained(torch.zeros(size)).isfinite().all())
        except (ValueError, RuntimeError):
            return False

    @torch.no_grad()
    def check(self, run: Run, sizes: list[tuple[int, ...]]) -> tuple[SizeCheck, ...]:
        """Run a file that was written, and hold it against the net.

        Raises:
            ValueError: if the net itself gives NaN or infinity.
            RuntimeError: if the file cannot be run, or is further from the net than the tolerance.
        """
        checks = []
        for size in sizes:
            image = torch.rand(size, generator=torch.Generator().manual_seed(0))
            expected = self.trained(image)
            if not expected.isfinite().all():
                raise ValueError(f"{self.name} gives NaN or infinity: there is nothing to check its file against")
            try:
                actual = run(image.to(self.dtype))
            except Exception as error:  # runtimes raise kinds of their own
                raise RuntimeError(
                    f"the file of {self.name} does not run at {size}: {first_line(error)}; nothing was written"
                ) from error
            checks.append(dataclasses.replace(compared(actual, expected), size=size))
            if not checks[-1].relative_error <= self.tolerance:  # which NaN is not either
                raise RuntimeError(
                    f"the file of {self.name} is not the net: at {checks[-1]}, more than {self.tolerance:.0e}; "
                    "nothing was written"
                )
        return tuple(checks)


def subject_of(net: nn.Module, size: tuple[int, int], dtype: torch.dtype, *, static: bool, tolerance: float) -> Subject:
    """Copy a net in both forms; it stays as it is itself.

    Raises:
        TypeError: if the net does not return an image.
        ValueError: if it does not take one of that size.
    """
    trained = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
    shipped = reparameterize_model(trained).to(dtype)
    subject = Subject(trained, shipped, size, dtype, static, tolerance)
    try:
        with torch.no_grad():
            given = trained(torch.zeros(subject.shape))
    except Exception as error:  # whatever a net raises
        raise ValueError(f"{subject.name} takes no image {subject.shape}: {first_line(error)}") from error
    if not isinstance(given, Tensor):
        raise TypeError(f"{subject.name} must return an image (B, C, H, W) to be exported, got {type(given).__name__}")
    return subject


@dataclass(frozen=True)
class Trace:
    """What torch made of a net.

    Args:
        program: of the shipped form.
        names: of the dimensions that stay open; two that must be equal have one name.
        dynamic: what stays open, with the bounds.
        static: what does not, with the reason.
        sizes: of images at which a file is checked: others than the traced one, where any may come.
        notes: conditions on the sizes that stay open.
    """

    program: torch.export.ExportedProgram
    names: dict[int, str]
    dynamic: dict[str, str]
    static: dict[str, str]
    sizes: list[tuple[int, ...]]
    notes: tuple[str, ...] = ()


def traced(subject: Subject) -> Trace:
    """Trace the shipped form of a net with as many sizes left open as it allows.

    What a net computes may bind sizes: one becomes a number, two become equal, or a condition must hold. Where no
    other size than the traced one is left, or torch cannot trace it with open sizes, all are fixed.

    Raises:
        RuntimeError: if it cannot be traced at all.
    """
    reason = "asked for"
    if not subject.static:
        try:
            program = _exported(subject, torch.export.Dim.AUTO)
        except Exception as error:  # torch raises many kinds
            reason = f"torch.export cannot leave it open: {first_line(error)}"
        else:
            trace, refusal = _open(program, subject)
            if trace.sizes:
                return trace
            reason = f"the net computes with the traced sizes: {refusal}"
    subject = dataclasses.replace(subject, static=True)
    try:
        program = _exported(subject, None)
    except Exception as error:
        raise RuntimeError(f"{subject.name} cannot be exported: {first_line(error)}") from error
    fixed = {name: f"{subject.shape[dim]}, {reason}" for dim, name in OPEN.items()}
    return Trace(program, {}, {}, fixed, [subject.shape])


def first_line(error: BaseException) -> str:
    """What an error says first.

    >>> first_line(ValueError("one, and" + chr(10) + "more"))
    'one, and'
    """
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep to themselves what torch and onnxscript tell: their age, packages that are not there, whole graphs."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def other_sizes(shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Sizes other than one that was traced: odd ones first, then such as suit a net that is bound to multiples.

    >>> next(other_sizes((2, 3, 48, 64)))
    (1, 3, 33, 72)
    """
    _, channels, height, width = shape
    side = max(height, width)
    yield 1, channels, height * 2 // 3 | 1, width + 8
    yield 3, channels, height + 8, width * 2 // 3 | 1
    yield 1, channels, height + 32, width + 32
    yield 3, channels, 2 * height, 2 * width
    yield 1, channels, side + 16, side + 16
    yield 3, channels, 2 * side, 2 * side


def _exported(subject: Subject, hint: Any) -> torch.export.ExportedProgram:
    image = torch.zeros(subject.shape, dtype=subject.dtype)
    return torch.export.export(
        subject.shipped, (image,), dynamic_shapes=None if hint is None else (dict.fromkeys(OPEN, hint),)
    )


def _open(program: torch.export.ExportedProgram, subject: Subject) -> tuple[Trace, str]:
    """Read off a program what it leaves open; with the reason why a size was refused, if one was."""
    shape, refusal_of = _image_of(program), _conditions(program)
    static = {name: _why_fixed(shape[dim]) for dim, name in OPEN.items() if isinstance(shape[dim], int)}
    names: dict[int, str] = {}
    for dim in (dim for dim, name in OPEN.items() if name not in static):
        twins = (names[other] for other in names if str(shape[other]) == str(shape[dim]))
        names[dim] = next(twins, OPEN[dim])

    def fitted(size: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size[dim] if dim in names else subject.shape[dim] for dim in range(4))

    refusals = {size: refusal_of(size) for size in map(fitted, other_sizes(subject.shape)) if size != subject.shape}
    sizes = [size for size, refusal in refusals.items() if not refusal][:CHECKS]
    least = {dim: _least(program, shape[dim]) for dim in names}
    smallest = fitted(tuple(1 if least.get(dim, 2) == 2 else least[dim] for dim in range(4)))
    if sizes and not refusal_of(smallest) and subject.takes(smallest):
        sizes.append(smallest)
    dynamic = {OPEN[dim]: f"{min(least[dim], *(size[dim] for size in sizes))} and up" for dim in names if sizes}
    dynamic |= {OPEN[dim]: f"equal to the {name}" for dim, name in names.items() if name != OPEN[dim]}
    refusal = next(filter(None, refusals.values()), "")
    notes = (f"holds only where {refusal}",) if refusal else ()
    return Trace(program, names, dynamic, static, list(dict.fromkeys(sizes)), notes), refusal or "none may be another"


def _why_fixed(size: int) -> str:
    return f"{size}, " + (
        "as torch takes a traced 1 for the only size" if size == 1 else "fixed by what the net computes"
    )


def _image_of(program: torch.export.ExportedProgram) -> Sequence[Any]:
    """The shape of the image, with symbols where it is open."""
    name = next(iter(program.graph_signature.user_inputs))
    shape = next(node for node in program.graph.nodes if node.name == name).meta["val"].shape
    # What was found to be one number after all is still a symbol, which only prints as that number.
    return [int(str(size)) if str(size).isdecimal() else size for size in shape]


def _least(program: torch.export.ExportedProgram, size: Any) -> int:
    """The smallest that an open size may be; torch counts from 2 where it found no bound."""
    bounds = program.range_constraints.get(size.node.expr)
    return 2 if bounds is None else max(2, int(bounds.lower))


def _conditions(program: torch.export.ExportedProgram) -> Callable[[tuple[int, ...]], str]:
    """What tells why a program does not hold for images of a size, in terms of that, or nothing."""
    guards = getattr(program.module(), "_guards_fn", None)  # torch before 2.9 does not keep them

    def refusal(size: tuple[int, ...]) -> str:
        try:
            if guards is not None:
                guards(torch.empty(size, device="meta"))
        except AssertionError as error:
            told = first_line(error).removeprefix("Guard failed: ")
            return re.sub(r"\w+\.size\(\)\[(\d)\]", lambda found: OPEN.get(int(found[1]), found[0]), told)
        return ""

    return refusal
