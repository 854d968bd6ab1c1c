# `make demo` and `make test` set up what they need in .venv: nothing but Python 3.10 or newer is asked for.
# Another Python: make test PYTHON=python3.12. Without a GPU, uv can fetch the small torch: UV_TORCH_BACKEND=cpu make demo.
PYTHON  ?= python3
LOWEST  ?= python3.10
VENV    ?= .venv
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
BIN      = $(VENV)/bin
READY    = $(VENV)/.ready
DEMO     = $(VENV)/.demo
NBTEST   = OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers $(WORKERS) --timing
PYTEST   = OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --durations 15

export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo install test test-all lint run prepare readme versions matrix methods

# What the demo imports, not the tools of development
demo: $(DEMO)
	$(BIN)/fasterdistill_demo

test: export MPLBACKEND = agg
test: lint
	$(NBTEST)
	$(PYTEST) tests -m 'not slow'

test-all: export MPLBACKEND = agg
test-all: lint
	$(NBTEST) --flags slow
	$(PYTEST) tests

lint: $(READY)
	$(BIN)/ruff check .

# The table of what works with what in fastai, in the documentation
matrix: export MPLBACKEND = agg
matrix: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/test_fastai.py --write-matrix --deselect tests/test_fastai.py::test_the_page_says_so

# What every method comes to on the demo's digits, what a step costs, what it was tried on: hours, once; a run goes on
methods: $(READY)
	$(BIN)/python benchmarks/methods.py

# What every loss promises, on the lowest versions settings.ini allows (Python 3.10) and on the newest,
# each in an environment of its own; needs uv
versions: version-lowest-direct version-highest

PROMISES = tests/test_contract.py tests/test_reference.py tests/test_callback.py tests/test_opening.py \
           tests/test_teachers.py tests/test_fastai.py tests/test_state.py tests/test_modes.py
version-%: export MPLBACKEND = agg
version-%:
	uv venv --clear --python $(if $(findstring lowest,$*),$(LOWEST),$$(command -v $(PYTHON))) .venv-$*
	uv pip install --python .venv-$*/bin/python --resolution $* -e '.[dev]'
	uv pip list --python .venv-$*/bin/python | grep -E '^(fastai|fastcore|timm|torch|torchvision) '
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -q -m 'not slow' -n $(WORKERS) $(PROMISES)

# Run every notebook, or NB=nbs/02_loss.ipynb, and keep what it shows
run: export MPLBACKEND =
run: $(READY)
	PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 $(BIN)/nbdev-test $(NB) --save --n-workers $(WORKERS)
	$(BIN)/nbdev-clean

# Before every commit
prepare: $(READY)
	$(BIN)/nbdev-export
	$(MAKE) test
	$(BIN)/nbdev-clean
	$(MAKE) readme

readme: $(READY)
	$(BIN)/python scripts/readme.py

install: $(READY)

# An environment with uv, which pip brings where it is missing: with pip alone the rest takes many minutes
define environment
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info>=(3,10) else "Python 3.10 or newer, please: make PYTHON=python3.12")'
	@if uv --version >/dev/null 2>&1; then set -x; uv venv --allow-existing --python "$$(command -v $(PYTHON))" $(VENV); \
	else set -ex; $(PYTHON) -m venv $(VENV); $(BIN)/python -m pip install -q --disable-pip-version-check uv; fi
	uv pip install --python $(BIN)/python -e '$(1)'
endef

# Again whenever what the package needs has changed
$(READY): settings.ini setup.py pyproject.toml
	$(call environment,.[dev])
	@touch $@ $(DEMO)

$(DEMO): settings.ini setup.py pyproject.toml
	$(call environment,.[demo])
	@touch $@
