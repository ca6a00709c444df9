"""One tile of quantized pages in paged decode: codes are multiplied as they lie, or as fp16.

K's codes are the left operand of an 8-bit wgmma, so that no thread touches them; Q is split into two codes
a number, which hold a bf16 number exactly (e4m3) or to 2^-16 of its head's largest (int8):

    Q = f (b Q_1 + Q_2),   S^T = K Q^T = f k_scale (b K Q_1^T + K Q_2^T)

Tensor cores add products of e4m3 with about 14 bits (DeepSeek-V3's report, section 3.3.2), int8's exactly: on
an H200, of normal numbers, results are off by 1.1e-3 and 9e-4 (relative RMS) from the reference.

wgmma transposes no codes, so that V's come to registers transposed, and become fp16, exactly. Their scales
are factors of the weights, which must not leave the range of fp16: exponents are relative to the largest of

    logit + log2 v_scale,   less HEADROOM
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import broadcast_columns, broadcast_rows, load_rows, pl, plgpu, where
from pallas_kernels.mosaic_inline import load_codes_transposed
from pallas_kernels.paged_attention.decode_tile import (
    Softmax,
    Tile,
    bias_and_mask,
    cap,
    is_visible,
    multiply_blocks,
    raise_maximum,
    store_transposed,
    zero_unseen,
)

HEADROOM = 14.0  # log2 of the largest weight: numbers down to 2^-28 of it are normal in fp16
SMALLEST_SCALE = 2.0**-40  # below, a value's weight may be less than fp16 could hold
LARGEST = {jnp.dtype(jnp.int8): 127 * 256 + 127, jnp.dtype(jnp.float8_e4m3fn): 256}
BASE = {jnp.dtype(jnp.int8): 256, jnp.dtype(jnp.float8_e4m3fn): 16}


def split_query(query: jax.Array, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes Q_1 and Q_2 of a query [..., H], and the factor f [...] that Q = f (b Q_1 + Q_2) has."""
    query, dtype = query.astype(jnp.float32), jnp.dtype(dtype)
    largest = jnp.maximum(jnp.abs(query).max(-1), 1e-30)
    if dtype == jnp.int8:
        factor = largest / LARGEST[dtype]
        number = jnp.round(query / factor[..., None]).astype(jnp.int32)
        high = (number + 128) // 256
        return high.astype(dtype), (number - 256 * high).astype(dtype), factor
    factor = jnp.ldexp(jnp.float32(1), jnp.frexp(largest)[1]) / LARGEST[dtype]
    number = query / factor[..., None]  # a power of two: exact
    high = lax.reduce_precision(number, exponent_bits=8, mantissa_bits=3)  # XLA leaves out a cast to and fro
    return high.astype(dtype), ((number - high) * BASE[dtype]).astype(dtype), factor / BASE[dtype]


def attend_tile(tile: Tile, state: Softmax) -> Softmax:
    """The softmax with one tile more."""
    plan, size, factor = tile.plan, tile.plan.config.tile, tile.queries.factor
    assert factor is not None
    products, k_scale, v_scale, values = multiply_keys(tile)
    logits = products * broadcast_rows(k_scale, plan.columns)
    logits = bias_and_mask(tile, cap(plan, logits * broadcast_columns(factor, size)))

    # A comparison: of tokens that nobody sees it may be NaN, and a NaN that counts must not reach `total`.
    known = where(jnp.abs(v_scale) > SMALLEST_SCALE, jnp.abs(v_scale), SMALLEST_SCALE)
    shifted = logits + broadcast_rows(jnp.log2(known) - HEADROOM, plan.columns)
    maximum, decay = raise_maximum(tile, state, shifted)
    exponentials = lax.exp2(logits - broadcast_columns(maximum, size))
    total = state.total * broadcast_columns(decay, size) + exponentials
    # A select: the scales of tokens that nobody sees may be NaN.
    weights = exponentials * broadcast_rows(v_scale, plan.columns)
    weights = where(is_visible(tile, weights.shape), weights, 0.0)
    old = state.values * broadcast_columns(decay, plan.width)
    return Softmax(maximum, total, multiply_values(tile, values, weights, old))


def multiply_keys(tile: Tile):
    """b K Q_1^T + K Q_2^T of one tile, its scales, and its values, loaded meanwhile."""
    plan, slot, k, v = tile.plan, tile.slot, tile.scratch.k, tile.scratch.v
    plgpu.barrier_wait(k.full.at[slot])

    def multiply(products_ref):
        multiply_blocks(tile, products_ref)
        k_scale = load_rows(k.scale.at[slot])
        plgpu.barrier_wait(v.full.at[slot])
        v_scale, values = load_rows(v.scale.at[slot]), load_values(tile)
        return products_ref[...], k_scale, v_scale, values

    is_integer = plan.page_dtype == jnp.int8
    shape = plan.config.tile, 2 * plan.columns
    accumulator = plgpu.WGMMAAccumulatorRef(shape, jnp.int32 if is_integer else jnp.float32)
    products, *rest = pl.run_scoped(multiply, accumulator)
    high, low = products[:, : plan.columns], products[:, plan.columns :]
    return (high * BASE[plan.page_dtype] + low).astype(jnp.float32), *rest


def load_values(tile: Tile) -> list[jax.Array]:
    """V^T of one tile in fp16, by blocks of 64 rows, interleaved."""
    plan, codes = tile.plan, tile.scratch.v.pages.at[tile.slot]
    if plan.page_dtype != jnp.int8:  # integers hold no NaN
        zero_unseen(tile, codes)
    places = [divmod(row, plan.block) for row in range(0, plan.width, 64)]
    return [load_codes_transposed(codes.at[block], column) for block, column in places]


def multiply_values(tile: Tile, values: list[jax.Array], weights, old):
    """O^T += V^T P^T of one tile, rows interleaved."""
    work, slot = tile.work, tile.slot
    store_transposed(work.weights, weights)
    plgpu.commit_smem()
    plgpu.barrier_arrive(tile.scratch.k.empty.at[slot])  # copies may write after the fence
    plgpu.barrier_arrive(tile.scratch.v.empty.at[slot])

    def multiply(values_ref):
        for place, block in enumerate(values):
            plgpu.wgmma(values_ref.at[pl.ds(64 * place, 64)], block, work.weights.transpose((1, 0)))

    return pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(old))
