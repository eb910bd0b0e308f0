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
# uv locks its store of credentials even where there is none; it shall not make one in the user's home.
ifeq ($(wildcard $(or $(XDG_DATA_HOME),$(HOME)/.local/share)/uv/credentials),)
export UV_CREDENTIALS_DIR ?= $(CURDIR)/.uv/credentials
endif
export UV_NO_PROGRESS ?= 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# A virtual environment that happens to be active is not ours.
unexport VIRTUAL_ENV UV_PROJECT_ENVIRONMENT
# The tests start many processes, and without stored bytecode each of them compiles torch's sources anew.
unexport PYTHONDONTWRITEBYTECODE

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
test: .venv/.synced ## Run the tests with coverage, of one package with P=name; ARGS= goes to pytest
	$(PY) -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile $(P:%=packages/%) $(patsubst %,--cov=packages/%/src,$(or $(P),$(PACKAGES))) $(ARGS)

.PHONY: optimum-onnx
optimum-onnx: .venv-optimum-onnx/.synced ## Run hamerspace's tests of optimum-onnx, which needs an environment of its own
	.venv-optimum-onnx/bin/python -m pytest packages/hamerspace/tests/test_optimum_backend.py $(ARGS)

##@ Before a change goes in
.PHONY: check lint types boundaries locked rules
check: lint types boundaries locked rules ## Lint, format, types, import boundaries, lock file, workspace rules
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

rules: .venv/.synced
	$(PY) tools/check_workspace.py

.PHONY: wheels
wheels: build/locked.txt .venv/.synced ## Build every package's wheel into dist/, with a constraints file of all versions
	rm -rf dist
	BITCORE_NATIVE=1 $(UV) build --all-packages --wheel --out-dir dist
	# An index takes compiled code only where it is known on which systems it runs.
	PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m auditwheel repair --plat manylinux_2_17_x86_64 --wheel-dir dist dist/*-linux_x86_64.whl
	rm dist/*-linux_x86_64.whl
	$(PY) tools/workspace.py > dist/constraints.txt

.PHONY: wheel-smoke
wheel-smoke: wheels ## Install each wheel alone, import its modules, run its commands, time its import
	$(PY) tools/wheel_smoke.py --uv $(UV) --constraint build/locked.txt $(P:%=--only %)

.PHONY: integration
integration: wheels ## Run tests-integration/ against the built wheels in an environment of their own
	$(UV) venv --quiet --clear --python $(PY) build/integration
	$(PY) tools/workspace.py --wheels dist > build/wheels.txt
	$(UV) pip install --quiet --python build/integration/bin/python --constraint build/locked.txt \
	  --requirement build/wheels.txt pytest pytest-timeout hypothesis
	build/integration/bin/python -m pytest tests-integration

.PHONY: lowest
lowest: .venv/.synced ## Run the tests with the lowest versions that are allowed, on a copy in build/lowest
	rm -rf build/lowest && mkdir -p build/lowest
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t build/lowest
	cd build/lowest && UV_RESOLUTION=lowest-direct $(abspath $(UV)) lock
	UV_RESOLUTION=lowest-direct $(MAKE) -C build/lowest test UV=$(abspath $(UV)) ARGS='-W default::DeprecationWarning'

##@ Measuring, documentation, release
.PHONY: bench
bench: .venv-bench/.synced ## Run the benchmarks, of one package with P=name, in .venv-bench beside their peers
	@files=(packages/$(or $(P),*)/benchmarks/bench_*.py); \
	[ -e "$${files[0]}" ] || { echo "no benchmarks in packages/$(or $(P),*)/benchmarks" >&2; exit 2; }; \
	for file in "$${files[@]}"; do echo "== $$file"; PYTHONPATH=tools OMP_NUM_THREADS=1 .venv-bench/bin/python "$$file"; done

.PHONY: docs
docs: .venv-docs/.synced ## Build the site into site/, with nothing fetched
	.venv-docs/bin/python tools/docs_pages.py build/docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

.PHONY: api
api: .venv/.synced ## Compare the public names of each package, or of P=name, with its last release
	$(PY) tools/check_api.py $(P:%=--package %)

.PHONY: plan
plan: .venv/.synced ## Say which packages await publication, and which names may not be published to
	$(PY) tools/release_plan.py

.PHONY: bump
bump: .venv/.synced ## Raise the version of a package: make bump P=av-memory PART=major, minor or patch
	@[ -n "$(P)" ] && [ -n "$(PART)" ] || { echo "usage: make bump P=<package> PART=major|minor|patch" >&2; exit 2; }
	$(PY) tools/bump.py $(P) $(PART)
	$(UV) lock

##@ Housekeeping
.PHONY: clean
clean: ## Remove what was built and the caches; with ALL=1 the environments too (never runs/)
	rm -rf build dist site htmlcov .coverage .coverage.* .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf $(if $(ALL),.venv .venv-bench .venv-docs .venv-optimum-onnx .uv)
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +

.uv/%/bin/uv:
	@command -v python3 >/dev/null || { echo "python3 with pip is needed, and is not on PATH" >&2; exit 2; }
	PIP_USER=0 PIP_REQUIRE_VIRTUALENV=0 python3 -m pip install --quiet --disable-pip-version-check \
	  --root-user-action=ignore --upgrade --target .uv/$* uv==$*

.venv/.synced: $(MANIFESTS) | $(filter .uv/%,$(UV))
	$(UV) sync --locked
	@touch $@

.venv-optimum-onnx/.synced: $(MANIFESTS) | $(filter .uv/%,$(UV))
	UV_PROJECT_ENVIRONMENT=.venv-optimum-onnx $(UV) sync --locked --no-group members --group optimum-onnx
	@touch $@

.venv-bench/.synced: $(MANIFESTS) | $(filter .uv/%,$(UV))
	UV_PROJECT_ENVIRONMENT=.venv-bench $(UV) sync --locked --group bench
	@touch $@

.venv-docs/.synced: $(MANIFESTS) | $(filter .uv/%,$(UV))
	UV_PROJECT_ENVIRONMENT=.venv-docs $(UV) sync --locked --only-group docs
	@touch $@

# What the lock holds of others' packages: wheels are tried with these versions and no newer ones.
build/locked.txt: .venv/.synced
	@mkdir -p build
	$(UV) export --quiet --locked --all-groups --no-group optimum-onnx --no-emit-workspace --no-hashes \
	  --no-annotate --no-header --output-file $@
