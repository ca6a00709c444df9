"""The producer warpgroups of paged prefill: what a unit needs to shared memory, and codes to 16 bits."""

import functools
import itertools
import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic import clip, div, load_columns, opaque, pl, plgpu, rem, where
from pallas_kernels.mosaic_copy import load_block
from pallas_kernels.mosaic_inline import draw
from pallas_kernels.paged_attention.page_tiles import copy_by_warps, widen, zero_invisible
from pallas_kernels.paged_attention.prefill_config import OCTET, WARPGROUP_ROWS
from pallas_kernels.paged_attention.prefill_plan import (
    Inputs,
    PrefillPlan,
    Ring,
    Scratch,
    buffer_of,
    octet_at,
)
from pallas_kernels.paged_attention.prefill_units import RECORDS, Work, for_each_unit, slot_of
from pallas_kernels.paged_attention.prefill_work import visible_keys
from pallas_kernels.paged_attention.units import drain

TILES_AHEAD = 4  # KV tiles left to load when the next unit is drawn: later, who is free is better known
WIDE_COLUMNS = 128  # that the widening warpgroup's registers hold of 64 rows


def load_units(plan: PrefillPlan, inputs: Inputs, scratch: Scratch):
    """The loading warpgroup: records a unit ahead, queries, and tiles of K and V as slots become empty, from
    a unit's last to its first: see attend_unit."""
    load_record(plan, inputs, scratch, np.int32(0), is_first=True)

    def load(turn, position):
        num_tiles = read(plan, scratch, turn, "tile_start", "tile_stop").num_tiles
        keys = inputs.k_pages, inputs.k_scale, scratch.k_codes or scratch.k
        values = inputs.v_pages, inputs.v_scale, scratch.v_codes or scratch.v

        def load_tile_of(of, index):
            pages, scale, ring = of
            # Again: registers are few.
            work = read(plan, scratch, turn, "row", "kv_length", "tile_stop", "kv_head")
            load_tile(plan, inputs, pages, scale, ring, work, index, position + index)

        def load_both(index, _):
            load_tile_of(keys, index)
            load_tile_of(values, index)

        # First the first keys: queries may wait for other results to leave, and a draw takes a while.
        pl.when(num_tiles > 0)(lambda: load_tile_of(keys, 0))
        load_queries(plan, inputs, scratch, turn)
        pl.when(num_tiles > 0)(lambda: load_tile_of(values, 0))
        draws = lax.max(num_tiles - TILES_AHEAD, 1)
        lax.fori_loop(1, draws, load_both, None)
        load_record(plan, inputs, scratch, turn + 1)
        lax.fori_loop(draws, num_tiles, load_both, None)
        return position + num_tiles

    turns, position = for_each_unit(scratch.records, load, np.int32(0))
    for ring in (scratch.k_codes or scratch.k, scratch.v_codes or scratch.v):
        drain(ring.empty, plan.config.stages, position)
    drain(scratch.records.empty, RECORDS, turns + 1)
    for turn, warpgroup in itertools.product(range(plan.query_buffers), range(plan.config.warpgroups)):
        wait_for_buffer(plan, scratch, turns + turn, buffer_of(plan, turns + turn, warpgroup))


def read(plan: PrefillPlan, scratch: Scratch, turn, *names: str) -> Work:
    return scratch.records.read(opaque(turn), plan.num_kv_heads, *names)


def load_record(plan: PrefillPlan, inputs: Inputs, scratch: Scratch, turn, is_first: bool = False):
    """Finds the unit of a turn, the program's first or after that of the turn before, and starts the copy of
    its item's record; beyond the last unit it is of no work. Others are drawn from behind all first ones."""
    records, slot = scratch.records, slot_of(turn)
    pl.when(turn >= RECORDS)(lambda: plgpu.barrier_wait(records.empty.at[slot]))
    if is_first:
        records.units[slot] = lax.axis_index("program")
    else:
        before = records.units[slot_of(turn - 1)]
        if inputs.counter is None:
            records.units[slot] = before + plan.num_programs
        else:
            draw(inputs.counter, records.units.at[pl.ds(slot, 1)], plan.num_programs, before)
    item = lax.min(div(records.units[slot], plan.num_kv_heads), plan.max_items)
    source = inputs.items.at[pl.ds(pl.multiple_of(item * plan.record_size, 4), plan.record_size)]
    mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # not a tensor copy, so that records may lie close together
    plgpu.copy_gmem_to_smem(source, records.fields.at[slot], records.full.at[slot], oob_mode=mode)


