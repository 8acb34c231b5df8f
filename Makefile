# Two commands do everything: `make demo` and `make test`. Both make .venv on their first call and reuse it after that.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test test-all lint install clean help

help:
	@echo "make demo     install, fetch a small model and real data, run the whole job, end with a report (runs/demo)"
	@echo "make test     install and run the tests"
	@echo "make test-all the tests that take long, too"
	@echo "make lint     ruff and mypy"
	@echo "make clean    remove the virtual environment and the demo's run"

demo: $(VENV)/.installed
	$(BIN)/ray-ensemble run examples/quickstart.yaml --output runs/demo

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n 2 -m "not slow and not bench"

test-all: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -m "not bench"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar off -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) runs/demo
