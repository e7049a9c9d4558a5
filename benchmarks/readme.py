"""The tables of README.md that come from CSV files: made from the newest of each.

python -m benchmarks.readme          # writes them into README.md
python -m benchmarks.readme --check  # exits with 1 if others are there
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import goals
from .runner import RESULTS

README = Path(__file__).parent.parent / "README.md"
MADE: Mapping[str, Callable[[Path], str]] = {"goals": goals.table}


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with what these results say between the marks of each.

    Raises:
        ValueError: if a mark is missing.
    """
    for name, make in MADE.items():
        begin, end = f"<!-- {name}: python -m benchmarks.readme -->", f"<!-- end of {name} -->"
        before, begun, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not begun or not ended:
            raise ValueError(f"the page must have {begin} and {end}")
        page = f"{before}{begin}\n{make(results)}\n{end}{after}"
    return page


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What README.md has from CSV files.")
    parser.add_argument("--check", action="store_true", help="only say whether it is that of the CSV files")
    check, page = parser.parse_args(argv).check, README.read_text()
    made = filled(page)
    if check:
        print("README.md is as the CSV files say" if made == page else "run python -m benchmarks.readme")
    else:
        README.write_text(made)
    return int(check and made != page)


if __name__ == "__main__":
    sys.exit(main())
