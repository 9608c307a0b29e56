# What people and CI run. Everything lives in a private .venv; nothing else on the machine changes.
SHELL := /bin/sh
PYTHON ?= python3
BIN := .venv/bin
UV := $(shell command -v uv 2>/dev/null || echo $(BIN)/uv)
PIN = $(UV) pip compile --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --quiet

.PHONY: help demo test check chaos bench bench-scale format lock compiled
help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: compiled ## two workers, one killed, Redis wiped: nothing lost, nothing twice
	@$(BIN)/exarq demo

test: compiled ## the whole suite, on embedded servers unless EXARQ_TEST_DATABASE_URL and EXARQ_TEST_REDIS_URL are set
	$(BIN)/pytest -q -n 4 --dist worksteal $(ARGS)

check: .venv/.ready ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

chaos: compiled ## break everything for a minute and count what it cost: SECONDS=60 SEED=1 FAULT=mix (FAULT=help lists them)
	@$(BIN)/python -m tests.chaos $(if $(filter help,$(FAULT)),--help,$(strip $(if $(SECONDS),--seconds $(SECONDS)) \
		$(if $(SEED),--seed $(SEED)) $(if $(FAULT),--fault $(FAULT)) $(ARGS)))

bench: compiled ## Exarq and its peers side by side on durable servers: QUICK=1 takes 3 minutes; ARGS="--systems exarq,limit --workloads orm --rounds 15"
	@$(BIN)/python -m tests.bench $(strip $(if $(QUICK),--quick) $(ARGS))

bench-scale: compiled ## idle workers, full tables, memory, how cost grows: QUICK=1 takes a tenth of each; ARGS="--parts idle,growth"
	@$(BIN)/python -m tests.bench.scale $(strip $(if $(QUICK),--quick) $(ARGS))

format: .venv/.ready ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: .venv/.ready ## pin every dependency with hashes, and apart what the images hold and what builds them
	$(PIN) pyproject.toml --extra dev --group dev --upgrade -o requirements.lock
	$(PIN) pyproject.toml --extra uvloop --constraint requirements.lock --no-annotate -o requirements.image.lock
	$(PIN) --group service --constraint requirements.lock --no-annotate -o requirements.service.lock
	$(PIN) --group build --constraint requirements.lock --no-annotate -o requirements.build.lock

compiled: .venv/.ready
	@$(BIN)/python -m compileall -q worker jobs tests

.venv/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Exarq needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@command -v uv >/dev/null 2>&1 || test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV) pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true  # where nothing is written at import, each start would do it anew
	@touch $@
