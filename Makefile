PYTHON ?= python3
BIN := .venv/bin
USER := .venv/.installed
STAMP := .venv/.installed-dev
# Without an NVIDIA GPU, Linux needs no CUDA libraries: torch's own index has a build without them. TORCH_INDEX= takes
# the usual build. A pip that has an index of its own keeps it.
HAS_GPU := $(shell command -v nvidia-smi)
CPU_INDEX := $(if $(filter Linux,$(shell uname -s)),https://download.pytorch.org/whl/cpu)
OWN_INDEX = $(shell $(PYTHON) -m pip config list 2>/dev/null | grep index-url)
TORCH_INDEX ?= $(if $(HAS_GPU)$(OWN_INDEX),,$(CPU_INDEX))

.DEFAULT_GOAL := help
.PHONY: help install demo test lowest newest parity real faults bench gpu-checks losses docs check lint type layers format clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP)  ## Install dpoctl and its tools into .venv, in the versions of constraints.txt

$(USER): pyproject.toml constraints.txt
	@echo 'Installing dpoctl and about 50 packages that it needs into .venv. To download: about 0.4 GB, 1.4 GB on disk,'
	@echo 'with torch for CPUs; about 2.7 GB, 6 GB on disk, with torch for NVIDIA GPUs. This time: $(if $(TORCH_INDEX),CPUs,what the index of pip has).'
	$(PYTHON) -m venv .venv
	$(if $(TORCH_INDEX),-$(BIN)/python -m pip install --retries 1 --timeout 15 --no-deps --constraint constraints.txt --extra-index-url $(TORCH_INDEX) torch)
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	@touch $@

$(STAMP): $(USER)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: runs/reviewer2-dpo/model.safetensors  ## Make a Reviewer #2: SFT, pairs that it writes itself, DPO, eval; downloads no model and no data
	$(BIN)/dpoctl eval runs/reviewer2-dpo
	@echo
	@echo 'Before: runs/reviewer2-sft, asked for a review, wrote a harsh one or a kind one. After: runs/reviewer2-dpo is Reviewer #2.'
	@echo 'The pairs that made the difference are in runs/reviewer2-pairs; the model wrote them itself.'
	@echo 'What to type next:'
	@echo '  $(BIN)/dpoctl chat runs/reviewer2-dpo --reference     talk to both'
	@echo '  $(BIN)/dpoctl report runs/reviewer2-dpo               the curves, the samples and the eval on one page'
	@echo '  $(BIN)/dpoctl dpo recipes/reviewer2-dpo.yaml dpo.loss.beta=0.5 --output-dir runs/stricter'
	@$(BIN)/dpoctl report runs/reviewer2-dpo > /dev/null

runs/reviewer2-sft/model.safetensors: recipes/reviewer2-sft.yaml | $(USER)
	$(BIN)/dpoctl sft recipes/reviewer2-sft.yaml --overwrite

runs/reviewer2-pairs/pairs-train.jsonl: recipes/reviewer2-contrastive.yaml runs/reviewer2-sft/model.safetensors
	$(BIN)/dpoctl convert-data recipes/reviewer2-contrastive.yaml --format contrastive -o runs/reviewer2-pairs/pairs.jsonl

runs/reviewer2-dpo/model.safetensors: recipes/reviewer2-dpo.yaml runs/reviewer2-pairs/pairs-train.jsonl
	$(BIN)/dpoctl dpo recipes/reviewer2-dpo.yaml --overwrite

test: $(STAMP)  ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_OPTIONS)

VERSIONS_TESTS ?= tests/model/test_lora.py tests/model/test_load.py tests/tasks/test_merge.py tests/tasks/test_evaluate.py \
	tests/tasks/test_chat.py tests/data/test_convert.py

lowest:  ## Run a short set of tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) tests/lowest_versions.py > .venv-lowest/constraints.txt
	$(call test_versions,.venv-lowest,--constraint .venv-lowest/constraints.txt)

newest:  ## The same with the newest versions, in .venv-newest; a failure is shown, and is no error of make
	$(PYTHON) -m venv .venv-newest
	-$(call test_versions,.venv-newest,--upgrade --upgrade-strategy eager)

# A folder for an environment, and options of pip. Warnings of other versions are not those of the versions in use.
define test_versions
$(if $(TORCH_INDEX),$(1)/bin/python -m pip install --quiet --no-deps --constraint constraints.txt --extra-index-url $(TORCH_INDEX) torch &&) \
$(1)/bin/python -m pip install --quiet $(2) --editable '.[quant,sentencepiece,tensorboard,zstd,served]' pytest hypothesis && \
OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -W default --disable-warnings -k 'not other_trainers' $(VERSIONS_TESTS)
endef

parity: $(STAMP)  ## Compare every loss with TRL's
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m parity tests/parity

real: $(STAMP)  ## Train a real model, SmolLM2-135M, beside plain transformers; downloads 98 MB, once
	GOMP_SPINCOUNT=20000 OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m pytest -m real --durations=0 tests/real

WHOLE_TESTS ?= tests/tasks/test_resume.py tests/tasks/test_sharding.py tests/core/test_invariance.py tests/tasks/test_keys.py \
	tests/tasks/test_invariance.py tests/tasks/test_estimate.py tests/tasks/test_scale_simulation.py tests/tasks/test_evaluate.py \
	tests/tasks/test_reference.py tests/tasks/test_train.py tests/tasks/test_benchmarks.py tests/tasks/test_real_server.py \
	tests/data/test_prepare.py tests/cli/test_streams.py

faults: $(STAMP)  ## Kill, cut and flood runs in every way that is known, and print what they survived
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --all-faults tests/faults $(WHOLE_TESTS)

bench: $(STAMP)  ## Compare a training step with TRL's, in turns, and plan ten million records
	$(BIN)/python tests/benchmarks/step_speed.py
	$(BIN)/python tests/benchmarks/plan_scale.py

gpu-checks:  ## Check kernels, runs and memory on a GPU, and compare steps with TRL's there; with the PYTHON that has them
	$(PYTHON) tests/gpu/gpu_checks.py $(if $(REHEARSE),--rehearse)

losses: runs/reviewer2-pairs/pairs-train.jsonl  ## Train every loss on the demo's pairs, and compare what comes out
	OMP_NUM_THREADS=1 $(BIN)/python tests/benchmarks/losses_table.py runs

docs: $(USER)  ## Write docs/recipe.md from the schema of recipes and the losses
	$(BIN)/python -m dpoctl.recipe.reference > docs/recipe.md

check: $(STAMP) lint type layers  ## Run the linter, the formatter's check, mypy and the import rules

lint: $(STAMP)  ## ruff: formatting and lints
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

type: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

layers: $(STAMP)  ## import-linter: a module imports only from the layers below its own, and never in a circle
	$(BIN)/lint-imports

format: $(STAMP)  ## Rewrite the code as the formatter wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment, builds and caches; runs/ stays
	rm -rf .venv .venv-lowest .venv-newest build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
