"""The list of work of paged prefill in one launch: what prefill_work.py says, where XLA takes five.

A thread for each item, and before that for each segment (a row, or tokens of no row). Every thread block cuts
all segments for itself, counts what comes before each, and looks for those of its items: quick for the few
hundred rows of a batch.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import pl, plgpu, where
from pallas_kernels.mosaic_inline import BY_THREAD, THREADS, gather, load_numbers, meet, store_records
from pallas_kernels.paged_attention.config import MAX_BOX, numbers_size
from pallas_kernels.paged_attention.plan import Counters
from pallas_kernels.paged_attention.prefill_plan import PrefillPlan
from pallas_kernels.paged_attention.prefill_work import (
    SINGLE,
    Segments,
    base_of,
    cached_tokens,
    comes_before,
    cut_segments,
    ends_late,
    item_records,
    items_before,
    place_in_list,
)

MAX_ROWS = 254  # two segments a thread: 16 and 128 rows take 2.0 and 4.4 us, XLA's launches 8 (an H200)
TOGETHER = 4  # segments that are looked at together


class Scratch(NamedTuple):
    """Numbers of segments in shared memory; segment s is row s - 1."""

    starts: Any  # i32[THREADS + size]: of row r in place THREADS + r
    lengths: Any
    loaded: Any
    weight: Any  # i32[size]
    num_items: Any
    first_item: Any
    cached: Any  # see cached_tokens
    num_late: Any  # see ends_late
    base: Any  # see base_of
    total: Any  # of items

    @classmethod
    def types(cls, size: int, num_copies: int) -> "Scratch":
        given, numbers, one = (plgpu.SMEM((length,), jnp.int32) for length in (THREADS + size, size, THREADS))
        return cls(given, given, plgpu.Barrier(num_arrivals=num_copies), *(numbers,) * 6, total=one)


def num_item_blocks(plan: PrefillPlan) -> int:
    """Thread blocks that list the items, and at least one record that is none."""
    return -(-(plan.max_items + 1) // THREADS)


def list_items(
    plan: PrefillPlan, query_start: jax.Array, kv_lengths: jax.Array
) -> tuple[jax.Array, Counters]:
    """The records of plan_work, i32[max_items + 1 or more, record size], and counters, which XLA would copy
    in two more launches; plan.num_rows <= MAX_ROWS."""
    size, num_blocks = numbers_size(plan.num_rows + 2), num_item_blocks(plan)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan, size),
        out_type=[
            jax.ShapeDtypeStruct((num_blocks * THREADS * plan.record_size,), jnp.int32),
            *counter_types(),
        ],
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[Scratch.types(size, 2 * -(-size // MAX_BOX))],
        kernel_name="list_items",
    )
    records, *counters = kernel(query_start.astype(jnp.int32), kv_lengths.astype(jnp.int32))
    return records.reshape(-1, plan.record_size), Counters(*counters)


def counter_types() -> Counters:
    """Room for a number a thread."""
    return Counters(*(jax.ShapeDtypeStruct((THREADS,), jnp.int32) for _ in Counters._fields))


def start_counters(counters: Counters, lightest=None) -> None:
    """Counters of nothing drawn; lightest: the least weight of a segment, a thread each."""
    thread = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=BY_THREAD)
    counters.prefill[...] = thread * 0
    counters.decode[...] = (
        thread * 0 if lightest is None else where((thread == 1) & (lightest > SINGLE), 1, thread * 0)
    )


def _kernel(plan: PrefillPlan, size: int, query_start, kv_lengths, records, *refs):
    *counters, scratch = refs
    _load(size, query_start, kv_lengths, scratch)
    lightest = count_items(plan, scratch)
    pl.when(lax.axis_index("block") == 0)(lambda: start_counters(Counters(*counters), lightest))
    store_items(plan, scratch, records, lambda row: row)


def count_items(plan: PrefillPlan, scratch: Scratch):
    """Where the items of each segment begin, and which are late, from its numbers in shared memory; returns
    the least weight of a segment."""
    thread = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=BY_THREAD)
    blocks = []
    for first in range(0, plan.num_rows + 2, THREADS):
        segment, part = thread + first, pl.ds(first, THREADS)
        given, cuts = cut_at(plan, scratch, segment)
        num_items = cuts.num_tiles * cuts.num_splits
        scratch.weight[part], scratch.num_items[part] = cuts.weight, num_items
        if plan.late_items:
            scratch.cached[part] = cached_tokens(plan, *given, num_items)
            scratch.base[part] = base_of(plan, given[2])
        blocks.append((segment, part, cuts.weight, num_items))
    meet()
    lightest = None
    for segment, part, weight, num_items in blocks:
        before = _count_before(plan, scratch, segment, weight)
        scratch.first_item[part], lightest = before.items, before.lightest
        if plan.late_items:
            is_late = ends_late(plan, before.all_seeing - before.items - num_items, before.cached_from)
            scratch.num_late[part] = where(is_late, num_items, 0)
            scratch.total[...] = before.all_items
    meet()
    return lightest


def store_items(plan: PrefillPlan, scratch: Scratch, records, table_of):
    """The records of this thread block's items; table_of(row) is the row of the block tables."""
    thread = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=BY_THREAD)
    item = lax.axis_index("block") * THREADS + thread
    segment = _segment_of(plan, scratch, item)
    known = lax.max(segment, 0)
    given, cuts = cut_at(plan, scratch, known)
    own = Segments(*given, *cuts[:3], gather(scratch.first_item, known))
    row, *numbers = item_records(plan, segment, own, item)
    place = _place_of(plan, scratch, segment, own, item) if plan.late_items else item
    store_records(records, place, [where(segment < 0, row, table_of(row)), *numbers])


