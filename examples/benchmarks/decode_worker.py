"""A fresh process of paged_attention.py: lowers, compiles in threads, waits for its turn, then times."""

import json
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import report
from decode_peers import PEERS, Row
from processes import result_by, say
from timing import milliseconds, or_reason

Programs = dict[tuple[str, str], Any]  # (row's label, peer's name): a compiled program, or why there is none


def main() -> None:
    job = json.loads(sys.stdin.readline())
    if jax.default_backend() != "gpu":
        report.refuse(f"needs an NVIDIA GPU, found {jax.default_backend()}")
    rows = [Row(**{**fields, "lengths": tuple(fields["lengths"])}) for fields in job["rows"]]
    start = time.perf_counter()
    programs = compile_all(rows, job["names"], job["compile_seconds"])
    say("@compiled", {"seconds": round(time.perf_counter() - start, 1), **report.device_facts()})
    if sys.stdin.readline():  # else the parent is gone
        if job["ceiling"]:
            say("@part", {"read_ceiling_tb_per_s": read_ceiling(job["iterations"])})
        measure_all(programs, job["iterations"])
        say("@done", {})
    os._exit(0)  # a thread may still be compiling


def compile_all(rows: list[Row], names: list[str], seconds: float) -> Programs:
    end = time.monotonic() + seconds
    pool = ThreadPoolExecutor(max(4, len(os.sched_getaffinity(0)) // 4))
    programs: Programs = {}
    for row in rows:
        for name in names:
            is_late = time.monotonic() > end
            lowered = f"not lowered within {seconds:.0f} s" if is_late else or_reason(lower, row, name)
            is_reason = isinstance(lowered, str)
            programs[row.label, name] = lowered if is_reason else pool.submit(or_reason, lowered.compile)
    for key, program in programs.items():
        if isinstance(program, Future):
            programs[key] = result_by(program, end, seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    return programs


def lower(row: Row, name: str) -> Any:
    return PEERS[name](row).lower()


def measure_all(programs: Programs, iterations: int) -> None:
    for (label, name), program in programs.items():
        outcome = program
        if not isinstance(program, str):
            outcome = or_reason(program.microseconds, iterations)
        field = "reason" if isinstance(outcome, str) else "microseconds"
        say("@part", {"row": label, "name": name, field: outcome})


def read_ceiling(iterations: int) -> float:
    """TB/s of a reduction over 2 GB."""
    array = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.bfloat16)
    total = jax.jit(lambda x: x.astype(jnp.float32).sum())
    return array.nbytes / milliseconds(total, (array,), iterations) / 1e9


if __name__ == "__main__":
    main()
