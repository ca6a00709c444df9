"""How far 16 bits may be from fp32: as far as the dtype goes, or twice as far as a naive computation in it.

A kernel's error is relative to its result, but where the result is what is left of larger numbers. The
gradients of attention subtract rowsum(dO * O), and O is rounded to 16 bits: with one visible key, or in a sum
over whole rows, little but that rounding is left. So it is in any computation that keeps O in 16 bits, which
is then the measure.
"""

from collections.abc import Callable

import numpy as np

LIMITS = {"bfloat16": 5e-3, "float16": 7e-4}  # relative RMS error; 1.3 and 1.4 units in the last place
LIMITS["float32"] = LIMITS["float16"]  # at JAX's default precision of matmuls: TF32 has fp16's mantissa
FLOOR = 0.05  # of a limit: an absolute error, where the result should be nothing


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def assert_close(
    name: str, actual, expected, limit: float, naive_error: Callable[[], float] = lambda: 0.0
) -> None:
    """Asserts rms(actual - expected) <= max(limit rms(expected), 2 naive_error() + FLOOR limit).

    naive_error: the RMS error of the naive computation; asked for only where the relative limit is missed.
    Few numbers of the one may be right by chance where those of the other are not: for them 2 grows.
    """
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert np.isfinite(actual).all(), f"{name}: not finite"
    error = rms(actual - expected)
    if error <= limit * rms(expected):
        return
    naive = naive_error()
    allowed = (2 + 6 / np.sqrt(expected.size)) * naive + FLOOR * limit
    message = (
        f"{name}: error {error:.3g} of {rms(expected):.3g}, relative limit {limit:.2g}, naive {naive:.3g}"
    )
    assert error <= allowed, message
