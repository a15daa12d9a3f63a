PYTHON ?= python3
PORT ?= 8501
ADDRESS ?= localhost
TORCH_INDEX_URL ?=
PYTEST_ARGS ?=
LOCK_ARGS ?=
BENCHMARK_ARGS ?= --output outputs/benchmark.csv --markdown outputs/benchmark.md --resume

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Nothing is resolved and nothing is built: what is locked is fetched, checked and unpacked.
LOCKED := $(PIP) install --no-deps --require-hashes --only-binary :all:
TORCH := $(shell sed -n 's/^torch==\([^ ]*\).*/\1/p' locks/torch.txt)
SITE := $(VENV)/lib/python3*/site-packages
TOOLS := $(VENV)/tools
RUNTIMES := $(VENV)/runtimes
TRANSFORMERS_4 := $(VENV)/transformers-4
# Test processes; each computes with one thread and takes up to 2 GB of memory. More than there are
# cores gain nothing: each makes what the tests of a file share once more.
WORKERS ?= 2
SETUP := $(VENV)/.setup
SETUP_TASKS := $(VENV)/.setup-tasks
SETUP_DEV := $(VENV)/.setup-dev
SETUP_BENCHMARK := $(VENV)/.setup-benchmark
SETUP_LLAMA_CPP := $(VENV)/.setup-llama-cpp
SETUP_TUNE := $(VENV)/.setup-tune
SETUP_RAY := $(VENV)/.setup-ray
STOCK_LLAMA_CPP := $(VENV)/stock-llama-cpp

.DEFAULT_GOAL := help
.PHONY: help setup llama-cpp tune ray app test runtimes extras stock-llama-cpp benchmark example screenshots lint format lock audit licences clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  ADDRESS=$(ADDRESS)  PORT=$(PORT)  TORCH_INDEX_URL=$(TORCH_INDEX_URL)"
	@echo "           WORKERS=$(WORKERS)  PYTEST_ARGS=$(PYTEST_ARGS)  LOCK_ARGS=$(LOCK_ARGS)"
	@echo "           BENCHMARK_ARGS=$(BENCHMARK_ARGS)"

setup: $(SETUP) $(SETUP_TASKS) ## install the app and the built-in model into .venv
	@echo "Ready: make app"

llama-cpp: $(SETUP_LLAMA_CPP) ## install llama.cpp into .venv, to quantise models and run them there

tune: $(SETUP_TUNE) ## install peft into .venv, to train cuts by LoRA

# Tests on real clusters take a minute and a half: `make ray test` runs them, CI skips them.
ray: $(SETUP_RAY) ## install Ray into .venv, to measure curves on a cluster

app: $(SETUP) $(SETUP_TASKS) ## start the app on http://ADDRESS:PORT
	$(PY) -m transact_core app --address "$(ADDRESS)" --port $(PORT)

test: lint runtimes ## check the code and run the tests (PYTEST_ARGS="-k name")
	sh scripts/install_browser.sh $(PY)
	$(PY) -m pytest -n $(WORKERS) $(PYTEST_ARGS)

# In CI a runtime that cannot be installed fails the run; elsewhere its tests are skipped.
runtimes: $(SETUP_DEV) ## install the other runtimes that exported models are tried in
	$(MAKE) --no-print-directory extras $(RUNTIMES)/.setup $(TRANSFORMERS_4)/.setup || \
		{ [ -z "$$CI" ] && echo "Going on without them: their tests will be skipped." >&2; }

# One after the other also under `make -j`, since both are installed into the same environment.
extras:
	$(MAKE) --no-print-directory -j 1 $(SETUP_LLAMA_CPP) $(SETUP_TUNE)

# Its quantiser is what tests/trust/stored/stock-quantiser.json was made with.
stock-llama-cpp: $(STOCK_LLAMA_CPP)/.setup ## fetch another build of llama.cpp for tests (Linux x86-64, needs npm)

benchmark: $(SETUP_BENCHMARK) ## compare with other libraries; takes hours (BENCHMARK_ARGS="--help")
	$(PY) -m benchmarks.table $(BENCHMARK_ARGS)

example: $(SETUP) ## measure the numbers of the first page anew; takes half an hour
	$(PY) -m scripts.record_example

screenshots: $(SETUP_DEV) ## take the README's picture anew, of the running app
	$(PY) -m scripts.screenshots

lint: $(SETUP_DEV) ## check the code alone
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-cache

