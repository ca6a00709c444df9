"""Units of paged decode: how the rows of a batch are cut, and which program takes which piece."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import ceil_div, div, draw, pl, plgpu
from pallas_kernels.paged_attention.decode_plan import BUFFERS, ROW_BLOCK, Plan, Scratch, Tickets


class Unit(NamedTuple):
    """One piece of work: `num_tiles` tiles of a row from `start` on, for one KV head."""

    row: jax.Array
    split: jax.Array
    head: jax.Array
    length: jax.Array  # of the row
    start: jax.Array  # first token of the first tile
    first_visible: jax.Array  # tokens first_visible <= token < end count
    end: jax.Array
    num_tiles: jax.Array


class Cursor(NamedTuple):
    """A place in the list of all units, which is never stored: rows in order, of each its splits, of each
    its heads."""

    index: jax.Array  # of the unit
    row: jax.Array  # R and more: beyond the last unit
    first: jax.Array  # index of the row's first unit


class Rows(NamedTuple):
    """What is known of the rows, in shared or in global memory."""

    lengths: Any  # i32[R] or more
    first_keys: Any  # likewise; None: zeros


class Schedule(NamedTuple):
    """What a warpgroup needs to know of its program's units."""

    rows: Rows
    rows_full: Any
    tickets: Tickets | None  # where units are drawn
    counter: Any  # i32[1] in global memory, of the warpgroup that draws


def schedule_of(scratch: Scratch) -> Schedule:
    """Of a warpgroup that draws no units."""
    return Schedule(Rows(scratch.lengths, scratch.first_keys), scratch.rows_full, scratch.tickets, None)


def for_each_unit(plan: Plan, schedule: Schedule, visit, carry):
    """Calls carry = visit(unit, next_unit, carry) on this program's units: its place, then every
    `num_programs`th after it, or what it draws.

    Splits without a visible token are not in the list. A row that cannot be cut always is, however short:
    nobody else would write its zeros.
    """
    program, rows = lax.axis_index("program"), schedule.rows
    zero = jnp.int32(0)
    plgpu.barrier_wait(schedule.rows_full)
    start = _seek(plan, rows, Cursor(zero, zero, zero), program)

    def step(state):
        units, cursor, unit, carry = state
        following = _seek(plan, rows, cursor, _next_index(plan, schedule, cursor.index, units))
        next_unit = _unit_at(plan, rows, following)
        return units + 1, following, next_unit, visit(unit, next_unit, carry)

    state = zero, start, _unit_at(plan, rows, start), carry
    units, _, _, carry = lax.while_loop(lambda state: state[1].row < plan.num_rows, step, state)
    if schedule.counter is not None:
        assert schedule.tickets is not None
        drain(schedule.tickets.empty, BUFFERS, units)
    return carry


def _next_index(plan: Plan, schedule: Schedule, index, units):
    """The unit after `index`. One warpgroup draws it, the others read what it drew."""
    if schedule.tickets is None:
        return index + plan.num_programs
    indices, full, empty = schedule.tickets
    slot = lax.rem(units, jnp.int32(BUFFERS))
    if schedule.counter is None:
        plgpu.barrier_wait(full.at[slot])
        drawn = indices[slot]
        plgpu.barrier_arrive(empty.at[slot])
        return drawn

    @pl.when(units >= BUFFERS)
    def _():
        plgpu.barrier_wait(empty.at[slot])

    draw(schedule.counter, indices.at[pl.ds(slot, 1)], plan.num_programs, index)
    plgpu.barrier_arrive(full.at[slot])
    return indices[slot]


def drain(barriers, size: int, total):
    """Waits for the last arrivals, so that none is pending when the program ends."""

    def wait(index, _):
        plgpu.barrier_wait(barriers.at[lax.rem(index, jnp.int32(size))])

    lax.fori_loop(jnp.maximum(total - size, 0), total, wait, None)


def _seek(plan: Plan, rows: Rows, cursor: Cursor, index) -> Cursor:
    """The cursor of unit `index`, which does not come before the cursor's."""
    if plan.num_splits == 1:
        row = jnp.minimum(div(index, plan.num_kv_heads), plan.num_rows)
        return Cursor(index, row, row * plan.num_kv_heads)

    def must_go_on(state):
        cursor, skipped = state
        return (skipped == ROW_BLOCK) & (cursor.row < plan.num_rows)

    def skip_rows(state):
        cursor, _ = state
        skipped, first = jnp.int32(0), cursor.first
        behind = cursor.first
        for offset in range(ROW_BLOCK):
            behind += _count_units(plan, rows, cursor.row + offset)
            is_skipped = (behind <= index) & (cursor.row + offset < plan.num_rows)
            skipped += is_skipped.astype(jnp.int32)
            first = jnp.where(is_skipped, behind, first)
        return Cursor(index, cursor.row + skipped, first), skipped

    cursor, _ = lax.while_loop(must_go_on, skip_rows, (cursor._replace(index=index), jnp.int32(ROW_BLOCK)))
    return cursor


def visible_range(plan: Plan, rows: Rows, row):
    """The tokens that a row's query sees: first, and one beyond the last, the row's length."""
    length = jnp.minimum(rows.lengths[row], plan.capacity)
    first = jnp.int32(0) if rows.first_keys is None else rows.first_keys[row]
    if plan.spec.window_left is not None:
        first = jnp.maximum(first, length - 1 - plan.spec.window_left)
    return first, length


def split_range(plan: Plan, first, length):
    """The splits that have a visible token: first, and one beyond the last."""
    return div(first, plan.config.split), ceil_div(length, plan.config.split)


def _count_units(plan: Plan, rows: Rows, row):
    first, stop = split_range(plan, *visible_range(plan, rows, row))
    return (stop - first) * plan.num_kv_heads


def _unit_at(plan: Plan, rows: Rows, cursor: Cursor) -> Unit:
    """The cursor's unit; one without tiles if it stands beyond the last."""
    first, length = visible_range(plan, rows, jnp.minimum(cursor.row, plan.num_rows))
    offset = cursor.index - cursor.first
    head = lax.rem(offset, jnp.int32(plan.num_kv_heads))
    split = div(offset, plan.num_kv_heads) + split_range(plan, first, length)[0]
    first_visible = jnp.maximum(split * plan.config.split, first)
    end = jnp.minimum(length, (split + 1) * plan.config.split)
    start = div(first_visible, plan.config.tile) * plan.config.tile
    num_tiles = ceil_div(jnp.maximum(end - start, 0), plan.config.tile)
    num_tiles = jnp.where(cursor.row < plan.num_rows, num_tiles, 0)
    return Unit(cursor.row, split, head, length, start, first_visible, end, num_tiles)
