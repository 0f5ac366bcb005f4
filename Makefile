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
DATA   ?=
MODELS ?=
PAIRS  ?=

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
  TRITON_INTERPRET=1 $(PYTEST) tests/interpreter
# Tests run three at a time, of one thread each, or NPROC at a time if that is above 1: on two cores, since there is often one that waits for
# the disk or for a signal. The compiler's have processes of their own, and a table.
SIDE_BY_SIDE := -n $(if $(filter-out 1,$(NPROC)),$(NPROC),3)
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest $(SIDE_BY_SIDE)
COMPILER = tests/test_compile.py
TRAIN := $(PY) $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --nproc-per-node $(NPROC)) train.py

# The recipes. Ours: the paper keeps its own to itself.
# The base: at most an hour on two cores. Small batches, since a small model learns more from many steps; a learning
# rate that stays high and then falls to zero, since the last third is where the arithmetic becomes right.
BASE_RECIPE := --data stdlib:0.3 problems:0.7 --batch-size 4 --max-steps 5200 --lr 2e-3 --schedule wsd \
  --warmup-steps 160 --decay 0.3 --min-lr 0 --holdout 0.02 --eval-every 1000 --eval-sequences 32 --save-every 250

# Instruction tuning and preferences. Zephyr's shape (arXiv:2310.16944), at learning rates for a model of 8 million.
SFT_RECIPE := --stage sft --sequence-length 512 --batch-size 2 --lr 1e-3 --warmup-steps 5 \
  --holdout 0.02 --eval-every 0 --save-every 1000
PAIRS_RECIPE := --sequence-length 512 --holdout 0.02
DPO_RECIPE := --stage dpo $(PAIRS_RECIPE) --batch-size 4 --lr 5e-5 --beta 0.1 --warmup-steps 5 \
  --eval-every 0 --save-every 1000

.DEFAULT_GOAL := help
.PHONY: help setup upscale base pretrain sft reference dpo sdpo merge align analyze evaluate reproduce reproduce-full test test-full \
  test-gpu bench-gpu bench clean check check-dev

help:  ## this list
	@echo "usage: make TARGET [MODEL=DIR] [OUT=DIR] [PLAN=dus:8] [NPROC=N] [PYTHON=python3] [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## make .venv with what requirements.txt pins; in an environment of your own, only check it
	@$(PY) -c 'import sys, torch; print(f"{sys.executable}: Python {sys.version.split()[0]}, torch {torch.__version__}")'

upscale: $(READY)  ## the main job: grow MODEL by PLAN and write it to OUT
	@$(PY) -m solar.upscale --model "$(MODEL)" --out "$(OUT)" --plan "$(PLAN)" $(ARGS)
ifeq ($(filter --dry-run,$(ARGS)),)
	@echo
ifeq ($(PYTHON)$(ACTIVE),)
	@echo "activate the environment:  source .venv/bin/activate"
endif
	@echo 'then try the model:        $(if $(PYTHON),$(PYTHON),python) generate.py$(if $(filter-out out/solar,$(OUT)), --model "$(OUT)") --prompt "A shop has 12 shells. In the morning 7 shells arrive, and by the evening 5 are sold. How many shells remain?"'
	@echo 'and train it:              $(if $(PYTHON),$(PYTHON) -m torch.distributed.run,torchrun) train.py$(if $(filter-out out/solar,$(OUT)), --model "$(OUT)")'
endif

out/solar/config.json: | $(READY)
	@$(PY) -m solar.upscale --model solar/assets/base --out out/solar --plan dus

pretrain: $(READY) out/solar/config.json  ## train the grown model on, and the base beside it, on the same tokens
	@$(TRAIN) --model out/solar --out out/pretrain $(ARGS)
	@$(TRAIN) --model solar/assets/base --out out/pretrain-base $(ARGS)
	@$(PY) -m solar.analyze curves out/pretrain out/pretrain-base

base: $(READY)  ## train the small base that comes along anew, from nothing: about an hour on two cores
	@$(PY) -m solar.base begin --out out/base-begun --force
	@$(TRAIN) --model out/base-begun --out out/base $(BASE_RECIPE) $(ARGS)
	@$(PY) -m solar.base embed --run out/base --out solar/assets/base --force

# MODEL=, DATA= and OUT= of these are given, or what the target before wrote.
given = $(if $(filter command environment,$(origin $1)),--$2 $($1))

out/instruct/%.jsonl: | $(READY)
	@$(PY) -m solar.instructions $* --out $@
out/instruct/seeds.jsonl: | $(READY)
	@$(PY) -m solar.mathdata problems --count 1500 --out $@
out/instruct/math.jsonl: out/instruct/seeds.jsonl
	@$(PY) -m solar.mathdata rephrase --seeds $< --out $@
