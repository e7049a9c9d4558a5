"""Two runs of the same benchmarks: what is compared, and when it is said to agree."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import claritycore

ROOT = Path(claritycore.__file__).parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks run from a checkout and are never installed

from benchmarks import repeat  # noqa: E402
from benchmarks.machine import Stamp  # noqa: E402
from benchmarks.report import Result, write_csv  # noqa: E402

STAMP = Stamp("a machine", 2, 1, "Linux", "3.11", "2.13", "none", "abc", "2026-01-01T00:00:00+00:00")


def row(provider: str, ratio: float | None, spread: float, status: str = "timed") -> Result:
    numbers = {"median_s": 1.0, "iqr_percent": spread, "vs_reference": ratio}
    return Result("squares", "size=4", "forward", provider, status, "", "float32", "cpu", **numbers)


def write(folder: Path, rows: list[Result]) -> Path:
    write_csv(rows, STAMP, {}, folder / "squares-float32-abc.csv")
    return folder


@pytest.fixture
def first(tmp_path) -> Path:
    return write(tmp_path / "first", [row("reference", 1.0, 3.0), row("ours", 2.0, 4.0), row("peer", 1.5, 0.0)])


def test_a_ratio_may_differ_by_the_spread_of_its_two_medians(first, tmp_path, capsys):
    second = write(tmp_path / "second", [row("reference", 1.0, 0.0), row("ours", 2.09, 0.0), row("peer", 1.47, 1.0)])
    ours, peer = repeat.pairs(first, second)
    assert ours.spread == pytest.approx(0.05)  # 3 % and 4 %
    assert peer.spread == pytest.approx(0.03)
    assert ours.agrees
    assert peer.agrees
    assert repeat.main([str(first), str(second)]) == 0
    assert "2 of 2 ratios agree" in capsys.readouterr().out


def test_a_ratio_that_is_further_off_is_told(first, tmp_path, capsys):
    second = write(tmp_path / "second", [row("reference", 1.0, 3.0), row("ours", 1.8, 4.0)])
    assert repeat.main([str(first), str(second)]) == 1
    printed = capsys.readouterr().out
    assert "2.00x and 1.80x, spread 5.0%: squares  size=4  forward  ours" in printed
    assert "0 of 1 ratios agree" in printed


def test_what_was_not_timed_is_left_out_and_nothing_in_common_is_refused(first, tmp_path):
    refused = replace(row("peer", None, 0.0, "refused"), median_s=None)
    second = write(tmp_path / "second", [row("reference", 1.0, 3.0), refused])
    with pytest.raises(ValueError, match="no CSV file of the same benchmark"):
        list(repeat.pairs(first, second))
