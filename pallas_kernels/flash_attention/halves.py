"""fp32 results that leave a kernel through staging memory of 16 bits, one half after the other.

    x = high + low,  high = bf16(x),  low = bf16(x - high)

Together they have 16 bits of mantissa or more, and the range of fp32: the memory of 16-bit results serves,
and the same copies, twice. The halves are the first dimension of the output; XLA adds them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.plan import AttentionPlan


def out_type(plan: AttentionPlan, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Of a kernel's output for results [*shape]."""
    return jax.ShapeDtypeStruct((2, *shape) if plan.keeps_fp32 else shape, plan.dtype)


def split(plan: AttentionPlan, x: jax.Array) -> list[jax.Array]:
    """fp32 registers as a kernel stores them, one after the other: in 16 bits, or both halves' bits."""
    if not plan.keeps_fp32:
        return [x.astype(plan.dtype)]
    high = x.astype(jnp.bfloat16)
    low = (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
    return [lax.bitcast_convert_type(half, plan.dtype) for half in (high, low)]


def target(plan: AttentionPlan, output: Any, half: int, place: tuple) -> Any:
    """Where the results of a place go."""
    return output.at[(half, *place) if plan.keeps_fp32 else place]


def join(plan: AttentionPlan, x: jax.Array) -> jax.Array:
    """A kernel's output as its results, in fp32 where it holds halves."""
    if not plan.keeps_fp32:
        return x
    high, low = lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32)
    return jnp.where(jnp.isfinite(high), high + low, high)
