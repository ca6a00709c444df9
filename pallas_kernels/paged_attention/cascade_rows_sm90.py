"""What cascade_rows.py says, the list of work of the shared pages and the queries in the order of their
groups, in one launch where XLA takes eight.

Every thread block counts for itself, from the rows' groups in shared memory. The first ones list the work
(prefill_list_sm90.py), a thread an item, of which a group is a row; one more says of each row, a thread a
row, where its results will lie; and each of the others copies the queries of a row to their place.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import div, pl, plgpu, rem, where
from pallas_kernels.mosaic_inline import BY_THREAD, THREADS, gather, load_numbers, meet
from pallas_kernels.paged_attention import prefill_list_sm90
from pallas_kernels.paged_attention.cascade_rows import shares_prefix
from pallas_kernels.paged_attention.config import MAX_BOX, numbers_size
from pallas_kernels.paged_attention.plan import Counters
from pallas_kernels.paged_attention.prefill_list_sm90 import (
    count_items,
    counter_types,
    cut_at,
    load_vector,
    num_item_blocks,
    start_counters,
    store_items,
)
from pallas_kernels.paged_attention.prefill_plan import PrefillPlan
from pallas_kernels.paged_attention.spec import PagedInputs

MAX_ROWS = 1024  # eight a thread
MAX_GROUPS = prefill_list_sm90.MAX_ROWS
TOGETHER = 8  # rows that are looked at together


class Rows(NamedTuple):
    """What is said of each row; arrays i32 of R or more numbers."""

    skipped: Any  # pages that it shares
    lengths: Any  # tokens behind them
    first_item: Any  # of the tile that holds its queries; its splits follow
    num_splits: Any  # 0: it shares nothing
    place: Any  # in the tile


class Listed(NamedTuple):
    """The results of the launch."""

    items: jax.Array  # as WorkList's
    query: jax.Array  # [tokens, N, H]: queries in the order of their groups, of rows in some group
    rows: Rows
    counters: Counters


class Scratch(NamedTuple):
    """Shared memory of a thread block."""

    lists: prefill_list_sm90.Scratch
    groups: Any  # i32[size of rows]: each row's group; C: none; beyond the last row more
    lengths: Any  # i32[size of rows]
    leaders: Any  # i32[THREADS + size of groups]: a row of group c in place THREADS + c
    query: Any  # [N, H]
    query_loaded: Any


class Sizes(NamedTuple):
    """Numbers of rows and groups, in whole copies."""

    num_rows: int
    rows: int
    groups: int

    @property
    def num_copies(self) -> int:
        return 2 * -(-self.rows // MAX_BOX) + -(-self.groups // MAX_BOX)


def serves(plan: PrefillPlan, inputs: PagedInputs) -> bool:
    num_rows, num_heads, _ = inputs.query.shape
    return num_rows <= MAX_ROWS and plan.num_rows <= MAX_GROUPS and num_heads <= MAX_BOX


def list_rows(plan: PrefillPlan, inputs: PagedInputs, prefix_lengths, group_of_row) -> Listed:
    """plan: of the shared pages, whose rows are the groups."""
    num_rows, num_heads, head_dim = inputs.query.shape
    sizes = Sizes(num_rows, numbers_size(num_rows), numbers_size(plan.num_rows + 2))
    by_row = jax.ShapeDtypeStruct((sizes.rows,), jnp.int32)
    num_lists = num_item_blocks(plan)
    numbers = plgpu.SMEM((sizes.rows,), jnp.int32)
    scratch = Scratch(
        lists=prefill_list_sm90.Scratch.types(sizes.groups, sizes.num_copies),
        groups=numbers,
        lengths=numbers,
        leaders=plgpu.SMEM((THREADS + sizes.groups,), jnp.int32),
        query=plgpu.SMEM((num_heads, head_dim), inputs.query.dtype),
        query_loaded=plgpu.Barrier(),
    )
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan, sizes, num_lists),
        out_type=[
            jax.ShapeDtypeStruct((num_lists * THREADS * plan.record_size,), jnp.int32),
            jax.ShapeDtypeStruct((plan.num_tokens, num_heads, head_dim), inputs.query.dtype),
            *(by_row,) * len(Rows._fields),
            *counter_types(),
        ],
        grid=(num_lists + 1 + num_rows,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[scratch],
        kernel_name="cascade_rows",
    )
    given = (x.astype(jnp.int32) for x in (group_of_row, inputs.kv_lengths, prefix_lengths))
    items, query, *rows, of_decode, of_prefill = kernel(inputs.query, *given)
    items = items.reshape(-1, plan.record_size)
    return Listed(items, query, Rows(*rows), Counters(of_decode, of_prefill))


def _kernel(plan: PrefillPlan, sizes: Sizes, num_lists: int, query, groups, lengths, prefixes, *refs):
    items, sorted_query, *rows, of_decode, of_prefill, scratch = refs
    block = lax.axis_index("block")
    row = block - (num_lists + 1)

    @pl.when(row >= 0)
    def _():
        plgpu.copy_gmem_to_smem(query.at[row], scratch.query, scratch.query_loaded)

    _load(plan, sizes, (groups, lengths, prefixes), scratch)

    @pl.when(row < 0)
    def _():
        _start_groups(plan, sizes, scratch)
        count_items(plan, scratch.lists)

        @pl.when(block < num_lists)
        def _():
            store_items(plan, scratch.lists, items, lambda row: gather(scratch.leaders, row + THREADS))

        @pl.when(block == num_lists)
        def _():
            start_counters(Counters(of_decode, of_prefill))
            _store_rows(plan, sizes, scratch, Rows(*rows))

    @pl.when(row >= 0)
    def _():
        (group,) = load_numbers(scratch.groups, [row])
        place = _visit_rows(sizes, scratch, _count_before(group, row), jnp.int32(0))
        plgpu.barrier_wait(scratch.query_loaded)

        @pl.when(group < plan.num_rows)
        def _():
            plgpu.copy_smem_to_gmem(scratch.query, sorted_query.at[place])
            plgpu.wait_smem_to_gmem(0)


def _load(plan: PrefillPlan, sizes: Sizes, sources, scratch: Scratch):
    """Copies the rows' numbers and the lengths of prefixes to shared memory; says C where a row has no
    group, or not all of its prefix."""
    targets = (
        (scratch.groups, 0, sizes.rows),
        (scratch.lengths, 0, sizes.rows),
        (scratch.lists.lengths, THREADS, sizes.groups),
    )
    for source, (target, offset, size) in zip(sources, targets, strict=True):
        load_vector(source, target, offset, size, scratch.lists.loaded)
    plgpu.barrier_wait(scratch.lists.loaded)
    num_groups = plan.num_rows
    for row, part in _by_thread(sizes.rows):
        group, length = (
            plgpu.load(ref.at[part], layout=BY_THREAD, optimized=False)
            for ref in (scratch.groups, scratch.lengths)
        )
        exists = (group >= 0) & (group < num_groups)
        prefix = gather(scratch.lists.lengths, where(exists, group, 0) + THREADS)
        shares = shares_prefix(prefix, length, plan.page_size, plan.capacity)
        group = where(exists & shares, group, num_groups)
        scratch.groups[part] = where(row < sizes.num_rows, group, num_groups + 1)
    meet()


def _by_thread(size: int):
    """(number of each thread, where these are) of as many numbers as there are threads, one after another."""
    thread = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=BY_THREAD)
    return [(thread + first, pl.ds(first, THREADS)) for first in range(0, size, THREADS)]


def _start_groups(plan: PrefillPlan, sizes: Sizes, scratch: Scratch):
    """Where groups start in the order, as the list of work wants it, and a row of each."""
    for group, part in _by_thread(sizes.groups):

        def look(row, other, carry, group=group):
            before, leader = carry
            row, other = (lax.broadcast(x, group.shape) for x in (row, other))
            before += (other < group).astype(jnp.int32)
            return before, where((other == group) & (leader < 0), row, leader)

        before, leader = _visit_rows(sizes, scratch, look, (group * 0, group * 0 - 1))
        behind = pl.ds(THREADS + part.start, THREADS)
        scratch.lists.starts[behind] = before
        scratch.leaders[behind] = lax.max(leader, 0)
    meet()


def _visit_rows(sizes: Sizes, scratch: Scratch, visit, carry):
    """carry = visit(row, its group, carry) over all rows, and some beyond."""

    def step(index, carry):
        rows = [index * TOGETHER + i for i in range(TOGETHER)]
        for row, group in zip(rows, load_numbers(scratch.groups, rows), strict=True):
            carry = visit(row, group, carry)
        return carry

    return lax.fori_loop(0, -(-sizes.num_rows // TOGETHER), step, carry)


def _count_before(group, row):
    """Counts the rows that come before a row of this group in the order."""

    def count(other_row, other, total):
        return total + ((other < group) | ((other == group) & (other_row < row))).astype(jnp.int32)

    return count


def _store_rows(plan: PrefillPlan, sizes: Sizes, scratch: Scratch, rows: Rows):
    """Of each row, a thread a row."""
    for row, part in _by_thread(sizes.rows):
        group = plgpu.load(scratch.groups.at[part], layout=BY_THREAD, optimized=False)
        is_grouped = group < plan.num_rows
        group = where(is_grouped, group, 0)

        def count(other_row, other, total, group=group, row=row):
            other_row, other = (lax.broadcast(x, total.shape) for x in (other_row, other))
            return total + ((other == group) & (other_row < row)).astype(jnp.int32)

        before = _visit_rows(sizes, scratch, count, row * 0)
        token = gather(scratch.lists.starts, group + THREADS) + before
        cuts = cut_at(plan, scratch.lists, group + 1)[1]
        distance = token - cuts.first_tile
        tile = cuts.num_tiles - 1 - div(distance, plan.tile_q)
        first_item = gather(scratch.lists.first_item, group + 1) + tile * cuts.num_splits
        prefix = where(is_grouped, gather(scratch.lists.lengths, group + THREADS), 0)
        length = plgpu.load(scratch.lengths.at[part], layout=BY_THREAD, optimized=False)
        rows.skipped[part] = div(prefix, plan.page_size)
        rows.lengths[part] = lax.max(lax.min(length, plan.capacity) - prefix, 0)
        rows.first_item[part] = where(is_grouped, first_item, 0)
        rows.num_splits[part] = where(is_grouped & (cuts.num_tiles > 0), cuts.num_splits, 0)
        rows.place[part] = where(is_grouped, rem(distance, plan.tile_q), 0)
