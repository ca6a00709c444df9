#!/bin/sh
# Runs every kernel test on the Hopper GPU of this machine and records the result.
#   tests/gpu/run.sh [RESULT.json] [more pytest arguments]
# PYTHON: the interpreter (python3 by default); it needs jax with CUDA, pytest, jaxtyping. JOBS: processes that share
# the GPU (needs pytest-xdist; compiling is most of the time).
cd "$(dirname "$0")/../.." || exit 1
result=${1:-examples/benchmarks/results/gpu_tests.json}
[ $# -gt 0 ] && shift
jobs=${JOBS:-1}
[ "$jobs" -gt 1 ] && set -- -n "$jobs" "$@"
export JAXATTN_TEST_GPU=1 PYTHONPATH=".:$PYTHONPATH" XLA_PYTHON_CLIENT_PREALLOCATE=false
# Choosing the fastest matmul for each reference would take most of the time.
export XLA_FLAGS="--xla_gpu_autotune_level=0 $XLA_FLAGS"
log=$(mktemp)
started=$(date -u +%Y-%m-%dT%H:%M:%SZ)
# Without pyproject.toml's pytest options: they name plugins that the GPU machine need not have.
"${PYTHON:-python3}" -m pytest -c /dev/null --rootdir . -o "markers=gpu: needs a Hopper GPU" -p no:cacheprovider -m gpu --junitxml="$log" tests/gpu "$@"
status=$?
"${PYTHON:-python3}" tests/gpu/record.py "$log" "$result" "$started" "pytest -m gpu tests/gpu $*"
exit $status
