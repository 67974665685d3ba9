# Everything runs from an environment of its own, .venv, that the first command makes.
#   PYTHON=...       the Python to make it with (3.11, 3.12 or 3.13)
#   TORCH_INDEX=...  a package index to take torch from as well, e.g. PyTorch's CPU wheel index:
#                    see CONTRIBUTING.md
#   PARALLEL=        run one test at a time
#   LAB_ROOT=...     the folder that `make lab` opens
#   TEST_ARGS=..., BENCH_ARGS=..., LAB_ARGS=...   handed on to pytest, the benchmarks, JupyterLab

VENV ?= .venv
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && command -v $$p && break; done)
TORCH_INDEX ?=
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
PEERS := .venv-peers
ENGINES := transformers llamacpp vllm
# Two tests at a time, each file in one process: what a file's tests share is made once.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
FAST := not slow and not thorough and not demo and not browser and not gpu and not peers \
	and not binder

.DEFAULT_GOAL := help
.PHONY: help install demo lab lab-dev test test-all test-fast lint format bench bench-peers gpu-check \
	binder-check badge browser clean distclean

help: ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) ## Make .venv with all that the other commands need

$(INSTALLED): pyproject.toml constraints.txt
	@"$(or $(PYTHON),false)" -c '$(SUPPORTED)' || { echo "inferkit needs Python 3.11, 3.12 or 3.13, \
	but found $(or $(PYTHON),none). Name one: make PYTHON=/path/to/python3.12"; \
	exit 1; }
	@test -x $(PY) || "$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
	echo "Could not make $(VENV). On Debian and Ubuntu the venv module is a package of its own: \
	apt-get install python3-venv"; exit 1; }
	@test -n "$(TORCH_INDEX)" || test "$$(uname)" != Linux || command -v nvidia-smi >/dev/null || \
	echo "No NVIDIA driver here. If pip starts to download CUDA packages (several GB), stop it and \
	see TORCH_INDEX in CONTRIBUTING.md."
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e ".[demo,test,dev]"
	@touch $@

demo: $(INSTALLED) ## Run the quickstart notebook on the demo model; print its latency table
	$(PY) notebooks/execute.py notebooks/01-quickstart.ipynb

lab: $(INSTALLED) ## Open the notebooks in JupyterLab, with the extension
	$(PY) extensions/labextension.py link
	$(PY) -m jupyterlab --ServerApp.root_dir=$(or $(LAB_ROOT),notebooks) \
		$(if $(filter 0,$(shell id -u)),--allow-root) $(LAB_ARGS)

lab-dev: $(INSTALLED) ## Build the JupyterLab extension again whenever a file of it changes
	$(PY) extensions/labextension.py watch

test: $(INSTALLED) browser ## Run the tests: what CI runs
	$(PY) -m pytest -m "not thorough and not peers and not binder" $(PARALLEL) $(TEST_ARGS)

test-all: $(INSTALLED) browser ## Run those as well that take a minute or more each
	$(PY) -m pytest -m "not peers and not binder" $(PARALLEL) $(TEST_ARGS)

test-fast: $(INSTALLED) ## Run the tests that need neither the demo model nor a browser
	$(PY) -m pytest -m "$(FAST)" $(PARALLEL) $(TEST_ARGS)

lint: $(INSTALLED) ## Check format, lint, layers and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(VENV)/bin/lint-imports
	$(PY) -m mypy
	$(PY) extensions/labextension.py check

format: $(INSTALLED) ## Format and fix what can be fixed
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

bench: $(INSTALLED) bench-peers ## Run the benchmarks, against the other engines too
	$(PY) benchmarks/run.py $(BENCH_ARGS)

bench-peers: $(INSTALLED) $(ENGINES:%=$(PEERS)/%/.installed) ## Make the other engines' environments

# Each engine has an environment of its own: their versions of torch and transformers differ.
# inferkit's constraints hold for transformers alone, so that both run the same code below them.
$(PEERS)/%/.installed: benchmarks/peers/%.txt
	@test -x $(@D)/bin/python || $(PY) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $< \
		$(if $(filter transformers,$*),-c constraints.txt) \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(if $(filter vllm,$*),$(@D)/bin/python -m pip uninstall --quiet --yes \
		torchvision torchaudio torchcodec)
	@touch $@

gpu-check: $(INSTALLED) ## Run the tests that need a CUDA device
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(PY) -m pytest -m gpu $(TEST_ARGS); \
	else \
		echo "No CUDA device that this torch can use: nothing was checked."; \
	fi

binder-check: $(INSTALLED) ## Make Binder's environment, and run every notebook with its memory
	$(PY) -m pytest -m binder -s $(TEST_ARGS)

badge: $(INSTALLED) ## Put the Binder badge of the public repository into README.md
	@$(PY) binder/badge.py $(REPO)

# The browser tests fail, with a message, where there is no Chromium and none can be installed.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	command -v google-chrome >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	else \
		echo "No Chromium found; the browser tests need one (Debian: apt-get install chromium)."; \
	fi

clean: ## Remove what the commands wrote, but not .venv
	rm -rf out build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -rf extensions/inferkit-lab/lib extensions/inferkit-lab/labextension
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## Remove .venv as well
	rm -rf $(VENV) $(PEERS) extensions/inferkit-lab/node_modules extensions/inferkit-lab/.yarn
