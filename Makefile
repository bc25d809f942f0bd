# `make demo` and `make test` need Python >= 3.11 and make, nothing else: the first call makes a
# virtual environment with the versions of requirements-demo.lock or requirements.lock, whose hashes
# every download has to match; later calls reuse it.

VENV ?= .venv
BIN := $(VENV)/bin
# Options that choose other versions than the locked ones, for test-lowest and test-latest.
PINS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal

# The first of the named interpreters that can make environments and passes the version test. Each
# one is run, because a name on the PATH can be a shim for a version that is not installed.
comma := ,
find_python = $(shell for python in $(1); do "$$python" -c 'import sys, ensurepip, venv; \
	$(2) or sys.exit(1); print(sys.executable)' 2>/dev/null && break; done)
PYTHON ?= $(call find_python,python3.13 python3.12 python3.11 python3,sys.version_info >= (3$(comma) 11))
PYTHON313 ?= $(call find_python,python3.13 $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python),\
	sys.version_info[:2] == (3$(comma) 13))

# Tests start many processes: each would compile what it imports anew, two fifths of the CPU time of
# its imports, where the environment says to keep no bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo docs test test-slow test-lowest test-latest lint bench accelerator-report lock clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-19s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/demo.stamp  ## Train and compare the methods on the digits, with a table and a picture
	$(BIN)/python -m experiments.compare --task digits --name demo

bench: $(VENV)/demo.stamp  ## Time every method against its Optax base
	$(BIN)/python -m experiments.bench

accelerator-report: $(VENV)/demo.stamp  ## Measure the methods on this machine's GPU or TPU, in 8 minutes
	$(BIN)/python -m experiments.accelerator_report

test: $(VENV)/dev.stamp  ## Run the tests, the slow ones left out
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(VENV)/dev.stamp  ## Run the slow tests
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m slow

test-lowest:  ## Run the tests with the lowest versions that pyproject.toml allows
	$(MAKE) test VENV=.venv-lowest PINS="--resolution lowest-direct"

test-latest:  ## Run the tests on Python 3.13 with the newest versions of everything
	@if [ -z "$(PYTHON313)" ]; then \
		echo "test-latest: skipped, no Python 3.13 found; name one by PYTHON313=/path/to/python"; \
	else \
		rm -f .venv-latest/*.stamp; \
		$(MAKE) test VENV=.venv-latest PYTHON="$(PYTHON313)" PINS=--upgrade; \
	fi

docs: $(VENV)/dev.stamp  ## Build the documentation into docs/_build/html
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

lint: $(VENV)/dev.stamp  ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

lock: $(VENV)/dev.stamp  ## Renew both lock files with the newest versions
	$(call compile,requirements.lock,--all-extras)
	$(call compile,requirements-demo.lock,--extra experiments --constraint requirements.lock)

# Beside the packages of the extras: what installs them, and what builds the project itself.
compile = printf '%s\n' uv hatchling editables | $(BIN)/uv pip compile pyproject.toml - $(2) \
	--quiet --upgrade --generate-hashes --universal --python-version 3.11 --fork-strategy fewest \
	--no-emit-package optax-accel --no-annotate --custom-compile-command "make lock" \
	--output-file $(1)

clean:  ## Remove environments, caches and builds (results in runs/ stay)
	rm -rf .venv .venv-lowest .venv-latest build dist docs/_build docs/api docs/methods docs/notebooks docs/tables .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/uv:
	@set -e; python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
		echo "No Python >= 3.11 with venv and ensurepip found (Debian: apt install python3-venv);" \
			"name one by PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	echo "Making $(VENV) with $$python"; \
	"$$python" -m venv --clear $(VENV)
	@awk '/^uv==/ { found = 1 } found { print; if (!/\\$$/) exit }' requirements-demo.lock >$(VENV)/uv.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes --requirement $(VENV)/uv.lock

# Installs an extra (1) from its lock file (2), then the project itself, which has no hash. uv
# installs in seconds what takes pip a minute; pip steps in where only pip knows the package index.
uv_install = $(BIN)/uv pip install --quiet --python $(BIN)/python
pip_install = $(BIN)/python -m pip install --disable-pip-version-check
either = $(uv_install) $(1) || $(pip_install) $(1)
ifeq ($(strip $(PINS)),)
install = { $(call either,--require-hashes --requirement $(2)); } \
	&& { $(call either,--no-deps --no-build-isolation --editable .); }
else
install = $(call either,$(PINS) --editable '.[$(1)]')
endif

$(VENV)/demo.stamp: $(BIN)/uv pyproject.toml requirements-demo.lock
	$(call install,experiments,requirements-demo.lock)
	touch $@

$(VENV)/dev.stamp: $(BIN)/uv pyproject.toml requirements.lock
	$(call install,dev,requirements.lock)
	touch $@
