# Two commands: `make lab` opens the course, `make test` tests it. `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV ?= .venv
# The first Python that is new enough; `make lab PYTHON=/path/to/python` chooses another.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
BIN := $(VENV)/bin
PY := $(BIN)/python
PORT ?=
ARGS ?=
LAB_FLAGS = $(if $(PORT),--port=$(PORT)) $(if $(filter 0,$(shell id -u)),--allow-root) $(ARGS)

.PHONY: help lab test lint unit nbval browser full-size notebooks badges readme format clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

lab: $(VENV)/.lab  ## set everything up and open JupyterLab on lesson 00 (PORT=8890, ARGS=--no-browser)
	@echo "Starting JupyterLab; stop it with Ctrl-C."
	@$(BIN)/jupyter lab --log-level=WARN --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb $(LAB_FLAGS)

test: lint unit nbval browser  ## run every test

lint: $(VENV)/.test  ## ruff, on the package, the tests and the notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Threads that sleep while they wait: a busy machine slows the tests a little, not tenfold.
unit nbval browser: export OMP_WAIT_POLICY ?= PASSIVE
unit nbval browser: export TOKENIZERS_PARALLELISM ?= false
nbval: export HF_HUB_OFFLINE ?= 1

unit: $(VENV)/.test  ## tests of the package, the exercises and the repository's rules
	$(PY) -m pytest -q tests $(ARGS)

nbval: $(VENV)/.test  ## run every notebook from cold
	$(PY) -m pytest -q --nbval-lax --nbval-current-env --nbval-cell-timeout 300 notebooks $(ARGS)

browser: $(VENV)/.test  ## use lesson 00 in JupyterLab, in a headless Chromium
	$(PY) -m pytest -q tests -m browser $(ARGS)

full-size: $(VENV)/.test  ## compare Stable Diffusion 1.5's networks at their real sizes (16 GB, some minutes)
	$(PY) -m pytest -q tests -m full_size $(ARGS)

notebooks: $(VENV)/.lab  ## run the notebooks from cold and store clean outputs (NAMES="00 04" for some of them)
	$(PY) -m ldm_lessons.notebooks run $(NAMES)

badges: $(VENV)/.lab  ## rewrite Colab badges and setup cells (REPO=https://github.com/you/fork changes the address first)
	$(PY) -m ldm_lessons.notebooks badges $(if $(REPO),--repo $(REPO))

readme: $(VENV)/.lab  ## put the measured scores into README.md
	$(PY) -m ldm_lessons.notebooks readme

format: $(VENV)/.test  ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## delete the environment and the caches (not the data)
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info

$(PY):
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "This course needs Python 3.11 or newer ($(or $(PYTHON),python3) is older or missing): install one, or name it with PYTHON=/path/to/python." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "Python's venv module is missing: install it (Debian and Ubuntu: sudo apt install python3-venv) and try again." >&2; exit 1; }
	@echo "Creating the environment in $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

# $(call install,extra): pip's log goes to a file; the terminal shows what is more than a megabyte.
define install
@echo "Installing the tested versions (a few minutes the first time) ..."
@set -o pipefail; $(PY) -m pip install --progress-bar off --disable-pip-version-check -c constraints.txt -e ".[$(1)]" 2>&1 \
	| tee $(VENV)/pip.log | { grep --line-buffered -oE '^ *(Downloading|Using cached) [^ ]+ \([0-9.]+ [MG]B\)|^Installing collected packages' || true; } \
	|| { grep -A 8 ERROR $(VENV)/pip.log; echo "pip could not install the course: the whole log is in $(VENV)/pip.log." >&2; exit 1; }
@$(PY) -m ipykernel install --sys-prefix --name python3 >/dev/null 2>&1
@mkdir -p $(VENV)/share/jupyter/lab/settings
@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' \
	> $(VENV)/share/jupyter/lab/settings/overrides.json
endef

$(VENV)/.lab: pyproject.toml constraints.txt | $(PY)
	$(call install,lab)
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(PY)
	$(call install,test)
	@touch $@ $(VENV)/.lab
