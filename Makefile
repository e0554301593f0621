# Everything the README promises. Needs Python >= 3.11, make and git; the first target that needs it makes .venv.
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
export PYTHON TORCH_INDEX
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# .venv is brought up to date when what it is made from changes
made_from := settings.ini setup.py pyproject.toml constraints.txt tools/setup.sh
ready := .venv/ready-$(shell cat $(made_from) | cksum | cut -d' ' -f1)

.PHONY: help demo lab test docs check check-outputs bench bench-full system

help:           ## this list
	@sed -n 's/^\([a-z-]*\): .*## /make \1@/p' Makefile | awk -F@ '{printf "%-19s %s\n", $$1, $$2}'

$(ready):
	@tools/setup.sh $@

demo: $(ready)  ## the main job: conversations in, a better agent and a report out (runs/demo)
	@stateset-nb improve --out runs/demo $(if $(wildcard runs/demo/run.json),--resume)

lab: $(ready)   ## open JupyterLab on the tutorials
	@jupyter lab nbs/tutorials

test: $(ready)  ## everything a change must pass
	@tools/test.sh

docs: $(ready)  ## build the site into _site/
	@tools/docs.sh
	@echo 'read it with: python3 -m http.server -d _site 8000'

check: $(ready) ## seconds: modules and notebooks agree, ruff, mypy
	@tools/check.sh
	@ruff check
	@mypy

check-outputs: $(ready) ## minutes: run every notebook and compare with the outputs it stores
	@python tools/nbrun.py --check nbs

bench: $(ready) ## the figures of the demo, of the engine beside TRL, of learnt rewards, the store, monitoring and the widgets, short
	@python benchmarks/support_desk.py --quick
	@python benchmarks/engine.py --quick
	@python benchmarks/reward.py --quick
	@python benchmarks/store.py --quick
	@python benchmarks/monitoring.py --quick
	@python benchmarks/widgets.py --quick

bench-full: $(ready) ## every seed and rival of the demo, every case of the engine, credit over turns, learnt rewards on real labels, store, labelling, monitoring, widgets (long)
	@python benchmarks/support_desk.py
	@python benchmarks/engine.py
	@python benchmarks/credit.py
	@python benchmarks/reward.py
	@python benchmarks/labelling.py
	@python benchmarks/store.py
	@python benchmarks/monitoring.py
	@python benchmarks/widgets.py

system:         ## Debian and Ubuntu: install what the tests drive: browser, PostgreSQL, Prometheus, Alertmanager
	@tools/system.sh
