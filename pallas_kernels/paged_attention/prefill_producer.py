"""The producer warpgroups of paged prefill: queries and pages to shared memory, and codes to 16 bits."""

import functools
import itertools
import math

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import div, load_columns, pl, plgpu
from pallas_kernels.paged_attention.page_tiles import widen, zero_invisible
from pallas_kernels.paged_attention.prefill_config import OCTET, WARPGROUP_ROWS
from pallas_kernels.paged_attention.prefill_plan import (
    Inputs,
    PrefillPlan,
    Ring,
    Scratch,
    Work,
    octet_at,
    visible_keys,
)
from pallas_kernels.paged_attention.units import drain

RECORD = len(Work._fields)
ID_REGISTERS = 8  # page ids that the loading warpgroup's few registers hold
WIDE_COLUMNS = 128  # that the widening warpgroup's registers hold of 64 rows


def stream_unit(plan: PrefillPlan, item, kv_head, inputs: Inputs, scratch: Scratch):
    """The loading warpgroup: a unit's record and queries, then tile after tile of K and V."""
    record = inputs.items.at[pl.ds(pl.multiple_of(item * RECORD, RECORD), RECORD)]
    plgpu.copy_gmem_to_smem(record, scratch.work, scratch.work_full)
    plgpu.barrier_wait(scratch.work_full)
    work = scratch.read_work()
    pl.when(work.tile_start < work.tile_stop)(lambda: load_queries(plan, inputs, scratch, work, kv_head))
    rings = scratch.k_codes or scratch.k, scratch.v_codes or scratch.v
    load = functools.partial(load_tile, plan, inputs, inputs.layer[0], rings, work, kv_head)
    num_tiles = work.tile_stop - work.tile_start
    lax.fori_loop(0, num_tiles, load, None)
    for ring in rings:
        drain(ring.empty, plan.config.stages, num_tiles)


def load_queries(plan: PrefillPlan, inputs: Inputs, scratch: Scratch, work: Work, kv_head):
    """Starts the copies of a tile's queries, every warpgroup's rows; rows of no head take the last head's."""
    queries, rows = scratch.rows[0], plan.run * OCTET
    for warpgroup in range(plan.config.warpgroups):
        for octet in range(0, WARPGROUP_ROWS // OCTET, plan.run):
            head, token = octet_at(plan, warpgroup, octet)
            head = kv_head * plan.group + jnp.minimum(head, plan.group - 1)
            source = pl.ds(pl.multiple_of(work.token + token, OCTET), rows)
            target = queries.at[warpgroup, pl.ds(octet * OCTET, rows)]
            plgpu.copy_gmem_to_smem(inputs.query.at[source, head], target, scratch.query_full.at[warpgroup])


def load_tile(plan: PrefillPlan, inputs: Inputs, layer, rings, work: Work, head, index, _):
    """Starts the copies of a tile's pages, one a page; beyond the last page the last one is taken again."""
    slot = lax.rem(index, jnp.int32(plan.config.stages))
    token = (work.tile_start + index) * plan.config.tile_kv
    last_column = div(work.kv_length - 1, plan.page_size)
    sources = (inputs.k_pages, inputs.k_scale), (inputs.v_pages, inputs.v_scale)
    for lot in itertools.batched(range(plan.num_copies), ID_REGISTERS):
        page_ids = []  # all before the first copy: their latencies overlap
        for copy in lot:
            column = jnp.minimum(div(token + copy * plan.copy_rows, plan.page_size), last_column)
            page = inputs.tables[work.row * plan.table_width + column]
            page_ids.append(jnp.clip(page, 0, plan.num_pages - 1))
        for (pages, scale), ring in zip(sources, rings, strict=True):
            if lot[0] == 0:
                pl.when(index >= plan.config.stages)(
                    functools.partial(plgpu.barrier_wait, ring.empty.at[slot])
                )
            for copy, page in zip(lot, page_ids, strict=True):
                place = layer, page, head
                scales = None if scale is None else scale.at[place]
                copy_page(plan, pages.at[place], scales, ring, slot, token, copy)


def copy_page(plan: PrefillPlan, page, scale, ring: Ring, slot, token, copy: int):
    """Starts the copy of a page, or of the part of it that is in the tile, and of its scales."""
    source = pl.ds(0, plan.copy_rows)
    if plan.page_size > plan.copy_rows:
        offset = lax.rem(token, jnp.int32(plan.page_size))
        source = pl.ds(pl.multiple_of(offset, plan.copy_rows), plan.copy_rows)
    rows = pl.ds(copy * plan.copy_rows, plan.copy_rows)
    plgpu.copy_gmem_to_smem(page.at[source], ring.smem.at[slot, rows], ring.full.at[slot])
    if scale is not None:
        mode = plgpu.OOBFillMode.PROMISE_IN_BOUNDS  # not a tensor copy, so that 32 bytes may lie anywhere
        target = ring.scale.at[slot, rows]
        plgpu.copy_gmem_to_smem(scale.at[source], target, ring.full.at[slot], oob_mode=mode)


def widen_unit(plan: PrefillPlan, scratch: Scratch):
    """The widening warpgroup of quantized pages: makes what wgmma reads of the codes that were copied."""
    plgpu.barrier_wait(scratch.work_full)
    work = scratch.read_work()
    num_tiles = work.tile_stop - work.tile_start
    assert scratch.k_codes is not None
    assert scratch.v_codes is not None
    k, v = (scratch.k_codes, scratch.k), (scratch.v_codes, scratch.v)

    def widen_tiles(index, _):
        widen_tile(plan, work, *k, index)
        widen_tile(plan, work, *v, index)

    lax.fori_loop(0, num_tiles, widen_tiles, None)
    for ring in (scratch.k, scratch.v):
        drain(ring.empty, plan.slots, num_tiles)


def widen_tile(plan: PrefillPlan, work: Work, codes: Ring, wide: Ring, index):
    """One tile of K or V: what no query sees, NaN as it may be, becomes zero."""
    tile_kv = plan.config.tile_kv
    source, slot = (lax.rem(index, jnp.int32(size)) for size in (plan.config.stages, plan.slots))
    plgpu.barrier_wait(codes.full.at[source])
    pl.when(index >= plan.slots)(lambda: plgpu.barrier_wait(wide.empty.at[slot]))
    first_key = (work.tile_start + index) * tile_kv
    first, stop = visible_keys(plan, work)
    key = plgpu.broadcasted_iota(jnp.int32, (tile_kv,), 0, layout=plgpu.Layout.WGMMA.reduce(0)) + first_key
    scale = jnp.where((key >= first) & (key < stop), load_columns(codes.scale.at[source]), 0.0)
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
