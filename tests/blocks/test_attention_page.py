"""docs/attention.md: its tables against what runs."""

import re
from pathlib import Path

import pytest
import torch

import claritycore
from claritycore.blocks import BLOCK_SOURCES
from tests.contracts import CONTRACTS
from tests.strategies import normal

PAGE = (Path(claritycore.__file__).parent / "docs" / "attention.md").read_text()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "autocast": torch.float32}


def table_below(heading: str) -> dict[str, dict[str, str]]:
    """The rows of the first table below a heading, by their first cell."""
    lines = PAGE.partition(f"## {heading}\n")[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end])
    return {row[0].strip("`"): dict(zip(head[1:], row[1:], strict=True)) for row in rows}


SUPPORT = table_below("Support")


def forms(name: str):
    """The contracts of one block."""
    return [contract for key, contract in CONTRACTS.items() if key.partition(" ")[0] == name]


def test_every_attention_has_a_row():
    attentions = {key.partition(" ")[0] for key in CONTRACTS if "Attention" in key} | {"SwinBlock"}
    gates = {"ChannelAttention", "ElementwiseAttention"}  # which scale a map and compare nothing
    assert set(SUPPORT) == attentions - gates - {"AttentionExpert"}  # which holds one of them


@pytest.mark.parametrize("name", SUPPORT)
@pytest.mark.parametrize("column", DTYPES)
def test_errors_are_as_the_table_says(name, column):
    bound, worst = float(SUPPORT[name][column]), 0.0
    for contract in forms(name):
        channels, dtype = contract.channels[-1], DTYPES[column]
        block, exact = (contract.make(channels, dtype=dtype).to(as_).eval() for as_ in (dtype, torch.float64))
        for size in [(1, 1), (9, 13), (32, 24)]:
            x = normal((2, channels, *size), dtype=dtype)
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=column == "autocast"):
                y = block(x)
            with torch.no_grad():
                right = exact(x.double())
            worst = max(worst, ((y.double() - right).abs().max() / right.abs().max()).item())
    assert bound / 10 < worst <= bound


@pytest.mark.parametrize("name", SUPPORT)
def test_float64_is_kept_and_tiles_are_as_the_table_says(name):
    row = SUPPORT[name]
    assert (row["float64"], row["compile"]) == ("kept", "one graph")  # test_properties.py compiles every contract
    for contract in forms(name):
        block = contract.make(contract.channels[-1], dtype=torch.float64).eval()
        assert block(normal((1, contract.channels[-1], 6, 9), dtype=torch.float64)).dtype == torch.float64
        assert row["tile-safe"] in ("as its parts", "yes" if block.tile_safe else "no")


def test_every_source_of_weights_has_a_row_that_names_its_block():
    rows = [row for row in table_below("From an existing block to ours").values() if row["weights"].startswith('`"')]
    assert {row["weights"].strip('`"'): row["ours"].strip("`") for row in rows} == {
        name: source.target for name, source in BLOCK_SOURCES.items()
    }


def test_every_file_that_the_page_names_is_there():
    root = Path(claritycore.__file__).parent
    assert all((root / name).exists() for name in re.findall(r"`(tests/[\w/]+\.py)`", PAGE))
