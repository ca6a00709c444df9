"""Time in kernels, and calls that may fail or hang."""

import contextlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.mosaic.gpu import profiler


def milliseconds(call: Any, inputs: tuple, iterations: int) -> float:
    """Median over runs of the time in kernels, by CUPTI.

    As many runs come before and do not count: on a GPU that was idle the same kernel takes up to a tenth
    longer, and who is measured first would pay for it.
    """
    _, times = profiler.measure(call, iterations=2 * iterations)(*inputs)
    if times is None:
        raise RuntimeError("no kernel ran")
    return statistics.median(times[iterations:])


def elapsed_milliseconds(call: Any, inputs: tuple, iterations: int) -> float:
    """From one call to the next, of calls that are launched without waiting for the one before."""
    jax.block_until_ready(call(*inputs))
    start = time.perf_counter()
    jax.block_until_ready([call(*inputs) for _ in range(iterations)])
    return 1e3 * (time.perf_counter() - start) / iterations


def or_reason(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, or in one line why it returns nothing."""
    try:
        return function(*arguments)
    except Exception as error:
        return reason(error)


def reason(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else repr(error)


@contextlib.contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Ends this process where the block takes longer: nothing else stops a kernel that hangs. What was saved
    before stays.
    """

    def give_up() -> None:
        print(f"{what}: no end within {seconds:.0f} s, giving up", file=sys.stderr, flush=True)
        os._exit(3)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
