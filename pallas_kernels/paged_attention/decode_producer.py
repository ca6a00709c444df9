"""The producer warpgroups of paged decode: pages, page ids and queries to shared memory, ahead of use."""

import functools

import jax
import numpy as np
from jax import lax

from pallas_kernels.mosaic import clip, div, pl, plgpu, rem
from pallas_kernels.mosaic_copy import OCTET, load_block
from pallas_kernels.mosaic_inline import load_numbers
from pallas_kernels.paged_attention.decode_memory import Inputs, Queries, Scratch, Tiles
from pallas_kernels.paged_attention.decode_plan import BUFFERS, MAX_BOX, Plan
from pallas_kernels.paged_attention.page_tiles import copy_by_warps, share_among_warps
from pallas_kernels.paged_attention.units import Schedule, Unit, drain, for_each_unit

COPIES = 8  # whose page ids are in registers together


def fetch_numbers(plan: Plan, inputs: Inputs, scratch: Scratch):
    """Starts the copies of all rows' lengths, of where their queries are, and of the pages to skip."""
    size = min(MAX_BOX, plan.numbers_size)

    def copy(box, _):
        part = pl.ds(pl.multiple_of(box * size, size), size)
        for source, target in (
            (inputs.lengths, scratch.lengths),
            (inputs.starts, scratch.starts),
            (inputs.skipped, scratch.skipped),
        ):
            if target is not None:
                plgpu.copy_gmem_to_smem(source.at[part], target.at[part], scratch.lengths_full)

    lax.fori_loop(0, plan.num_boxes, copy, None)


def produce(
    plan: Plan, inputs: Inputs, pages, scale, tiles: Tiles, schedule: Schedule, queries: Queries | None
):
    """A producer warpgroup: keeps every slot of the ring filled with the next tile's pages."""
    layer = inputs.layer[0]
    if plan.is_quantized:
        scale = scale.at[layer]

    def visit(unit: Unit, next_unit: Unit, carry):
        count, units = carry
        if plan.page_size is not None:
            # A unit ahead: under full memory traffic a load takes microseconds.
            pl.when(next_unit.row < plan.num_rows)(
                lambda: fetch_ids(plan, inputs, next_unit, tiles, units + 1)
            )
        if queries is not None:
            fetch_queries(plan, inputs, unit, queries, units)
        buffer = rem(units, BUFFERS)
        if plan.page_size is not None:
            plgpu.barrier_wait(tiles.ids_full.at[buffer])
        fetch = functools.partial(fetch_tile, plan, layer, pages, scale, tiles, buffer, unit, count)
        lax.fori_loop(0, unit.num_tiles, fetch, None)
        plgpu.commit_smem()  # all ids are read before a copy overwrites them
        return count + unit.num_tiles, units + 1

    def begin(unit: Unit):
        if plan.page_size is not None:
            fetch_ids(plan, inputs, unit, tiles, np.int32(0))

    count, units = for_each_unit(plan, schedule, visit, (np.int32(0), np.int32(0)), begin)
    drain(tiles.empty, plan.config.stages, count)
    if queries is not None:
        drain(queries.empty, BUFFERS, units)


def fetch_ids(plan: Plan, inputs: Inputs, unit: Unit, tiles: Tiles, units):
    """Starts the copy of a unit's part of its block table."""
    buffer = rem(units, BUFFERS)
    start = pl.multiple_of(first_id(plan, unit), 4)
    for box in range(0, plan.ids_per_split, MAX_BOX):
        size = min(MAX_BOX, plan.ids_per_split - box)
        plgpu.copy_gmem_to_smem(
            inputs.tables.at[pl.ds(start + box, size)],
            tiles.ids.at[buffer, pl.ds(box, size)],
            tiles.ids_full.at[buffer],
        )


def first_id(plan: Plan, unit: Unit):
    """Where in the flat block tables a unit's copy begins: TMA copies start at a multiple of 16 bytes."""
    assert plan.page_size is not None
    return div(_table_start(plan, unit) + div(unit.split * plan.config.split, plan.page_size), 4) * 4


def _table_start(plan: Plan, unit: Unit):
    """Where in the flat block tables the ids of the row's pages begin."""
    start = unit.row * plan.table_width
    return start if unit.skipped is None else start + unit.skipped


def fetch_queries(plan: Plan, inputs: Inputs, unit: Unit, queries: Queries, units):
    """Starts the copies of a KV head's queries and of what is given for its heads."""
    buffer = rem(units, BUFFERS)

    @pl.when(units >= BUFFERS)
    def _():
        plgpu.barrier_wait(queries.empty.at[buffer])

    full, mode = queries.full.at[buffer], plgpu.OOBFillMode.PROMISE_IN_BOUNDS
    copy = functools.partial(copy_queries, plan, inputs.query, unit, queries.query.at[buffer], full)
    share_among_warps(copy, [(octet,) for octet in range(plan.query_octets)])
    for source, place, target in (
        (inputs.query_factor, (unit.row, unit.head), queries.factor),
        (inputs.sinks, unit.head, queries.sinks),
        (inputs.slopes, unit.head, queries.slopes),
    ):
        if target is not None:
            plgpu.copy_gmem_to_smem(source.at[place], target.at[buffer], full, oob_mode=mode)


