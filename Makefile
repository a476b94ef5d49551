# Two commands on a fresh machine:   make book    make test
#
# Everything is installed into .venv/ (Python 3.11 or later, a C compiler and a package index are needed, nothing else).
# PYTHON=python3.12 chooses another Python. MPI=openmpi takes another MPI library of the package index, MPI= that of the
# site; VENV= says where an environment for it is made, beside the usual one.

PYTHON ?= python3
MPI ?= mpich
VENV ?= .venv
RANKS ?= 2 3
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
SOAK_MINUTES ?= 60
# A test that hangs is ended by pytest, and pytest itself by this.
LIMIT ?= timeout -k 10 2400
PYTEST ?= python -m pytest
SPHINX ?= sphinx-build -n -W --keep-going
# More ranks than cores is what these tests want; Open MPI needs to be told. With MPICH a rank that waits asks a thousand
# times before it lets another one have the core; with fewer the tests on three ranks take a third of the time.
export MPIR_CVAR_POLLS_BEFORE_YIELD ?= 10
export OMPI_MCA_rmaps_base_oversubscribe := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export PATH := $(abspath $(VENV))/bin:$(PATH)
SHELL := /bin/bash

.PHONY: book test serial ranks soak mutate bench tangle check dist clean

book: $(VENV)/ready                       ## the rendered book, in _build/html
	python tools/tangle.py
	$(SPHINX) -b html . _build/html

test: serial ranks                      ## everything on one rank, and what communicates on several

serial: $(VENV)/ready                     # one process for each core
	python tools/tangle.py --check
	OMP_NUM_THREADS=1 $(LIMIT) $(PYTEST) -n $(JOBS) --dist worksteal $(SOAK)

ranks: $(VENV)/ready
	for n in $(RANKS); do echo "== $$n ranks"; OMP_NUM_THREADS=1 $(LIMIT) mpirun -n $$n $(PYTEST) -p no:cacheprovider $(SOAK) || exit 1; done

soak: $(VENV)/ready                       ## for SOAK_MINUTES: thousands of random examples, jobs that are killed; in rounds
	end=$$((SECONDS + 60 * $(SOAK_MINUTES))); while ((SECONDS < end)); do $(MAKE) test LIMIT= SOAK="--soak -o timeout=3600" || exit 1; done

mutate: $(VENV)/ready                     ## break the package in forty places, one by one: does a test notice?
	python tools/mutate.py --sample $(or $(SAMPLE),40) --seed $(or $(SEED),1)

bench: $(VENV)/bench-ready                ## this package beside its peers
	python -m benchmarks

tangle: $(VENV)/ready                     ## the package, from the chapters
	python tools/tangle.py

check: $(VENV)/lint-ready                 ## is the package what the chapters say? does it lint, and do its types agree?
	python tools/tangle.py --check
	python tools/tangle.py trace -- ruff check .
	python tools/tangle.py trace -- ruff format --check vmad_lit tools tests benchmarks conf.py conftest.py providers
	python tools/tangle.py trace -- mypy

dist: $(VENV)/ready                       ## what is published, in dist/: built, installed where nothing else is, and tried out
	rm -rf dist
	python -m build -q --outdir dist .
	python -m build -q --outdir dist providers/pfft-python
	$(PYTEST) tests/published.py

clean:
	rm -rf _build dist .venv .venv-openmpi

$(VENV)/ready: requirements.txt constraints.txt pyproject.toml providers/pfft-python/pyproject.toml
	@echo "== installing into $(VENV) (once)"
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install -q --upgrade pip -c constraints.txt
	$(if $(MPI),python -m pip install -q -c constraints.txt $(MPI),mpicc -show)
	python -m pip install -q -r requirements.txt
	touch $@

$(VENV)/%-ready: $(VENV)/ready              # what only one of the commands needs, once
	python -m pip install -q -c constraints.txt -e '.[$*]'
	touch $@
