# Every target sets up what it needs in .venv by itself. `make` alone lists the targets.

VENV   := .venv
PINNED := constraints.txt
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/.specdec-ready
PIP    := $(PYTHON) -m pip --disable-pip-version-check
FAST   := -m pytest -q -n 2 --dist worksteal -m "not slow"
TORCH  := $(shell grep '^torch==' $(PINNED))

# The interpreter that makes .venv; `make test SYSTEM_PYTHON=/path/to/python3.12` chooses one.
SYSTEM_PYTHON ?=

# Targets share one environment; two at once would set it up twice.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test newest slow architectures lint format types setup clean

help: ## list the targets
	@grep -E '^[a-z]+: .*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /|/' \
	    | awk -F'|' '{ printf "  make %-14s %s\n", $$1, $$2 }'

demo: $(READY) ## generate with a real model: plain, assisted by transformers, and with specdec
	@$(PYTHON) -m specdec.demo

test: lint types ## lint, types and tests (what CI runs)
	$(PYTHON) $(FAST)

newest: ## the tests in .venv-newest, with transformers and the rest as new as pyproject.toml allows
	rm -rf .venv-newest
	$(MAKE) setup VENV=.venv-newest PINNED=constraints-newest.txt
	.venv-newest/bin/python $(FAST)

slow: $(READY) ## the tests that `make test` leaves out
	$(PYTHON) -m pytest -q -m slow

architectures: $(READY) ## compare with plain generate() on every architecture of transformers
	$(PYTHON) tests/architectures/run.py

lint: $(READY) ## ruff: rules and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(READY) ## let ruff repair and format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types: $(READY) ## mypy --strict on src
	$(PYTHON) -m mypy --strict src

setup: $(READY) ## only set up .venv

clean: ## remove .venv and every cache in this folder
	rm -rf $(VENV) .venv-newest .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# --- set-up -----------------------------------------------------------------------------------------

# Is .venv there, of a Python that will do, and has it pip (an environment made by uv has none)?
define usable
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
    && { $(PIP) --version || $(PYTHON) -m ensurepip; } >/dev/null 2>&1
endef

# The first interpreter that can make an environment. pip would end in a riddle on one that is too new.
define create
found=; for python in $(SYSTEM_PYTHON) python3 python3.13 python3.12 python3.11 python3.14 python; do \
    if "$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
	2>/dev/null; then found="$$python"; break; fi; \
done; \
if [ -z "$$found" ]; then \
    echo 'specdec needs Python 3.11 to 3.14 with the venv module, and found none.' >&2; \
    echo 'Install one (Debian, Ubuntu: apt install python3-venv), or name one:' >&2; \
    echo '    make $(firstword $(MAKECMDGOALS)) SYSTEM_PYTHON=/path/to/python3.12' >&2; \
    exit 1; \
fi; \
echo "Making $(VENV) with $$("$$found" --version) ..."; "$$found" -m venv --clear $(VENV)
endef

# torch on its own first: pip then takes a build that is at hand (CPU only, say) before it weighs the rest.
define install
$(PIP) install -c $(PINNED) $(TORCH) && $(PIP) install -q -c $(PINNED) -e '.[test,demo,bench,dev]'
endef

define whole
$(PYTHON) -c 'import accelerate, gguf, hypothesis, matplotlib, mypy.api, numpy, pytest, rich, safetensors, xdist, torch, transformers' \
    && $(PYTHON) -m ruff --version >/dev/null
endef

# The stamp is written last, so that a set-up that was cut short is taken up again. What pip left half
# done it mostly repairs itself; where it cannot, the environment is made anew, once.
$(READY): pyproject.toml $(PINNED)
	@rm -f $@
	@$(usable) || { $(create); }
	@echo "Installing into $(VENV) (some minutes the first time) ..."
	@$(install)
	@{ $(whole); } 2>/dev/null || { echo "$(VENV) is damaged: making it anew ..." >&2; $(create) && $(install) && $(whole); }
	@touch $@
