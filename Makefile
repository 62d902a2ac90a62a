PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test parity faults bench losses check lint type floors format clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(STAMP)  ## Install dpoctl and its tools into .venv, in the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: runs/reviewer2-dpo/model.safetensors  ## Make a Reviewer #2: SFT, pairs that it writes itself, DPO, eval; no download
	$(BIN)/dpoctl eval runs/reviewer2-dpo
	@echo
	@echo 'Before: runs/reviewer2-sft, asked for a review, wrote a harsh one or a kind one. After: runs/reviewer2-dpo is Reviewer #2.'
	@echo 'The pairs that made the difference are in runs/reviewer2-pairs; the model wrote them itself.'
	@echo 'What to type next:'
	@echo '  $(BIN)/dpoctl chat runs/reviewer2-dpo --reference     talk to both'
	@echo '  $(BIN)/dpoctl report runs/reviewer2-dpo               the curves, the samples and the eval on one page'
	@echo '  $(BIN)/dpoctl dpo recipes/reviewer2-dpo.yaml dpo.loss.beta=0.5 --output-dir runs/stricter'

runs/reviewer2-sft/model.safetensors: recipes/reviewer2-sft.yaml | $(STAMP)
	$(BIN)/dpoctl sft recipes/reviewer2-sft.yaml --overwrite

runs/reviewer2-pairs/pairs-train.jsonl: recipes/reviewer2-contrastive.yaml runs/reviewer2-sft/model.safetensors
	$(BIN)/dpoctl convert-data recipes/reviewer2-contrastive.yaml --format contrastive -o runs/reviewer2-pairs/pairs.jsonl

runs/reviewer2-dpo/model.safetensors: recipes/reviewer2-dpo.yaml runs/reviewer2-pairs/pairs-train.jsonl
	$(BIN)/dpoctl dpo recipes/reviewer2-dpo.yaml --overwrite

test: $(STAMP)  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

parity: $(STAMP)  ## Compare every loss with TRL's
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m parity tests/parity

faults: $(STAMP)  ## Kill, cut and flood runs in every way that is known, and print what they survived
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --all-faults tests/faults

bench: $(STAMP)  ## Compare a training step with TRL's, in turns, and plan ten million records
	$(BIN)/python tests/benchmarks/step_speed.py
	$(BIN)/python tests/benchmarks/plan_scale.py

losses: runs/reviewer2-pairs/pairs-train.jsonl  ## Train every loss on the demo's pairs, and compare what comes out
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/losses_table.py runs

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
