# make demo        trains a small GPT-2 on real text, serves it, then serves SmolLM2   (TEXT=path: on your text)
# make test        all tests but the long ones; make test-all adds those
# make test-gpu    the kernels' tests on a Hopper GPU      make bench   every benchmark on it, about half an hour
# make lint        ruff and pyright
PYTHON ?= python3
PY     := .venv/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
# An NVIDIA driver decides whether JAX comes with CUDA.
CUDA   := $(if $(shell command -v nvidia-smi 2>/dev/null),cuda,)
comma  := ,

.PHONY: demo test test-all test-gpu bench lint format clean

demo: .venv/installed
	$(PY) examples/demo.py $(if $(TEXT),--text "$(TEXT)")

# --dist loadgroup keeps the tests that share a compiled engine on one worker.
test: .venv/installed-test .venv-hopper/installed
	JAXATTN_REQUIRE_HOPPER=1 $(PY) -m pytest -n 2 --dist loadgroup -m "not slow and not gpu"

# XLA_FLAGS: programs for the CPU are compiled as users compile them, which tests/conftest.py would not.
test-all: .venv/installed-test .venv-hopper/installed
	XLA_FLAGS=--xla_force_host_platform_device_count=8 JAXATTN_REQUIRE_HOPPER=1 $(PY) -m pytest -n 2 --dist loadgroup -m "not gpu" --timeout 3600

test-gpu: .venv/installed-test
	PYTHON=$(PY) tests/gpu/run.sh

bench: .venv/installed
	PYTHON=$(PY) examples/benchmarks/all.sh

lint: .venv/installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: .venv/installed-test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { echo "jaxattn needs Python 3.12 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt examples/requirements-data.txt
	@echo "Installing pinned dependencies into .venv ..."
	$(PIP) -e ".$(if $(CUDA),[$(CUDA)])"
	$(PY) -m pip --disable-pip-version-check install --quiet --no-deps -r examples/requirements-data.txt
	@touch $@

.venv/installed-test: .venv/installed
	$(PIP) -e ".[dev$(if $(CUDA),$(comma)$(CUDA))]"
	@touch $@

# Compiles kernels for sm_90a where there is no GPU. An environment of its own: with the CUDA plugin
# beside it, every run on a CPU would log that cuDNN is missing.
.venv-hopper/installed: .venv/bin/python tests/pallas_kernels/requirements-hopper.txt constraints.txt
	@echo "Installing the sm_90a compiler into .venv-hopper ..."
	$(PYTHON) -m venv .venv-hopper
	.venv-hopper/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt -r tests/pallas_kernels/requirements-hopper.txt
	@touch $@

clean:
	rm -rf .venv .venv-hopper build *.egg-info .pytest_cache .ruff_cache .hypothesis