out/instruct/math-pairs.jsonl: out/instruct/math.jsonl
	@$(PY) -m solar.mathdata pairs --instruct $< --out $@

# Without DATA= the generated sets, made if they are not there.
SFT_DATA := $(or $(DATA),out/instruct/alpaca.jsonl out/instruct/math.jsonl)
DPO_DATA := $(or $(DATA),out/instruct/feedback.jsonl out/instruct/math-pairs.jsonl)
made = $(if $(DATA),,$1)
REFERENCE = $(PY) $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --nproc-per-node $(NPROC)) -m solar.reference $(PAIRS_RECIPE)
there = @test -e "$(if $(call given,MODEL,),$(MODEL),$1)" || { echo "error: $(if $(call given,MODEL,),$(MODEL) does not exist,$1 does not exist yet: \`make $2\` makes it, or give MODEL=DIR)" >&2; exit 2; }

sft: $(READY) $(call made,$(SFT_DATA))  ## tune a model on instructions: MODEL=, DATA='A.jsonl B.jsonl', OUT=
	$(call there,out/pretrain/model,pretrain)
	@$(TRAIN) $(SFT_RECIPE) --data $(SFT_DATA) $(call given,MODEL,model) $(call given,OUT,out) $(ARGS)

# PAIRS= holds flags that the reference and training must agree on: --template, --sequence-length, --too-long, --holdout.
reference: $(READY) $(call made,$(DPO_DATA))  ## what MODEL thinks of the pairs in DATA, kept for DPO
	$(call there,out/sft/model,sft)
	@$(REFERENCE) $(PAIRS) --data $(DPO_DATA) $(call given,MODEL,model)

dpo: reference  ## align MODEL to the preferences in DATA
	@$(TRAIN) $(DPO_RECIPE) $(PAIRS) --data $(DPO_DATA) $(call given,MODEL,model) $(call given,OUT,out) $(ARGS)

# The references come first, so that ranking the files reads what is there instead of computing it again.
sdpo: reference  ## the same in steps, easy files first, each with the model of the step before as reference
	@mkdir -p out/sdpo && $(REFERENCE) $(PAIRS) --data $(DPO_DATA) $(call given,MODEL,model) --rank-chunks > out/sdpo/order
	@cat out/sdpo/order
	@model="$(if $(call given,MODEL,model),$(MODEL),out/sft/model)"; step=0; \
	for file in $$(tail -n 1 out/sdpo/order); do \
	  step=$$((step + 1)); values=out/sdpo/step-$$step.ref.jsonl; \
	  $(REFERENCE) $(PAIRS) --data $$file --model "$$model" --out $$values || exit; \
	  $(TRAIN) $(DPO_RECIPE) $(PAIRS) --data $$file --reference $$values --model "$$model" --out out/sdpo/step-$$step $(ARGS) || exit; \
	  model=out/sdpo/step-$$step/model; \
	done

merge: $(READY)  ## average models: MODELS='A B', OUT=
	@$(if $(MODELS),,for model in out/dpo/model out/sdpo/step-2/model; do test -e $$model || { echo "error: $$model does not exist yet: \`make dpo sdpo\` makes it, or give MODELS='A B'" >&2; exit 2; }; done)
	@$(PY) -m solar.merge --models $(or $(MODELS),out/dpo/model out/sdpo/step-2/model) --out $(if $(call given,OUT,out),$(OUT),out/merged) $(ARGS)

# The whole recipe in miniature: SFT v1 to v4, DPO v1 to v3, sDPO, two candidates and their merges, as in the paper's
# tables 3 to 8. Each model is a target of its own, made once: `make out/align/dpo-v2/model` makes what that one needs.
A := out/align
D := $(A)/data
MADE := base grown continued sft-v1 sft-v2 sft-v3 sft-v4 sft-v3+v4 dpo-v1 dpo-v2 dpo-v1+v2 dpo-v3 sdpo-1 sdpo-2 cand-1 cand-2 \
  merge-v1 merge-v2 merge-v3 merge-v4

# Two models at a time, of one thread each: small models gain less from a second thread than from a second core. Each is
# asked its questions when it is made.
align: $(READY)  ## the whole recipe on the small base, and a table of all its models: less than half an hour on two cores
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j 2 $(MADE:%=$(A)/%/marks.json)
	@$(PY) -m solar.recipe $(A)

$(A)/%/marks.json: $(A)/%/model
	@$(PY) -m solar.recipe $(A) --only $*

$(D)/alpaca.jsonl: | $(READY)
	@$(PY) -m solar.instructions alpaca --count 1000 --seed 0 --out $@
