# Two commands do everything on a machine with git, make and Python 3.11 (with venv):
#   make demo    install, compress a small model that ships with the project, print where the report is
#   make test    install the rest, run every test
# Both may be run again at any time.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt

.PHONY: demo test lint wheel clean

demo: $(VENV)/.base
	$(BIN)/edgecompress demo

test: $(VENV)/.full
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A wheel in an empty environment must do what the checkout does.
wheel: $(VENV)/.lint
	rm -rf dist build/wheel-venv
	$(BIN)/python -m build --wheel --outdir dist
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip install -q -c $(CONSTRAINTS) dist/*.whl
	cd build && wheel-venv/bin/edgecompress demo -o wheel-demo

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgecompress needs Python 3.11 or newer: make PYTHON=python3.11 demo")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.full: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[export,native,test]'
	touch $@ $(VENV)/.base

$(VENV)/.lint: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[lint]'
	touch $@

clean:
	rm -rf $(VENV) build dist edgecompress-demo
