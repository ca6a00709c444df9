#!/bin/sh
# Small rows of each family of kernels under compute-sanitizer, on the Hopper GPU of this machine (sanitize.py).
#   tests/gpu/sanitize.sh [RESULT.json] [-k regex of rows]
# PYTHON: the interpreter (python3 by default). ROW_SECONDS: what a row may take under one tool (120). JOBS: at a time.
cd "$(dirname "$0")/../.." || exit 1
export COMMAND="${JOBS:+JOBS=$JOBS }${ROW_SECONDS:+ROW_SECONDS=$ROW_SECONDS }tests/gpu/sanitize.sh $*"
result=examples/benchmarks/results/sanitizer.json
case ${1:-} in *.json) result=$1 && shift ;; esac
export JAXATTN_TEST_GPU=1 PYTHONPATH=".:$PYTHONPATH" XLA_PYTHON_CLIENT_PREALLOCATE=false
export XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_command_buffer= --xla_gpu_force_compilation_parallelism=1 $XLA_FLAGS"
exec "${PYTHON:-python3}" -m tests.gpu.sanitize "$result" "$@"
