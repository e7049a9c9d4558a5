"""What the Triton kernels become on a Hopper GPU, compiled where there is none: what they hold, and how many fit.

A kernel that spills its registers, or of which few warps fit into a multiprocessor, is slow whatever it computes. The
calls are those of the benchmarks, forward and backward; nothing runs, so that there are no times.

python -m benchmarks.hopper                         # all, in float32 and bfloat16; needs Triton, and no GPU
python -m benchmarks.hopper --only window_attention # benchmarks with this in their name
"""

import argparse
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from claritycore.kernels import KERNELS

from .report import label
from .runner import RESULTS, Benchmark, Plan, Step
from .trained import write

FILES = (
    *("depthwise_conv2d", "expert_routing", "frequency_split", "modulated_conv"),
    *("noise_field", "selective_scan", "selective_scan_2d", "window_attention"),
)
DTYPES = (torch.float32, torch.bfloat16)

# Of a multiprocessor of compute capability 9.0 (CUDA C++ Programming Guide, technical specifications). Registers are
# given to a warp in pieces of 256, and a block takes 1 KiB of shared memory besides its own.
WARPS, BLOCKS, REGISTERS, SHARED_BYTES = 64, 32, 65536, 228 * 1024
OBJECTS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Args:
        kernel: its file and its name.
        case: the benchmark and the first of its cases that compiles it.
        dtype: of the inputs.
        warps: of a program.
        registers: of a thread.
        stack: bytes of a thread in memory: what did not fit into registers, and what large angles need.
        shared: bytes of a program.
        occupancy: warps that fit into a multiprocessor, in percent of the 64 that it could hold.
    """

    kernel: str
    case: str
    dtype: str
    warps: int
    registers: int
    stack: int
    shared: int
    occupancy: int


class Absent:
    """A driver for a card that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def occupancy(warps: int, registers: int, shared: int) -> int:
    """Count how many warps of such programs fit into a multiprocessor, in percent of what it could hold.

    >>> occupancy(warps=4, registers=128, shared=0)
    25
    """
    of_warp = -(-32 * registers // 256) * 256
    fit = min(BLOCKS, WARPS // warps, REGISTERS // (of_warp * warps), SHARED_BYTES // (shared + 1024))
    return 100 * fit * warps // WARPS


def rows(benchmark: Benchmark, dtype: torch.dtype) -> Iterator[Row]:
    """Compile what the calls of a benchmark would launch; a kernel that is as in another case is told once."""
    known = set()
    for case in benchmark.cases:
        for name, kernel in _compiled(benchmark, case, dtype):
            warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
            registers, stack = _usage(kernel)
            if (found := (name, warps, registers, stack, shared)) not in known:
                known.add(found)
                where = f"{benchmark.name} {label(case)}"
                fits = occupancy(warps, registers, shared)
                yield Row(name, where, str(dtype).removeprefix("torch."), warps, registers, stack, shared, fits)


def _compiled(benchmark: Benchmark, case: Any, dtype: torch.dtype) -> list[tuple[str, CompiledKernel]]:
    """Call the Triton form forward and backward, on tensors of the CPU, with every launch compiled alone."""
    found, run = [], triton.JITFunction.run

    def compile_alone(self: Any, *args: Any, **options: Any) -> None:
        kernel = run(self, *args, **{**options, "warmup": True})
        found.append((f"{self.__module__.removeprefix('claritycore.kernels.')}.{self.__name__}", kernel))

    driver.set_active(Absent())
    with (
        mock.patch.object(triton.JITFunction, "run", compile_alone),
        mock.patch.object(type(KERNELS[0]), "why_not", return_value=""),
    ):
        Step(replace(benchmark, cuda_only=()), "triton", case, Plan(torch.device("cpu"), dtype), benchmark.backward)()
    return found


def _usage(kernel: CompiledKernel) -> tuple[int, int]:
    """Registers of a thread, and bytes of it that lie in memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        said = subprocess.run([OBJECTS, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.findall(rf"{key}:(\d+)", said)[0]) for key in ("REG", "STACK"))
    return registers, stack


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What the Triton kernels become on a Hopper GPU.")
    parser.add_argument("--only", default="", help="benchmarks with this in their name")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    modules = [importlib.import_module(f".{name}", __package__) for name in FILES]
    declared = [value for module in modules for value in vars(module).values() if isinstance(value, Benchmark)]
    found = []
    print("| kernel | case | dtype | warps | registers | stack | shared | occupancy |\n" + "|---" * 8 + "|")
    for benchmark in declared:
        if "triton" in benchmark.providers and options.only in benchmark.name:
            for dtype in DTYPES:
                for row in rows(benchmark, dtype):
                    found.append(row)
                    name = f"| `{row.kernel}` | {row.case} | {row.dtype} | {row.warps} | {row.registers} "
                    print(f"{name}| {row.stack} | {row.shared} | {row.occupancy} % |", flush=True)
    if not options.only:
        print(f"\n{write(found, 'hopper', options.csv)}")


if __name__ == "__main__":
    main()