def _place_of(plan: PrefillPlan, scratch: Scratch, segment, own: Segments, item):
    """Where each item comes in the list."""
    (total,) = load_numbers(scratch.total, [0])
    key = base_of(plan, own.kv_length) - (item - own.first_item)

    def count(_, carry, first_item, num_late, base):
        before, first_late = carry
        return before + items_before(first_item, num_late, base, own.first_item, key), first_late - num_late

    refs, carry = (scratch.first_item, scratch.num_late, scratch.base), (item * 0, item * 0 + total)
    is_any = lax.axis_index("block") * THREADS < total  # else a batch of decode rows would count for nothing
    before, first_late = _for_each_segment(plan, refs, count, carry, is_any)
    return place_in_list(segment, item, first_late, before)


def _load(size: int, query_start, kv_lengths, scratch: Scratch):
    """Copies numbers of rows to shared memory; beyond the last they are zeros."""
    load_vector(query_start, scratch.starts, THREADS, size, scratch.loaded)
    load_vector(kv_lengths, scratch.lengths, THREADS, size, scratch.loaded)
    plgpu.barrier_wait(scratch.loaded)


def load_vector(source, target, offset: int, size: int, barrier) -> None:
    """Starts the copies of a vector, and of zeros behind its end, to target[offset : offset + size]; an
    arrival at the barrier each MAX_BOX.

    In a loop, because JAX refuses a copy that is known to begin past the end.
    """
    box = min(MAX_BOX, size)

    def copy(index, _):
        first = pl.multiple_of(index * box, box)
        part = target.at[pl.ds(pl.multiple_of(offset + first, math.gcd(offset, box)), box)]
        plgpu.copy_gmem_to_smem(source.at[pl.ds(first, box)], part, barrier)

    lax.fori_loop(0, size // box, copy, None)


def cut_at(plan: PrefillPlan, scratch: Scratch, segment):
    """((start, stop, kv_length), cuts) of segments."""
    last = plan.num_rows + 1
    is_row = (segment > 0) & (segment < last)
    start = where(segment > last, plan.num_tokens, gather(scratch.starts, segment + (THREADS - 1)))
    start = where(segment > 0, lax.max(start, 0), 0)
    stop = where(segment < last, gather(scratch.starts, segment + THREADS), plan.num_tokens)
    stop = lax.min(stop, plan.num_tokens)
    kv_length = where(is_row, gather(scratch.lengths, segment + (THREADS - 1)), 0)
    return (start, stop, kv_length), cut_segments(plan, start, stop, kv_length, is_row)


class Before(NamedTuple):
    """What comes before a segment's first item, and what there is, a number a thread."""

    items: Any
    cached_from: Any  # tokens, of this segment and those after it
    all_items: Any
    all_seeing: Any  # items that see keys
    lightest: Any  # the least weight


def _count_before(plan: PrefillPlan, scratch: Scratch, segment, weight) -> Before:
    def count(other, carry: Before, other_weight, num_items, cached=None):
        is_before = comes_before(other_weight, other, weight, segment)
        return Before(
            carry.items + where(is_before, num_items, 0),
            carry.cached_from if cached is None else carry.cached_from + where(is_before, 0, cached),
            carry.all_items + num_items,
            carry.all_seeing + where(other_weight > 0, num_items, 0),
            lax.min(carry.lightest, other_weight),
        )

    refs = scratch.weight, scratch.num_items, *([scratch.cached] if plan.late_items else [])
    return _for_each_segment(plan, refs, count, Before(*(segment * 0,) * 5))


def _segment_of(plan: PrefillPlan, scratch: Scratch, item):
    """Each item's segment, or -1."""

    def look(segment, found, first_item, num_items):
        return where((first_item <= item) & (item < first_item + num_items), segment, found)

    return _for_each_segment(plan, (scratch.first_item, scratch.num_items), look, item * 0 - 1)


def _for_each_segment(plan: PrefillPlan, refs, visit, carry, is_any: Any = True):
    """carry = visit(segment, carry, the segment's number in each reference), over all segments, or none."""

    def step(index, carry):
        segments = [index * TOGETHER + i for i in range(TOGETHER)]
        numbers = [load_numbers(ref, segments) for ref in refs]
        for values in zip(segments, *numbers, strict=True):
            segment, *values = (lax.broadcast(x, (THREADS,)) for x in values)
            carry = visit(segment, carry, *values)
        return carry

    count = -(-(plan.num_rows + 2) // TOGETHER)
    return lax.fori_loop(0, count if is_any is True else lax.select(is_any, count, 0), step, carry)