format: $(SETUP_DEV) ## format the code and fix what can be fixed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

lock: $(TOOLS)/.setup ## write locks/ anew from the requirements (LOCK_ARGS=--upgrade)
	PATH="$(TOOLS)/bin:$$PATH" $(PY) -m scripts.lock $(LOCK_ARGS)

# --strict, as what could not be looked up would else count as clean.
audit: $(TOOLS)/.setup ## look the locked packages up in the advisories of PyPI
	for lock in app torch cuda tasks dev llama-cpp tune ray runtimes transformers-4; do \
		$(TOOLS)/bin/pip-audit --strict --disable-pip --progress-spinner off \
			-r locks/$$lock.txt || exit 1; \
	done

licences: $(TOOLS)/.setup ## write docs/licences.md anew, from what the locked packages declare
	$(TOOLS)/bin/python -m scripts.licences

clean: ## remove caches
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove caches and .venv
	rm -rf $(VENV)

# pip is made last, so its absence also tells of a venv that was left half made.
$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
		"Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# Whichever build of torch pip would choose is fetched first, as it may lie on this machine, and is
# unpacked only when its hash is among those of the lock. TORCH_INDEX_URL is for another build of the
# same version: its hash is not known here, and neither are those of what it needs. Builds that are
# not PyPI's have a longer version, as 2.13.0+cpu, and need nothing of locks/cuda.txt.
$(SETUP): locks/app.txt locks/torch.txt locks/cuda.txt requirements-model.txt | $(VENV)/bin/pip
	$(LOCKED) -r locks/app.txt
ifneq ($(TORCH_INDEX_URL),)
	$(PIP) install --no-deps --index-url "$(TORCH_INDEX_URL)" torch==$(TORCH)
	$(PIP) install torch==$(TORCH)
else
	ls -d $(SITE)/torch-$(TORCH)*.dist-info >/dev/null 2>&1 || { \
		$(PIP) download --no-deps --only-binary :all: --dest $(VENV)/wheels torch==$(TORCH) && \
		$(LOCKED) --no-index --find-links $(VENV)/wheels -r locks/torch.txt; }
	rm -rf $(VENV)/wheels
	ls -d $(SITE)/torch-$(TORCH)+*.dist-info >/dev/null 2>&1 || $(LOCKED) -r locks/cuda.txt
endif
	$(LOCKED) -r requirements-model.txt
	@touch $@

# Another 14 MB to fetch, 95 MB unpacked. lm_eval would drag in 38 packages for tasks that are not run.
$(SETUP_TASKS): locks/tasks.txt | $(SETUP)
	$(LOCKED) -r $<
	@touch $@

$(SETUP_DEV): locks/dev.txt $(SETUP) $(SETUP_TASKS)
	$(LOCKED) -r locks/dev.txt
	@touch $@

$(SETUP_LLAMA_CPP): locks/llama-cpp.txt $(SETUP)
	$(LOCKED) -r locks/llama-cpp.txt
	@touch $@

$(SETUP_TUNE): locks/tune.txt $(SETUP)
	$(LOCKED) -r locks/tune.txt
	@touch $@

$(SETUP_RAY): locks/ray.txt $(SETUP)
	$(LOCKED) -r locks/ray.txt
	@touch $@

# In folders of their own, as each has a package in another version than the app: the converter of
# llama.cpp brings its own gguf. What is not in them comes from $(VENV).
$(RUNTIMES)/.setup: locks/runtimes.txt | $(SETUP_DEV)
	rm -rf $(@D)
	$(LOCKED) --target $(@D) -r $<
	@touch $@

$(TRANSFORMERS_4)/.setup: locks/transformers-4.txt | $(SETUP_DEV)
	rm -rf $(@D)
	$(LOCKED) --target $(@D) -r $<
	@touch $@

$(STOCK_LLAMA_CPP)/.setup: scripts/fetch_stock_llama_cpp.sh
	sh scripts/fetch_stock_llama_cpp.sh $(@D)
	@touch $@

# Without dependencies: what these need is installed, and a resolver could exchange it.
$(SETUP_BENCHMARK): benchmarks/requirements.txt $(SETUP)
	$(PIP) install --no-deps -r benchmarks/requirements.txt
	@touch $@

# The tools are no part of the app, so they have an environment of their own.
$(TOOLS)/.setup: requirements-tools.txt | $(VENV)/bin/pip
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check install -r requirements-tools.txt
	@touch $@
