# make demo | demo-globus | test | lint | install | deb | prove | prove-quick | bench | bench-quick | bench-beside | bench-globus | bench-throttle | bench-ways-out | clean
#
# Needs Python >= 3.11 with venv, make and git; everything else goes into .venv.
# Tests and benchmarks run on the built wheel, never on this folder: what is
# missing from the wheel must fail here, not at a beamline.

VENV   := .venv
BIN    := $(VENV)/bin
DIST   := build/dist
SHELL  := /bin/sh
# Workers for the tests that bear company: more than cores, since they wait a lot. `make test JOBS=0`: in one process.
JOBS   ?= 4
PYTEST := PYTHONSAFEPATH=1 TEST_INSTALLED=1 $(BIN)/pytest

# The folder comes last on the path: the daemon is the installed one.
PROVE  := $(BIN)/python -P -c 'import runpy, sys; sys.path.append("."); runpy.run_module("tests.prove", None, "__main__", True)'

# Directories are listed too: their time moves when a file is removed.
SOURCES := $(shell find trigger_daemon -name __pycache__ -prune -o -print 2>/dev/null)

.PHONY: demo demo-globus test test-only lint install deb prove prove-quick bench bench-quick bench-beside bench-globus bench-throttle bench-ways-out clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/trigger-daemon demo

# The pipelines of docs/tutorials, with the installed daemon and an emulated Globus: no account, no network.
demo-globus: $(VENV)/.installed $(VENV)/.dev
	@$(BIN)/python -P -c 'import runpy, sys; sys.path.append("."); runpy.run_module("tests.globus.pipelines", None, "__main__", True)'

test: lint test-only

# Serial ones first, so that the large summary is the last thing printed. Status
# 5 says that no test is marked serial.
test-only: $(VENV)/.installed $(VENV)/.dev
	$(PYTEST) -m serial -p no:xdist -q || [ $$? -eq 5 ]
	$(PYTEST) -m 'not serial' -n $(JOBS) --dist loadgroup

# Where it lies at the end, what the service runs, and for a package below which directory it is put meanwhile.
PREFIX  ?= /usr/local
DESTDIR ?=
SYSTEM_PYTHON ?= /usr/bin/python3
VERSION  = $(shell $(BIN)/python -c 'import re; print(re.search(r"__version__ = .([^\"]+)", open("trigger_daemon/__init__.py").read())[1])')
# systemd-python (journald) is compiled: gcc, pkg-config, python3-dev, libsystemd-dev.
EXTRAS  ?= globus,eiger,journald
INSTALL := $(BIN)/python packaging/install.py

install: $(VENV)/.wheel
	$(INSTALL) --destdir "$(DESTDIR)" --prefix "$(PREFIX)" --python "$(SYSTEM_PYTHON)" --extras "$(EXTRAS)" \
	    --version $(VERSION) --wheel $(DIST)/*.whl

# The Debian package, for the release and Python of this machine: build/trigger-daemon_VERSION_ARCH.deb
PACKAGED := $(shell find packaging rules docs -type f 2>/dev/null) README.md CHANGELOG.md LICENSE
deb: build/.deb

build/.deb: $(VENV)/.wheel $(PACKAGED)
	$(BIN)/python -m pip install -q --group package
	rm -rf build/deb build/trigger-daemon_*.deb
	$(INSTALL) --destdir build/deb --prefix /usr --python /usr/bin/python3 --extras "$(EXTRAS)" \
	    --version $(VERSION) --wheel $(DIST)/*.whl
	$(BIN)/python packaging/deb/build.py --root build/deb --version $(VERSION) --target build
	touch $@

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

# Every target beside others and the raw limit: table, picture and figures in build/bench. `make bench PUBLISH=--publish`
# puts them into the documents. What is not installed (watchman, rclone) is left out, and named.
bench: $(VENV)/.installed $(VENV)/.dev $(VENV)/.bench
	$(BIN)/python benchmarks/targets.py $(PUBLISH)

bench-quick: $(VENV)/.installed $(VENV)/.dev $(VENV)/.bench
	$(BIN)/python benchmarks/targets.py --quick

# What the daemon costs an instrument that writes to the same disk: up to 20 GB of it, for some twenty minutes.
bench-beside: $(VENV)/.installed $(VENV)/.dev
	$(BIN)/python benchmarks/beside.py

bench-globus: $(VENV)/.installed $(VENV)/.dev
	$(BIN)/python benchmarks/globus.py

# The second even if the first finds a broken promise. Both need a real disk below the temporary directory.
bench-throttle: $(VENV)/.installed $(VENV)/.dev
	@$(BIN)/python benchmarks/throttle.py; rates=$$?; $(BIN)/python benchmarks/throttle.py --pause && exit $$rates

# Our rsync and rclone beside the bare ones, locally and to servers on loopback: some eight minutes.
bench-ways-out: $(VENV)/.installed $(VENV)/.dev
	$(BIN)/python benchmarks/ways_out.py

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

$(VENV)/.bench: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install -q --group bench
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
