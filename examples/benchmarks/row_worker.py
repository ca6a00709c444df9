"""A fresh process of in_processes.py: lowers, compiles in threads, waits for its turn, then times."""

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import report
from processes import result_by, say
from timing import or_reason

Programs = dict[tuple[str, str], Any]  # (row's label, peer's name): a compiled program, or why there is none


def main() -> None:
    job = json.loads(sys.stdin.readline())
    if jax.default_backend() != "gpu":
        report.refuse(f"needs an NVIDIA GPU, found {jax.default_backend()}")
    peers = importlib.import_module(job["peers"])
    rows = [peers.Row(**{name: _hashable(x) for name, x in fields.items()}) for fields in job["rows"]]
    start = time.perf_counter()
    programs = compile_all(peers, rows, job["names"], job["compile_seconds"])
    say("@compiled", {"seconds": round(time.perf_counter() - start, 1), **report.device_facts()})
    if sys.stdin.readline():  # else the parent is gone
        if job["ceiling"]:
            outcome = or_reason(peers.ceiling, job["iterations"])
            say("@part", {"no_ceiling": outcome} if isinstance(outcome, str) else outcome)
        measure_all(programs, job["iterations"])
        say("@done", {})
    os._exit(0)  # a thread may still be compiling


def _hashable(value: Any) -> Any:
    """JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value


def compile_all(peers: Any, rows: Sequence[Any], names: Sequence[Sequence[str]], seconds: float) -> Programs:
    """peers: a module with a table PEERS; names: of each row, the peers that are to compute it."""
    end = time.monotonic() + seconds
    pool = ThreadPoolExecutor(max(4, len(os.sched_getaffinity(0)) // 4))
    programs: Programs = {}
    for row, name in ((row, name) for row, of_row in zip(rows, names, strict=True) for name in of_row):
        is_late = time.monotonic() > end
        lowered = f"not lowered within {seconds:.0f} s" if is_late else or_reason(_lower, peers, row, name)
        is_reason = isinstance(lowered, str)
        programs[row.label, name] = lowered if is_reason else pool.submit(or_reason, lowered.compile)
    for key, program in programs.items():
        if isinstance(program, Future):
            programs[key] = result_by(program, end, seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    return programs


def _lower(peers: Any, row: Any, name: str) -> Any:
    return peers.PEERS[name](row).lower()


def measure_all(programs: Programs, iterations: int) -> None:
    """Says the figures of each program, or the reason why there are none."""
    for (label, name), program in programs.items():
        outcome = program if isinstance(program, str) else or_reason(program.figures, iterations)
        figures = {"reason": outcome} if isinstance(outcome, str) else outcome
        say("@part", {"row": label, "name": name, **figures})


if __name__ == "__main__":
    main()
