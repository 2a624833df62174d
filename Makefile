# `make` alone shows what there is.

PYTHON ?= python3
# Any pip requirement or arguments: a version, a wheel, an index of other builds.
TORCH ?= torch==2.13.0
# The other supported generation of transformers.
TF4 ?= transformers==4.57.6
# The libraries that some slow tests compare with.
PEERS ?= transformer-lens==3.9.0 sae-lens==6.54.12 nnsight==0.8.1
# One of them that asks for an nnsight which the others have left behind. Nothing that trains needs it, and all else that it
# asks for comes with the others.
PEERS_ALONE ?= dictionary-learning==0.1.0
# A server of objects that checks signatures, for slow tests.
SWIFT ?= swift==2.38.3

# Of `make bench-peers`: which of them (nnsight, transformer-lens, lmprobe, easyroutine), all when empty; 0 rounds are 7.
PEER ?=
ROUNDS ?= 0

# The library whose users read our datasets, as we do theirs.
LMPROBE ?= lmprobe==0.10.3

VENV := .venv
VENV_TF4 := .venv-tf4
VENV_PEERS := .venv-peers
VENV_SWIFT := .venv-swift
VENV_LMPROBE := .venv-lmprobe
PY := $(VENV)/bin/python
PY_TF4 := $(VENV_TF4)/bin/python

# The tests whose outcome can depend on the version of transformers.
TF4_TESTS = $(sort $(wildcard $(foreach subject,adapters analysis anatomy architectures attention beams capture cli decoder_inputs demo edits encode extract head hub identity in_memory invariance knockout loading media nnsight norms offload pattern probe prompts quantized readme ready_made rope run_with_cache selftest sites staleness sweeps traps unified zoo,tests/test_*$(subject)*.py)))
# All but the one that needs other libraries, which has a target of its own.
BENCHMARKS = $(sort $(filter-out benchmarks/peers.py,$(wildcard benchmarks/[a-z]*.py)))

export PYTHON
# The model of the demo and of the tests is part of the package: nothing may reach for a model hub.
offline := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

# As many processes as there are processors; a file's tests stay together, with what they share.
# When one of them ends in a test, the others finish what they have: its next one would begin with that test again.
PYTEST = -m pytest -n auto --dist loadfile --max-worker-restart=0

.DEFAULT_GOAL := help
.PHONY: help venv venv-tf4 venv-peers venv-lmprobe venv-swift demo test test-all coverage mutations lint types docs bench \
    bench-peers format clean

help: ## show this list
	@echo "make TARGET [PYTHON=python3] [TORCH=torch==2.13.0]"
	@echo
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-16s%s\n", $$1, $$2}'

venv: ## make the virtual environment .venv (quick when it is up to date)
	@scripts/make_venv.sh $(VENV) "$(TORCH)" -e ".[dev]"

venv-tf4:
	@scripts/make_venv.sh $(VENV_TF4) "$(TORCH)" "$(TF4)" -e ".[dev]"

venv-peers: ## make .venv-peers, in which slow tests compare with other libraries
	@scripts/make_venv.sh $(VENV_PEERS) "$(TORCH)" $(PEERS) -e .
	@$(VENV_PEERS)/bin/python -m pip install -qq --disable-pip-version-check --no-deps $(PEERS_ALONE)

venv-lmprobe: ## make .venv-lmprobe, in which slow tests read our datasets with lmprobe
	@scripts/make_venv.sh $(VENV_LMPROBE) "$(TORCH)" "$(LMPROBE)" "pyarrow>=15"

venv-swift: ## make .venv-swift, whose object store (OpenStack Swift) slow tests talk to
	@scripts/make_venv.sh $(VENV_SWIFT) "--only-binary=:all: $(SWIFT)"

demo: venv ## run the main job on the shipped model: extract, keep, read back, probe
	@echo "==> actcache demo"
	@$(offline) $(VENV)/bin/actcache demo

test: venv ## the fast tests (under 10 minutes)
	@echo "==> fast tests"
	@$(offline) $(PY) $(PYTEST) -q -m "not slow and not rare"

test-all: venv venv-tf4 venv-peers venv-lmprobe venv-swift ## all tests, and once more those that depend on transformers with 4.57 (under 60 minutes)
	@status=0; \
	echo "==> tests that depend on transformers, with $(TF4)"; \
	$(offline) $(PY_TF4) $(PYTEST) -q -m "not slow" $(TF4_TESTS) || status=1; \
	echo "==> all tests"; \
	$(offline) $(PY) $(PYTEST) || status=1; \
	exit $$status

coverage: venv ## which lines and branches the fast tests reach: at least 92 % (two to three times as long as they take)
	@mkdir -p build/coverage && $(PY) -m coverage erase
	@$(offline) $(PY) -m coverage run $(PYTEST) -q -m "not slow and not rare"
	@$(PY) -m coverage combine -q && $(PY) -m coverage report

mutations: venv ## break lines of keys, batching and segments, one at a time: do the tests notice? (a few minutes)
	@OMP_NUM_THREADS=1 $(offline) $(PY) scripts/mutate.py

lint: venv ## check format and style (ruff)
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .

types: venv ## check types (mypy, strict for src/)
	@$(PY) -m mypy

format: venv ## put the code into its format and fix what can be fixed
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

docs: venv ## build the documentation's site in build/site
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "build/site/index.html (to search it: $(PY) -m http.server -d build/site)"

bench: venv ## run the benchmarks: tables of ratios against a reference in the same run
	@status=0; for file in $(BENCHMARKS); do echo "==> $$file"; $(offline) $(PY) $$file || status=1; done; exit $$status

bench-peers: venv venv-peers venv-lmprobe ## the same work with other libraries: is it right, and how long does it take?
	@$(PY) benchmarks/peers.py $(addprefix --peer ,$(PEER)) --rounds $(ROUNDS) --torch "$(TORCH)" --environment nnsight=$(VENV_PEERS) \
	    --environment transformer-lens=$(VENV_PEERS) --environment lmprobe=$(VENV_LMPROBE)

clean: ## remove the virtual environments and what tools left behind
	rm -rf $(VENV) $(VENV_TF4) $(VENV_PEERS) $(VENV_LMPROBE) $(VENV_SWIFT) build/peers build/coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
