# What a person does with this repository; `make` alone prints the list.
#
# Everything lands in .venv, and two stamp files in it remember which pins it was made from, so a second `make test`
# starts testing at once. Nothing here asks for an activated environment.

PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# torch, by far the largest, is installed in full view; the rest adds -q and speaks only when it fails.
PIP_INSTALL := $(PIP) install --progress-bar on

# One exact version, installed alone and before the rest: it is the version the pins were resolved against, and a range
# left to a later step would fetch the newest build with its CUDA libraries over an environment that already works.
TORCH_VERSION := 2.13.0
MOSHI_VERSION := 0.2.13

# Pins in, stamp name out; cksum because every POSIX system has it.
hash = $(shell cat $(1) 2>/dev/null | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(call hash,pyproject.toml requirements.lock)
TEST_STAMP := $(VENV)/.installed-test-$(call hash,pyproject.toml requirements.lock requirements-test.lock)

.PHONY: help install install-test demo test check lock
.DEFAULT_GOAL := help

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv if it is missing and install kikitori into it

install-test: $(TEST_STAMP)  ## the same, with what the tests and checks need

demo: $(STAMP)  ## transcribe the bundled speech with the checkpoint that ships inside the package
	$(BIN)/python -m deploy.demo

# Two processes: half of the time goes into waiting for Ray. A file stays in one of them, with what it has started.
test: $(TEST_STAMP)  ## run the test suite; PYTEST_ARGS="-k align" picks some of it
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# The variable stops pyright from asking the network for its newest version before every run.
check: $(TEST_STAMP)  ## formatting, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("kikitori needs Python 3.11 or newer, and \
	$(PYTHON) is %d.%d; name another one: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(STAMP): | $(BIN)/python
	$(PIP_INSTALL) torch==$(TORCH_VERSION)
	@echo "Installing $$(grep -vc '^#' requirements.lock) pinned packages and kikitori itself; a minute or two without a word ..."
	$(PIP_INSTALL) -q -r requirements.lock
	$(PIP_INSTALL) -q --no-deps -e .
	@$(check_torch)
	@rm -f $(VENV)/.installed-*
	@touch $@

# --no-deps: the file is a complete, frozen set, and moshi in it asks for an older torch than the one it runs with here.
$(TEST_STAMP): $(STAMP)
	$(PIP_INSTALL) -q --no-deps -r requirements-test.lock
	@$(check_torch)
	@touch $@

check_torch = $(BIN)/python -c 'import sys, torch; v = torch.__version__; v.startswith("$(TORCH_VERSION)") or \
	sys.exit("torch is now %s, expected $(TORCH_VERSION): a requirement replaced it" % v)'

# Both files are what pip resolves today for pyproject.toml, in an environment made for that and thrown away.
# CUDA libraries are dropped: torch itself brings the ones its own build needs.
lock:  ## resolve pyproject.toml again and write both lock files
	@set -eu; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	pins() { $$work/venv/bin/python -m pip freeze | sed 's/+[a-z0-9.]*$$//' | grep -viE '^(nvidia-|triton|cuda-)' | LC_ALL=C sort -f; }; \
	wanted() { $$work/venv/bin/python -c 'import sys, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print("\n".join(p["dependencies"] if len(sys.argv) == 1 else sum((p["optional-dependencies"][e] for e in sys.argv[1:]), [])))' "$$@"; }; \
	$(PYTHON) -m venv $$work/venv; \
	$$work/venv/bin/python -m pip install -q torch==$(TORCH_VERSION); \
	wanted > $$work/base.in; \
	$$work/venv/bin/python -m pip install -q -r $$work/base.in; \
	pins > $$work/base.txt; \
	wanted test check oracle > $$work/test.in; \
	$$work/venv/bin/python -m pip install -q -c $$work/base.txt -r $$work/test.in; \
	$$work/venv/bin/python -m pip install -q --no-deps moshi==$(MOSHI_VERSION); \
	pins | grep -vxFf $$work/base.txt > $$work/test.txt; \
	{ echo "# What kikitori runs on, resolved from pyproject.toml by \`make lock\`. Edit that file, not this one."; \
	cat $$work/base.txt; } > requirements.lock; \
	{ echo "# What the tests and checks add to requirements.lock, by \`make lock\`. Install with --no-deps: moshi pins an older torch."; \
	cat $$work/test.txt; } > requirements-test.lock; \
	wc -l requirements.lock requirements-test.lock
