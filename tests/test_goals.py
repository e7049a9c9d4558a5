"""The tables in the README that come from CSV files: they are up to date, and that of goals judges as it says."""

import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import claritycore

ROOT = Path(claritycore.__file__).parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks run from a checkout and are never installed

from benchmarks import goals, readme, scaling  # noqa: E402
from benchmarks.goals import Goal  # noqa: E402
from benchmarks.machine import Stamp  # noqa: E402
from benchmarks.report import Result, write_csv  # noqa: E402

STAMP = Stamp("a machine", 2, 1, "Linux", "3.11", "2.13", "none", "abc", "2026-01-01T00:00:00+00:00")
GOAL = {"what": "ours", "benchmark": "squares", "case": "size=4", "stage": "forward", "ours": "ours"}


def row(provider: str, seconds: float, **fields: object) -> Result:
    options = {"status": "timed", "reason": "", "dtype": "float32", "device": "cpu"}
    options |= {"median_s": seconds, "iqr_percent": 3.0, "peak_bytes": 100, "floor_s": 0.5}
    return Result("squares", "batch=1 size=4", "forward", provider, **{**options, **fields})


@pytest.fixture
def results(tmp_path):
    """Two runs: in the older one ours takes four times as long."""
    for date, ours in (("2026-01-01", 8.0), ("2026-03-01", 2.0), ("2026-02-01", 4.0)):
        rows = [row("reference", 6.0, peak_bytes=400), row("ours", ours)]
        write_csv(rows, replace(STAMP, date=date), {}, tmp_path / f"squares-float32-{date}.csv")
    return tmp_path


def test_the_readme_has_the_tables_of_the_csv_files():
    page = readme.README.read_text()
    assert readme.filled(page) == page, "run python -m benchmarks.readme"
    assert page.count("not yet measured") >= 1
    assert " of its floor, GPU" in page


def test_the_readme_shows_pictures_that_are_there():
    shown = re.findall(r"!\[[^]]+\]\(([^)]+)\)", readme.README.read_text())
    assert [name for name in shown if not (ROOT / name).is_file()] == []
    assert sum("/scaling_" in name for name in shown) == len(scaling.SWEEPS)
    assert list(scaling.SWEEPS) == [benchmark.name for benchmark in scaling.BENCHMARKS]


@pytest.mark.parametrize(
    ("fields", "ratio", "verdict"),
    [
        ({"least": 3.0}, 3.0, "met"),
        ({"least": 3.1}, 3.0, "not met"),
        ({"least": 3.1, "never": 2.9}, 3.0, "within its bound"),
        ({"most": 0.34}, 1 / 3, "met"),
        ({"most": 0.3}, 1 / 3, "not met"),
        ({"most": 0.3, "never": 0.34}, 1 / 3, "within its bound"),
        ({"most": 0.3, "column": "peak_bytes"}, 0.25, "met"),
        ({"most": 3.0, "than": "floor"}, 4.0, "not met"),
    ],
)
def test_it_judges_the_newest_run(results, fields, ratio, verdict):
    goal = Goal(**GOAL, **{"than": "reference", **fields})
    assert goal.ratio(results)[0] == pytest.approx(ratio)
    assert goal.verdict(ratio) == verdict
    assert verdict in goal.row(results)


def test_a_ratio_has_the_spread_of_both_medians(tmp_path):
    write_csv(
        [row("reference", 6.0, iqr_percent=12.0), row("ours", 2.0, iqr_percent=5.0)],
        STAMP,
        {},
        tmp_path / "squares-float32-a.csv",
    )
    goal = Goal(**GOAL, than="reference", least=3.0)
    assert goal.ratio(tmp_path) == pytest.approx((3.0, 13.0))
    assert "3.00x: met | 13 % |" in goal.row(tmp_path)
    write_csv(
        [row("reference", 6.0, iqr_percent=16.0), row("ours", 2.0, iqr_percent=12.0)],
        STAMP,
        {},
        tmp_path / "squares-float32-a.csv",
    )
    assert "3.00x: met, noisy | 20 % |" in goal.row(tmp_path)


@pytest.mark.parametrize("fields", [{"case": "size=5"}, {"ours": "triton"}, {"than": "peer"}, {"cuda": True}])
def test_what_no_run_has_is_said_to_be_unmeasured(results, fields):
    goal = Goal(**{**GOAL, "than": "reference", "least": 2.0, **fields})
    assert goal.ratio(results) is None
    assert "not yet measured" in goal.row(results)


def test_every_goal_names_a_benchmark_and_one_bound():
    commands = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    for goal in goals.goals():
        assert (goal.command or goal.benchmark) in commands
        assert (goal.most is None) != (goal.least is None), asdict(goal)
        assert goal.stage in ("forward", "forward+backward")


def test_a_page_without_the_marks_is_refused(results):
    with pytest.raises(ValueError, match="the page must have"):
        readme.filled("nothing", results)
