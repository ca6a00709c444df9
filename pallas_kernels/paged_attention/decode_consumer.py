"""The consumer warpgroups of paged decode: the online softmax over a unit's tiles, transposed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic import (
    LOG2_E,
    broadcast_columns,
    div,
    load_columns,
    pl,
    plgpu,
    register_full,
    register_zeros,
    rem,
    where,
)
from pallas_kernels.mosaic_inline import reduce_rows, store_deinterleaved
from pallas_kernels.paged_attention import decode_codes, decode_tile
from pallas_kernels.paged_attention.decode_memory import Merge, Outputs, Scratch, Workspace
from pallas_kernels.paged_attention.decode_plan import BUFFERS, Plan
from pallas_kernels.paged_attention.decode_tile import MASKED, Softmax, Tile, UnitQueries, store_transposed
from pallas_kernels.paged_attention.units import Schedule, Unit, for_each_unit

COLUMNS = plgpu.Layout.WGMMA.reduce(0)


class Destination(NamedTuple):
    """Where the results of a unit go."""

    plan: Plan
    unit: Unit
    outputs: Outputs
    scratch: Scratch


class Result(NamedTuple):
    """A softmax whose totals are summed over tokens."""

    maximum: jax.Array  # f32[columns], in units of log2
    total: jax.Array  # f32[columns]
    values: jax.Array  # f32[width, columns]


def consume(plan: Plan, consumer, outputs: Outputs, scratch: Scratch):
    """A consumer warpgroup: every tile of its units, or every other tile; the first one stores."""

    def visit(unit: Unit, _, carry):
        count, units = carry
        buffer = rem(units, BUFFERS)
        plgpu.barrier_wait(scratch.queries.full.at[buffer])
        state, sinks = attend_unit(plan, consumer, scratch, unit, count, buffer)
        if plan.has_numbers:
            plgpu.commit_smem()  # all are read before a copy overwrites them, also where no tile came after
        plgpu.barrier_arrive(scratch.queries.empty.at[buffer])
        to = Destination(plan, unit, outputs, scratch)
        finish_unit(to, consumer, count, units, state, sinks)
        return count + unit.num_tiles, units + 1

    units = for_each_unit(plan, Schedule.of(scratch), visit, (np.int32(0), np.int32(0)))[1]
    plgpu.wait_smem_to_gmem(0)
    if (merge := scratch.merge) is not None:

        @pl.when((consumer == 1) & (units > 0))
        def _():
            plgpu.barrier_wait(merge.empty)


def attend_unit(plan: Plan, consumer, scratch: Scratch, unit: Unit, count, buffer):
    """The softmax over this consumer's share of a unit's tiles, and the sinks of its columns."""
    consumers = plan.config.consumers
    queries, sinks = load_queries(plan, scratch, buffer)
    work = workspace_of(scratch.work, consumer)
    attend_tile = decode_codes.attend_tile if plan.is_quantized else decode_tile.attend_tile

    # By turns over the borders of units: with an even number of slots each is always the same consumer's.
    first = rem(consumer + count, consumers)

    def update(step, state):
        index = step * consumers + first
        slot = rem(count + index, plan.config.stages)
        start = unit.start + index * plan.config.tile
        return attend_tile(Tile(plan, scratch, work, queries, unit, slot, start), state)

    steps = div(unit.num_tiles + (consumers - 1) - first, consumers)
    return lax.fori_loop(0, steps, update, init_softmax(plan)), sinks


def load_queries(plan: Plan, scratch: Scratch, buffer) -> tuple[UnitQueries, jax.Array | None]:
    """What a unit's columns bring along, and their sinks in units of log2."""
    queries, spec = scratch.queries, plan.spec
    factor = None
    if plan.is_quantized:
        to_logits = spec.scale * LOG2_E if spec.logits_soft_cap is None else spec.scale
        factor = load_columns(queries.factor.at[buffer]) * to_logits
    slopes = load_columns(queries.slopes.at[buffer]) * LOG2_E if plan.has_slopes else None
    sinks = load_columns(queries.sinks.at[buffer]) * LOG2_E if plan.has_sinks else None
    return UnitQueries(queries.query.at[buffer], factor, slopes), sinks


def workspace_of(work: Workspace, consumer) -> Workspace:
    return Workspace(*[None if ref is None else ref.at[consumer] for ref in work])


def init_softmax(plan: Plan) -> Softmax:
    maximum = register_full((plan.columns,), MASKED, COLUMNS)
    total, values = (register_zeros((rows, plan.columns)) for rows in (plan.config.tile, plan.width))
    return Softmax(maximum, total, values)


def finish_unit(to: Destination, consumer, count, units, state: Softmax, sinks):
    """Brings the consumers' results together; the first consumer stores them."""
    total = reduce_rows("add", state.total, workspace_of(to.scratch.work, consumer).reduction)
    result = Result(state.maximum, total, state.values)
    merge = to.scratch.merge
    if merge is None:
        store_unit(to, result, sinks)
        return

    @pl.when(consumer == 1)
    def _():
        hand_over(merge, units, result)

    @pl.when(consumer == 0)
    def _():
        # In the order of the tiles, so that bits do not depend on whose turn it was.
        other, is_first = take_over(merge), rem(count, 2) == 0
        results = [
            Result(*[lax.select(lax.broadcast(is_first, x.shape), x, y) for x, y in zip(*pair, strict=True)])
            for pair in ((result, other), (other, result))
        ]
        store_unit(to, merge_results(to.plan, *results), sinks)


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
    maximum = lax.max(first.maximum, second.maximum)
    decays = lax.exp2(first.maximum - maximum), lax.exp2(second.maximum - maximum)
    values = first.values * broadcast_columns(decays[0], plan.width)
    values += second.values * broadcast_columns(decays[1], plan.width)
    return Result(maximum, first.total * decays[0] + second.total * decays[1], values)


def store_unit(to: Destination, result: Result, sinks):
    plan, unit, out = to.plan, to.unit, to.scratch.out
    if sinks is not None and not plan.is_merged:  # else the sink joins where the parts are merged
        result = join_sinks(plan, result, sinks)
    norm = where(result.total != 0, 1 / result.total, 0.0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the unit before may still be on its way
    store = store_deinterleaved if plan.is_quantized else store_transposed
    store(out, result.values * broadcast_columns(norm, plan.width))
    plgpu.commit_smem()
    place = (unit.row, unit.split) if plan.is_merged else unit.token
    copy_heads(plan, unit, out, to.outputs.out.at[place])
    lse = (result.maximum + jnp.log2(result.total)) * (1 / LOG2_E)
    to.outputs.lse[unit.row, unit.split, unit.head] = where(result.total != 0, lse, -jnp.inf)


def join_sinks(plan: Plan, result: Result, sinks) -> Result:
    maximum = lax.max(result.maximum, sinks)
    decay = lax.exp2(result.maximum - maximum)
    total = result.total * decay + lax.exp2(sinks - maximum)
    return Result(maximum, total, result.values * broadcast_columns(decay, plan.width))


def copy_heads(plan: Plan, unit: Unit, source, out):
    """Starts the copies of a unit's heads to global memory."""
    first_head = unit.head * plan.group
    if plan.width == plan.out_columns:
        plgpu.copy_smem_to_gmem(source.at[pl.ds(0, plan.group)], out.at[pl.ds(first_head, plan.group)])
        return
    for i in range(plan.group):
        own = source.at[i, pl.ds(0, plan.head_dim)]
        plgpu.copy_smem_to_gmem(own, out.at[first_head + i])
