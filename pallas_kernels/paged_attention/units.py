"""Units of paged decode: how the rows of a batch are cut, and which program takes which piece."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic import ceil_div, div, pl, plgpu, rem, where
from pallas_kernels.mosaic_inline import BY_THREAD, THREADS, draw, gather, load_numbers
from pallas_kernels.paged_attention.config import ROW_BLOCK
from pallas_kernels.paged_attention.decode_memory import Scratch, Tickets
from pallas_kernels.paged_attention.decode_plan import BUFFERS, NOT_OURS, Plan
from pallas_kernels.paged_attention.plan import is_single


class Unit(NamedTuple):
    """One piece of work: `num_tiles` tiles of a row from `start` on, for one KV head."""

    row: jax.Array
    token: jax.Array  # of its query, and of its results
    split: jax.Array
    head: jax.Array
    length: jax.Array  # of the row
    skipped: jax.Array | None  # pages at the start of its table
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


class Schedule(NamedTuple):
    """What a warpgroup needs to know of its program's units."""

    lengths: Any  # i32[numbers_size], in shared memory
    starts: Any  # i32[numbers_size], where rows are ragged
    skipped: Any  # i32[numbers_size], where tables begin with others' pages
    counts: Any  # i32[numbers_size]: units of each row, where they are counted
    tickets: Tickets | None  # where units are drawn
    counter: Any  # i32[1] in global memory, of the warpgroup that draws

    @classmethod
    def of(cls, scratch: Scratch, counter: Any = None) -> "Schedule":
        return cls(scratch.lengths, scratch.starts, scratch.skipped, scratch.counts, scratch.tickets, counter)


def for_each_unit(plan: Plan, schedule: Schedule, visit, carry, begin=lambda unit: None):
    """Calls carry = visit(unit, next_unit, carry) on this program's units: its place, then every
    `num_programs`th after it, or what it draws; begin(unit) on the first, before the next is looked for.

    Splits without a visible token are not in the list. A row that cannot be cut always is, however short,
    unless it is not ours: nobody else would write its zeros.
    """
    zero: Any = np.int32(0)
    start = _seek(plan, schedule, Cursor(zero, zero, zero), lax.axis_index("program"))

    def step(state):
        units, cursor, unit, carry = state
        following = _seek(plan, schedule, cursor, _next_index(plan, schedule, cursor.index, units))
        next_unit = _unit_at(plan, schedule, following)
        return units + 1, following, next_unit, visit(unit, next_unit, carry)

    first = _unit_at(plan, schedule, start)
    pl.when(first.row < plan.num_rows)(lambda: begin(first))
    state = zero, start, first, carry
    units, _, _, carry = lax.while_loop(lambda state: state[1].row < plan.num_rows, step, state)
    if schedule.counter is not None:
        assert schedule.tickets is not None
        drain(schedule.tickets.empty, BUFFERS, lax.max(units - 1, 0))
    return carry


def _next_index(plan: Plan, schedule: Schedule, index, units):
    """The unit after `index`, which is the program's unit number `units`. The second is never drawn: that
    would hold up the loads of the first."""
    following, tickets = index + plan.num_programs, schedule.tickets
    if tickets is None:
        return following
    return lax.cond(units == 0, lambda: following, lambda: _drawn(plan, schedule, tickets, index, units - 1))


def _drawn(plan: Plan, schedule: Schedule, tickets: Tickets, index, number):
    """What is drawn after `number` others. One warpgroup draws it, the others read what it drew."""
    indices, full, empty = tickets
    slot = rem(number, BUFFERS)
    if schedule.counter is None:
        plgpu.barrier_wait(full.at[slot])
        drawn = indices[slot]
        plgpu.barrier_arrive(empty.at[slot])
        return drawn

    @pl.when(number >= BUFFERS)
    def _():
        plgpu.barrier_wait(empty.at[slot])

    # In turn it would draw index + programs: two for each program were not drawn.
    before = index - plan.num_programs
    draw(schedule.counter, indices.at[pl.ds(slot, 1)], 2 * plan.num_programs, before)
    plgpu.barrier_arrive(full.at[slot])
    return indices[slot]


def drain(barriers, size: int, total):
    """Waits for the last arrivals, so that none is pending when the program ends."""

    def wait(index, _):
        plgpu.barrier_wait(barriers.at[rem(index, size)])

    lax.fori_loop(lax.max(total - size, 0), total, wait, None)


