"""The compute warpgroups of paged prefill: the online softmax over a unit's KV tiles, and its results."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic import (
    LOG2_E,
    broadcast_rows,
    load_rows,
    opaque,
    pl,
    plgpu,
    register_zeros,
    rem,
    row_full,
    where,
)
from pallas_kernels.mosaic_copy import store_tile
from pallas_kernels.mosaic_inline import store_rows
from pallas_kernels.paged_attention.prefill_config import OCTET, WARPGROUP_ROWS
from pallas_kernels.paged_attention.prefill_plan import Inputs, Outputs, PrefillPlan, Scratch, octet_at
from pallas_kernels.paged_attention.prefill_tile import (
    Unit,
    attend_ahead,
    attend_behind,
    attend_first,
    attend_tile,
    multiply_values,
    place_of_rows,
    skip_tile,
    wait_keys,
)
from pallas_kernels.paged_attention.prefill_units import for_each_unit

FLOOR = -1e30  # the running maximum before a key was seen: finite, so that no difference is NaN


def attend_units(plan: PrefillPlan, warpgroup, inputs: Inputs, outputs: Outputs, scratch: Scratch):
    """A compute warpgroup: its rows of every unit of the program."""
    at = functools.partial(Unit, plan, warpgroup, inputs, scratch)

    def attend(turn, position):
        work = scratch.records.read(turn, plan.num_kv_heads, "tile_start", "tile_stop")
        unit = at(turn, position + work.num_tiles)
        store_unit(unit, attend_unit(unit, position), outputs)
        return unit.stop

    turns, _ = for_each_unit(scratch.records, attend, np.int32(0))
    if plan.query_buffers > 1:
        pl.when(turns > 0)(lambda: at(turns, None).release(turns - 1))
    plgpu.wait_smem_to_gmem(0)


def attend_unit(unit: Unit, start):
    """Online softmax over the KV tiles that the queries see, from the last to the first: (values, maximum,
    total).

    Only the ends of their range need a mask, and mostly the last tile alone.
    """
    plan = unit.plan
    plgpu.barrier_wait(unit.scratch.query_full.at[unit.buffer])
    if not plan.config.overlap:
        pl.when(start < unit.stop)(lambda: wait_keys(unit, start))
    skip = functools.partial(skip_tile, unit)
    if plan.has_own_ranges:
        lax.fori_loop(start, unit.steps.start, skip, None)
    carry = (_attend_overlapped if plan.config.overlap else _attend_in_order)(unit)
    if plan.has_own_ranges and plan.spec.window_left is not None:
        lax.fori_loop(unit.steps.stop, unit.stop, skip, None)
    return carry


def _attend_in_order(unit: Unit):
    attend = functools.partial(attend_tile, unit)
    masked = functools.partial(attend, masked=True)
    carry = (
        register_zeros((WARPGROUP_ROWS, unit.plan.head_dim)),
        row_full(WARPGROUP_ROWS, FLOOR),
        row_full(WARPGROUP_ROWS, 0.0),
    )
    carry = lax.fori_loop(unit.steps.start, unit.steps.masked_stop, masked, carry)
    unit.release_last()
    carry = lax.fori_loop(unit.steps.masked_stop, unit.steps.full_stop, attend, carry)
    if unit.plan.spec.window_left is not None:
        carry = lax.fori_loop(unit.steps.full_stop, unit.steps.stop, masked, carry)
    return carry


def _attend_overlapped(unit: Unit):
    """As _attend_in_order, the softmax always one tile ahead (FlashAttention-3, algorithm 2)."""
    tile_kv, steps = unit.plan.config.tile_kv, unit.steps
    second = lax.min(steps.start + 1, steps.stop)
    carry = (
        row_full(WARPGROUP_ROWS, FLOOR),
        row_full(WARPGROUP_ROWS, 0.0),
        register_zeros((WARPGROUP_ROWS, tile_kv)).astype(unit.plan.dtype),
    )
    carry = lax.fori_loop(steps.start, second, functools.partial(attend_first, unit), carry)
    unit.release_last()
    carry = (register_zeros((WARPGROUP_ROWS, unit.plan.head_dim)), *carry)
    masked = functools.partial(attend_behind, unit)
    masked_stop, full_stop = (lax.max(x, second) for x in (steps.masked_stop, steps.full_stop))
    carry = lax.fori_loop(second, masked_stop, masked, carry)
    carry = lax.fori_loop(masked_stop, full_stop, functools.partial(attend_ahead, unit), carry)
    if unit.plan.spec.window_left is not None:
        carry = lax.fori_loop(full_stop, unit.steps.stop, masked, carry)
    values, maximum, total, weights16 = carry
    steps = unit.steps

    def attend_last(position, values):
        return multiply_values(unit, position, weights16, values)

    last = where(steps.start < steps.stop, steps.stop - 1, steps.stop)
    return lax.fori_loop(last, steps.stop, attend_last, values), maximum, total


def store_unit(unit: Unit, carry, outputs: Outputs):
    """A unit's results to global memory; those of tokens leave through the buffer of their queries."""
    plan = unit.plan
    values, maximum, total = carry
    norm = 1.0
    if unit.inputs.sinks is not None:  # one more logit, which has no value
        sinks = load_rows(unit.given(unit.inputs.sinks)) * LOG2_E
        highest = lax.max(maximum, sinks)
        norm = lax.exp2(maximum - highest)
        maximum, total = highest, total * norm + lax.exp2(sinks - highest)
    live = total != 0  # also where it is NaN
    lse = where(live, (maximum + jnp.log2(total)) * (1 / LOG2_E), -jnp.inf)
    place = unit.field("item"), unit.field("kv_head"), opaque(unit.warpgroup)
    values *= broadcast_rows(where(live, norm / total, 0.0), plan.head_dim)
    if plan.has_parts:
        outputs.lse[place] = lse
        rows = outputs.out.at[place]
        for first in range(0, plan.head_dim, 64):
            column = min(first, plan.head_dim - 64)  # the last may store again what the one before did
            rows[:, pl.ds(column, 64)] = values[:, column : column + 64]
    else:
        store_tokens(unit, values.astype(plan.query_dtype), outputs.out)
        outputs.lse[place] = lse  # last: copies from shared memory wait for what was stored before
    if plan.query_buffers == 1:
        unit.release(unit.turn)


