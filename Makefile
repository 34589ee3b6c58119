# Every user action, one target each. `make` alone prints the help.
SHELL     := /bin/bash
SWEEP     ?= reproduce
LAUNCHER  ?= joblib
JOBS      ?= $(shell getconf _NPROCESSORS_ONLN)
OVERRIDES ?=
CELL      ?=
BUDGET    ?= 1e13
PYTHON    ?= python3
EXTRAS    ?= dev
BIN       := .venv/bin
# Cells that run at once; on Slurm only if JOBS is given, as the cores of the login node do not matter there.
AT_ONCE_joblib = --jobs $(JOBS)
AT_ONCE_slurm  = $(if $(filter command environment,$(firstword $(origin JOBS))),--jobs $(JOBS))
# 0 means no.
$(foreach flag,REPLACE LOCKED PLAN CHECK AVX512,$(if $(filter 0,$($(flag))),$(eval override $(flag) :=)))

# A setup with EXTRAS or LOCKED installs once for each choice; all other targets are content with any.
INSTALLED     = .venv/installed$(if $(filter command,$(firstword $(origin EXTRAS))),-$(EXTRAS))$(if $(LOCKED),-locked)
# AVX512=1: MKL, which decides when it is loaded, uses AVX-512 on processors of AMD too.
MKL           = .venv/mkl_avx512.so
TOLD          = $(if $(AVX512),LD_PRELOAD=$(CURDIR)/$(MKL))
# Number of workers for which the plan estimates the time.
WORKERS       = $(if $(filter joblib,$(LAUNCHER)),$(JOBS),1)
# One thread a cell, one cell a core; more threads only spin.
export OMP_NUM_THREADS      ?= 1
export OPENBLAS_NUM_THREADS ?= 1

