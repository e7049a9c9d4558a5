"""Compiling the Triton kernels for a card that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks run from a checkout and are never installed

from benchmarks.hopper import occupancy  # noqa: E402


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "percent"),
    [
        (4, 32, 0, 100),  # 64 x 32 x 32 registers are all that there are
        (4, 33, 0, 75),  # given in pieces of 256: as 40 a thread, of which 12 blocks of 4 x 32 have room
        (4, 128, 0, 25),
        (8, 255, 0, 12),  # one block, of 8 warps
        (4, 32, 100 * 1024, 12),  # two blocks have room in 228 KiB
        (1, 16, 0, 50),  # 32 blocks are the most
    ],
)
def test_how_many_warps_fit(warps, registers, shared, percent):
    assert occupancy(warps, registers, shared) == percent


def test_a_kernel_is_compiled_and_counted():
    """In a process of its own: here Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.hopper", "--only", "noise_bias_act"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in run.stdout.splitlines()[2:]]
    assert {(row[0], row[2]) for row in rows} == {
        (f"`modulated_conv.fused.{name}`", dtype)
        for name in ("_forward_kernel", "_backward_kernel")
        for dtype in ("float32", "bfloat16")
    }
    for row in rows:
        warps, registers, stack, shared, fits = (int(re.sub(r"\D", "", cell)) for cell in row[3:])
        assert (warps, stack) == (4, 0)
        assert 16 < registers <= 128
        assert shared < 2048
        assert 25 <= fits <= 100
