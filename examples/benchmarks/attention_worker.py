"""A fresh process of flash_attention.py: compiles everything in threads, waits for its turn, then times."""

import json
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import report
from attention_peers import PEERS, STANDARD, arrays_of, extras_of, forward_and_backward, has_standard
from attention_rows import Row
from processes import result_by, say
from timing import milliseconds, or_reason, reason

METRICS = ("forward", "forward_backward")
INPUTS = "inputs"
CEILING = 8192  # the size of the matrix product that every share is a share of


def main() -> None:
    job = json.loads(sys.stdin.readline())
    if jax.default_backend() != "gpu":
        report.refuse(f"needs an NVIDIA GPU, found {jax.default_backend()}")
    rows = [Row(**fields) for fields in job["rows"]]
    start = time.perf_counter()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Tokamax warns of every shape it was not tuned for
    compiled = compile_all(rows, job["peers"], job["compile_seconds"])
    say("@compiled", {"seconds": round(time.perf_counter() - start, 1), **report.device_facts()})
    if sys.stdin.readline():  # else the parent is gone
        measure_all(rows, compiled, job)
    os._exit(0)  # a thread may still be compiling


def measure_all(rows: list[Row], compiled: dict[Row, dict], job: dict) -> None:
    start = time.perf_counter()
    if job["ceiling"]:
        say("@part", {"matmul_tflops": matmul_tflops()})
    for row in rows:
        say("@part", {"row": measure_row(row, compiled[row], job["turn"])})
    if job["ceiling"]:
        say("@part", {"matmul_tflops": matmul_tflops()})
    # Last, and compiled only now, by one process at a time: XLA tries its matrix products on the GPU, with
    # gigabytes of logits each.
    for row in filter(has_standard, rows if job["turn"] == 0 else ()):
        for metric in METRICS:
            say("@part", {"row": measure_standard(row, metric)})
    say("@done", {"timing_seconds": round(time.perf_counter() - start, 1)})


def compile_all(rows: list[Row], peers: list[str], seconds: float = 600.0) -> dict[Row, dict]:
    """row -> (peer, metric) -> a compiled call, or why there is none; INPUTS -> what makes the arrays.

    seconds: what is not compiled by then has no figure; a compiler that hangs costs its own call.
    """
    end = time.monotonic() + seconds
    extras = {row: jax.tree.map(_spec, extras_of(row)) for row in rows}
    pool = ThreadPoolExecutor(max(4, len(os.sched_getaffinity(0)) // 4))
    inputs = {row: pool.submit(_compile_inputs, row) for row in rows}
    calls = {
        (row, peer, metric): pool.submit(or_reason, compile_call, row, peer, metric, extras[row])
        for row in rows
        for peer in peers
        for metric in METRICS
    }
    compiled: dict[Row, dict] = {row: {INPUTS: future.result()} for row, future in inputs.items()}
    for (row, peer, metric), future in calls.items():
        compiled[row][peer, metric] = result_by(future, end, seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    return compiled


def _spec(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _compile_inputs(row: Row) -> Any:
    return jax.jit(lambda: arrays_of(row)).lower().compile()


def compile_call(row: Row, peer: str, metric: str, extras: dict) -> Any:
    arrays = jax.eval_shape(lambda: arrays_of(row))
    attend = PEERS[peer](row)
    if metric == "forward":
        return jax.jit(attend).lower(*arrays[:3], extras).compile()
    return jax.jit(forward_and_backward(attend)).lower(*arrays, extras).compile()


def measure_row(row: Row, calls: dict, turn: int) -> dict:
    """{label, peers: {name: {metric_ms, metric_temp_bytes, or metric_error}}}; each process rotates the order
    of the peers.
    """
    arrays, extras = calls[INPUTS](), extras_of(row)
    peers = list(dict.fromkeys(call[0] for call in calls if call != INPUTS))
    peers = peers[turn % len(peers) :] + peers[: turn % len(peers)]
    figures: dict[str, dict] = {peer: {} for peer in peers}
    for metric in METRICS:
        inputs = (*arrays[:3], extras) if metric == "forward" else (*arrays, extras)
        for peer in peers:
            figures[peer] |= _time(calls[peer, metric], metric, inputs, iterations_of(row))
    print(f"  measured {row.label}", file=sys.stderr, flush=True)
    return {"label": row.label, "peers": figures}


def measure_standard(row: Row, metric: str) -> dict:
    """As measure_row, of standard attention alone."""
    arrays, extras = arrays_of(row), extras_of(row)
    call = or_reason(compile_call, row, STANDARD, metric, extras)
    inputs = (*arrays[:3], extras) if metric == "forward" else (*arrays, extras)
    print(f"  measured {row.label}: {STANDARD}, {metric}", file=sys.stderr, flush=True)
    return {"label": row.label, "peers": {STANDARD: _time(call, metric, inputs, 3)}}


def _time(call: Any, metric: str, inputs: tuple, iterations: int) -> dict:
    """metric_ms and metric_temp_bytes of a compiled call, or metric_error of the reason why it is none."""
    if isinstance(call, str):
        return {f"{metric}_error": call}
    memory = {f"{metric}_temp_bytes": call.memory_analysis().temp_size_in_bytes}
    try:
        return {**memory, f"{metric}_ms": milliseconds(call, inputs, iterations)}
    except Exception as error:
        return {**memory, f"{metric}_error": reason(error)}


def iterations_of(row: Row) -> int:
    """Runs that take about 20 ms together, at least 4 and at most 20."""
    return int(min(20, max(4, 20e-3 * 1e15 / (2 * row.flops))))


def matmul_tflops(size: int = CEILING) -> float:
    """The ceiling: a bf16 matrix product on random data."""
    x, y = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    return 2 * size**3 / milliseconds(jax.jit(jnp.matmul), (x, y), 8) / 1e9


if __name__ == "__main__":
    main()
