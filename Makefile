# Everything here is a name for one documented python script; every target builds .venv first when it is missing or old.
#   make table3 SCALE=smoke            make table3 PLAN=1            make table3 ROWS=kl_basic,gkl_basic SEEDS=0,1,2
#   make table3 SCALE=small ARGS="data=image_folder data.root=pictures.zip loss.gamma=0.3"

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help tables figures teachers sweep-alpha sweep-beta sweep-gamma sweep-tau report claims dashboard dashboard-sync release test test-all torture check eval doctor speed5 bench gpu docs docs-serve lock clean

# --- what you may set -------------------------------------------------------------------------------------------------
SCALE    ?= paper#      paper | small | smoke
PROTOCOL ?= official#   official: as the authors' code runs | paper: as the text describes it
SEEDS    ?=#            0,1,2      (default: three, at smoke scale one)
ROWS     ?=#            row ids of the table (default: all)
PAIRS    ?=#            teacher-student pairs of Tables V, XVII and XVIII (default: all)
PLAN     ?=#            1: only say what is missing and what it costs
MINUTES  ?=#            stop after so many; what has begun is saved, and the same command goes on
DEVICES  ?= 1#          devices per run
JOBS     ?= auto#       runs at the same time
LAUNCHER ?=#            slurm | torchrun-nodes (default: this machine; its settings: ARGS="launcher.partition=gpu launcher.minutes=600")
ARGS     ?=#            any further Hydra overrides
PYTHON   ?= $(shell for p in python3 python3.12 python3.13 python3.11; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)

# A smoke run tries this machine: it trains anew and keeps its records to itself. results/ holds the committed ones.
ifeq ($(SCALE),smoke)
export GKL_RESULTS ?= outputs/smoke
endif

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed

ASKED = scale=$(SCALE) protocol=$(PROTOCOL) jobs=$(JOBS) devices=$(DEVICES) $(if $(filter-out 0,$(PLAN)),plan=true) $(if $(MINUTES),minutes=$(MINUTES)) \
	  $(if $(SEEDS),'seeds=[$(SEEDS)]') $(if $(ROWS),'rows=[$(ROWS)]') $(if $(PAIRS),'columns=[$(PAIRS)]') $(if $(LAUNCHER),launcher=$(LAUNCHER)) $(ARGS)
REPRODUCE = $(PY) scripts/reproduce.py $(ASKED)

table%: $(STAMP) ## table1 1kd 2 to 8, 10 to 24: run what is missing, print it (SCALE SEEDS ROWS PAIRS PLAN PROTOCOL DEVICES ARGS)
	@$(REPRODUCE) table=$*

figure%: $(STAMP) ## figure1 to figure4: run what is missing, draw it as PNG and PDF
	@$(REPRODUCE) figure=$*

tables: $(addprefix table,1 1kd 2 3 4 5 6 7 8 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24) ## every table there is

teachers: ## the teachers of Tables XVII and XVIII, trained here (published files: GKL_TEACHERS=folder, teacher.weights=published)
	@$(MAKE) --no-print-directory table17 table18 ROWS=teacher SEEDS=0

figures: figure1 figure2 figure3 figure4 ## every figure there is

sweep-alpha: table10 ## the paper's sweep over the weight of wMSE (Table X); scripts/sweep.py sweeps anything else
sweep-beta: table11 ## over the weight of the cross-entropy (Table XI)
sweep-gamma: table12 table20 ## over the smoothing exponent, class-wise and sample-wise (Tables XII, XX)
sweep-tau: table21 ## over the prior's temperature, conference version (Table XXI)

report: $(STAMP) ## all tables, figures and the page results/report.html from the records; runs nothing
	@$(PY) scripts/report.py

claims: $(STAMP) ## results/claims.md: what the records say of the paper's claims; PLAN=1: which runs would say most; MINUTES=10: run those
	@$(PY) scripts/claims.py $(ASKED)

dashboard: $(STAMP) ## wandb workspaces that set KL against GKL, as JSON with previews in results/dashboard; needs no login
	@$(PY) scripts/dashboard.py $(ARGS)

dashboard-sync: $(STAMP) ## send the runs that wandb wrote offline, and the workspaces; needs a wandb login
	@$(PY) scripts/dashboard.py sync=true $(ARGS)

release: $(STAMP) ## pack a run for the Hugging Face Hub and RobustBench: make release RUN=results/runs/.../seed0.json ARGS="upload=name/repository"
	@$(PY) scripts/release.py run=$(RUN) $(ARGS)

test: $(STAMP) ## the tests but the long ones: no network, no GPU, no downloads
	@$(PY) -m pytest -n auto --dist worksteal -m "not long" $(ARGS)

test-all: $(STAMP) ## every test
	@$(PY) -m pytest -n auto --dist worksteal $(ARGS)

torture: $(STAMP) ## half an hour of random kills, damage and full disks over every method; nothing may be lost (TORTURE_SEED repeats one)
	@RUN_SLOW=1 $(PY) -m pytest -q -s -n 0 tests/system/test_torture.py $(ARGS)

check: $(STAMP) ## linter, formatter and type checker
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

eval: $(STAMP) ## AutoAttack on a checkpoint: make eval CKPT=file MODEL=wrn_34_10 DATA=cifar100, or a published one: NAME=...
	@$(PY) scripts/evaluate.py $(if $(NAME),published=$(NAME)) $(if $(CKPT),'checkpoint="$(CKPT)"') $(if $(MODEL),model=$(MODEL)) $(if $(DATA),data=$(DATA)) $(ARGS)

doctor: $(STAMP) ## this machine, its versions and data, and what each table still needs
	@$(PY) scripts/doctor.py

speed5: $(STAMP) ## Table V's steps, all methods in one run, beside the paper's; seconds on a GPU (ARGS: --batch --precision)
	@$(PY) benchmarks/table5.py $(ARGS) && $(PY) benchmarks/table.py

bench: $(STAMP) ## speed as ratios against targets, under half an hour on two idle cores; DKL_REF=folder adds the authors' code
	@for name in loss step distillation autoattack augmentation semi_supervised segmentation table5 clip; do echo "== $$name"; $(PY) benchmarks/$$name.py || exit 1; done
	@$(PY) benchmarks/table.py

gpu: $(STAMP) ## whether this GPU computes right, how fast, and how long the paper's runs take on it; ten minutes (DKL_REF=folder as above)
	@$(PY) benchmarks/gpu.py $(ARGS) && $(PY) benchmarks/table.py

docs: $(STAMP) ## the documentation as a site in site/, every link and name checked
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet && echo "wrote site/index.html"

docs-serve: $(STAMP) ## the same on a local port, renewed as files change
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

lock: ## renew requirements.lock from pyproject.toml (needs uv; keeps pins that still fit)
	uv pip compile pyproject.toml --universal --extra dev --python-version 3.11 -o requirements.lock \
	  --custom-compile-command "make lock" -q

clean: ## remove .venv and caches; never outputs/, data/ or results/
	rm -rf $(VENV) site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './outputs/*' -prune -exec rm -rf {} +

help: ## this list
	@awk -F': .*## ' '/^[a-z0-9%-]+: .*## /{sub("%", "N", $$1); printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo; awk -F' *[?]= *|# +' '/^[A-Z]+ +[?]=.*# /{printf "  %-10s %-10s %s\n", $$1, $$2, $$3}' Makefile

$(STAMP): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "error: gkl needs Python 3.11, 3.12 or 3.13, none is on the PATH; name one with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