def _seek(plan: Plan, schedule: Schedule, cursor: Cursor, index) -> Cursor:
    """The cursor of unit `index`, which does not come before the cursor's."""
    if not plan.has_uneven_rows:
        row = lax.min(div(index, plan.num_kv_heads), plan.num_rows)
        return Cursor(index, row, row * plan.num_kv_heads)

    def must_go_on(state):
        cursor, skipped = state
        return (skipped == ROW_BLOCK) & (cursor.row < plan.num_rows)

    def skip_rows(state):
        cursor, _ = state
        rows = [cursor.row + offset for offset in range(ROW_BLOCK)]
        if schedule.counts is None:
            counts = [_count_units(plan, length) for length in load_numbers(schedule.lengths, rows)]
        else:
            counts = load_numbers(schedule.counts, rows)
        return _skip_rows(plan.num_rows, cursor._replace(index=index), rows, counts)

    cursor, _ = lax.while_loop(must_go_on, skip_rows, (cursor._replace(index=index), np.int32(ROW_BLOCK)))
    return cursor


# Two functions of their own, each traced once for the six places in a kernel that look for units.


@functools.partial(jax.jit, static_argnums=0)
def _skip_rows(num_rows: int, cursor: Cursor, rows: list[jax.Array], counts: list[jax.Array]):
    """The cursor behind those of these rows, of so many units each, whose units all come before it; and how
    many rows these are."""
    skipped, behind, first = np.int32(0), cursor.first, cursor.first
    for row, count in zip(rows, counts, strict=True):
        behind += count
        is_skipped = (behind <= cursor.index) & (row < num_rows)
        skipped += is_skipped.astype(jnp.int32)
        first = where(is_skipped, behind, first)
    return Cursor(cursor.index, cursor.row + skipped, first), skipped


def split_range(plan: Plan, length):
    """The splits of a row of this length that have a visible token: first, and one beyond the last."""
    return div(_first_visible(plan, length), plan.config.split), ceil_div(length, plan.config.split)


def _first_visible(plan: Plan, length):
    if plan.spec.window_left is None:
        return 0
    return lax.max(length - 1 - plan.spec.window_left, 0)


def _count_units(plan: Plan, length):
    if plan.num_splits == 1:
        return (length >= 0).astype(jnp.int32) * plan.num_kv_heads
    first, stop = split_range(plan, lax.min(length, plan.capacity))
    return (stop - first) * plan.num_kv_heads


def see_rows(plan: Plan, scratch: Scratch):
    """Leaves alone ragged rows that have not one query, and counts the units of every row, where they are
    counted; a warpgroup does it for all, a row a thread."""
    if not (plan.is_ragged or plan.counts_units):
        return
    thread = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=BY_THREAD)

    def see(block, _):
        first = pl.multiple_of(block * THREADS, THREADS)
        part = pl.ds(first, THREADS)
        length = plgpu.load(scratch.lengths.at[part], layout=BY_THREAD, optimized=False)
        if plan.is_ragged:
            start = plgpu.load(scratch.starts.at[part], layout=BY_THREAD, optimized=False)
            stop = gather(scratch.starts, lax.min(first + thread + 1, plan.num_rows))
            length = where(is_single(start, stop, plan.num_tokens), lax.max(length, 0), NOT_OURS)
            scratch.lengths[part] = length
        if plan.counts_units:
            scratch.counts[part] = _count_units(plan, length)

    lax.fori_loop(0, plan.numbers_size // THREADS, see, None)


def _unit_at(plan: Plan, schedule: Schedule, cursor: Cursor) -> Unit:
    """The cursor's unit; one without tiles if it stands beyond the last."""
    row = lax.min(cursor.row, plan.num_rows)
    length = lax.min(schedule.lengths[row], plan.capacity)
    token = row if schedule.starts is None else schedule.starts[row]
    skipped = None if schedule.skipped is None else schedule.skipped[row]
    return _unit_of(plan, cursor, token, length, skipped)


@functools.partial(jax.jit, static_argnums=0)
def _unit_of(
    plan: Plan, cursor: Cursor, token: jax.Array, length: jax.Array, skipped: jax.Array | None
) -> Unit:
    offset = cursor.index - cursor.first
    head = rem(offset, plan.num_kv_heads)
    first_visible = _first_visible(plan, length)
    split = div(offset, plan.num_kv_heads) + div(first_visible, plan.config.split)
    first_visible = lax.max(split * plan.config.split, first_visible)
    end = lax.min(length, (split + 1) * plan.config.split)
    start = div(first_visible, plan.config.tile) * plan.config.tile
    num_tiles = ceil_div(lax.max(end - start, 0), plan.config.tile)
    num_tiles = where(cursor.row < plan.num_rows, num_tiles, 0)
    return Unit(cursor.row, token, split, head, length, skipped, start, first_visible, end, num_tiles)
