# Run `make` for the list of targets.
SHELL := /bin/bash
venv := .venv/bin
python := $(venv)/python
code := hpcmm tests benchmarks slurm scripts examples
lowest := .venv-lowest
lowest_tests := tests/config tests/reports tests/runs tests/page/test_outputs.py tests/launch/test_script.py \
	tests/launch/test_plan.py --ignore tests/config/test_parts.py

.PHONY: help setup demo test test-all test-lowest compiled-ops lint cluster-up cluster-down cluster-status clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

setup: ## Install system packages (as root) and .venv with the pinned Python packages
	@scripts/setup.sh

demo: ## Train on a local four-node Slurm under nsys, and show where the time went
	@scripts/demo.sh

test: ## Set up, then run the tests; those on the real Slurm one after the other
	@scripts/setup.sh --with-test-tools
	@status=0; \
	$(python) -m pytest -m "not long" -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/integration || status=1; \
	$(python) -m pytest -m "not long" tests/integration || status=1; \
	exit $$status

test-all: test ## ... and those that it leaves out: long ones, and further cases of what it tests
	@status=0; \
	$(python) -m pytest -m long -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/integration || status=1; \
	$(python) -m pytest -m long tests/integration || status=1; \
	exit $$status

compiled-ops: setup ## Compile what the tests' ranks load, as the first test that needs it does
	@$(python) -m pytest --quiet --setup-only tests/recipes/test_pipeline_recipe.py >/dev/null

test-lowest: setup ## ... and those of the toolkit without torch, with the lowest versions that pyproject.toml allows
	@$(python) -m venv --clear $(lowest)
	@$(python) scripts/lowest_versions.py >$(lowest)/constraints.txt
	@$(lowest)/bin/python -m pip install --quiet --disable-pip-version-check -c $(lowest)/constraints.txt -e . \
		pytest pytest-timeout hypothesis
	@PATH=$(CURDIR)/$(lowest)/bin:$$PATH python -m pytest $(lowest_tests)

lint: setup ## Check style, types, import contracts and the measures of the layout
	$(python) -m ruff check $(code)
	$(python) -m ruff format --check $(code)
	$(venv)/vermin --quiet --target=3.9- --violations $$($(python) scripts/rank_side.py)
	$(python) -m mypy --strict hpcmm
	MYPYPATH=slurm/local $(python) -m mypy --strict --package cluster
	$(venv)/lint-imports
	$(python) scripts/measure_layout.py

cluster-up: ## Start the local four-node Slurm cluster (as root)
	@slurm/local/up

cluster-down: ## Stop it
	@slurm/local/down

cluster-status: ## Show its nodes; exit status 0 only when it can be used
	@slurm/local/status

clean: ## Remove .venv and caches; runs/ stays
	rm -rf .venv $(lowest) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find hpcmm tests benchmarks slurm scripts -name __pycache__ -type d -prune -exec rm -rf {} +
