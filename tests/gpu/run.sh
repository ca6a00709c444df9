#!/bin/sh
# Runs every kernel test on the Hopper GPU of this machine and records the result as tests end (record.py).
#   tests/gpu/run.sh [RESULT.json] [test files] [more pytest arguments, such as -k paged]
# PYTHON: the interpreter (python3 by default); it needs jax with CUDA, pytest, jaxtyping. JOBS: processes that share
# the GPU (compiling is most of the time). TEST_SECONDS: what a test may take before it counts as hung (120).
# MAX_SECONDS: what the whole run may take. LEFT_OF=RESULT.json: only what did not pass in that run.
cd "$(dirname "$0")/../.." || exit 1
random="${JAXATTN_RANDOM_CASES:+JAXATTN_RANDOM_CASES=$JAXATTN_RANDOM_CASES }"
random="$random${JAXATTN_RANDOM_DRAWS:+JAXATTN_RANDOM_DRAWS=$JAXATTN_RANDOM_DRAWS }"
export COMMAND="$random${LEFT_OF:+LEFT_OF=$LEFT_OF }tests/gpu/run.sh $*"
result=examples/benchmarks/results/gpu_tests.json
case ${1:-} in *.json) result=$1 && shift ;; esac
case "$*" in *tests/gpu*) ;; *) set -- tests/gpu "$@" ;; esac
export JAXATTN_TEST_GPU=1 PYTHONPATH=".:$PYTHONPATH" XLA_PYTHON_CLIENT_PREALLOCATE=false
# Choosing the fastest matmul for each reference would take most of the time.
export XLA_FLAGS="--xla_gpu_autotune_level=0 $XLA_FLAGS"
# Without pyproject.toml's pytest options: they name plugins that the GPU machine need not have.
exec "${PYTHON:-python3}" -m tests.gpu.record "$result" \
    -c /dev/null --rootdir . -o "markers=gpu: needs a Hopper GPU" -p no:cacheprovider -q -m gpu "$@"
