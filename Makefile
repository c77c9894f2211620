# The two commands of the README: `make run` and `make test`. Each sets up what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
INPUTS := pyproject.toml constraints.txt requirements-data.txt

.PHONY: run test lint clean

run: $(VENV)/.installed  ## SmolLM2-135M to about 90M parameters, on this machine
	$(BIN)/minitron run smollm2-135m-cpu

# In the order of their names: that of xdist leaves the files with few tests, which are the long ones, for the end.
test: $(VENV)/.installed  ## the tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.installed  ## style, types, and the one-way imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Minitron needs Python 3.11 to 3.13: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch first: with it in place nothing else asks for another build of it
$(VENV)/.installed: $(BIN)/python $(INPUTS)
	@echo 'Installing about 180 packages into $(VENV): a few minutes, the last of them quiet.'
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps -r requirements-data.txt
	touch $@

clean:
	rm -rf $(VENV)
