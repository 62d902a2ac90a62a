PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test check lint type floors format clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(STAMP)  ## Install dpoctl and its tools into .venv, in the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(STAMP)  ## Train the nicer reviewer: SFT, then DPO, then measure it; a few minutes, no download of models
	$(BIN)/dpoctl sft recipes/reviewer2-sft.yaml --overwrite
	$(BIN)/dpoctl dpo recipes/reviewer2-dpo.yaml --overwrite
	$(BIN)/dpoctl eval runs/reviewer2-dpo

test: $(STAMP)  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(STAMP) lint type floors  ## Run the linter, the formatter's check, mypy and the import floors

lint: $(STAMP)  ## ruff: formatting and lints
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

floors: $(STAMP)  ## import-linter: a module imports only from the floors below its own
	$(BIN)/lint-imports

format: $(STAMP)  ## Rewrite the code as the formatter wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment, builds and caches; runs/ stays
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
