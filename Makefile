# make demo    a fresh machine with Python 3.11 to 3.13 -> a picture
# make test    a fresh machine -> the test suite (without slow, gpu, rtx and browser)
# make test-rtx  the tests marked rtx
# make test-browser  the tests marked browser, in Debian's chromium
# make check   format, lint, types
# make builtin compiles the built-in model again
# make sanitize  the C++ operators' tests under the address and undefined behaviour sanitizers
# make bench-quick  ratios of speed beside those of the ledger, under three minutes on two cores
# make benchmarks  operators and components under pytest-benchmark (ARGS="-k attention --benchmark-save=NAME")
# make clean   removes what the others made
#
# Each works in .venv, which it makes on the first call; later calls are instant unless a file named below has changed.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
MARKS  ?= not slow and not gpu and not rtx and not browser

# Python files are not listed: the install is editable, so they are used as they are.
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

.PHONY: demo test test-rtx test-browser check format-check lint types check-native sanitize bench-quick benchmarks format builtin clean

demo: $(VENV)/.stamp-demo
	$(BIN)/ldmrt generate "a red circle on a white background" --seed 2 --out demo.png
	@echo "$(CURDIR)/demo.png"

# A process for each core: the tests compute on one thread.
test: $(VENV)/.stamp-test
	@$(BIN)/python -m pytest -n auto --dist loadfile -m "$(MARKS)" $(ARGS)

# Builds TensorRT plans for GPUs that are not there; installs TensorRT for RTX (100 MB).
test-rtx: $(VENV)/.stamp-rtx
	@$(BIN)/python -m pytest -m "rtx and not slow and not gpu" $(ARGS)

# Skips, and says so, where chromium is not installed (apt-get install chromium).
test-browser: $(VENV)/.stamp-browser
	@$(BIN)/python -m pytest -m "browser and not slow" tests/serving/http/test_page.py $(ARGS)

check: format-check lint types

format-check: $(VENV)/.stamp-lint
	$(BIN)/ruff format --check .

lint: $(VENV)/.stamp-lint
	$(BIN)/ruff check .

# The folders kernels/ and export/ are installed inside ldmrt/. mypy sees them there through a tree of symlinks.
# What lies in the three is checked without being named; another folder of Python files is added to the list at the end.
TYPES := build/types
types: $(VENV)/.stamp-lint
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/ldmrt
	@ln -s $(CURDIR)/ldmrt/* $(TYPES)/ldmrt/
	@ln -s $(CURDIR)/kernels $(CURDIR)/export $(TYPES)/ldmrt/
	$(BIN)/mypy --python-executable $(BIN)/python $(TYPES)/ldmrt $(wildcard tests examples benchmarks)

# A wheel without the native library is legal (no compiler) but never what we want to test.
check-native: $(VENV)/.stamp-test
	@$(BIN)/python -c "from ldmrt.kernels import native; reason = native.why_not(); assert reason is None, reason"

# The C++ bodies under the address and undefined behaviour sanitizers, which must be in the process before Python loads them.
SANITIZED := $(CURDIR)/build/sanitize/libldmrt_cpu.so
sanitize: $(VENV)/.stamp-test
	@cmake -S . -B build/sanitize -DLDMRT_SANITIZE=ON >/dev/null && cmake --build build/sanitize --parallel >/dev/null
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 LDMRT_NATIVE=$(SANITIZED) \
	$(BIN)/python -m pytest -q tests/kernels/test_sampler.py tests/kernels/test_group_norm.py tests/kernels/test_add_group_norm.py \
	  tests/kernels/test_layer_norm.py tests/kernels/test_geglu.py tests/kernels/test_upsample.py tests/kernels/test_attention.py \
	  tests/kernels/test_linear.py tests/kernels/test_linear_geglu.py tests/kernels/test_convolution.py \
	  tests/kernels/test_winograd.py tests/test_hostile_graphs.py -k "native or cpp or cpu or packed"

# Fails only far outside what the ledger has of processors with the same instructions.
bench-quick: $(VENV)/.stamp-test
	@$(BIN)/python benchmarks/quick.py $(ARGS)

benchmarks: $(VENV)/.stamp-test
	@$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds $(ARGS)

format: $(VENV)/.stamp-lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# pip learnt dependency groups in 25.1.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c "import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else 'ldmrt needs Python 3.11 to 3.13, and $(PYTHON) is ' + sys.version.split()[0] + '; name another one: make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "pip>=25.1"
	@touch $@

$(VENV)/.stamp-demo: $(SOURCES) | $(VENV)/.stamp-venv
	$(INSTALL) --editable .
	@$(BIN)/python -c "import ldmrt.kernels"
	@touch $@

$(VENV)/.stamp-test: $(SOURCES) | $(VENV)/.stamp-venv
	$(INSTALL) --editable ".[export,onnxruntime,triton,serve,bench]" --group test
	@$(BIN)/python -c "import ldmrt.kernels"
	@touch $@ $(VENV)/.stamp-demo

$(VENV)/.stamp-rtx: $(VENV)/.stamp-test
	$(INSTALL) --editable ".[tensorrt-rtx]"
	@touch $@

$(VENV)/.stamp-browser: $(VENV)/.stamp-test
	$(INSTALL) --group browser
	@touch $@

$(VENV)/.stamp-lint: $(VENV)/.stamp-test
	$(INSTALL) --group lint
	@touch $@

# The built-in model's folder is also its bundle. Run this when the weights or the compiler's output have changed.
builtin: $(VENV)/.stamp-test
	rm -rf ldmrt/builtin/shapes/graphs ldmrt/builtin/shapes/ldmrt.json
	$(BIN)/ldmrt build-engines ldmrt/builtin/shapes --out ldmrt/builtin/shapes --dtype float32 --batch 1 --batch 4

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
