"""The machine under a benchmark: what it is, how fast it can possibly go, and how a call is clocked on it."""

import gc
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.profiler import profile

SHORTEST_REPEAT = 5e-3  # seconds that a CPU is clocked for at least: far above the grain of the clock
WARM_UP = 0.05  # seconds
EXP_CHAIN = 32  # exponentials per element loaded


@dataclass(frozen=True)
class Stamp:
    """What a figure depends on besides the code. `cores`: logical cores of a CPU, multiprocessors of a GPU."""

    machine: str
    cores: int
    threads: int
    os: str
    python: str
    torch: str
    triton: str
    commit: str
    date: str

    @classmethod
    def take(cls, device: torch.device) -> "Stamp":
        gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        return cls(
            machine=gpu.name if gpu else _cpu_model(),
            cores=gpu.multi_processor_count if gpu else os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            os=f"{platform.system()} {platform.release()}",
            python=platform.python_version(),
            torch=torch.__version__,
            triton=_installed("triton"),
            commit=_commit(),
            date=datetime.now().astimezone().isoformat(timespec="seconds"),
        )


@dataclass(frozen=True)
class Work:
    """What one pass cannot do without.

    Args:
        bytes: bytes to move through memory, each input read once and each output written once.
        flops: floating-point operations, 2 per multiply-add.
        exps: exponentials.
    """

    bytes: float
    flops: float = 0
    exps: float = 0


class Ceilings:
    """The best this machine does in three disciplines, each measured when first asked for and then kept.

    A ceiling is the best of several attempts rather than their median: noise only ever slows a machine down.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        # Half-precision work may be done in float32 where that is faster, as it is on most CPUs.
        self.dtypes = {dtype, torch.float32} if dtype.itemsize < 4 else {dtype}

    @cached_property
    def copy(self) -> float:
        """Bytes per second, read plus written, of a copy too large for any cache."""
        source = torch.rand(2**28 if self.device.type == "cuda" else 2**26, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / best(lambda: target.copy_(source), self.device)

    @cached_property
    def matmul(self) -> float:
        """Floating-point operations per second of a large matrix product, 2 per multiply-add."""
        return max(self._matmul(dtype) for dtype in self.dtypes)

    @cached_property
    def exp(self) -> float:
        """Exponentials per second where memory does not slow them: that limit is `copy`, and counted there."""
        return max(self._exp(dtype) for dtype in self.dtypes)

    def floor(self, work: Work) -> tuple[float, str]:
        """Return the shortest time in seconds that `work` can take here, and the name of the ceiling that sets it."""
        amounts = {"copy": work.bytes, "matmul": work.flops, "exp": work.exps}
        return max((amount / getattr(self, name), name) for name, amount in amounts.items() if amount)

    def measured(self) -> dict[str, float]:
        return {name: vars(self)[name] for name in ("copy", "matmul", "exp") if name in vars(self)}

    def _matmul(self, dtype: torch.dtype) -> float:
        rate, size, seconds = 0.0, 128, 0.0
        while seconds < 0.02 and size < 8192:  # by doubling, as some CPUs are a thousand times slower in float16
            size *= 2
            left, right = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
            seconds = best(lambda left=left, right=right: left @ right, self.device)
            rate = max(rate, 2 * size**3 / seconds)
        return rate

    def _exp(self, dtype: torch.dtype) -> float:
        if self.device.type == "cuda":
            # One exp per element loaded would measure memory even out of the L2 cache; a fused chain does not.
            x = torch.rand(2**24, device=self.device).to(dtype)
            chain = torch.compile(_exp_chain)
            return EXP_CHAIN * x.numel() / best(lambda: chain(x), self.device)
        x = torch.rand(2**16 * torch.get_num_threads()).to(dtype)  # each thread's part lies in its own L2 cache
        y = torch.empty_like(x)
        return x.numel() / best(lambda: torch.exp(x, out=y), self.device, loops=32)


def clock(call: Callable[[], object], device: torch.device, loops: int = 1) -> float:
    """Return the seconds that one `call` takes.

    A GPU is clocked by events around a single call whose data is no longer in the L2 cache; a CPU by the mean of
    `loops` calls in a row, which find in the cache what fits there.
    """
    if device.type == "cuda":
        _cache_sized_buffer(device).zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3
    begin = time.perf_counter()
    for _ in range(loops):
        call()
    return (time.perf_counter() - begin) / loops


def best(call: Callable[[], object], device: torch.device, loops: int = 1, repeats: int = 7) -> float:
    """Return the shortest of several clocked times of `call`, in seconds, after one call to warm up."""
    call()
    return min(clock(call, device, loops) for _ in range(repeats))


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes of tensors `call` holds at once at most, over what was held before it.

    Everything that torch's allocator hands out is counted: outputs, what autograd saves, temporaries inside an op.
    Memory that a library takes past torch's allocator is not.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _muted_stderr(), profile(profile_memory=True) as record:
        call()
    events = (event for event in record.kineto_results.events() if event.name() == "[memory]")
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def time_in_turns(
    calls: Mapping[str, Callable[[], object]], device: torch.device, repeats: int, seconds: float
) -> dict[str, list[float]]:
    """Clock the calls in turns, A B C A B C, so that a noisy moment of the machine falls on all alike.

    Args:
        calls: what to clock, by name.
        device: where they run.
        repeats: how many times to clock each.
        seconds: how long that may take; calls too slow for it are still clocked three times each.

    Returns:
        The seconds that each call took, time after time.
    """
    if not calls:
        return {}
    shortest = {name: _warm_up(call, device) for name, call in calls.items()}
    loops = {name: math.ceil(SHORTEST_REPEAT / once) for name, once in shortest.items()}
    one_round = sum(loops[name] * once for name, once in shortest.items())
    times: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    gc.disable()  # the collector must not run in the middle of a clocked call
    try:
        for _ in range(max(3, min(repeats, int(seconds / one_round)))):
            for name, call in calls.items():
                times[name].append(clock(call, device, loops[name]))
    finally:
        gc.enable()
    return times


def iqr_percent(times: Sequence[float]) -> float:
    """Return the inter-quartile range in percent of the median."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return 100 * (high - low) / middle


def _warm_up(call: Callable[[], object], device: torch.device) -> float:
    times = [clock(call, device)]
    while sum(times) < WARM_UP:
        times.append(clock(call, device))
    return min(times)


def _exp_chain(x: Tensor) -> Tensor:
    for _ in range(EXP_CHAIN):
        x = torch.exp(-x)  # stays within (0, 1]
    return x


@cache
def _cache_sized_buffer(device: torch.device) -> Tensor:
    # Twice the L2 cache, and long enough to write that the call's first launches are queued behind it.
    size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
    return torch.empty(size, dtype=torch.uint8, device=device)


@contextmanager
def _muted_stderr() -> Iterator[None]:
    # Some builds of torch announce each start and stop of the profiler on file descriptor 2, past `sys.stderr`.
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=8", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "uncommitted"
    return answer.stdout.strip()
