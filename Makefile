# make demo   sets up .venv and runs the main job on a local cluster
# make test   sets up .venv and passes the tests
# make check  what CI runs: format, lint, types, import rules, tests
# make fork-table  measures the table of docs/FORK_SAFETY.md again, with the libraries' current versions
#
# Needs Linux, Python 3.11 or later with venv, and PyPI. PYTHON=... names the interpreter; else the first that fits.

VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: demo dev test check clean fork-table
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo
	$(BIN)/herder demo

test: dev
	VIRTUAL_ENV=$(CURDIR)/$(VENV) tools/test

check: dev
	tools/check

dev: $(VENV)/.dev

# In an environment of its own, made new so that versions are today's; FORK_TABLE_PYTHON=... is one that has them all.
# TORCH: what to install for torch (its wheels in the registry bring gigabytes of CUDA); TORCH= leaves it out.
FORK_TABLE_VENV := .venv-fork-table
FORK_TABLE_PYTHON ?= $(CURDIR)/$(FORK_TABLE_VENV)/bin/python
TORCH ?= torch --index-url https://download.pytorch.org/whl/cpu
FORK_TABLE ?=

fork-table: dev $(if $(filter $(CURDIR)/%,$(FORK_TABLE_PYTHON)),fork-table-venv)
	$(BIN)/python benchmarks/fork_table.py --python $(FORK_TABLE_PYTHON) $(FORK_TABLE)

.PHONY: fork-table-venv
fork-table-venv: $(BIN)/python
	$(BIN)/python -m venv --clear $(FORK_TABLE_VENV)
	$(BIN)/python tools/extra fork-table | xargs $(FORK_TABLE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check
	$(if $(TORCH),$(FORK_TABLE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH))

clean:
	rm -rf $(VENV) $(FORK_TABLE_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find client shared coordinator agent launch tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# The tests' environment has all that the demo needs.
$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(VENV)/.dev $(VENV)/.demo

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	touch $@

$(BIN)/python:
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "making $(VENV) with $$("$$python" -c 'import sys; print(sys.executable)')"; \
			exec "$$python" -m venv $(VENV); \
		fi; \
	done; \
	echo "Herder needs Python 3.11 or later with the venv module (Debian: apt install python3 python3-venv)." >&2; \
	echo "None was found as python3.11, python3.12, python3.13 or python3; name one: make PYTHON=/path/to/python" >&2; \
	exit 1
