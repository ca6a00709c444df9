"""The consumer warpgroups of paged decode: the online softmax over a unit's tiles, transposed."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import (
    LOG2_E,
    broadcast_columns,
    broadcast_rows,
    div,
    load_columns,
    load_rows,
    pl,
    plgpu,
    reduce_rows,
    row_iota,
)
from pallas_kernels.paged_attention.decode_plan import BUFFERS, Merge, Outputs, Plan, Scratch, Workspace
from pallas_kernels.paged_attention.page_tiles import load_wide, widen, zero_invisible
from pallas_kernels.paged_attention.units import Schedule, Unit, for_each_unit

MASKED = -1e30  # a logit no token sees: -inf would make -inf - -inf = NaN
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


class Softmax(NamedTuple):
    """The online softmax of one unit, transposed: a column a query."""

    maximum: jax.Array  # f32[columns], in units of log2
    total: jax.Array  # f32[tile, columns]: summed over tokens once, at the end
    values: jax.Array  # f32[H, columns]


def consume(plan: Plan, consumer, outputs: Outputs, scratch: Scratch):
    """A consumer warpgroup: every tile of its units, or every other tile; the first one stores."""

    def visit(unit: Unit, _, carry):
        count, units = carry
        buffer = lax.rem(units, jnp.int32(BUFFERS))
        plgpu.barrier_wait(scratch.queries.full.at[buffer])
        state, sinks = attend_unit(plan, consumer, scratch, unit, count, buffer)
        plgpu.barrier_arrive(scratch.queries.empty.at[buffer])
        finish_unit(plan, consumer, scratch, unit, count, units, state, sinks, outputs)
        return count + unit.num_tiles, units + 1

    schedule = Schedule(scratch.lengths, scratch.tickets, None)
    _, units = for_each_unit(plan, schedule, visit, (jnp.int32(0), jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)
    if (merge := scratch.merge) is not None:

        @pl.when((consumer == 1) & (units > 0))
        def _():
            plgpu.barrier_wait(merge.empty)


def attend_unit(plan: Plan, consumer, scratch: Scratch, unit: Unit, count, buffer):
    """The softmax over this consumer's share of a unit's tiles, and the sinks of its columns."""
    consumers = plan.config.consumers
    queries = scratch.queries
    query, work = queries.query.at[buffer], workspace_of(scratch.work, consumer)
    slopes = load_columns(queries.slopes.at[buffer]) * LOG2_E if plan.has_slopes else None
    sinks = load_columns(queries.sinks.at[buffer]) * LOG2_E if plan.has_sinks else None

    # By turns over the borders of units: with an even number of slots each is always the same consumer's.
    first = lax.rem(consumer + count, jnp.int32(consumers))

    def update(step, state):
        index = step * consumers + first
        return attend_tile(plan, scratch, work, query, slopes, unit, count, index, state)

    steps = div(unit.num_tiles + (consumers - 1) - first, consumers)
    return lax.fori_loop(0, steps, update, init_softmax(plan)), sinks


def workspace_of(work: Workspace, consumer) -> Workspace:
    return Workspace(*[None if ref is None else ref.at[consumer] for ref in work])


def init_softmax(plan: Plan) -> Softmax:
    def full(rows, value):
        return plgpu.layout_cast(jnp.full((rows, plan.columns), value, jnp.float32), plgpu.Layout.WGMMA)

    maximum = plgpu.layout_cast(jnp.full((plan.columns,), MASKED, jnp.float32), COLUMNS)
    return Softmax(maximum, full(plan.config.tile, 0.0), full(plan.width, 0.0))


def attend_tile(
    plan: Plan, scratch: Scratch, work: Workspace, query, slopes, unit: Unit, count, index, state: Softmax
) -> Softmax:
    tile = plan.config.tile
    slot = lax.rem(count + index, jnp.int32(plan.config.stages))
    start = unit.start + index * tile
    logits = multiply_keys(plan, scratch, query, slot)
    logits = bias_and_mask(plan, logits, slopes, unit, start)

    maximum = jnp.maximum(state.maximum, reduce_rows("max", logits, work.reduction))
    decay = jnp.exp2(state.maximum - maximum)
    weights = jnp.exp2(logits - broadcast_columns(maximum, tile))
    total = state.total * broadcast_columns(decay, tile) + weights
    values = state.values * broadcast_columns(decay, plan.width)
    values = multiply_values(plan, scratch, work, unit, start, slot, weights, values)
    return Softmax(maximum, total, values)


def multiply_keys(plan: Plan, scratch: Scratch, query, slot):
    """S^T = K Q^T of one tile, scaled to units of log2, capped."""
    tile, spec = plan.config.tile, plan.spec
    plgpu.barrier_wait(scratch.k.full.at[slot])
    keys = scratch.k.pages.at[slot]
    accumulator = plgpu.WGMMAAccumulatorRef((tile, plan.columns), jnp.float32)

    def multiply(logits_ref):
        if not plan.is_quantized:
            plgpu.wgmma(logits_ref, keys, query.transpose((1, 0)))
            return logits_ref[...]
        width = math.gcd(plan.head_dim, 128)  # blocks of 64 x 128 codes: more would not stay in registers
        for first, column in itertools.product(range(0, tile, 64), range(0, plan.head_dim, width)):
            rows, columns = pl.ds(first, 64), pl.ds(column, width)
            right = query.at[:, columns].transpose((1, 0))
            left = plgpu.layout_cast(load_wide(keys.at[rows, columns], plan.dtype), plgpu.Layout.WGMMA)
            plgpu.wgmma(logits_ref.at[rows], left, right)
        return logits_ref[...]

    logits = pl.run_scoped(multiply, accumulator)
    if plan.is_quantized:
        scale = load_rows(scratch.k.scale.at[slot])
        logits *= broadcast_rows(scale, plan.columns)
    else:
        plgpu.barrier_arrive(scratch.k.empty.at[slot])
    if spec.logits_soft_cap is None:
        return logits * (spec.scale * LOG2_E)
    return jnp.tanh(logits * (spec.scale / spec.logits_soft_cap)) * (spec.logits_soft_cap * LOG2_E)


def bias_and_mask(plan: Plan, logits, slopes, unit: Unit, start):
    if slopes is not None:
        distance = (unit.length - 1 - start - row_iota(plan.config.tile)).astype(jnp.float32)
        logits -= broadcast_rows(distance, plan.columns) * broadcast_columns(slopes, plan.config.tile)
    return jnp.where(is_visible(unit, start, logits.shape), logits, MASKED)


def multiply_values(plan: Plan, scratch: Scratch, work: Workspace, unit: Unit, start, slot, weights, old):
    """O^T += V^T P^T of one tile."""
    plgpu.barrier_wait(scratch.v.full.at[slot])
    if plan.is_quantized:
        scale = broadcast_rows(load_rows(scratch.v.scale.at[slot]), plan.columns)
        # A select: scales of tokens that nobody sees may be NaN.
        weights = jnp.where(is_visible(unit, start, weights.shape), weights * scale, 0.0)
    store_transposed(work.weights, weights)
    v_smem = scratch.v.pages.at[slot]
    if plan.is_quantized:
        widen(v_smem, work.values, math.gcd(plan.head_dim, 128))
        v_smem = work.values
    if plan.page_dtype != jnp.int8:  # integers hold no NaN

        @pl.when((start < unit.first_visible) | (start + plan.config.tile > unit.end))
        def _():
            zero_invisible(v_smem, start, unit.first_visible, unit.end)

    plgpu.commit_smem()
    if plan.is_quantized:  # registers hold all codes and scales, and copies may write after the fence
        plgpu.barrier_arrive(scratch.k.empty.at[slot])
        plgpu.barrier_arrive(scratch.v.empty.at[slot])

    def multiply(values_ref):
        if plan.whole == plan.head_dim:
            plgpu.wgmma(values_ref, v_smem.transpose((1, 0)), work.weights.transpose((1, 0)))
            return
        for row in range(0, plan.width, 64):
            block = v_smem.at[:, pl.ds(min(row, plan.head_dim - 64), 64)]
            plgpu.wgmma(
                values_ref.at[pl.ds(row, 64)], block.transpose((1, 0)), work.weights.transpose((1, 0))
            )

    values: Any = pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(old))
    if not plan.is_quantized:
        plgpu.barrier_arrive(scratch.v.empty.at[slot])
    return values


def store_transposed(ref, x):
    """ref[...] = x^T for a wgmma accumulator x."""
    ref.transpose((1, 0))[...] = plgpu.layout_cast(x.astype(ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)


def is_visible(unit: Unit, start, shape):
    token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + start
    return (token >= unit.first_visible) & (token < unit.end)


class Result(NamedTuple):
    """A softmax whose totals are summed over tokens."""

    maximum: jax.Array  # f32[columns], in units of log2
    total: jax.Array  # f32[columns]
    values: jax.Array  # f32[H, columns]


def finish_unit(plan: Plan, consumer, scratch: Scratch, unit: Unit, count, units, state, sinks, outputs):
    """Brings the consumers' results together; the first consumer stores them."""
    total = reduce_rows("add", state.total, workspace_of(scratch.work, consumer).reduction)
    result = Result(state.maximum, total, state.values)
    merge = scratch.merge
    if merge is None:
        store_unit(plan, unit, result, sinks, outputs, scratch.out)
        return

    @pl.when(consumer == 1)
    def _():
        hand_over(merge, units, result)

    @pl.when(consumer == 0)
    def _():
        # In the order of the tiles, so that bits do not depend on whose turn it was.
        other, is_first = take_over(merge), lax.rem(count, jnp.int32(2)) == 0
        results = [
            Result(*[lax.select(lax.broadcast(is_first, x.shape), x, y) for x, y in zip(*pair, strict=True)])
            for pair in ((result, other), (other, result))
        ]
        store_unit(plan, unit, merge_results(plan, *results), sinks, outputs, scratch.out)