def store_tokens(unit: Unit, values, out):
    """A tile whose rows of results are whole runs leaves as it lies in swizzled memory, any other goes from
    registers, without the tokens that it shares its octets with."""
    plan, work = unit.plan, unit.read("token", "first", "stop", "kv_head")
    ends_run = lambda token: rem(token - work.token, plan.run * OCTET) == 0
    is_whole = ends_run(work.first) & ends_run(work.stop)

    @pl.when(is_whole)
    def _():
        rows = unit.scratch.rows[1].at[unit.buffer]
        rows[...] = values
        plgpu.commit_smem()
        store_runs(unit, rows, out)

    @pl.when(jnp.logical_not(is_whole))
    def _():
        head, token = place_of_rows(unit)
        token += work.token
        is_ours = (head < plan.group) & (token >= work.first) & (token < work.stop)
        row = token * plan.num_heads + work.kv_head * plan.group + head
        store_rows(out, values, where(is_ours, row, -1))


def store_runs(unit: Unit, rows, out):
    """A copy a run of octets, of those that hold the row's tokens."""
    plan, work, first_head = unit.plan, unit.read("token", "first", "stop", "kv_head"), unit.first_head
    for octet in range(0, WARPGROUP_ROWS // OCTET, plan.run):
        head, token = octet_at(plan, opaque(unit.warpgroup), octet, first_head)
        token += work.token
        source = rows.at[pl.ds(octet * OCTET, plan.run * OCTET)]

        @pl.when((head < plan.group) & (token >= work.first) & (token < work.stop))
        def _(source=source, token=token, head=head):
            place = pl.multiple_of(token, OCTET), work.kv_head * plan.group + head
            store_tile(source, out, place, inside=True)
