"""fp32 results that leave a kernel through staging memory of 16 bits, half of their columns at a time.

The memory of 16-bit results serves, and the same copies, twice: of half of the columns it holds the high 16
bits of each word, then the low ones. The two are the first dimension of the output; XLA joins the words.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.mosaic_copy import store_tile


def out_type(plan: AttentionPlan, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Of a kernel's output for results [*shape]."""
    return jax.ShapeDtypeStruct((2, *shape) if plan.keeps_fp32 else shape, plan.dtype)


def split(plan: AttentionPlan, x: jax.Array) -> Iterator[jax.Array]:
    """fp32 registers [rows, columns] as they are stored, one after the other: in 16 bits, or as two halves.

    One half after the other is found, where it is stored before the next is asked for: both would not fit the
    registers of a backward kernel.
    """
    if not plan.keeps_fp32:
        yield x.astype(plan.dtype)
        return
    rows, columns = x.shape
    for first in (0, columns // 2):
        words = lax.bitcast_convert_type(lax.slice(x, (0, first), (rows, first + columns // 2)), jnp.uint32)
        parts = (lax.shift_right_logical(words, jnp.uint32(16)), words)
        bits = lax.concatenate([part.astype(jnp.uint16) for part in parts], 1)
        yield lax.bitcast_convert_type(bits, plan.dtype)


def store(plan: AttentionPlan, staging: Any, output: Any, half: int, place: tuple) -> None:
    """Starts the copy of what `split` gave; place: (batch, first row, head) of an output [B, T, heads, H]."""
    store_tile(staging, output, (half, *place) if plan.keeps_fp32 else place)


def join(plan: AttentionPlan, x: jax.Array) -> jax.Array:
    """A kernel's output as its results, in fp32 where it holds halves."""
    if not plan.keeps_fp32:
        return x
    bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    high, low = jnp.split(bits, 2, axis=-1)
    left, right = lax.bitcast_convert_type(high << 16 | low, jnp.float32)
    return jnp.concatenate([left, right], axis=-1)