def hand_over(merge: Merge, units, result: Result):
    @pl.when(units > 0)
    def _():
        plgpu.barrier_wait(merge.empty)

    store_transposed(merge.values, result.values)
    merge.maximum[...] = result.maximum
    merge.total[...] = result.total
    plgpu.barrier_arrive(merge.full)


def take_over(merge: Merge) -> Result:
    plgpu.barrier_wait(merge.full)
    values = plgpu.load(merge.values.transpose((1, 0)), layout=plgpu.Layout.WGMMA_TRANSPOSED)
    values = plgpu.layout_cast(values, plgpu.Layout.WGMMA)
    result = Result(load_columns(merge.maximum), load_columns(merge.total), values)
    plgpu.barrier_arrive(merge.empty)
    return result


def merge_results(plan: Plan, first: Result, second: Result) -> Result:
    maximum = jnp.maximum(first.maximum, second.maximum)
    decays = jnp.exp2(first.maximum - maximum), jnp.exp2(second.maximum - maximum)
    values = first.values * broadcast_columns(decays[0], plan.width)
    values += second.values * broadcast_columns(decays[1], plan.width)
    return Result(maximum, first.total * decays[0] + second.total * decays[1], values)


def store_unit(plan: Plan, unit: Unit, result: Result, sinks, outputs: Outputs, out_smem):
    maximum, total, values = result
    if sinks is not None and plan.num_splits == 1:  # else the sink joins where the splits are merged
        maximum = jnp.maximum(result.maximum, sinks)
        decay = jnp.exp2(result.maximum - maximum)
        total = total * decay + jnp.exp2(sinks - maximum)
        values = values * broadcast_columns(decay, plan.width)
    norm = jnp.where(total > 0, 1 / total, 0.0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the unit before may still be on its way
    store_transposed(out_smem, values * broadcast_columns(norm, plan.width))
    plgpu.commit_smem()
    copy_heads(plan, unit, out_smem, outputs.out.at[unit.row, unit.split])
    lse = (maximum + jnp.log2(total)) * (1 / LOG2_E)
    outputs.lse[unit.row, unit.split, unit.head] = jnp.where(total > 0, lse, -jnp.inf)


def copy_heads(plan: Plan, unit: Unit, out_smem, out):
    """Starts the copies of a unit's heads to global memory."""
    first_head = unit.head * plan.group
    first_column = lax.rem(first_head, jnp.int32(8)) if plan.shares_columns else 0
    if plan.width == plan.out_columns:
        source = out_smem.at[pl.ds(first_column, plan.group)]
        plgpu.copy_smem_to_gmem(source, out.at[pl.ds(first_head, plan.group)])
        return
    for i in range(plan.group):
        copy_head(plan, out_smem.at[first_column + i], out.at[first_head + i])


def copy_head(plan: Plan, out_smem, out):
    """Starts the copies of one head's values [width] to global memory [H]."""
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, plan.whole)], out.at[pl.ds(0, plan.whole)])
    if rest := plan.head_dim - plan.whole:
        source = out_smem.at[pl.ds(plan.width - rest, rest)]
        plgpu.copy_smem_to_gmem(source, out.at[pl.ds(plan.whole, rest)])
