# make demo    the main job on embedded data, ending with a report
# make test    linter, type checker, import contract, tests
# make floor   the tests that meet transformers closely, under the oldest version that is supported
# Both set up .venv first: from nothing on a fresh machine, and again when a dependency changes. The demo needs
# the package alone, the tests its development tools too.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
KEY    := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
STAMP  := $(VENV)/.installed-$(KEY)
DEV    := $(VENV)/.installed-dev-$(KEY)
DEMO   := runs/demo
# Python compiles what it imports: to compile all that comes with it takes longer than the tests gain from it.
PIP    := --quiet --no-compile
# Memory, where there are two gigabytes of it to write to.
SCRATCH := $(shell test "$$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print int($$4 / 1000000)}')" -ge 2 2>/dev/null \
	&& test -w /dev/shm && echo /dev/shm || echo $${TMPDIR:-/tmp})

.PHONY: demo test floor lint install clean
.DEFAULT_GOAL := install

install: $(DEV)

# PyTorch goes first and pinned: left to a range, a machine without a GPU may pull a CUDA build of several GB.
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "aiether needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP) --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install $(PIP) --constraint constraints.txt --editable .
	rm -f $(VENV)/.installed-*
	touch $@

$(DEV): $(STAMP)
	$(BIN)/python -m pip install $(PIP) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	rm -rf $(DEMO)
	$(BIN)/aiether train --preset demo --baseline static --output_dir $(DEMO)
	@echo "Report: $(CURDIR)/$(DEMO)/report.html"

lint: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

# One thread per worker: two workers fill two cores. Checkpoints are synced again and again, which in memory costs
# nothing: on a disk it is a fifth of the time. The type checker has one thread for a minute, which the tests, that
# wait now and then, do not miss; what it found is said at the end.
test: $(DEV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports
	$(BIN)/pyright >$(VENV)/pyright.log 2>&1 & types=$$!; trap "kill $$types 2>/dev/null; exit 130" INT TERM; \
	OMP_NUM_THREADS=1 TMPDIR=$(SCRATCH) $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/pyright.log; test $$tests -eq 0 && test $$types -eq 0

# Beside the version that is installed, and found first.
floor: $(DEV)
	$(BIN)/python -m pip install $(PIP) --upgrade --no-deps --target $(VENV)/floor transformers==5.17.0 'huggingface-hub<2'
	OMP_NUM_THREADS=1 TMPDIR=$(SCRATCH) PYTHONPATH=$(VENV)/floor $(BIN)/pytest -n 2 --dist loadfile \
		tests/adaptive tests/evaluation tests/growth tests/retrofitting tests/toroidal tests/training/test_lahr.py \
		tests/study/test_retrofits.py tests/study/test_spec.py

clean:
	rm -rf $(VENV) runs dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
