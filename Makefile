# make demo | test | lint | prove | prove-quick | bench | bench-quick | clean
#
# Needs Python >= 3.11 with venv, make and git; everything else goes into .venv.
# Tests and benchmarks run on the built wheel, never on this folder: what is
# missing from the wheel must fail here, not at a beamline.

VENV   := .venv
BIN    := $(VENV)/bin
DIST   := build/dist
SHELL  := /bin/sh
# Workers for the tests that bear company; `make test JOBS=0` runs them in one process.
JOBS   ?= 2
PYTEST := PYTHONSAFEPATH=1 TEST_INSTALLED=1 $(BIN)/pytest

# The folder comes last on the path: the daemon is the installed one.
PROVE  := $(BIN)/python -P -c 'import runpy, sys; sys.path.append("."); runpy.run_module("tests.prove", None, "__main__", True)'

# Directories are listed too: their time moves when a file is removed.
SOURCES := $(shell find trigger_daemon -name __pycache__ -prune -o -print 2>/dev/null)

.PHONY: demo test test-only lint prove prove-quick bench bench-quick clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/trigger-daemon demo

test: lint test-only

# Serial ones first, so that the large summary is the last thing printed. Status
# 5 says that no test is marked serial.
test-only: $(VENV)/.installed $(VENV)/.dev
	$(PYTEST) -m serial -p no:xdist -q || [ $$? -eq 5 ]
	$(PYTEST) -m 'not serial' -n $(JOBS)

lint: $(VENV)/.installed $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Kills, power cuts, faults, histories: every promise, in under an hour; the report is build/prove/report.md.
# As root it can do all; what it cannot do it names, with the Debian package it wants.
prove: $(VENV)/.installed $(VENV)/.dev
	$(PROVE)

prove-quick: $(VENV)/.installed $(VENV)/.dev
	$(PROVE) --quick

bench: $(VENV)/.installed $(VENV)/.dev
	$(BIN)/python benchmarks/quick.py --full

bench-quick: $(VENV)/.installed $(VENV)/.dev
	$(BIN)/python benchmarks/quick.py

clean:
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A Python is chosen by running it: a shim on PATH may lead nowhere.
$(VENV)/.made:
	@for python in "$${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do \
	    if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        echo "making $(VENV) with $$("$$python" --version)"; \
	        rm -rf $(VENV) && "$$python" -m venv $(VENV) || exit 1; \
	        $(BIN)/python -m pip install -q --upgrade 'pip>=25.1' && touch $@ && exit 0; \
	        exit 1; \
	    fi; \
	done; \
	echo "No Python >= 3.11 with the venv module was found (tried \$$PYTHON, python3, python3.11 to python3.14)." >&2; \
	echo "On Debian: apt-get install python3-venv. Or say where it is: make PYTHON=/path/to/python3.12" >&2; \
	exit 1

# --group came with pip 25.1, which the step above has put there.
$(VENV)/.dev: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install -q --group dev
	touch $@

$(VENV)/.wheel: $(VENV)/.made pyproject.toml README.md LICENSE $(SOURCES)
	rm -rf $(DIST)
	$(BIN)/python -m pip wheel -q --no-deps --wheel-dir $(DIST) .
	touch $@

$(VENV)/.installed: $(VENV)/.wheel
	wheel=$$(ls $(DIST)/*.whl) && \
	$(BIN)/python -m pip install -q "$$wheel[globus]" && \
	$(BIN)/python -m pip install -q --force-reinstall --no-deps "$$wheel"
	touch $@
