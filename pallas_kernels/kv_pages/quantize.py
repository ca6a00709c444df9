"""How K and V become 8-bit codes: one scale for each slot and head.

    scale = max |x| / limit,   code = round(x limit / max |x|),   x' = code scale

over the H numbers of one head of one token; limit is 127 for int8 and 448 for fp8 (e4m3). Were there one
scale a page, codes would change as tokens are appended: they would depend on how a prompt was cut into
chunks, and errors would add up. A scale a slot costs 4 bytes beside H codes, and no code ever changes.

    int8:  |x' - x| <= max |x| / 254                                     (half a step, everywhere alike)
    fp8:   |x' - x| <= max(|x| / 16, max |x| / (448 * 1024))             (half a unit of 3 mantissa bits)

both up to fp32 rounding (2^-21 relative): a GPU's division is off by up to two units in the last place, so
that next to a tie the kernel's code may be the other neighbour. A vector of zeros gives zeros; one smaller
than SMALLEST in every number is taken as if its largest were SMALLEST. A vector with a NaN or an infinity has
the scale NaN: all of it reads as NaN, and nothing else does.
"""

from typing import Any

import jax
import jax.numpy as jnp

LIMITS = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
SMALLEST = 1e-30  # of what is divided by: limit / SMALLEST is far from overflow


def quantize(vectors: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Codes [..., H] of the dtype and scales f32[...] of vectors [..., H]. Also used inside kernels."""
    limit = LIMITS[jnp.dtype(dtype)]
    vectors = vectors.astype(jnp.float32)
    largest = jnp.max(jnp.abs(vectors), axis=-1)
    scale, inverse = scale_and_inverse(largest, limit)
    return to_codes(vectors * inverse[..., None], dtype), scale


def scale_and_inverse(largest: jax.Array, limit: float) -> tuple[jax.Array, jax.Array]:
    """The scale of a vector whose largest magnitude is given, and what to multiply it by."""
    largest = jnp.maximum(largest, SMALLEST)
    not_finite = largest - largest  # 0, or NaN for NaN and infinity
    return largest * (1 / limit) + not_finite, limit / largest


def to_codes(scaled: jax.Array, dtype: Any) -> jax.Array:
    """Rounds to the nearest code, ties to even."""
    if jnp.issubdtype(dtype, jnp.integer):
        scaled = jnp.round(scaled)
    return scaled.astype(dtype)


def dequantize(codes: jax.Array, scale: jax.Array) -> jax.Array:
    """f32[..., H] from codes [..., H] and scales f32[...]."""
    return codes.astype(jnp.float32) * scale[..., None]
