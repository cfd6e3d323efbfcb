# make demo        register a real pair of images, secure and clear, with pictures
# make test        the test suite
# make test-full   the same with the tests that take minutes
# make bench       the benchmarks
# make doc         the documentation, into doc/_build; runs the tutorials
# make types       check the annotations of the public interface
# make lint        style, by ruff
# make checked     the kernels' tests with every index checked
# make sanitize    the kernels' tests with gcc's address and undefined-behaviour sanitizers
# make wheels      source distribution and wheel, in dist/
# make constraints the versions in .venv, as constraints.txt
# make build       only the environment, with the package and its kernels
# make clean       remove everything that make made
#
# Everything runs from a virtual environment of its own, .venv, with the package
# built and installed as users get it. Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
OUT ?= demo_output
# Tests that run at a time, each with up to three parties, which wait for one another:
# with three at a time two cores are busy.
JOBS ?= 3
VENV := .venv
BIN := $(VENV)/bin
SITE = $(wildcard $(VENV)/lib/python3*/site-packages)
KERNELS := dipy_ppir/_kernels
SOURCES := pyproject.toml setup.py MANIFEST.in \
	$(filter-out $(KERNELS)/sources.py,$(shell find dipy_ppir -type f \
		-not -name '*.so' -not -path '*/__pycache__/*')) \
	$(wildcard cython_kernels/*.pyx cython_kernels/*.px[di] cython_kernels/*.h)

# What runs here is the package as users get it: keep the source tree, which has the
# same name, off the path of every Python that is started from here.
export PYTHONSAFEPATH = 1
unexport PYTHONPATH

.PHONY: demo test test-full bench build doc lint types checked sanitize wheels \
	constraints clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/dipy_ppir_demo $(OUT)

# Parties and workers share the machine, and OpenMP's threads wait by spinning.
test test-full checked sanitize: export OMP_NUM_THREADS = 1
test test-full checked sanitize: export OPENBLAS_NUM_THREADS = 1

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-full: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m '' --hypothesis-profile=new

build: $(VENV)/test.stamp

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

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# For the machine it is made on; `cibuildwheel` makes those of a release.
wheels: $(VENV)/dev.stamp
	rm -rf dist
	$(BIN)/python -m build --outdir dist/raw .
	@mv dist/raw/*.tar.gz dist/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m auditwheel repair -w dist dist/raw/*.whl

constraints: $(VENV)/test.stamp $(VENV)/fast.stamp
	{ echo "# Versions that the tests ran with: pip install -c constraints.txt dipy-ppir"; \
	$(BIN)/python -m pip freeze --exclude dipy-ppir; } > constraints.txt

# Other builds of the kernels, each in a folder of its own, and the tests that reach
# every kernel.
KERNEL_TESTS = tests/test_carry_kernels.py tests/test_field_kernels.py \
	tests/test_ring_kernels.py tests/test_ring128_kernels.py tests/test_windows.py \
	tests/test_parzenhist.py tests/test_ssdmetric.py tests/test_lattice.py

build/checked/stamp: HOW = DIPY_PPIR_BOUNDSCHECK=1
checked: build/checked/stamp
	@grep -q RaiseBufferIndexError build/checked/tree/cython_kernels/ring64.c
	PYTHONPATH=build/checked/site $(BIN)/python -m pytest $(KERNEL_TESTS)

# A finding ends the process, and is seen because pytest leaves descriptors alone.
# Python itself leaks, so leaks are not looked for.
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all
build/sanitize/stamp: HOW = LDFLAGS="$(SANITIZE)" \
	CFLAGS="$(SANITIZE) -g1 -fno-omit-frame-pointer"
sanitize: build/sanitize/stamp
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	PYTHONPATH=build/sanitize/site $(BIN)/python -m pytest --capture=sys $(KERNEL_TESTS)

build/%/stamp: $(VENV)/test.stamp
	@rm -rf $(@D)
	@mkdir -p $(@D)/tree
	@tar cf - README.md LICENSE $(SOURCES) | tar xf - -C $(@D)/tree
	$(HOW) $(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation \
		--no-deps --target $(@D)/site $(@D)/tree
	@touch $@

# Left-over modules in build/ would end up in the wheel; compiled kernels may stay,
# and are not compiled again because the build finds the same NumPy and Cython.
# The source tree gets the kernels too: Python started in it finds it first.
$(VENV)/%.stamp: $(VENV)/tools.stamp $(SOURCES)
	@find build -name '*.py' -delete 2>/dev/null || true
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation '.[$*]'
	@rm -f $(KERNELS)/*.so
	@cp -p $(SITE)/$(KERNELS)/sources.py $(SITE)/$(KERNELS)/*.so $(KERNELS)/
	@touch $@

# What pyproject.toml names to build with.
$(VENV)/tools.stamp: $(VENV)/python.stamp
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", \
		"rb"))["build-system"]["requires"], sep="\n")' > $(VENV)/tools.txt
	@$(BIN)/python -m pip install --disable-pip-version-check -q -r $(VENV)/tools.txt
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
	rm -f cython_kernels/*.c cython_kernels/*.html $(KERNELS)/*.so $(KERNELS)/sources.py
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