$(D)/orca.jsonl: | $(READY)
	@$(PY) -m solar.instructions orca --count 640 --seed 1 --out $@
$(D)/feedback.jsonl: | $(READY)
	@$(PY) -m solar.instructions feedback --count 320 --seed 2 --out $@
$(D)/seeds.jsonl: | $(READY)
	@$(PY) -m solar.mathdata problems --count 600 --seed 3 --out $@
$(D)/math.jsonl: $(D)/seeds.jsonl
	@$(PY) -m solar.mathdata rephrase --seeds $< --out $@
$(D)/math-pairs.jsonl: $(D)/math.jsonl
	@$(PY) -m solar.mathdata pairs --instruct $< --out $@

jsonl = $(filter %.jsonl,$^)
$(A)/base/model: | $(READY)
	@$(PY) -m solar.upscale --model solar/assets/base --out $@ --plan copy --model-type keep
$(A)/grown/model: $(A)/base/model
	@$(PY) -m solar.upscale --model $< --out $@ --plan dus --force
# Nothing else can be made meanwhile, so this one has both cores. Half the base's highest learning rate: few steps must do.
$(A)/continued/model: $(A)/grown/model
	@OMP_NUM_THREADS=2 $(TRAIN) --model $< --out $(@D) --max-steps 60 --lr 1e-3 --holdout 0.02 --eval-every 0

$(A)/sft-v1/model: $(D)/alpaca.jsonl
$(A)/sft-v2/model: $(D)/alpaca.jsonl $(D)/orca.jsonl
$(A)/sft-v3/model: $(D)/alpaca.jsonl $(D)/orca.jsonl $(D)/math.jsonl
$(A)/sft-v4/model: $(D)/alpaca.jsonl $(D)/math.jsonl
$(A)/sft-v%/model: $(A)/continued/model
	@$(TRAIN) $(SFT_RECIPE) --model $< --data $(jsonl) --out $(@D)
$(A)/sft-v3+v4/model: $(A)/sft-v3/model $(A)/sft-v4/model
	@$(PY) -m solar.merge --models $^ --out $@ --force

# What an SFT model thinks of a file of pairs: ref/FILE/MODEL.jsonl. Of the mathematics 160 pairs are used, as the paper
# used a part.
feedback := $(D)/feedback.jsonl
math-pairs := $(D)/math-pairs.jsonl::160
.SECONDEXPANSION:
$(A)/ref/feedback/%.jsonl: $(A)/$$*/model $(D)/feedback.jsonl
	@$(PY) -m solar.reference $(PAIRS_RECIPE) --model $< --data $(feedback) --out $@
$(A)/ref/math-pairs/%.jsonl: $(A)/$$*/model $(D)/math-pairs.jsonl
	@$(PY) -m solar.reference $(PAIRS_RECIPE) --model $< --data $(math-pairs) --out $@
# $1: the model to begin with, $2: the files of pairs.
dpo = @$(TRAIN) $(DPO_RECIPE) --model $(A)/$1/model --data $(foreach file,$2,$($(file))) \
  --reference $(2:%=$(A)/ref/%/$1.jsonl) --out $(@D)
refs = $(2:%=$(A)/ref/%/$1.jsonl)
BOTH := feedback math-pairs

$(A)/dpo-v1/model: $(call refs,sft-v3,feedback)
	$(call dpo,sft-v3,feedback)
$(A)/dpo-v2/model: $(call refs,sft-v3,$(BOTH))
	$(call dpo,sft-v3,$(BOTH))
$(A)/dpo-v1+v2/model: $(A)/dpo-v1/model $(A)/dpo-v2/model
	@$(PY) -m solar.merge --models $^ --out $@ --force
$(A)/dpo-v3/model: $(call refs,sft-v3+v4,$(BOTH))
	$(call dpo,sft-v3+v4,$(BOTH))
# The chunks are sources, easy ones first, in the order that --rank-chunks has given: mathematics, feedback. (`make sdpo`
# reads it from there; here the targets must be known before.)
$(A)/sdpo-1/model: $(call refs,sft-v3+v4,math-pairs)
	@$(PY) -m solar.reference $(PAIRS_RECIPE) --model $(A)/sft-v3+v4/model --data $(feedback) $(math-pairs) --rank-chunks
	$(call dpo,sft-v3+v4,math-pairs)
$(A)/sdpo-2/model: $(call refs,sdpo-1,feedback)
	$(call dpo,sdpo-1,feedback)
$(A)/cand-1/model: $(call refs,sft-v3+v4,$(BOTH))
	$(call dpo,sft-v3+v4,$(BOTH)) --seed 1 --lr 1e-4
$(A)/cand-2/model: $(call refs,sft-v3+v4,$(BOTH))
	$(call dpo,sft-v3+v4,$(BOTH)) --seed 2 --beta 0.3
