# make demo    a fresh machine with Python 3.11 to 3.13 -> a picture
# make test    a fresh machine -> the test suite (without slow, gpu, rtx, browser and ray)
# make test-rtx  the tests marked rtx
# make test-browser  the tests marked browser, in Debian's chromium
# make test-ray  the tests marked ray, on a cluster of two nodes on this machine
# make check   format, lint, types, and the files of docs/deploy
# make builtin compiles the built-in model again
# make sanitize  the C++ operators' tests under the address and undefined behaviour sanitizers
# make bench-quick  ratios of speed beside those of the ledger, under three minutes on two cores
# make soak  mixed traffic against `ldmrt serve` (ARGS="--seconds 30 --faults --no-record")
# make benchmarks  operators and components under pytest-benchmark (ARGS="-k attention --benchmark-save=NAME")
# make lock    resolves anew what the container images hold
# make sbom    the bills of materials of the images, from their locks
# make audit   known vulnerabilities of what they hold
# make clean   removes what the others made
#
# Each works in .venv, which it makes on the first call; later calls are instant unless a file named below has changed.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
MARKS  ?= not slow and not gpu and not rtx and not browser and not ray

# Python files are not listed: the install is editable, so they are used as they are.
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

.PHONY: demo test test-rtx test-browser test-ray check format-check lint types deployable check-native sanitize bench-quick soak benchmarks format builtin lock sbom audit installed clean

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

# Installs ray. Its replicas are processes of their own: one test at a time.
test-ray: $(VENV)/.stamp-ray
	@$(BIN)/python -m pytest -m "ray and not slow" tests/serving/test_ray_app.py $(ARGS)

check: format-check lint types deployable

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
	$(BIN)/mypy --python-executable $(BIN)/python $(TYPES)/ldmrt $(wildcard tests examples benchmarks) .ci/audit.py

# docs/deploy, as far as it can be checked without Docker and a cluster; tests/test_deploy.py holds it against the server.
YAML := {extends: default, rules: {line-length: {max: 160}, document-start: disable, comments: {min-spaces-from-content: 1}}}
deployable: $(VENV)/.stamp-lint
	$(BIN)/hadolint docs/deploy/Dockerfile
	$(BIN)/yamllint --strict --config-data "$(YAML)" docs/deploy
	$(BIN)/kubernetes-validate --quiet --strict $(filter-out %/kustomization.yaml,$(wildcard docs/deploy/kubernetes/cpu/*.yaml))

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

# Fails where a picture is wrong, a request is not accounted for, or the server does not end well.
soak: $(VENV)/.stamp-test
	@$(BIN)/python benchmarks/soak.py $(ARGS)

benchmarks: $(VENV)/.stamp-test
	@$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds $(ARGS)

format: $(VENV)/.stamp-lint
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# All that the other targets install, at once.
installed: $(VENV)/.stamp-lint $(VENV)/.stamp-rtx $(VENV)/.stamp-browser

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
	$(INSTALL) "ldmrt[tensorrt-rtx]"
	@touch $@

$(VENV)/.stamp-browser: $(VENV)/.stamp-test
	$(INSTALL) --group browser
	@touch $@

$(VENV)/.stamp-ray: $(VENV)/.stamp-test
	$(INSTALL) "ldmrt[ray]"
	@touch $@

$(VENV)/.stamp-supply: $(VENV)/.stamp-venv
	$(INSTALL) --group supply
	@touch $@

$(VENV)/.stamp-lint: $(VENV)/.stamp-test
	$(INSTALL) --group lint
	@touch $@

# The built-in model's folder is also its bundle. Run this when the weights or the compiler's output have changed.
builtin: $(VENV)/.stamp-test
	rm -rf ldmrt/builtin/shapes/graphs ldmrt/builtin/shapes/ldmrt.json
	$(BIN)/ldmrt build-engines ldmrt/builtin/shapes --out ldmrt/builtin/shapes --dtype float32 --batch 1 --batch 4

# What the images install, from PyPI, each with the hashes of its files. torch for CPUs alone is in PyTorch's own index: the Dockerfile names it.
LOCKS := docs/deploy/lock
LOCK = $(BIN)/uv pip compile --quiet --upgrade --default-index https://pypi.org/simple --python-version 3.12 \
  --python-platform x86_64-manylinux_2_28 --constraint constraints.txt --generate-hashes --no-header --no-annotate
lock: $(VENV)/.stamp-supply
	$(LOCK) --extra serve pyproject.toml --output-file $(LOCKS)/gpu.txt
	$(LOCK) --extra serve pyproject.toml --output-file $(LOCKS)/cpu.txt --no-emit-package torch --no-emit-package triton \
	  $$(grep -oE '^(cuda|nvidia)-[a-z0-9-]+' $(LOCKS)/gpu.txt | sed 's/^/--no-emit-package /')
	printf '%s\n' "scikit-build-core>=1.1" cmake ninja | $(LOCK) - --output-file $(LOCKS)/build.txt

SBOM = $(BIN)/python -P -W ignore::UserWarning -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible
sbom: $(VENV)/.stamp-supply
	@mkdir -p build/sbom
	@$(SBOM) --output-file build/sbom/gpu.cdx.json $(LOCKS)/gpu.txt
	@(cat $(LOCKS)/cpu.txt; sed -n 's/^ARG TORCH_CPU=/torch==/p' docs/deploy/Dockerfile) | $(SBOM) --output-file build/sbom/cpu.cdx.json -
	@ls build/sbom/*

audit: $(VENV)/.stamp-supply
	@$(BIN)/python -P .ci/audit.py $(LOCKS)/gpu.txt $(LOCKS)/build.txt

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis demo.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