def load_queries(plan: PrefillPlan, inputs: Inputs, scratch: Scratch, turn):
    """Starts the copies of a tile's queries, every warpgroup's rows; rows of no head take the last head's."""
    packed = ("first_head",) if plan.is_packed else ()
    work, rows = read(plan, scratch, turn, "token", "kv_head", *packed), plan.query_run * OCTET
    for warpgroup in range(plan.config.warpgroups):
        buffer = buffer_of(plan, turn, warpgroup)
        wait_for_buffer(plan, scratch, turn, buffer)

        def copy(octet, token, head, buffer=buffer):
            target = scratch.rows[0].at[buffer, pl.ds(octet * OCTET, rows)]
            source, full = (pl.ds(token, rows), head), scratch.query_full.at[buffer]
            if plan.ends_within:
                load_block(inputs.query, source, 0, target, full)
            else:
                plgpu.copy_gmem_to_smem(inputs.query.at[source], target, full)

        locate = functools.partial(locate_queries, plan, work, work.kv_head * plan.group, warpgroup)
        octets = range(0, WARPGROUP_ROWS // OCTET, plan.query_run)
        if plan.is_packed:  # each warp locates its own: those of all would take registers
            locate_and_copy = lambda octet, copy=copy, locate=locate: copy(*locate(octet))
            copy_by_warps(locate_and_copy, [(octet,) for octet in octets])
        else:
            copy_by_warps(copy, [locate(octet) for octet in octets])


def locate_queries(plan: PrefillPlan, work: Work, group_head, warpgroup, octet):
    """(octet, first token, head) of an octet of a warpgroup's rows; group_head: the group's first."""
    head, token = octet_at(plan, warpgroup, octet, work.first_head)
    head = group_head + (head if plan.is_packed else min(head, plan.group - 1))
    token = lax.max(work.token + token, 0)  # before the row any will do
    if plan.is_packed:  # TMA asks for multiples of OCTET, and warps have no multiple_of
        return octet, div(token, OCTET) * OCTET, head
    return octet, pl.multiple_of(token, OCTET), head


def wait_for_buffer(plan: PrefillPlan, scratch: Scratch, turn, buffer):
    """Waits until the buffer of a warpgroup's queries of this turn is empty."""
    pl.when(turn >= plan.query_buffers)(lambda: plgpu.barrier_wait(scratch.query_empty.at[buffer]))


def load_tile(plan: PrefillPlan, inputs: Inputs, pages, scale, ring: Ring, work: Work, index, position):
    """Starts the copies of a tile's pages into its slot, when the slot's last users have left it."""
    slot = rem(position, plan.config.stages)
    pl.when(position >= plan.config.stages)(lambda: plgpu.barrier_wait(ring.empty.at[slot]))
    token, layer = (work.tile_stop - 1 - index) * plan.config.tile_kv, inputs.layer[0]

    def copy(place):
        source = find_page(plan, inputs, work, token, place, layer)
        rows = pl.ds(place * plan.copy_rows, plan.copy_rows)
        plgpu.copy_gmem_to_smem(pages.at[source], ring.smem.at[slot, rows], ring.full.at[slot])
        if scale is not None:
            mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # not a tensor copy, so that 32 bytes may lie anywhere
            target = ring.scale.at[slot, rows]
            plgpu.copy_gmem_to_smem(scale.at[source], target, ring.full.at[slot], oob_mode=mode)

    copy_by_warps(copy, [(place,) for place in range(plan.num_copies)])


def find_page(plan: PrefillPlan, inputs: Inputs, work: Work, token, place, layer):
    """Where the tokens of a tile's copy lie: in a page, or in the part of it that is in the tile; beyond the
    last page the last one is taken again."""
    column = div(token + place * plan.copy_rows, plan.page_size)
    column = lax.min(column, div(work.kv_length - 1, plan.page_size))
    page = inputs.tables[work.row * plan.table_width + column]
    rows = pl.ds(0, plan.copy_rows)
    if plan.page_size > plan.copy_rows:
        offset = rem(token, plan.page_size)
        rows = pl.ds(pl.multiple_of(offset, plan.copy_rows), plan.copy_rows)
    return layer, clip(page, 0, plan.num_pages - 1), work.kv_head, rows


def widen_units(plan: PrefillPlan, scratch: Scratch):
    """The widening warpgroup of quantized pages: makes what wgmma reads of the codes that were copied."""
    assert scratch.k_codes is not None
    assert scratch.v_codes is not None
    k, v = (scratch.k_codes, scratch.k), (scratch.v_codes, scratch.v)

    def widen_unit(turn, position):
        work = read(plan, scratch, turn, "tile_start", "tile_stop", "first", "offset", "kv_length")

        def widen_tiles(index, _):
            widen_tile(plan, work, *k, index, position + index)
            widen_tile(plan, work, *v, index, position + index)

        lax.fori_loop(0, work.num_tiles, widen_tiles, None)
        return position + work.num_tiles

    _, position = for_each_unit(scratch.records, widen_unit, np.int32(0))
    for ring in (scratch.k, scratch.v):
        drain(ring.empty, plan.slots, position)


def widen_tile(plan: PrefillPlan, work: Work, codes: Ring, wide: Ring, index, position):
    """One tile of K or V: what no query sees, NaN as it may be, becomes zero."""
    tile_kv = plan.config.tile_kv
    source, slot = (rem(position, size) for size in (plan.config.stages, plan.slots))
    plgpu.barrier_wait(codes.full.at[source])
    pl.when(position >= plan.slots)(lambda: plgpu.barrier_wait(wide.empty.at[slot]))
    first_key = (work.tile_stop - 1 - index) * tile_kv
    first, stop = visible_keys(plan, work)
    key = plgpu.broadcasted_iota(jnp.int32, (tile_kv,), 0, layout=plgpu.Layout.WGMMA.reduce(0)) + first_key
    scale = where((key >= first) & (key < stop), load_columns(codes.scale.at[source]), 0.0)
    wide.scale.at[slot][...] = scale
    widen(codes.smem.at[source], wide.smem.at[slot], math.gcd(plan.head_dim, WIDE_COLUMNS))
    if plan.page_dtype != jnp.int8:  # integers hold no NaN

        @pl.when((first_key < first) | (first_key + tile_kv > stop))
        def _():
            plgpu.commit_smem()  # it loads what other threads have stored
            zero_invisible(wide.smem.at[slot], first_key, first, stop)

    plgpu.commit_smem()
    plgpu.barrier_arrive(codes.empty.at[source])
    plgpu.barrier_arrive(wide.full.at[slot])