def copy_queries(plan: Plan, query, unit: Unit, target, barrier, octet):
    """Starts the copies of eight of a unit's query heads, or of their first or second codes.

    They begin at any head, which Pallas's copies of tiles do not.
    """
    rows = pl.ds(octet * OCTET, OCTET)
    column, place = octet * OCTET, (unit.token,)
    if plan.is_quantized:
        code = div(column, plan.columns)
        column, place = column - code * plan.columns, (unit.row, code)
    heads = pl.ds(unit.head * plan.group + column, OCTET)
    for block in range(plan.num_blocks):
        load_block(query, (*place, heads), block * plan.block, target.at[block, rows], barrier)


def fetch_tile(plan: Plan, layer, pages, scale, tiles: Tiles, buffer, unit: Unit, count, index, _):
    """Starts the copies of one tile into its slot of the ring."""
    slot = rem(count + index, plan.config.stages)
    token = unit.start + index * plan.config.tile
    wait_until_empty(plan, tiles, slot, count + index)
    if plan.page_size is None:
        copy = functools.partial(copy_part, plan, pages, tiles, slot, unit, token)
        share(plan, copy, [(place,) for place in range(plan.num_copies)])
        return
    for first in range(0, plan.num_copies, COPIES):
        places = range(first, min(first + COPIES, plan.num_copies))
        # Their ids first: between copies each load would be waited for.
        page_ids = load_numbers(tiles.ids.at[buffer], id_columns(plan, unit, token, places))
        rows = rows_of_page(plan, token)
        copy = functools.partial(copy_page, plan, layer, pages, scale, tiles, slot, unit, rows)
        share(plan, copy, list(zip(places, page_ids, strict=True)))


def share(plan: Plan, copy, arguments):
    """Calls copy for each of the arguments; where H ends within a block always in one warp, as load_block
    must be."""
    (share_among_warps if plan.ends_within else copy_by_warps)(copy, arguments)


def copy_rows(plan: Plan, array, place: tuple, target, barrier):
    """Starts the copies of array[place], [rows, H], into blocks of columns [blocks, rows, block]."""
    if not plan.ends_within:
        plgpu.copy_gmem_to_smem(array.at[place], target.at[0], barrier)
        return
    for block in range(plan.num_blocks):
        load_block(array, place, block * plan.block, target.at[block], barrier)


def copy_part(plan: Plan, caches, tiles: Tiles, slot, unit: Unit, token, place):
    """Starts the copies of a part of a tile out of a row's cache."""
    first, target = token + place * plan.copy_rows, pl.ds(place * plan.copy_rows, plan.copy_rows)
    if not plan.ends_within:  # of load_block's warp there is no multiple_of, nor need
        first = pl.multiple_of(first, plan.copy_rows)
    source = unit.row, pl.ds(first, plan.copy_rows), unit.head
    copy_rows(plan, caches, source, tiles.pages.at[slot, :, target], tiles.full.at[slot])


def wait_until_empty(plan: Plan, tiles: Tiles, slot, index):
    @pl.when(index >= plan.config.stages)
    def _():
        plgpu.barrier_wait(tiles.empty.at[slot])


@functools.partial(jax.jit, static_argnums=(0, 3))  # traced once, for K and V
def id_columns(plan: Plan, unit: Unit, token: jax.Array, places: range) -> list[jax.Array]:
    """Where a unit's ids hold the pages of a tile's copies, or, of those not visible, the nearest that is."""
    page_size = plan.page_size
    assert page_size is not None
    first_column = first_id(plan, unit) - _table_start(plan, unit)
    first, last = (div(x, page_size) for x in (unit.first_visible, unit.end - 1))

    def column_of(place):
        column = lax.min(div(token + place * plan.copy_rows, page_size), last)
        return (column if plan.spec.window_left is None else lax.max(column, first)) - first_column

    return [column_of(place) for place in places]


def rows_of_page(plan: Plan, token):
    """What the tile from `token` on takes of each of its pages: all, or a part of one."""
    assert plan.page_size is not None
    if plan.page_size == plan.copy_rows:
        return pl.ds(0, plan.copy_rows)
    return pl.ds(pl.multiple_of(rem(token, plan.page_size), plan.copy_rows), plan.copy_rows)


def copy_page(plan: Plan, layer, pages, scale, tiles: Tiles, slot, unit: Unit, rows, place, page):
    """Starts the copies of some rows of a page, and of their scales."""
    full, target = tiles.full.at[slot], pl.ds(place * plan.copy_rows, plan.copy_rows)
    page = clip(page, 0, plan.num_pages - 1)
    copy_rows(plan, pages, (layer, page, unit.head, rows), tiles.pages.at[slot, :, target], full)
    if plan.is_quantized:
        mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # not a tensor copy, so that 32 bytes may lie anywhere
        plgpu.copy_gmem_to_smem(
            scale.at[page, unit.head, rows], tiles.scale.at[slot, target], full, oob_mode=mode
        )
