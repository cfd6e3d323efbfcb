# make demo        register a real pair of images, secure and clear, with pictures
# make test        the test suite
# make test-full   the same with the tests that take minutes
# make bench       the benchmarks
# make doc         the documentation, into doc/_build; runs the tutorials
# make types       check the annotations of the public interface
# make clean       remove everything that make made
#
# Everything runs from a virtual environment of its own, .venv, with the package
# built and installed as users get it. Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
OUT ?= demo_output
# Tests that run at a time, each with up to three parties.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py MANIFEST.in \
	$(shell find dipy_ppir -name '*.py' -o -path '*/templates/*') \
	$(wildcard cython_kernels/*.pyx cython_kernels/*.px[di] cython_kernels/*.h)

# The kernels are in the installed package only: keep the source tree, which has
# the same name, off the path of every Python that is started from here.
export PYTHONSAFEPATH = 1
unexport PYTHONPATH

.PHONY: demo test test-full bench doc types clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/dipy_ppir_demo $(OUT)

# Parties and workers share the machine, and OpenMP's threads wait by spinning.
test test-full: export OMP_NUM_THREADS = 1
test test-full: export OPENBLAS_NUM_THREADS = 1

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-full: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m '' --hypothesis-profile=new

bench: $(VENV)/test.stamp
	$(BIN)/python -m pytest benchmarks --override-ini addopts= -q -m '' --benchmark-only

# What the tutorials printed and drew is kept until they change.
doc: export OMP_NUM_THREADS = 1
doc: export MPLBACKEND = Agg
doc: $(VENV)/doc.stamp
	rm -rf doc/api
	$(BIN)/python -m sphinx -W --keep-going -b html doc doc/_build

types: $(VENV)/dev.stamp
	$(BIN)/python -m mypy

# Left-over modules in build/ would end up in the wheel; compiled kernels may stay.
$(VENV)/%.stamp: $(VENV)/python.stamp $(SOURCES)
	@find build -name '*.py' -delete 2>/dev/null || true
	$(BIN)/python -m pip install --disable-pip-version-check -q '.[$*]'
	@touch $@

$(VENV)/python.stamp:
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: $(PYTHON) is not installed; install Python 3.11 or newer, or" \
		"name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or newer is needed, $(PYTHON) is" \
		"$$($(PYTHON) -V 2>&1); name one: make PYTHON=python3.12" >&2; exit 1; }
	@command -v $${CC:-cc} >/dev/null || { \
		echo "error: a C compiler is needed to build the kernels; install one" \
		"(gcc or clang), or name it: make CC=clang" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists( \
		os.path.join(sysconfig.get_path("include"), "Python.h")))' || { \
		echo "error: the C headers of Python are missing; install the development" \
		"package of $(PYTHON) (for example python3-dev)" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { \
		echo "error: $(PYTHON) cannot make virtual environments; install its venv" \
		"package (for example python3-venv)" >&2; rm -rf $(VENV); exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output .pytest_cache .hypothesis \
		.benchmarks .mypy_cache doc/_build doc/api doc/auto_tutorials
	rm -f cython_kernels/*.c cython_kernels/*.html dipy_ppir/_kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