# A word that make takes for a variable, such as sweep=smoke or a second override without quotes, must not be ignored.
KNOWN   = SWEEP CELL METHOD RIVALS LAYER BUDGET PLAN CHECK LAUNCHER JOBS OVERRIDES REPLACE PRICE LOCKED AVX512 PYTHON EXTRAS BIN SHELL OMP_NUM_THREADS OPENBLAS_NUM_THREADS
UNKNOWN = $(foreach name,$(filter-out $(KNOWN) -%,$(.VARIABLES)),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
ifneq (,$(strip $(UNKNOWN)))
$(error $(firstword $(UNKNOWN)) is no variable of this Makefile; there are: $(KNOWN); keys of the configuration go together into one pair of quotes: OVERRIDES='key=value key=value')
endif

# A forgotten variable of the environment must not remove finished cells.
ifneq (command line,$(origin REPLACE))
override REPLACE :=
endif

# These reach the programs through the environment, so that neither make nor the shell reads what is in them.
$(foreach name,SWEEP OVERRIDES CELL METHOD RIVALS LAYER,$(eval override $(name) := $$(value $(name)))$(eval export $(name)))

.DEFAULT_GOAL := help
# `data sweep figures` need each other in this order, also with make -j.
.NOTPARALLEL:
OF_A_SWEEP := data plan sweep repeat status restore figures compare publish sync dashboard
TARGETS    := help setup reproduce smoke test check studies place tune time standing page notebooks bench torture clean $(OF_A_SWEEP)
.PHONY: $(TARGETS)

# `make sweep smoke` would train SWEEP=reproduce, and then run the target smoke.
STUDIES = $(if $(filter $(OF_A_SWEEP),$(MAKECMDGOALS)),$(basename $(notdir $(wildcard sweeps/*.yaml))))
STRAY   = $(firstword $(filter $(STUDIES),$(MAKECMDGOALS)) $(filter-out $(TARGETS) .venv/%,$(MAKECMDGOALS)))
ifneq (,$(STRAY))
$(error $(STRAY) is no target here; the study is named by SWEEP=$(STRAY))
endif

help: ## print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo; echo "Variables: SWEEP=$$SWEEP LAUNCHER=joblib|local|slurm JOBS=$(JOBS) OVERRIDES='key=value ...' PYTHON=$(PYTHON)"
	@echo "METHOD=NAME RIVALS=NAME,NAME: what to compare (every method with the study's baseline; METHOD alone: with all others)"
	@echo "CELL=NAME: the cell to repeat; PRICE=NUMBER: price of a GPU-hour, for plan; REPLACE=1: publish may remove finished cells of results/, or replace them by cells of another configuration"
	@echo "LAYER=NAME: the layer to place, tune or time; BUDGET=$(BUDGET): the largest budget of its row; PLAN=1: of make place and make tune; CHECK=1: of make place"
	@echo "AVX512=1: of reproduce, sweep, place, tune, time and repeat: faster matrix products on AMD's processors that have AVX-512 (docs/speed.md)"
	@echo "LOCKED=1: setup installs the versions that the published studies ran on (requirements.lock)"
	@echo "Exit codes of the programs: 0 done, 1 a crash, 2 wrong input, 3 some cells failed (make sweep counts this as success), 4 some cells were killed again and again, 130 Ctrl-C"

reproduce: ## the main command: corpus, training runs, fits, figures and table of the study reproduce (17 minutes on 2 cores)
	@$(MAKE) --no-print-directory data sweep figures SWEEP=reproduce
	@echo "Browse the runs:      .venv/bin/wandb leet runs/reproduce/CELL/wandb    upload them: make sync"

smoke: ## from text to a figure in about a minute, on a tiny study
	@$(MAKE) --no-print-directory data sweep figures SWEEP=smoke
	@echo "Everything works, from text to figure; the runs are far too short for any result."

setup: $(INSTALLED) $(if $(AVX512),$(MKL)) ## create .venv and install the package (a second call does nothing)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: peerscale needs Python 3.11 or newer: name one with PYTHON=..."; exit 2; }
	@echo "creating .venv and installing peerscale into it: some minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(LOCKED),--constraint requirements.lock) --editable '.[$(EXTRAS)]'
	@touch .venv/installed $@

$(MKL): src/peerscale/ops/mkl_avx512.c | $(INSTALLED)
	@$(CC) -shared -fPIC -o $@ $<

data: setup ## download and tokenize the corpus of SWEEP, once
	@$(BIN)/python -m peerscale.data.prepare --sweep "$$SWEEP" "OVERRIDES=$$OVERRIDES"

plan: setup ## what SWEEP would run: parameters, FLOPs, steps, time, dropped cells
	@$(BIN)/python -m peerscale.launch.overview plan --jobs $(WORKERS)$(if $(PRICE), --price $(PRICE)) "$$SWEEP" "OVERRIDES=$$OVERRIDES"

studies: setup ## every study: its question, and how many of its cells are done
	@$(BIN)/python -m peerscale.launch.overview studies

sweep: setup ## train the missing cells of SWEEP; failed cells do not stop the others
	@$(TOLD) $(BIN)/python -m peerscale.launch "$$SWEEP" --keep-going --launcher $(LAUNCHER) $(AT_ONCE_$(LAUNCHER)) "OVERRIDES=$$OVERRIDES"

repeat: setup ## train the cell CELL of SWEEP in results/ again, in runs/repeated, and compare its losses
	@$(TOLD) $(BIN)/python -m peerscale.launch.repeat "$$SWEEP" "$$CELL"

status: setup ## the loss or the state of every cell of SWEEP
	@$(BIN)/python -m peerscale.launch.overview status "$$SWEEP" "OVERRIDES=$$OVERRIDES"

restore: setup ## copy the records of SWEEP in results/ to runs/, where they count as if trained here; keeps records that are there
	@$(BIN)/python analysis/restore.py "$$SWEEP"

figures: setup ## table, fits and figures of SWEEP, from its runs
	@$(BIN)/python analysis/collect.py "$$SWEEP" "OVERRIDES=$$OVERRIDES"
	@$(BIN)/python analysis/figures.py "$$SWEEP" "OVERRIDES=$$OVERRIDES"
	@$(if $(OVERRIDES),true,test ! -d "runs/$$SWEEP/study/figures") || { echo; \
		echo "Figures:              runs/$$SWEEP/study/figures/"; \
		echo "Copied to results/:   make publish SWEEP=$$SWEEP"; }

compare: setup ## METHOD of SWEEP against RIVALS, a line for each budget: difference, multiplier, what could have been told
	@$(BIN)/python analysis/collect.py "$$SWEEP" "OVERRIDES=$$OVERRIDES" --methods "$$METHOD,$$RIVALS"
	@$(BIN)/python analysis/compare.py "$$SWEEP" "OVERRIDES=$$OVERRIDES" --methods "$$METHOD" --rivals "$$RIVALS"

place: setup ## tune LAYER, train it and write its folder in results/standing; PLAN=1: what that takes; CHECK=1: check the folder
	@$(TOLD) $(BIN)/python -m peerscale.launch.place "$$LAYER" --budget $(BUDGET) --launcher $(LAUNCHER) $(AT_ONCE_$(LAUNCHER)) $(if $(PLAN),--plan)$(if $(CHECK),--check) "OVERRIDES=$$OVERRIDES"

tune: setup ## tune LAYER as the standing table does, and print lines for its file in conf/ffn; PLAN=1: what that takes
	@$(TOLD) $(BIN)/python -m peerscale.launch.place "$$LAYER" --tune --launcher $(LAUNCHER) $(AT_ONCE_$(LAUNCHER)) $(if $(PLAN),--plan) "OVERRIDES=$$OVERRIDES"

time: setup ## time steps of LAYER in turn with the reference of the standing table, on a machine that does nothing else
	@$(TOLD) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/layer_time.py "$$LAYER"

standing: setup ## the standing table and its figure, from the records in results/standing
	@for table in results/standing*; do $(BIN)/python analysis/standing.py --results $$table || exit 1; done

page: setup ## one HTML page of the studies in results/: answers, isoFLOP curves to look into, tables; in runs/page.html
	@$(BIN)/python analysis/page.py

publish: setup ## copy table, fits and figures of SWEEP to results/, to be committed; keeps finished cells there, unless REPLACE=1
	@$(BIN)/python analysis/publish.py "$$SWEEP" $(if $(REPLACE),--replace)

sync: setup ## upload the offline W&B runs of SWEEP that are not uploaded yet
	@GLOBIGNORE='runs/*/*.old/wandb/*'; $(BIN)/wandb sync -n 4 runs/"$$SWEEP"/*/wandb/offline-run-*

dashboard: setup ## save a report of SWEEP on the W&B server: its figures, its table, the curves of its runs
	@$(BIN)/python analysis/dashboard.py "$$SWEEP"

notebooks: setup ## run notebooks/explore.ipynb and save its outputs, to be committed
	@$(BIN)/python notebooks/execute.py

bench: setup $(MKL) ## measure training speed: PEER-pytorch and our PEER, all methods, growth with size; in results/bench (some 10 minutes)
	@$(BIN)/python -c 'import PEER_pytorch' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	@OMP_NUM_THREADS=$(JOBS) $(BIN)/python benchmarks/peer_step.py --out results/bench/peer_step.json
	@OMP_NUM_THREADS=$(JOBS) $(BIN)/python benchmarks/growth.py --out results/bench/growth.csv
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training_step.py --out results/bench/training_step.csv
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mkl_avx512.py --library $(MKL) --out results/bench/mkl_avx512.csv
	@$(BIN)/python benchmarks/plot.py results/bench

torture: setup ## interrupt a small study in every way and check that nothing is lost
	@$(BIN)/python benchmarks/torture.py

test: setup check ## lint, types, import rules and tests
	@$(BIN)/pytest -n 3 --dist worksteal

check: setup ## lint, types and import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyrefly check --min-severity error
	@$(BIN)/lint-imports

clean: ## remove caches and the environment; runs, data and results stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src analysis tests -name __pycache__ -type d -prune -exec rm -rf {} +
