"""A fresh process of flash_attention.py: compiles everything in threads, waits for its turn, then times.

Speaks with its parent in lines: a job comes in as JSON, "@compiled SECONDS" goes out, a line comes in when
the GPU is this process's own, "@done RESULTS" goes out.
"""

import json
import logging
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from attention_peers import PEERS, arrays_of, extras_of, forward_and_backward
from attention_rows import Row
from jax.experimental.mosaic.gpu import profiler

METRICS = ("forward", "forward_backward")
INPUTS = "inputs"
CEILING = 8192  # the size of the matrix product that every share is a share of


def main() -> None:
    job = json.loads(sys.stdin.readline())
    rows = [Row(**fields) for fields in job["rows"]]
    start = time.perf_counter()
    logging.getLogger("absl").setLevel(logging.ERROR)  # Tokamax warns of every shape it was not tuned for
    compiled = compile_all(rows, job["peers"])
    print("@compiled", round(time.perf_counter() - start, 1), flush=True)
    if not sys.stdin.readline():  # the parent is gone
        return
    start = time.perf_counter()
    matmul = [matmul_tflops()] if job["ceiling"] else []
    results = [measure_row(row, compiled[row], job["turn"]) for row in rows]
    matmul += [matmul_tflops()] if job["ceiling"] else []
    seconds = round(time.perf_counter() - start, 1)
    print(
        "@done", json.dumps({"matmul_tflops": matmul, "timing_seconds": seconds, "rows": results}), flush=True
    )


def compile_all(rows: list[Row], peers: list[str]) -> dict[Row, dict]:
    """row -> (peer, metric) -> a compiled call, or why there is none; INPUTS -> what makes the arrays."""
    extras = {row: jax.tree.map(_spec, extras_of(row)) for row in rows}
    tasks = [(row, peer, metric) for row in rows for peer in peers for metric in METRICS]
    with ThreadPoolExecutor(max(4, len(os.sched_getaffinity(0)) // 4)) as pool:
        make = pool.map(lambda row: jax.jit(lambda: arrays_of(row)).lower().compile(), rows)
        calls = pool.map(lambda task: _compile(*task, extras[task[0]]), tasks)
        compiled: dict[Row, dict] = {row: {INPUTS: call} for row, call in zip(rows, make, strict=True)}
        for (row, peer, metric), call in zip(tasks, calls, strict=True):
            compiled[row][peer, metric] = call
    return compiled


def _spec(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _compile(row: Row, peer: str, metric: str, extras: dict) -> Any:
    arrays = jax.eval_shape(lambda: arrays_of(row))
    try:
        attend = PEERS[peer](row)
        if metric == "forward":
            return jax.jit(attend).lower(*arrays[:3], extras).compile()
        return jax.jit(forward_and_backward(attend)).lower(*arrays, extras).compile()
    except Exception as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    return (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}" if str(error) else repr(error)
    )


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
            call = calls[peer, metric]
            if not isinstance(call, str):
                figures[peer][f"{metric}_temp_bytes"] = call.memory_analysis().temp_size_in_bytes
                call = _attempt(call, inputs, iterations_of(row, peer))
            figures[peer][f"{metric}_{'error' if isinstance(call, str) else 'ms'}"] = call
    print(f"  measured {row.label}", file=sys.stderr, flush=True)
    return {"label": row.label, "peers": figures}


def iterations_of(row: Row, peer: str) -> int:
    """Runs that take about 20 ms together, at least 4 and at most 20; fewer of standard attention."""
    return 3 if peer == "xla" else int(min(20, max(4, 20e-3 * 1e15 / (2 * row.flops))))


def _attempt(call: Any, inputs: tuple, iterations: int) -> float | str:
    try:
        return milliseconds(call, inputs, iterations)
    except Exception as error:
        return _reason(error)


def milliseconds(call: Any, inputs: tuple, iterations: int) -> float:
    """Median over runs of the time in kernels, by CUPTI."""
    _, times = profiler.measure(call, iterations=iterations)(*inputs)
    if times is None:
        raise RuntimeError("no kernel ran")
    return statistics.median(times)


def matmul_tflops(size: int = CEILING) -> float:
    """The ceiling: a bf16 matrix product on random data."""
    x, y = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    return 2 * size**3 / milliseconds(jax.jit(jnp.matmul), (x, y), 8) / 1e9


if __name__ == "__main__":
    main()
