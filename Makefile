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
TORCH = $$(grep -o '^torch==[^ ]*' locks/torch.txt)
TOOLS := $(VENV)/tools
SETUP := $(VENV)/.setup
SETUP_DEV := $(VENV)/.setup-dev
SETUP_BENCHMARK := $(VENV)/.setup-benchmark

.DEFAULT_GOAL := help
.PHONY: help setup app test benchmark screenshots lint format lock audit licences clean distclean

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

lock: $(TOOLS)/bin/uv ## write locks/ anew from the requirements (LOCK_ARGS=--upgrade)
	PATH="$(TOOLS)/bin:$$PATH" $(PY) -m scripts.lock $(LOCK_ARGS)

audit: $(TOOLS)/bin/pip-audit ## look the locked packages up in the advisories of PyPI
	for lock in app torch cuda dev; do \
		$(TOOLS)/bin/pip-audit --no-deps --disable-pip --progress-spinner off -r locks/$$lock.txt \
			|| exit 1; \
	done

licences: $(SETUP_DEV) ## write docs/licences.md anew, from what is installed
	$(PY) -m scripts.licences

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

# The default build of torch is checked by hash as the rest is. TORCH_INDEX_URL is for another build
# of the same version, whose hash is not known here, and neither are those of what it needs. Builds
# from elsewhere are named, as 2.13.0+cpu, and need nothing of locks/cuda.txt.
$(SETUP): locks/app.txt locks/torch.txt locks/cuda.txt requirements-model.txt | $(VENV)/bin/pip
	$(LOCKED) -r locks/app.txt
ifneq ($(TORCH_INDEX_URL),)
	$(PIP) install --no-deps --index-url "$(TORCH_INDEX_URL)" $(TORCH)
	$(PIP) install $(TORCH)
else
	$(LOCKED) -r locks/torch.txt
	ls -d $(VENV)/lib/python3*/site-packages/torch-*+*.dist-info >/dev/null 2>&1 \
		|| $(LOCKED) -r locks/cuda.txt
endif
	$(LOCKED) -r requirements-model.txt
	@touch $@

$(SETUP_DEV): locks/dev.txt $(SETUP)
	$(LOCKED) -r locks/dev.txt
	@touch $@

# Without dependencies: what these need is installed, and a resolver could exchange it.
$(SETUP_BENCHMARK): benchmarks/requirements.txt $(SETUP)
	$(PIP) install --no-deps -r benchmarks/requirements.txt
	@touch $@

# The tools are no part of the app, so they have an environment of their own.
$(TOOLS)/bin/uv $(TOOLS)/bin/pip-audit: | $(VENV)/bin/pip
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip --disable-pip-version-check install uv==0.13.9 pip-audit==2.10.1
