"""One tile of paged decode: the online softmax, transposed, over its tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import LOG2_E, broadcast_columns, broadcast_rows, pl, plgpu, row_iota, where
from pallas_kernels.mosaic_inline import reduce_rows
from pallas_kernels.paged_attention.decode_memory import Scratch, Workspace
from pallas_kernels.paged_attention.decode_plan import Plan
from pallas_kernels.paged_attention.page_tiles import zero_invisible
from pallas_kernels.paged_attention.units import Unit

MASKED = -1e30  # a logit no token sees: -inf would make -inf - -inf = NaN


class Softmax(NamedTuple):
    """The online softmax of one unit, transposed: a column a query."""

    maximum: jax.Array  # f32[columns], in units of log2: what exponents are relative to
    total: jax.Array  # f32[tile, columns]: summed over tokens once, at the end
    values: jax.Array  # f32[width, columns]


class UnitQueries(NamedTuple):
    """What a unit's columns bring along."""

    query: Any  # [blocks, columns, block], or [blocks, 2 columns, block] in codes
    factor: jax.Array | None  # f32[columns]: codes to logits in units of log2, before a soft cap
    slopes: jax.Array | None  # f32[columns], in units of log2


class Tile(NamedTuple):
    """Where a consumer stands."""

    plan: Plan
    scratch: Scratch
    work: Workspace
    queries: UnitQueries
    unit: Unit
    slot: jax.Array  # of the rings
    start: jax.Array  # its first token


def attend_tile(tile: Tile, state: Softmax) -> Softmax:
    """The softmax with one tile more."""
    logits = bias_and_mask(tile, cap(tile.plan, multiply_keys(tile)))
    maximum, decay = raise_maximum(tile, state, logits)
    weights = lax.exp2(logits - broadcast_columns(maximum, tile.plan.config.tile))
    total = state.total * broadcast_columns(decay, tile.plan.config.tile) + weights
    values = multiply_values(tile, weights, state.values * broadcast_columns(decay, tile.plan.width))
    return Softmax(maximum, total, values)


def raise_maximum(tile: Tile, state: Softmax, logits):
    """The maximum after these logits, and what of the sums before is left: (maximum, decay) f32[columns]."""
    maximum = lax.max(state.maximum, reduce_rows("max", logits, tile.work.reduction))
    return maximum, lax.exp2(state.maximum - maximum)


def multiply_keys(tile: Tile):
    """S^T = K Q^T of one tile."""
    ring = tile.scratch.k
    plgpu.barrier_wait(ring.full.at[tile.slot])

    def multiply(logits_ref):
        multiply_blocks(tile, logits_ref)
        return logits_ref[...]

    accumulator = plgpu.WGMMAAccumulatorRef((tile.plan.config.tile, tile.plan.columns), jnp.float32)
    logits = pl.run_scoped(multiply, accumulator)
    plgpu.barrier_arrive(ring.empty.at[tile.slot])
    spec = tile.plan.spec
    return logits * (spec.scale * LOG2_E if spec.logits_soft_cap is None else spec.scale)


def multiply_blocks(tile: Tile, products_ref):
    """K Q^T, a block of columns after the other; what lies beyond H is zero in both."""
    keys, query = tile.scratch.k.pages.at[tile.slot], tile.queries.query
    for block in range(tile.plan.num_blocks):
        plgpu.wgmma(products_ref, keys.at[block], query.at[block].transpose((1, 0)))


def cap(plan: Plan, logits):
    """Logits in units of log2; given in such, or, with a soft cap, in natural units."""
    soft_cap = plan.spec.logits_soft_cap
    return logits if soft_cap is None else lax.tanh(logits * (1 / soft_cap)) * (soft_cap * LOG2_E)


def bias_and_mask(tile: Tile, logits):
    unit, size, slopes = tile.unit, tile.plan.config.tile, tile.queries.slopes
    if slopes is not None:
        distance = (unit.length - 1 - tile.start - row_iota(size)).astype(jnp.float32)
        logits -= broadcast_rows(distance, tile.plan.columns) * broadcast_columns(slopes, size)
    return where(is_visible(tile, logits.shape), logits, MASKED)


def is_visible(tile: Tile, shape):
    token = lax.iota(jnp.int32, shape[0]) + tile.start
    return broadcast_rows((token >= tile.unit.first_visible) & (token < tile.unit.end), shape[1])


def multiply_values(tile: Tile, weights, old):
    """O^T += V^T P^T of one tile."""
    plan, ring, work = tile.plan, tile.scratch.v, tile.work
    plgpu.barrier_wait(ring.full.at[tile.slot])
    store_transposed(work.weights, weights)
    values = ring.pages.at[tile.slot]
    zero_unseen(tile, values)
    plgpu.commit_smem()

    def multiply(values_ref):
        right = work.weights.transpose((1, 0))
        for block in range(plan.num_blocks):
            rows = values_ref.at[pl.ds(block * plan.block, plan.block)]
            plgpu.wgmma(rows, values.at[block].transpose((1, 0)), right)

    result: Any = pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(old))
    plgpu.barrier_arrive(ring.empty.at[tile.slot])
    return result


def zero_unseen(tile: Tile, values_ref):
    """Zeroes what nobody sees in a tile that has such, for all threads to see."""
    unit, stop = tile.unit, tile.start + tile.plan.config.tile

    @pl.when((tile.start < unit.first_visible) | (stop > unit.end))
    def _():
        for block in range(tile.plan.num_blocks):
            zero_invisible(values_ref.at[block], tile.start, unit.first_visible, unit.end)
        plgpu.commit_smem()


def store_transposed(ref, x):
    """ref[...] = x^T for a wgmma accumulator x."""
    ref.transpose((1, 0))[...] = plgpu.layout_cast(x.astype(ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