$(A)/merge-v1/model: AMOUNT = --weights 0.5 0.5
$(A)/merge-v2/model: AMOUNT = --weights 0.4 0.6
$(A)/merge-v3/model: AMOUNT = --weights 0.6 0.4
$(A)/merge-v4/model: AMOUNT = --method slerp --t 0.5
$(A)/merge-v%/model: $(A)/cand-1/model $(A)/cand-2/model
	@$(PY) -m solar.merge --models $^ --out $@ --force $(AMOUNT)

# ARGS are those of the search, such as ARGS='--depth 20 --copies-only'.
analyze: $(READY)  ## what each layer of MODEL does, the seams of PLAN, and the best plan for a depth; on DATA
	@$(PY) -m solar.analyze layers --model "$(MODEL)" $(call given,DATA,data)
	@$(PY) -m solar.analyze seams --model "$(MODEL)" $(call given,DATA,data) --plan "$(PLAN)"
	@$(PY) -m solar.analyze search --model "$(MODEL)" $(call given,DATA,data) $(ARGS)

# Without DATA= made-up questions, so that a clean clone runs; they are no benchmark, and the report says so.
EVALUATE = $(PY) $(if $(filter-out 1,$(NPROC)),-m torch.distributed.run --nproc-per-node $(NPROC)) -m solar.evaluate
evaluate: $(READY)  ## the six benchmarks of H6: MODEL=, DATA=directory of their files, OUT=report.json
ifeq ($(DATA),)
	@echo "no DATA=DIR is given: made-up questions, to see that all runs; which files the real ones are:  $(PY) -m solar.tasks"
	@test -e out/standin || $(PY) -m solar.standin --out out/standin >/dev/null
	@$(EVALUATE) --model "$(MODEL)" --data out/standin --limit 16 --max-new-tokens 64 --out $(if $(call given,OUT,out),"$(OUT)",out/standin.json) --force $(ARGS)
else
	@$(EVALUATE) --model "$(MODEL)" --data "$(DATA)" $(call given,OUT,out) $(ARGS)
endif

# The papers' claims, on the embedded base or on MODEL= with the text in DATA= (and EVAL=, DOMAIN=, PLANS=); ONLY='a d'
# takes some of them, TOKENS= says how many each run has. What is done is kept in OUT=, so a stopped one goes on.
# THREADS: of each of the two runs side by side. What comes last counts, so ARGS='--lrs 1e-4' replaces what stands here.
REPRODUCE = OMP_NUM_THREADS=$(or $(THREADS),1) $(PY) -m solar.reproduce $(EFFORT) $(call given,MODEL,model) \
  $(call given,DATA,data) $(call given,EVAL,eval) $(call given,DOMAIN,domain) $(call given,PLANS,plans) \
  $(call given,ONLY,only) $(call given,TOKENS,tokens) $(call given,OUT,out) $(ARGS)

reproduce: $(READY)  ## measure what the papers claim, one seed: 20 to 30 minutes on two cores
	@$(REPRODUCE)

# ARGS='--tokens 200000 --lrs 1e-4 3e-4 1e-3 3e-3' is the same of longer runs and finer rates: in a night.
reproduce-full: EFFORT = --out out/reproduce-full --seeds 0 1 2
reproduce-full: $(READY)  ## the same with three seeds: an hour
	@$(REPRODUCE)

test: $(TESTS)  ## the checks that a CPU can run; before each commit, and in CI
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .
	@$(PYTEST) -m "not slow" --ignore $(COMPILER) $(ARGS)
	@$(PY) -m pytest -m "not slow" $(COMPILER)
	@$(IN_THE_INTERPRETER) -m "not slow"

test-full: $(TESTS)  ## the same with the long counts
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .
	@$(PYTEST) --ignore $(COMPILER) $(ARGS)
	@$(PY) -m pytest $(COMPILER)
	@$(IN_THE_INTERPRETER)

test-gpu: $(TESTS)  ## the kernels on this machine's GPU: bf16 parity, compilation, determinism
	@$(PY) -m pytest tests/gpu $(ARGS)

bench: $(READY)  ## speed on this machine's CPU, of training and generation; PEER=PYTHON puts its transformers beside it
	@$(PY) -m tests.bench.train_step $(if $(PEER),--peer $(PEER)) $(ARGS)
	@$(PY) -m tests.bench.generation $(if $(PEER),--peer $(PEER))
	@$(PY) -m tests.bench.train_costs sizes
	@$(PY) -m tests.bench.train_costs lengths
	@$(PY) -m tests.bench.train_costs save
	@$(PY) -m tests.bench.preference
	@$(PY) -m tests.bench.decontaminate

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
