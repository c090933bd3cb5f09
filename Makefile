# make demo   sets up .venv and runs the main job on a local cluster
# make test   sets up .venv and passes the tests
# make check  what CI runs: format, lint, types, import rules, tests
#
# Needs Linux, Python 3.11 or later with venv, and PyPI. PYTHON=... names the interpreter; else the first that fits.

VENV := .venv
BIN := $(VENV)/bin
SHELL := /bin/bash

.PHONY: demo dev test check clean
.DEFAULT_GOAL := demo

demo: $(VENV)/.demo
	$(BIN)/herder demo

test: dev
	$(BIN)/python -m pytest -q

check: dev
	tools/check

dev: $(VENV)/.dev

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
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
