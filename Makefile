# make demo, make test, make nightly, make lint, make benchmark: each sets up .venv by itself, and is quick the second time.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
BENCHMARKS := $(basename $(notdir $(shell grep -l "raise SystemExit" benchmarks/*.py)))
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: demo test nightly lint benchmark clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest

# Fifty times as many examples of each property, and the rows that make test leaves out; however long a test takes.
nightly: lint
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest --timeout 0

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

benchmark: $(READY)
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --quick $(CSV:%=--csv %) || exit 1; done

# torch first and exactly: whatever comes later finds it there and brings no other build of it. Its CUDA builds bring
# the triton that fits them; its CPU build brings none, and 3.6.0 runs our kernels in its interpreter.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -c 'import triton' 2>/dev/null || [ "$$(uname -s)" != Linux ] || $(BIN)/pip install --quiet triton==3.6.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
