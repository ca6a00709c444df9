"""One token of each row from unnormalised weights: cuts by rank and by mass without sorting, then a draw."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def keep_from(weights: jax.Array, threshold: jax.Array) -> jax.Array:
    """weights[R, V] with zeros where they are below threshold[R]."""
    return jnp.where(weights >= threshold[:, None], weights, 0.0)


def top_k_threshold(weights: jax.Array, top_k: jax.Array) -> jax.Array:
    """The k-th largest weight of each row, f32[R]; those equal to it stay too. 0 where all stay."""

    def find() -> jax.Array:
        k = jnp.where(top_k > 0, jnp.minimum(top_k, weights.shape[-1]), weights.shape[-1])
        return _largest(lambda t: (weights >= t[:, None]).sum(axis=-1) >= k, weights.shape[0])

    return lax.cond((top_k > 0).any(), find, lambda: jnp.zeros(weights.shape[0]))


def top_p_threshold(weights: jax.Array, top_p: jax.Array) -> jax.Array:
    """The largest t for which the weights from t on sum to top_p of all, f32[R]. 0 where all stay."""

    def find() -> jax.Array:
        wanted = top_p * weights.sum(axis=-1)
        threshold = _largest(lambda t: keep_from(weights, t).sum(axis=-1) >= wanted, weights.shape[0])
        return jnp.where(top_p < 1, threshold, 0.0)

    return lax.cond((top_p < 1).any(), find, lambda: jnp.zeros(weights.shape[0]))


def _largest(holds: Any, num_rows: int) -> jax.Array:
    """The largest float32 t in [0, 1] of each row for which `holds(t[R]) -> bool[R]`, true at 0 and monotone.

    Bisection over the bits: floats that are not negative order as their bits do, so 30 passes over the row
    find t exactly. A sort of the vocabulary, the usual way, moves more than that and is slow on a GPU.
    """

    def narrow(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # holds(low), not holds(high)
        middle = low + (high - low) // 2
        is_low = holds(lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(is_low, middle, low), jnp.where(is_low, high, middle)

    one = int(np.float32(1).view(np.int32))
    bounds = (jnp.zeros(num_rows, jnp.int32), jnp.full(num_rows, one + 1, jnp.int32))
    low, _ = lax.fori_loop(0, one.bit_length(), narrow, bounds)
    return lax.bitcast_convert_type(low, jnp.float32)


def inverse_cdf(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """The index at which the running sum of weights passes u times their total: first a block, then in it.

    Two levels cost one pass over the vocabulary and two short running sums, and give unlikely tokens the
    resolution of two random numbers.
    """
    num_rows, vocab_size = weights.shape
    block = max(1, int(np.sqrt(vocab_size)))
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab_size % block))).reshape(num_rows, -1, block)
    chosen = _pass_point(blocks.sum(axis=-1), uniforms[:, 0])
    inside = jnp.take_along_axis(blocks, chosen[:, None, None], axis=1)[:, 0]
    return chosen * block + _pass_point(inside, uniforms[:, 1])


def _pass_point(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index whose running sum is above uniform * total: always one of positive weight."""
    running = jnp.cumsum(weights, axis=-1)
    total = running[:, -1]
    point = jnp.minimum(uniform * total, jnp.nextafter(total, 0.0))  # the product may round up to the total
    return jnp.argmax(running > point[:, None], axis=-1).astype(jnp.int32)
