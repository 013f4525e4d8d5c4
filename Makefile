# Each target sets up .venv when it is missing or older than pyproject.toml or constraints.txt.
# make demo        the whole of RLHF and of reasoning fine-tuning on two CPU cores, in minutes
# make test        every test
# make test-fast   without the slow ones
# make test-gpu    what only a GPU can show; the other tests hide it
# make lint        format, rules, types, who may import whom
# make constraints writes constraints.txt from what .venv has; run it after `make test` passed with newer versions

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1
export WANDB_MODE ?= disabled
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# One thread per worker: small networks are slower with more, and workers share the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

.PHONY: help demo test test-fast test-gpu lint format setup constraints

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rlhf-toolkit needs Python 3.11 or newer; set PYTHON=python3.11")'
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/rlhf run pipeline run.overwrite=true

test: $(STAMP)
	$(PYTEST)

test-gpu: $(STAMP)
	RLHF_TEST_ON_GPU=1 $(BIN)/python -m pytest tests/lm/test_on_gpu.py

test-fast: $(STAMP)
	$(PYTEST) -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A build tag such as +cpu belongs to one machine, the version to all.
constraints: $(STAMP)
	{ echo "# The versions the tests passed with. Written by: make constraints"; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9]*$$//'; } > constraints.txt
	@touch $(STAMP)
