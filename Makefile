# Every user action, one line each. `make` alone prints this help.
SHELL     := /bin/bash
SWEEP     ?= reproduce
LAUNCHER  ?= joblib
JOBS      ?= $(shell nproc 2>/dev/null || echo 2)
OVERRIDES ?=
PYTHON    ?= python3
BIN       := .venv/bin
export HYDRA_FULL_ERROR := 1

.DEFAULT_GOAL := help
.PHONY: help setup test clean

help: ## print every target
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo "Variables: SWEEP=$(SWEEP) LAUNCHER=$(LAUNCHER) JOBS=$(JOBS) OVERRIDES='key=value ...'"

setup: .venv/installed ## create .venv and install the package (a second call does nothing)

.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: peerscale needs Python 3.11 or newer; name one with PYTHON=..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
