# Two commands on a fresh machine:   make book    make test
#
# Everything is installed into .venv/ (Python 3.11 or later, a C compiler and a package index are needed, nothing else).
# PYTHON=python3.12 chooses another Python. MPI=openmpi takes another MPI library of the package index, MPI= that of the
# site; VENV=.venv-openmpi says where an environment for it is made, beside the usual one.

PYTHON ?= python3
MPI ?= mpich
VENV ?= .venv
RANKS ?= 2 3
TESTS ?=
# Of pytest; --no-cells leaves out what the book runs when it is built.
OPTIONS ?=
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
SOAK_MINUTES ?= 60
SOAK_MPIS ?= mpich openmpi
TRIALS ?= 300
RESULTS ?= _build/soak.json
# --no-alt forgives pictures that have no alternative text, --only 'book/chapters/016*' looks at some pages.
CHECK ?=
# A test that hangs is ended by pytest, and pytest itself by this.
LIMIT ?= timeout -k 10 2400
PYTEST ?= python -m pytest
SPHINX ?= sphinx-build -n -W --keep-going
# More ranks than cores is what these tests want; Open MPI needs to be told. With MPICH a rank that waits asks a thousand
# times before it lets another one have the core; with fewer the tests on three ranks take a third of the time. Open MPI
# does not yield at all unless it is told, and wants to be asked twice by root, who is the user of many a container.
export MPIR_CVAR_POLLS_BEFORE_YIELD ?= 10
export OMPI_MCA_mpi_yield_when_idle ?= 1
export OMPI_ALLOW_RUN_AS_ROOT ?= 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM ?= 1
export OMPI_MCA_rmaps_base_oversubscribe := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
# Hundreds of processes import the package, and each would compile it anew on a machine that keeps no bytecode.
export PYTHONDONTWRITEBYTECODE :=
export PATH := $(abspath $(VENV))/bin:$(PATH)
SHELL := /bin/bash

.PHONY: book epub pdf check-book test serial ranks soak trials mutate bench tangle check dist clean

book: $(VENV)/ready                     ## the rendered book, in _build/html
	python tools/tangle.py
	$(SPHINX) -b html . _build/html

epub: $(VENV)/ready                     ## the book for readers of devices, _build/epub/vmad_lit.epub; needs Chromium, for the formulas
	python tools/tangle.py
	rm -rf _build/epub                  # whatever lies there is packed
	$(SPHINX) -b epub -t epub -d _build/doctrees-epub . _build/epub

pdf: book                               ## the book on paper, _build/vmad_lit.pdf, printed by Chromium from _build/html
	python tools/print_book.py _build/html _build/vmad_lit.pdf

check-book: $(VENV)/ready               ## every page of _build/html in headless Chromium, as seen by a wide window and a phone
	python tools/check_book.py _build/html $(CHECK)

test: serial ranks                      ## everything on one rank, and what communicates on several

serial: $(VENV)/ready                   # one process for each core
	python tools/tangle.py --check
	OMP_NUM_THREADS=1 $(LIMIT) $(PYTEST) -n $(JOBS) --dist worksteal $(OPTIONS)

ranks: $(VENV)/ready
	for n in $(RANKS); do echo "== $$n ranks"; OMP_NUM_THREADS=1 $(LIMIT) mpirun -n $$n $(PYTEST) -p no:cacheprovider $(OPTIONS) $(TESTS) || exit 1; done

soak: $(VENV)/ready                     ## for SOAK_MINUTES, and with each MPI: jobs that are killed, disks that fill up, ranks that err; random examples
	end=$$((SECONDS + 60 * $(SOAK_MINUTES))); \
	for mpi in $(SOAK_MPIS); do \
	    test $$mpi = "$(MPI)" && venv=$(VENV) || venv=$(VENV)-$$mpi; \
	    $(MAKE) MPI=$$mpi VENV=$$venv trials ranks || exit 1; \
	done; \
	while ((SECONDS < end)); do $(MAKE) test LIMIT= OPTIONS="--soak -o timeout=3600" || exit 1; done

trials: $(VENV)/ready                   # what goes wrong in a night, TRIALS times; SEED makes the same again
	mkdir -p $(dir $(RESULTS))
	python -m tools.soak --trials $(TRIALS) $(if $(SEED),--seed $(SEED)) --results $(RESULTS)

mutate: $(VENV)/ready                   ## break the package in forty places, one by one: does a test notice?
	python tools/mutate.py --sample $(or $(SAMPLE),40) --seed $(or $(SEED),1)

bench: $(VENV)/bench-ready              ## this package beside its peers
	python -m benchmarks

tangle: $(VENV)/ready                   ## the package, from the chapters
	python tools/tangle.py

check: $(VENV)/lint-ready               ## is the package what the chapters say? does it lint, and do its types agree?
	python tools/tangle.py --check
	python tools/tangle.py trace -- ruff check .
	python tools/tangle.py trace -- ruff format --check vmad_lit tools tests benchmarks conf.py conftest.py providers
	python tools/tangle.py trace -- mypy

dist: $(VENV)/ready                     ## what is published, in dist/: built, installed where nothing else is, and tried out
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
	python -m pip install -q -c constraints.txt --no-cache-dir mpsort  # one in pip's cache may be for another MPI
	python -m pip install -q -r requirements.txt
	python -m vmad_lit.warm_up || true      # compile the loops of a simulation, once for all
	touch $@

$(VENV)/%-ready: $(VENV)/ready              # what only one of the commands needs, once
	python -m pip install -q -c constraints.txt -e '.[$*]'
	touch $@
