# Grow a language model in depth and train it on. Two commands do all the set-up: `make upscale` and `make test`.
#
#   make upscale MODEL=mistral-7b OUT=solar-10.7b PLAN=dus:8

# MODEL: directory of the base model (the small one that comes along).   OUT: directory that make upscale writes.
# PLAN: dus:M, idus:M:G, stack, expand:GROUPS:TOP, slices:0-24,8-32, copy, or a JSON file.
# NPROC: processes that work side by side: ranks of a training run, tests.   ARGS: more flags, such as ARGS=--dry-run.
# PYTHON: an interpreter to use as it is; empty: that of the active environment or, without one, of .venv, which is made.
MODEL  ?= solar/assets/base
OUT    ?= out/solar
PLAN   ?= dus
NPROC  ?= 1
ARGS   ?=
PYTHON ?=
PEER   ?=

# conda's base environment is active in every shell that conda has touched: that is no choice of an environment; nor is
# our own .venv, which these targets keep complete.
ACTIVE := $(or $(filter-out $(CURDIR)/.venv,$(VIRTUAL_ENV)),$(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX)))
ifeq ($(PYTHON)$(ACTIVE),)
  PY    := .venv/bin/python
  READY := .venv/ready
  TESTS := .venv/ready-dev
else
  PY    := $(or $(PYTHON),python)
  READY := check
  TESTS := check-dev
endif

# Triton reads the switch when it decorates a kernel, so its interpreter has a process of its own. No Triton, no tests of it.
IN_THE_INTERPRETER = $(PY) -c 'import triton' 2>/dev/null || { echo "skipped: no triton here, so no tests of its kernels"; exit 0; }; \
  TRITON_INTERPRET=1 $(PY) -m pytest tests/interpreter
SIDE_BY_SIDE := $(if $(filter-out 1,$(NPROC)),-n $(NPROC))
TRAIN := $(PY) $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --nproc-per-node $(NPROC)) train.py

# The recipes. Ours: the paper keeps its own to itself.
# The base: at most an hour on two cores. Small batches, since a small model learns more from many steps; a learning
# rate that stays high and then falls to zero, since the last third is where the arithmetic becomes right.
BASE_RECIPE := --data stdlib:0.3 problems:0.7 --batch-size 4 --max-steps 5200 --lr 2e-3 --schedule wsd \
  --warmup-steps 160 --decay 0.3 --min-lr 0 --holdout 0.02 --eval-every 1000 --eval-sequences 32 --save-every 250
# Continued pretraining, of the grown model and, beside it, of the base, on the same tokens with the same schedule. Half
# the base's highest learning rate: enough to mend the seam, not enough to forget what both halves know.
PRETRAIN_RECIPE := --data stdlib:0.3 problems:0.7 --max-steps 200 --lr 1e-3 --eval-every 100 --holdout 0.02

.DEFAULT_GOAL := help
.PHONY: help setup upscale base pretrain test test-full test-gpu bench-gpu bench clean check check-dev

help:  ## this list
	@echo "usage: make TARGET [MODEL=DIR] [OUT=DIR] [PLAN=dus:8] [NPROC=N] [PYTHON=python3] [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## make .venv with what requirements.txt pins; in an environment of your own, only check it
	@$(PY) -c 'import sys, torch; print(f"{sys.executable}: Python {sys.version.split()[0]}, torch {torch.__version__}")'

upscale: $(READY)  ## the main job: grow MODEL by PLAN and write it to OUT
	@$(PY) -m solar.upscale --model "$(MODEL)" --out "$(OUT)" --plan "$(PLAN)" $(ARGS)
	@echo
ifeq ($(PYTHON)$(ACTIVE),)
	@echo "activate the environment:  source .venv/bin/activate"
endif
	@echo 'then try the model:        $(if $(PYTHON),$(PYTHON),python) generate.py$(if $(filter-out out/solar,$(OUT)), --model "$(OUT)") --prompt "Once upon a time"'
	@echo 'and train it:              torchrun train.py$(if $(filter-out out/solar,$(OUT)), --model "$(OUT)")'

out/solar/config.json: | $(READY)
	@$(PY) -m solar.upscale --model solar/assets/base --out out/solar --plan dus

pretrain: $(READY) out/solar/config.json  ## train the grown model on, and the base beside it, on the same tokens
	@$(TRAIN) --model out/solar --out out/pretrain $(PRETRAIN_RECIPE) $(ARGS)
	@$(TRAIN) --model solar/assets/base --out out/pretrain-base $(PRETRAIN_RECIPE) $(ARGS)
	@$(PY) -m solar.analyze curves out/pretrain out/pretrain-base

base: $(READY)  ## train the small base that comes along anew, from nothing: about an hour on two cores
	@$(PY) -m solar.base begin --out out/base-begun --force
	@$(TRAIN) --model out/base-begun --out out/base $(BASE_RECIPE) $(ARGS)
	@$(PY) -m solar.base embed --run out/base --out solar/assets/base --force

test: $(TESTS)  ## every check that a CPU can run; before each commit, and in CI
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .
	@$(PY) -m pytest -m "not slow" $(SIDE_BY_SIDE) $(ARGS)
	@$(IN_THE_INTERPRETER) -m "not slow" $(SIDE_BY_SIDE)

test-full: $(TESTS)  ## the same with the long counts
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .
	@$(PY) -m pytest $(SIDE_BY_SIDE) $(ARGS)
	@$(IN_THE_INTERPRETER) $(SIDE_BY_SIDE)

test-gpu: $(TESTS)  ## the kernels on this machine's GPU: bf16 parity, compilation, determinism
	@$(PY) -m pytest tests/gpu $(ARGS)

bench: $(READY)  ## training's speed on this machine's CPU; PEER=PYTHON puts that one's transformers beside it
	@$(PY) -m tests.bench.train_step $(if $(PEER),--peer $(PEER)) $(ARGS)
	@$(PY) -m tests.bench.train_costs sizes
	@$(PY) -m tests.bench.train_costs lengths
	@$(PY) -m tests.bench.train_costs save

bench-gpu: $(READY)  ## the kernels' speed on this machine's GPU, beside torch's own; whole 10.7B-shaped steps
	@$(PY) -m kernels.bench $(ARGS)
	@$(PY) -m tests.bench.model_gpu $(ARGS)

clean:  ## remove .venv; what you made under out/ stays
	rm -rf .venv

.venv/bin/python:
	@python3 -c 'import sys; sys.exit(f"error: Python 3.11 or newer is needed, python3 is {sys.version.split()[0]}; give PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo "making .venv (Python packages: torch, numpy, sentencepiece, safetensors, triton)"
	@python3 -m venv .venv || { rm -rf .venv; exit 1; }

.venv/ready: requirements.txt .venv/bin/python
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# An environment of the user's own is never changed, only looked at.
define LACKING
import sys, importlib.util
if sys.version_info < (3, 11):
    sys.exit(f"error: Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}")
lack = [name for name in sys.argv[2:] if not importlib.util.find_spec(name)]
if lack:
    sys.exit(f"error: {sys.executable} lacks {', '.join(lack)}: run  {sys.executable} -m pip install -r {sys.argv[1]}")
endef
export LACKING

check:
	@$(PY) -c "$$LACKING" requirements.txt torch numpy sentencepiece safetensors

check-dev: check
	@$(PY) -c "$$LACKING" requirements-dev.txt pytest hypothesis ruff xdist
