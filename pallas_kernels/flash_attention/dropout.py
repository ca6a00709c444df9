"""The dropout mask as a function of indices, so that it is never stored and no tile size changes it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Integer, UInt32

# Odd constants: murmur3's finalizer, the golden ratio, xxHash's primes.
_MIX_1, _MIX_2 = 0x85EBCA6B, 0xC2B2AE35
_BATCH, _HEAD, _QUERY, _KEY = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F


def dropout_seed(key: jax.Array) -> UInt32[Array, "2"]:
    """Draws the two words of a call's seed from a JAX random key."""
    return jax.random.bits(key, (2,), jnp.uint32)


def keep_mask(
    seed: UInt32[Array, "2"],
    batch: Integer[Array, "..."],
    head: Integer[Array, "..."],
    query: Integer[Array, "..."],
    key: Integer[Array, "..."],
    *,
    rate: float,
) -> Bool[Array, "..."]:
    """Says which attention weights survive: hash(seed, batch, head, query, key) >= rate x 2^32.

    A counter hash: each query's row is mixed once, then each key once, in 32-bit words, so that a kernel can
    recompute it in the backward pass. Indices broadcast against each other.
    """
    return survives(hash_row(seed, batch, head, query), key, rate)


def hash_row(seed, batch, head, query):
    """The hash of a row of weights: 32 well-mixed bits."""
    row = _mix(_u32(batch) * _u32(_BATCH) + seed[0])
    row = _mix(row ^ (_u32(head) * _u32(_HEAD) + seed[1]))
    return _mix(row ^ (_u32(query) * _u32(_QUERY)))


def survives(row, key, rate: float):
    """Which keys survive in rows of these hashes."""
    return _mix(row ^ (_u32(key) * _u32(_KEY))) >= _u32(min(round(rate * 2**32), 2**32 - 1))


def shift_seed(
    seed: UInt32[Array, "2"], first_batch: Integer[Array, ""] | int, first_head: Integer[Array, ""] | int
) -> UInt32[Array, "2"]:
    """The seed under which batch row 0 and head 0 drop what first_batch and first_head drop under `seed`."""
    return seed + jnp.stack([_u32(first_batch) * _u32(_BATCH), _u32(first_head) * _u32(_HEAD)])


def _mix(x):
    x = (x ^ (x >> 16)) * _u32(_MIX_1)
    x = (x ^ (x >> 13)) * _u32(_MIX_2)
    return x ^ (x >> 16)


def _u32(x):
    return jnp.uint32(x) if isinstance(x, int) else x.astype(jnp.uint32)
