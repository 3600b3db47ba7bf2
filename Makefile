# Each target sets up what it needs: an environment in $(VENV), torch first, because the native part is built
# against the torch that is already there; then fastprompt, editable, with all its extras.

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest

NEWEST := torch torchvision timm
# NumPy 2.4 refuses an int() that the interpreter of triton 3.6 relies on.
OLDEST := torch==2.11.0 torchvision==0.26.0 triton==3.6.0 timm==1.0.26 'numpy<2.4'
BUILD_TOOLS := 'scikit-build-core>=0.11' cmake ninja

NATIVE_SOURCES := CMakeLists.txt $(wildcard kernels/cpu/*.cpp kernels/include/*.h)
# An editable install keeps a list of the packages that were there: a new one asks for a new install.
PACKAGES := $(wildcard fastprompt/__init__.py fastprompt/*/__init__.py)

# At most two pytest workers, which share the cores.
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
WORKERS := $(shell [ $(CORES) -ge 2 ] && echo 2 || echo 1)
TEST_THREADS := $(shell expr $(CORES) / $(WORKERS))
PYTEST = OMP_NUM_THREADS=$(TEST_THREADS) MKL_NUM_THREADS=$(TEST_THREADS) \
	$(1)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal -p no:benchmark $(PYTEST_ARGS)

.PHONY: help demo test test-all test-oldest lint bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo         train prompts on real images on this machine and write the figures"
	@echo "make test         the tests that cover every code path once, with the newest torch and timm; minutes"
	@echo "make test-all     all tests"
	@echo "make test-oldest  all tests, with the oldest supported torch and timm"
	@echo "make lint         ruff, mypy"
	@echo "make bench        check correctness, then time everything on this machine"
	@echo "make clean        remove builds and caches; keep the environments and reinstall fastprompt on next use"

demo: $(VENV)/.fastprompt-installed
	$(VENV)/bin/python -m examples.digits

test: $(VENV)/.fastprompt-installed
	$(call PYTEST,$(VENV)) -m "not slow"

test-all: $(VENV)/.fastprompt-installed
	$(call PYTEST,$(VENV))

test-oldest: $(VENV_OLDEST)/.fastprompt-installed
	$(call PYTEST,$(VENV_OLDEST))

lint: $(VENV)/.fastprompt-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy fastprompt

bench: $(VENV)/.fastprompt-installed
	$(VENV)/bin/python -m bench.run

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(VENV)/.fastprompt-installed $(VENV_OLDEST)/.fastprompt-installed
	find fastprompt kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# $(1) the environment, $(2) what it must hold before fastprompt is built. The stamps say when that was done last;
# an environment without them is taken over as it is.
define environment
$(1)/.fastprompt-packages: pyproject.toml
	$$(PYTHON) -c 'import sys; sys.exit("fastprompt needs Python 3.10 or newer; set PYTHON=" if sys.version_info < (3, 10) else 0)'
	test -x $(1)/bin/pip || $$(PYTHON) -m venv $(1)
	@echo "$(1): installing $(2) (about 6 GB where they are missing; a few minutes)"
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(2) $$(BUILD_TOOLS)
	touch $$@

$(1)/.fastprompt-installed: $(1)/.fastprompt-packages $$(NATIVE_SOURCES) $$(PACKAGES)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]'
	touch $$@
endef
$(eval $(call environment,$(VENV),$(NEWEST)))
$(eval $(call environment,$(VENV_OLDEST),$(OLDEST)))
