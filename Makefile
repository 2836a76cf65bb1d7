# Every target sets itself up from nothing: Python 3.11, gcc and make are enough.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
LEVEL ?= change
AZURITE := 3.37.0
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check lint types build bench prove clean

.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no python3.11 on PATH (hint: make PYTHON=/path/to/python3.11)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	@# An Azure Blob service for the tests. Without npm, or offline, they are skipped.
	@if command -v npm >/dev/null; then \
	    npm install --prefix .venv/azurite --silent --no-audit --no-fund --fetch-retries=1 --fetch-timeout=60000 azurite@$(AZURITE) >/dev/null 2>&1 \
	        || echo "azurite was not installed: the tests of Azure are skipped"; \
	fi
	touch $@

demo: .venv/ready
	$(BIN)/stoker demo

# Two processes: many tests wait, for deadlines and for processes that they kill. A file stays in one of them.
test: .venv/ready
	$(BIN)/pytest -q -n 2 --dist loadfile

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

# The wheel is built from the sdist, so what it lists is what both hold.
build: .venv/ready
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m zipfile -l dist/stoker-*.whl

check: lint types test build

bench: .venv/ready
	$(BIN)/stoker bench tiers
	$(BIN)/stoker bench load
	$(BIN)/stoker bench ckpt

# LEVEL=change takes minutes, nightly hours, release a day.
prove: .venv/ready
	$(BIN)/python -m tests.faults.prove --level $(LEVEL)

clean:
	rm -rf .venv build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
