"""Compare the providers of one operation: first whether they agree, then how long they take and what they hold.

A benchmark file declares *what* to compare in one `Benchmark`; everything about *how* is here.
"""

import argparse
import pkgutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .agreement import Named, disagreement, leaves
from .machine import Ceilings, Stamp, Work, iqr_percent, peak_bytes, time_in_turns
from .report import Progress, Result, file_stem, label, plot, table, write_csv

__all__ = ["Benchmark", "Work", "main"]

Case = Mapping[str, Any]
Inputs = Mapping[str, Any] | tuple[Any, ...]
Gradients = Sequence[Tensor | None]

RESULTS = Path(__file__).parent / "results"
SEED = 0
# A median whose times have a larger inter-quartile range says little: its row is marked, in the table and in the CSV.
NOISY_PERCENT = 15
# Room for long sums, and in float32 none for TF32, which leaves three times as much.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}

# A provider that raises one of these is not at fault: it is not installed, not made for this device, or too large.
ABSENT = (ImportError, NotImplementedError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Benchmark:
    """What to compare.

    Args:
        name: of the benchmark, and of its files.
        cases: the sweep, smallest first; the values of a case are what `inputs`, `build` and `work` look at.
        inputs: `inputs(case, device, dtype)` draws the arguments of one call: keywords in a dict, or a tuple.
        providers: by name, the functions to compare; "reference" is the base of agreement and of ratios. A string
            "module:attribute" is imported when its turn comes.
        build: `build(case)` makes the module under test. With it, a provider takes the module (a copy of its own,
            with the same weights) and returns the function to compare: `lambda net: net`, `torch.compile`.
        peer: the provider that the others are also compared with.
        cuda_only: providers that need CUDA tensors.
        backward: whether the backward pass is compared and timed too.
        tolerance: by dtype, the largest difference allowed, relative to the largest value of the reference.
        work: `work(case, dtype, backward)` counts what the floor is computed from; forward and backward together
            where `backward` is true. None: no floor.
        compared: what of the result of a call is compared, where providers need not agree on all of it; timed is the
            call alone.
    """

    name: str
    cases: Sequence[Case]
    inputs: Callable[[Case, torch.device, torch.dtype], Inputs]
    providers: Mapping[str, Callable[..., Any] | str]
    build: Callable[[Case], nn.Module] | None = None
    peer: str = ""
    cuda_only: Sequence[str] = ()
    backward: bool = False
    tolerance: Mapping[torch.dtype, float] = field(default_factory=dict)
    work: Callable[[Case, torch.dtype, bool], Work | None] = lambda case, dtype, backward: None
    compared: Callable[[Any], Any] = lambda result: result

    def __post_init__(self) -> None:
        if not self.cases:
            raise ValueError(f"cases of {self.name!r} must not be empty, got {self.cases!r}")
        for name in ["reference", *filter(None, [self.peer]), *self.cuda_only]:
            if name not in self.providers:
                raise ValueError(f"providers of {self.name!r} must have {name!r}, got {list(self.providers)}")


@dataclass(frozen=True)
class Plan:
    """How a run goes: where, in which dtype, which part of the sweep, and how long to measure."""

    device: torch.device
    dtype: torch.dtype
    backward: bool | None = None
    case_filter: str = ""
    provider_filter: str = ""
    cases: int | None = None
    repeats: int = 50  # 0: nothing is timed
    seconds: float = 10.0  # that the repeats of one stage of one case may take
    attempts: int = 3  # at a stage of a case whose times scatter: the calmest counts

    def cases_of(self, benchmark: Benchmark) -> list[Case]:
        chosen = [case for case in benchmark.cases if self.case_filter in f"{benchmark.name} {label(case)}"]
        return chosen[: self.cases]

    def providers_of(self, benchmark: Benchmark) -> list[str]:
        """List the chosen providers, the reference first: nothing can be judged without it."""
        others = [name for name in benchmark.providers if name != "reference"]
        return ["reference", *(name for name in others if self.provider_filter in name)]


class Step:
    """One provider made ready for one case, with inputs and parameters of its own: what a repeat calls."""

    def __init__(self, benchmark: Benchmark, provider: str, case: Case, plan: Plan, backward: bool) -> None:
        if provider in benchmark.cuda_only and plan.device.type != "cuda":
            raise NotImplementedError("needs CUDA tensors")
        declared = benchmark.providers[provider]
        self.call = pkgutil.resolve_name(declared) if isinstance(declared, str) else declared
        torch.manual_seed(SEED)
        inputs = benchmark.inputs(case, plan.device, plan.dtype)
        self.positional, self.keywords = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
        named = {f"input {key}": leaves(value) for key, value in [*enumerate(self.positional), *self.keywords.items()]}
        self.wanted = [(name, t) for name, tensors in named.items() for t in tensors if t.is_floating_point()]
        if benchmark.build:
            module = _stirred(benchmark.build(case)).to(plan.device, plan.dtype).train(backward)
            self.wanted += [(f"parameter {name}", parameter) for name, parameter in module.named_parameters()]
            self.call = self.call(module)
        for _, tensor in self.wanted:
            tensor.requires_grad_(backward)
        self.backward, self.compared = backward, benchmark.compared
        self.upstream: list[Tensor] | None = None

    def __call__(self, part: Callable[[Any], Any] = lambda result: result) -> tuple[list[Tensor], Gradients]:
        with torch.set_grad_enabled(self.backward):
            outputs = leaves(part(self.call(*self.positional, **self.keywords)))
        return outputs, self._gradients(outputs) if self.backward else ()

    def named_results(self) -> Named:
        """Run once from a fixed seed and name what comes out and is to be compared."""
        torch.manual_seed(SEED)
        outputs, gradients = self(self.compared)
        self.upstream = None
        results = [(f"output {i}", output.detach()) for i, output in enumerate(outputs)]
        return results + [(f"gradient of {n}", g) for (n, _), g in zip(self.wanted, gradients, strict=self.backward)]

    def _gradients(self, outputs: list[Tensor]) -> Gradients:
        roots = [output for output in outputs if output.requires_grad]
        if not roots:
            return [None] * len(self.wanted)
        if self.upstream is None:
            # A gradient of ones, or one that follows the input, is blind to what a normalisation does to gradients.
            draws = torch.Generator().manual_seed(SEED + 1)
            self.upstream = [torch.empty_like(root).copy_(torch.randn(root.shape, generator=draws)) for root in roots]
        return torch.autograd.grad(roots, [t for _, t in self.wanted], self.upstream, allow_unused=True)


def run(benchmark: Benchmark, plan: Plan, ceilings: Ceilings, progress: Progress) -> Iterator[Result]:
    """Check and time every chosen case and stage."""
    with_backward = benchmark.backward if plan.backward is None else plan.backward
    for case in plan.cases_of(benchmark):
        for backward in (False, True)[: 1 + with_backward]:
            yield from _compare(benchmark, case, plan, backward, ceilings, progress)


def main(*benchmarks: Benchmark, argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks as the command line says, print the table, write the CSV files and the plots.

    Returns the exit code: 0, or 1 if a provider disagreed with the reference or raised.
    """
    options, plan = _options(benchmarks, argv)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.allow_tf32 = False  # in convolutions too, float32 means float32
    progress, stamp, ceilings = Progress(), Stamp.take(plan.device), Ceilings(plan.device, plan.dtype)
    results = {benchmark.name: list(run(benchmark, plan, ceilings, progress)) for benchmark in benchmarks}
    progress.clear()
    print(table([row for rows in results.values() for row in rows], stamp, ceilings.measured()))
    for name, rows in results.items():
        path = (options.csv or RESULTS) / file_stem(name, options.dtype, options.device, stamp)
        if rows and (options.csv or not (options.quick or options.check)):
            write_csv(rows, stamp, ceilings.measured(), Path(f"{path}.csv"))
        if rows and options.plot:
            plot(rows, Path(f"{path}.png"))
    return int(any(row.status in ("refused", "failed") for rows in results.values() for row in rows))


def _compare(
    benchmark: Benchmark, case: Case, plan: Plan, backward: bool, ceilings: Ceilings, progress: Progress
) -> Iterator[Result]:
    stage = "forward+backward" if backward else "forward"
    progress.show(f"{benchmark.name} {label(case)}, {stage}: checking")
    steps, verdicts = _checked(benchmark, case, plan, backward)
    if plan.repeats:
        work = benchmark.work(case, plan.dtype, backward)
        progress.show(f"{benchmark.name} {label(case)}, {stage}: timing")
    else:
        work, verdicts = (
            None,
            {n: ("agrees", "not timed") if n in steps else verdict for n, verdict in verdicts.items()},
        )
        steps = {}
    floor, bound_by = ceilings.floor(work) if work else (None, "")
    peaks = {name: peak_bytes(step, plan.device) for name, step in steps.items()}
    seconds = _calmest(steps, plan)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    dtype = str(plan.dtype).removeprefix("torch.")
    for name, (status, reason) in verdicts.items():
        result = Result(
            *(benchmark.name, label(case), stage, name, status, reason, dtype, plan.device.type),
            peer=benchmark.peer,
            floor_s=floor,
            bound_by=bound_by,
        )
        if status == "timed":
            result = replace(
                result,
                reason="noisy" if iqr_percent(seconds[name]) > NOISY_PERCENT else "",
                median_s=medians[name],
                iqr_percent=iqr_percent(seconds[name]),
                repeats=len(seconds[name]),
                peak_bytes=peaks[name],
                vs_reference=medians["reference"] / medians[name],
                vs_peer=medians[benchmark.peer] / medians[name] if benchmark.peer in medians else None,
                over_floor=medians[name] / floor if floor else None,
            )
        yield result


def _calmest(steps: Mapping[str, Step], plan: Plan) -> dict[str, list[float]]:
    """Clock again while a spread is that of a noisy machine, and keep the attempt whose largest is the smallest."""

    def noise(times: Mapping[str, Sequence[float]]) -> float:
        return max(map(iqr_percent, times.values()), default=0)

    attempts: list[dict[str, list[float]]] = [] if steps else [{}]
    while len(attempts) < plan.attempts and (not attempts or noise(attempts[-1]) > NOISY_PERCENT):
        attempts.append(time_in_turns(steps, plan.device, plan.repeats, plan.seconds))
    return min(attempts, key=noise)


def _checked(
    benchmark: Benchmark, case: Case, plan: Plan, backward: bool
) -> tuple[dict[str, Step], dict[str, tuple[str, str]]]:
    """Return the steps of the providers that agree with the reference, and (status, reason) of every provider."""
    tolerance = {**TOLERANCE, **benchmark.tolerance}[plan.dtype]
    steps, verdicts, expected = {}, {}, None
    for name in plan.providers_of(benchmark):
        try:
            step = Step(benchmark, name, case, plan, backward)
            results = step.named_results()
            # The reference is compared with itself, too: one that is not finite is no reference.
            reason = disagreement(results, expected or results, tolerance)
            status = "refused" if reason else "timed"
        except ABSENT as error:
            status, reason = "absent", _one_line(error)
        except Exception as error:
            status, reason = "failed", f"{type(error).__name__}: {_one_line(error)}"
        verdicts[name] = status, reason
        if status == "timed":
            steps[name], expected = step, expected or results
        elif name == "reference":
            unjudged = "refused", "there is no reference to agree with"
            return {}, dict.fromkeys(plan.providers_of(benchmark), unjudged) | verdicts
    return steps, verdicts


def _stirred(module: nn.Module) -> nn.Module:
    """Move every parameter off its start value: behind a weight of zero or one a wrong provider looks right."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return module


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _options(benchmarks: Sequence[Benchmark], argv: Sequence[str] | None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(description=f"Compare the providers of {', '.join(b.name for b in benchmarks)}.")
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=[str(d).removeprefix("torch.") for d in TOLERANCE], default="float32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--quick", action="store_true", help="only the smallest case, with few repeats, and no CSV")
    parser.add_argument("--check", action="store_true", help="only whether providers agree, in the smallest case")
    parser.add_argument(
        "--backward", action=argparse.BooleanOptionalAction, help="time it too (default: as the benchmark declares)"
    )
    parser.add_argument("--only", default="", metavar="CASE/PROVIDER", help="parts of names; either may be empty")
    parser.add_argument("--csv", type=Path, metavar="FOLDER", help=f"where to write (default: {RESULTS.name})")
    parser.add_argument("--plot", action="store_true", help="draw time against case as a PNG beside the CSV")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not cuda:
        parser.error("--device cuda: torch finds no CUDA device here")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.csv and not next(path for path in (options.csv, *options.csv.parents) if path.exists()).is_dir():
        parser.error(f"--csv {options.csv}: must be a folder, or one that can be made; there is a file in its place")
    case, _, provider = options.only.partition("/")
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    effort = {"cases": 1, "repeats": 5, "seconds": 1.0, "attempts": 1} if options.quick else {}
    effort |= {"cases": 1, "repeats": 0} if options.check else {}
    plan = Plan(device, dtype, options.backward, case, provider, **effort)
    if not any(plan.cases_of(b) and any(provider in name for name in b.providers) for b in benchmarks):
        parser.error(f"--only {options.only}: no case and provider has that in its name")
    return options, plan
