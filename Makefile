# Every target does its own set-up: python3, pip, make and g++ are all that a machine needs.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

UV_VERSION := 0.13.9
# A uv of the right series on PATH is used as it is; else pip puts one into the checkout.
UV := $(shell uv --version 2>/dev/null | grep -q '^uv 0\.13\.' && command -v uv || echo .uv/$(UV_VERSION)/bin/uv)
PY := .venv/bin/python
PACKAGES := $(notdir $(patsubst %/pyproject.toml,%,$(wildcard packages/*/pyproject.toml)))
MANIFESTS := pyproject.toml uv.lock $(wildcard packages/*/pyproject.toml)
TEXT ?=
OUT ?=

# Should no Python of this machine fit, the one that uv brings stays inside the checkout as well.
export UV_PYTHON_INSTALL_DIR := $(CURDIR)/.uv/python
export UV_NO_PROGRESS ?= 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# A virtual environment that happens to be active is not ours.
unexport VIRTUAL_ENV UV_PROJECT_ENVIRONMENT

ifneq ($(P),)
ifeq ($(filter $(P),$(PACKAGES)),)
$(error P=$(P) is no package of this workspace; there are: $(PACKAGES))
endif
endif

##@ Start here
.PHONY: help
help: ## Show this list
	@awk 'BEGIN { FS = ":.*## "; print "Usage: make TARGET [VARIABLE=value]" } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile
	@printf '\nPackages (P=): %s\n' "$(PACKAGES)"

.PHONY: setup
setup: .venv/.synced ## Install everything the other targets need, into .venv and .uv

.PHONY: demo
demo: .venv/.synced ## From raw text to written text in about 5 minutes; TEXT= and OUT= name your own files and folder
	TEXT="$(TEXT)" OUT="$(OUT)" $(PY) tools/demo.py

.PHONY: test
test: .venv/.synced ## Run the tests with coverage, of one package with P=name
	$(PY) -m pytest $(P:%=packages/%) $(patsubst %,--cov=packages/%/src,$(or $(P),$(PACKAGES)))

##@ Before a change goes in
.PHONY: check lint types boundaries locked workspace
check: lint types boundaries locked ## Lint, format, types, import boundaries, lock file, workspace rules
	@echo "check: all passed"

lint: .venv/.synced
	.venv/bin/ruff check
	.venv/bin/ruff format --check

types: .venv/.synced
	.venv/bin/pyright

boundaries: .venv/.synced
	.venv/bin/lint-imports --no-cache

locked: .venv/.synced
	$(UV) lock --check
	$(UV) pip check --python $(PY)

##@ Housekeeping
.PHONY: clean
clean: ## Remove what was built and the caches; with ALL=1 the environments too (never runs/)
	rm -rf build dist site htmlcov .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf $(if $(ALL),.venv .venv-bench .venv-docs .uv)
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +

.uv/%/bin/uv:
	@command -v python3 >/dev/null || { echo "python3 with pip is needed, and is not on PATH" >&2; exit 2; }
	PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 python3 -m pip install --quiet --disable-pip-version-check \
	  --upgrade --target .uv/$* uv==$*

.venv/.synced: $(MANIFESTS) | $(filter .uv/%,$(UV))
	$(UV) sync --locked
	@touch $@
