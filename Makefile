# Every target makes the environment it needs. The first run installs (a few minutes); later ones start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-slow check docs benchmarks clean

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing fewstep and its development tools into $(VENV)"
	@$(PIP) torch
	@$(PIP) --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/fewstep demo --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell src tests docs benchmarks README.md CONTRIBUTING.md CHANGELOG.md
	$(BIN)/lint-imports
	$(BIN)/pyright

docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

benchmarks: $(STAMP)
	$(BIN)/python benchmarks/step_overhead.py --out benchmarks/results/step_overhead.json
	$(BIN)/python benchmarks/teacher_quality.py --out benchmarks/results/teacher_quality.json
	$(BIN)/python benchmarks/solvers.py --out benchmarks/results

clean:
	rm -rf $(VENV) site runs dist build .pytest_cache .ruff_cache .hypothesis
