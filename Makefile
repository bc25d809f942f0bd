# `make demo` and `make test` need Python >= 3.11 and make, nothing else: the first call makes a
# virtual environment with the versions of requirements.lock, later calls reuse it.

VENV ?= .venv
BIN := $(VENV)/bin
# Version choice of an installation; the other test targets replace it.
PINS ?= --constraint requirements.lock
PYTEST_ARGS ?= -n 2

# The first of the named interpreters that can make environments and passes the version test. Each
# one is run, because a name on the PATH can be a shim for a version that is not installed.
comma := ,
find_python = $(shell for python in $(1); do "$$python" -c 'import sys, ensurepip, venv; \
	$(2) or sys.exit(1); print(sys.executable)' 2>/dev/null && break; done)
PYTHON ?= $(call find_python,python3.13 python3.12 python3.11 python3,sys.version_info >= (3$(comma) 11))
PYTHON313 ?= $(call find_python,python3.13 $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python),\
	sys.version_info[:2] == (3$(comma) 13))

.PHONY: help demo test test-slow test-lowest test-latest lint bench lock clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/demo.stamp  ## Train and compare the methods on the digits, with a table and a picture
	$(BIN)/python -m experiments.compare --task digits --name demo

bench: $(VENV)/demo.stamp  ## Time every method against its Optax base
	$(BIN)/python -m experiments.bench

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

lint: $(VENV)/dev.stamp  ## Check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

lock: $(VENV)/dev.stamp  ## Renew requirements.lock with the newest versions
	$(BIN)/uv pip compile pyproject.toml --quiet --upgrade --all-extras --universal \
		--python-version 3.11 --fork-strategy fewest --no-emit-package optax-accel \
		--no-annotate --custom-compile-command "make lock" --output-file requirements.lock

clean:  ## Remove environments, caches and builds (results in runs/ stay)
	rm -rf .venv .venv-lowest .venv-latest build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
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
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock uv

# uv installs in seconds what takes pip a minute; pip steps in where only pip knows the package index.
install = $(BIN)/uv pip install --quiet --python $(BIN)/python $(PINS) --editable '.[$(1)]' \
	|| $(BIN)/python -m pip install --disable-pip-version-check $(PINS) --editable '.[$(1)]'

$(VENV)/demo.stamp: $(BIN)/uv pyproject.toml requirements.lock
	$(call install,experiments)
	touch $@

$(VENV)/dev.stamp: $(BIN)/uv pyproject.toml requirements.lock
	$(call install,dev)
	touch $@
