"""One token of each row from unnormalised weights: cuts by rank and by mass without sorting, then a draw."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

FLOAT_BITS = 30  # of a float32 in [0, 2)
BITS = 3  # found in one pass: 7 candidates share one reading of the row


def keep_from(weights: jax.Array, threshold: jax.Array) -> jax.Array:
    """weights[R, V] with zeros where they are below threshold[R]."""
    return jnp.where(weights >= threshold[:, None], weights, 0.0)


def top_k_threshold(weights: jax.Array, top_k: jax.Array, *, may_skip: bool = True) -> jax.Array:
    """The k-th largest weight of each row, f32[R]; those equal to it stay too. 0 where all stay."""

    def find() -> jax.Array:
        k = jnp.where(top_k > 0, jnp.minimum(top_k, weights.shape[-1]), weights.shape[-1])
        return _largest(lambda t: (weights >= t).astype(jnp.int32), k)

    return _unless_all_stay((top_k > 0).any(), find, weights, may_skip)


def top_p_threshold(weights: jax.Array, top_p: jax.Array, *, may_skip: bool = True) -> jax.Array:
    """The largest t for which the weights from t on sum to top_p of all, f32[R]. 0 where all stay."""

    def find() -> jax.Array:
        wanted = top_p * weights.sum(axis=-1)
        threshold = _largest(lambda t: jnp.where(weights >= t, weights, 0.0), wanted)
        return jnp.where(top_p < 1, threshold, 0.0)

    return _unless_all_stay((top_p < 1).any(), find, weights, may_skip)


def _unless_all_stay(
    cuts: jax.Array, find: Callable[[], jax.Array], weights: jax.Array, may_skip: bool
) -> jax.Array:
    """What `find` finds; where it may be skipped, only if some row is cut: a choice that costs a wait."""
    return lax.cond(cuts, find, lambda: jnp.zeros(weights.shape[0])) if may_skip else find()


def _largest(terms: Callable[[jax.Array], jax.Array], wanted: jax.Array) -> jax.Array:
    """The largest float32 t in [0, 2) of each row for which sum(terms(t)) >= wanted[R].

    terms(t[R, 1]) -> [R, V], none of which grows with t. Floats that are not negative order as their bits do,
    so the search goes over the 30 bits, BITS at a time: one pass reads the row once for all 2^BITS - 1
    candidates. A sort of the vocabulary, the usual way, moves far more and is slow on a GPU.
    """
    num_candidates, num_rows = 2**BITS - 1, wanted.shape[0]

    def narrow(step: jax.Array, low: jax.Array) -> jax.Array:
        unit = jnp.int32(1) << (FLOAT_BITS - BITS * (step + 1))
        candidates = [low + (i + 1) * unit for i in range(num_candidates)]
        operands = tuple(terms(lax.bitcast_convert_type(c, jnp.float32)[:, None]) for c in candidates)
        zeros = (jnp.zeros((), operands[0].dtype),) * num_candidates
        sums = lax.reduce(operands, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (1,))
        return low + unit * sum((total >= wanted).astype(jnp.int32) for total in sums)

    low = lax.fori_loop(0, FLOAT_BITS // BITS, narrow, jnp.zeros(num_rows, jnp.int32))
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
