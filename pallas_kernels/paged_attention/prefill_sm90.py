"""Paged prefill for Hopper: ragged queries of many rows against K and V in their pages.

The forward pass of FlashAttention-3 (warp specialization, section 3.1), where a tile of queries is a work
item computed from the batch: (row, tokens, KV tiles). A tile holds tokens x query heads of one KV head, so
that a row of few tokens still fills the 64 rows of a wgmma, and each K and V tile serves the whole group. A
thread block is a unit of work (item, KV head); the loading warpgroup issues one TMA copy a page, the page ids
read from the block table.

TMA moves eights of tokens. So tiles start at multiples of eight tokens of the batch, wherever rows start:
tokens of other rows are computed and dropped. A tile that is all its row's leaves by TMA as it lies in the
swizzled memory; any other goes row by row.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.tiles import KvTiles
from pallas_kernels.mosaic import (
    LOG2_E,
    broadcast_rows,
    div,
    pl,
    plgpu,
    register_zeros,
    row_full,
    row_iota,
    specialize,
)
from pallas_kernels.paged_attention.prefill_config import OCTET, WARPGROUP_ROWS
from pallas_kernels.paged_attention.prefill_plan import (
    Inputs,
    Outputs,
    PrefillPlan,
    Ring,
    Scratch,
    Work,
    WorkList,
    scratch_types,
    visible_tiles,
)
from pallas_kernels.paged_attention.spec import PagedInputs
from pallas_kernels.paged_attention.units import drain

FLOOR = -1e30  # the running maximum before a key was seen: finite, so that no difference is NaN
RECORD = len(Work._fields)
ID_REGISTERS = 8  # page ids that the loading warpgroup's few registers hold


def launch(plan: PrefillPlan, inputs: PagedInputs, work: WorkList) -> Outputs:
    """Runs the kernel on query [tokens, N, H], tokens a multiple of OCTET; tokens of no item stay
    unwritten."""
    config = plan.config
    unit_rows = (plan.max_items, plan.num_kv_heads, config.warpgroups, WARPGROUP_ROWS)
    out = jax.ShapeDtypeStruct((plan.num_tokens, plan.num_heads, plan.head_dim), plan.dtype)
    if config.splits > 1:
        out = jax.ShapeDtypeStruct((*unit_rows, plan.head_dim), jnp.float32)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=[out, jax.ShapeDtypeStruct(unit_rows, jnp.float32)],
        grid=(plan.max_items * plan.num_kv_heads,),
        grid_names=("unit",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=[scratch_types(plan)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_prefill",
    )
    tables = inputs.block_tables.astype(jnp.int32).reshape(-1)
    pages = inputs.k_pages, inputs.v_pages
    return Outputs(
        *kernel(inputs.query, *pages, tables, inputs.layer[None], work.items.reshape(-1), work.num_items)
    )


def _kernel(plan: PrefillPlan, *refs):
    inputs, outputs, scratch = Inputs(*refs[:7]), Outputs(*refs[7:9]), refs[9]
    warpgroup, unit = lax.axis_index("warpgroup"), lax.axis_index("unit")
    item, kv_head = div(unit, plan.num_kv_heads), lax.rem(unit, jnp.int32(plan.num_kv_heads))

    @pl.when(item < inputs.num_items[0])
    def _():
        specialize(
            plan.config.warpgroups,
            warpgroup,
            compute=lambda: attend_unit(plan, warpgroup, item, kv_head, outputs, scratch),
            load=lambda: stream_unit(plan, item, kv_head, inputs, scratch),
        )


def read_work(scratch: Scratch) -> Work:
    return Work(*(scratch.work[field] for field in range(RECORD)))


def octet_at(plan: PrefillPlan, warpgroup, octet):
    """(head of the group, first token in the tile) of an octet of a warpgroup's rows."""
    index = warpgroup * (WARPGROUP_ROWS // OCTET) + octet
    return div(index, plan.head_octets), lax.rem(index, jnp.int32(plan.head_octets)) * OCTET


# --- the loading warpgroup


def stream_unit(plan: PrefillPlan, item, kv_head, inputs: Inputs, scratch: Scratch):
    """Loads the unit's record and queries, then keeps the rings of K and V filled."""
    record = inputs.items.at[pl.ds(pl.multiple_of(item * RECORD, RECORD), RECORD)]
    plgpu.copy_gmem_to_smem(record, scratch.work, scratch.work_full)
    plgpu.barrier_wait(scratch.work_full)
    work = read_work(scratch)
    pl.when(work.tile_start < work.tile_stop)(lambda: load_queries(plan, inputs, scratch, work, kv_head))
    load = functools.partial(load_tile, plan, inputs, inputs.layer[0], scratch, work, kv_head)
    num_tiles = work.tile_stop - work.tile_start
    lax.fori_loop(0, num_tiles, load, None)
    drain(scratch.k.empty, plan.config.stages, num_tiles)
    drain(scratch.v.empty, plan.config.stages, num_tiles)


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


def load_tile(plan: PrefillPlan, inputs: Inputs, layer, scratch: Scratch, work: Work, head, index, _):
    """Starts the copies of a tile's pages, one a page; beyond the last page the last one is taken again."""
    slot = lax.rem(index, jnp.int32(plan.config.stages))
    token = (work.tile_start + index) * plan.config.tile_kv
    last_column = div(work.kv_length - 1, plan.page_size)
    for lot in itertools.batched(range(plan.num_copies), ID_REGISTERS):
        page_ids = []  # all before the first copy: their latencies overlap
        for copy in lot:
            column = jnp.minimum(div(token + copy * plan.copy_rows, plan.page_size), last_column)
            page = inputs.tables[work.row * plan.table_width + column]
            page_ids.append(jnp.clip(page, 0, plan.num_pages - 1))
        for pages, ring in ((inputs.k_pages, scratch.k), (inputs.v_pages, scratch.v)):
            if lot[0] == 0:
                pl.when(index >= plan.config.stages)(
                    functools.partial(plgpu.barrier_wait, ring.empty.at[slot])
                )
            for copy, page in zip(lot, page_ids, strict=True):
                copy_page(plan, pages.at[layer, page, head], ring, slot, token, copy)


def copy_page(plan: PrefillPlan, page, ring: Ring, slot, token, copy: int):
    """Starts one copy: a page, or the part of it that is in the tile."""
    if plan.page_size > plan.copy_rows:
        offset = lax.rem(token, jnp.int32(plan.page_size))
        page = page.at[pl.ds(pl.multiple_of(offset, plan.copy_rows), plan.copy_rows)]
    rows = pl.ds(copy * plan.copy_rows, plan.copy_rows)
    plgpu.copy_gmem_to_smem(page, ring.smem.at[slot, rows], ring.full.at[slot])


# --- a compute warpgroup
#
# Its accumulators leave few registers: fields of the work record are read again where they are used.


def attend_unit(plan: PrefillPlan, warpgroup, item, kv_head, outputs: Outputs, scratch: Scratch):
    """Online softmax over the KV tiles that the queries see; only the ends of their range need a mask."""
    plgpu.barrier_wait(scratch.work_full)
    work = read_work(scratch)
    num_tiles = work.tile_stop - work.tile_start

    @pl.when(num_tiles > 0)
    def _():
        plgpu.barrier_wait(scratch.query_full.at[warpgroup])
        plgpu.barrier_wait(scratch.k.full.at[0])

    own = KvTiles(*(tile - work.tile_start for tile in visible_tiles(plan, work, warpgroup)))
    attend = functools.partial(attend_tile, plan, warpgroup, scratch, num_tiles)
    masked = functools.partial(attend, masked=True)
    skip = functools.partial(skip_tile, plan, warpgroup, scratch, num_tiles)
    carry = (
        register_zeros((WARPGROUP_ROWS, plan.head_dim)),
        row_full(WARPGROUP_ROWS, FLOOR),
        row_full(WARPGROUP_ROWS, 0.0),
    )
    if plan.spec.window_left is not None:
        if plan.has_own_ranges:
            lax.fori_loop(0, own.start, skip, None)
        carry = lax.fori_loop(own.start, own.full_start, masked, carry)
    carry = lax.fori_loop(own.full_start, own.full_stop, attend, carry)
    carry = lax.fori_loop(own.full_stop, own.stop, masked, carry)
    if plan.has_own_ranges:
        lax.fori_loop(own.stop, num_tiles, skip, None)
    store_unit(plan, warpgroup, item, kv_head, carry, outputs, scratch)


def wait_next_keys(plan: PrefillPlan, scratch: Scratch, index, num_tiles):
    """Whoever enters a tile has already waited for its keys."""
    slot = lax.rem(index + 1, jnp.int32(plan.config.stages))
    pl.when(index + 1 < num_tiles)(lambda: plgpu.barrier_wait(scratch.k.full.at[slot]))


def skip_tile(plan: PrefillPlan, warpgroup, scratch: Scratch, num_tiles, index, _):
    """Releases a tile that other warpgroups use and this one does not."""
    slot = lax.rem(index, jnp.int32(plan.config.stages))
    plgpu.barrier_wait(scratch.v.full.at[slot])
    zero_invisible(plan, warpgroup, scratch, index, slot)
    wait_next_keys(plan, scratch, index, num_tiles)
    plgpu.barrier_arrive(scratch.k.empty.at[slot])
    plgpu.barrier_arrive(scratch.v.empty.at[slot])


def attend_tile(plan: PrefillPlan, warpgroup, scratch: Scratch, num_tiles, index, carry, masked=False):
    config, spec = plan.config, plan.spec
    values, maximum, total = carry
    slot = lax.rem(index, jnp.int32(config.stages))
    if masked:  # before the accumulators are full
        plgpu.barrier_wait(scratch.v.full.at[slot])
        zero_invisible(plan, warpgroup, scratch, index, slot)

    def multiply_keys(logits_ref):
        plgpu.wgmma(logits_ref, scratch.rows[0].at[warpgroup], scratch.k.smem.at[slot].transpose((1, 0)))
        return logits_ref[...]

    logits = pl.run_scoped(multiply_keys, plgpu.ACC((WARPGROUP_ROWS, config.tile_kv), jnp.float32))
    plgpu.barrier_arrive(scratch.k.empty.at[slot])
    scale = spec.scale * LOG2_E  # exp2 is the hardware's exponential
    if spec.logits_soft_cap is not None:
        logits = jnp.tanh(logits * (spec.scale / spec.logits_soft_cap))
        scale = spec.logits_soft_cap * LOG2_E
    if masked:
        visible = visible_keys(plan, warpgroup, read_work(scratch), index, logits.shape)
        logits = jnp.where(visible, logits, -jnp.inf)

    # The scale is applied where the maximum is subtracted: one fused multiply-add an element.
    new_maximum = jnp.maximum(maximum, logits.max(axis=1) * scale)
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(logits * scale - broadcast_rows(new_maximum, config.tile_kv))
    values *= broadcast_rows(decay, plan.head_dim)
    total *= decay
    weights16 = weights.astype(plan.dtype)
    if plan.head_dim <= 128:
        total += weights.sum(axis=1)
        values, total, new_maximum, weights16 = lax.optimization_barrier(
            (values, total, new_maximum, weights16)
        )
    if not masked:
        plgpu.barrier_wait(scratch.v.full.at[slot])
    # At 64 x 256 accumulators the sum would hold the weights' registers across the barrier.
    if plan.head_dim > 128:
        total += weights.sum(axis=1)

    def multiply_values(values_ref):
        plgpu.wgmma(values_ref, weights16, scratch.v.smem.at[slot])
        wait_next_keys(plan, scratch, index, num_tiles)

    values: Any = pl.run_state(multiply_values)(plgpu.ACC.init(values))
    plgpu.barrier_arrive(scratch.v.empty.at[slot])
    return values, new_maximum, total


def visible_keys(plan: PrefillPlan, warpgroup, work: Work, index, shape):
    """bool[rows, keys] of a tile, laid out as a wgmma accumulator."""
    row = row_iota(shape[0])
    _, first_token = octet_at(plan, warpgroup, lax.div(row, jnp.int32(OCTET)))
    position = work.token + first_token + lax.rem(row, jnp.int32(OCTET)) + work.offset
    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    key += (work.tile_start + index) * plan.config.tile_kv
    last = jnp.minimum(position if plan.spec.is_causal else position + 2**29, work.kv_length - 1)
    visible = key <= broadcast_rows(last, shape[1])
    if plan.spec.window_left is not None:
        visible &= key >= broadcast_rows(position - plan.spec.window_left, shape[1])
    return visible


def zero_invisible(plan: PrefillPlan, warpgroup, scratch: Scratch, index, slot):
    """Zeroes the values that no query sees: their weights are zero, but what lies there may be NaN.

    The warpgroups share the work, and wait for each other.
    """
    work, tile_kv = read_work(scratch), plan.config.tile_kv
    first_key = (work.tile_start + index) * tile_kv
    first_visible = jnp.int32(0)
    if plan.spec.window_left is not None:
        first_visible = work.first + work.offset - plan.spec.window_left

    def zero(index, row, column):
        part = scratch.v.smem.at[slot, pl.ds(row, 64), pl.ds(column, 64)]

        @pl.when(warpgroup == index % plan.config.warpgroups)
        def _():
            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            key = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=plgpu.Layout.WGMMA) + first_key + row
            is_visible = (key >= first_visible) & (key < work.kv_length)
            part[...] = jnp.where(is_visible, values, jnp.zeros_like(values))

    @pl.when((first_key < first_visible) | (first_key + tile_kv > work.kv_length))
    def _():
        blocks = itertools.product(range(0, tile_kv, 64), range(0, plan.head_dim, 64))
        for index, (row, column) in enumerate(blocks):
            zero(index, row, column)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.zeroed)
        plgpu.barrier_wait(scratch.zeroed)


def store_unit(plan: PrefillPlan, warpgroup, item, kv_head, carry, outputs: Outputs, scratch: Scratch):
    """A unit's results to global memory."""
    values, maximum, total = carry
    live = total > 0
    lse = jnp.where(live, (maximum + jnp.log2(total)) * (1 / LOG2_E), -jnp.inf)
    outputs.lse[item, kv_head, warpgroup] = lse
    values *= broadcast_rows(jnp.where(live, 1 / total, 0.0), plan.head_dim)
    if plan.config.splits > 1:
        outputs.out[item, kv_head, warpgroup] = values
        return
    values = values.astype(plan.dtype)
    work = read_work(scratch)
    is_whole = (work.first == work.token) & (work.stop == work.token + plan.tile_q)
    _, swizzled, plain = (view.at[warpgroup] for view in scratch.rows)

    @pl.when(is_whole)
    def _():
        swizzled[...] = values
        plgpu.commit_smem()
        store_runs(plan, warpgroup, kv_head, work, swizzled, outputs.out)

    @pl.when(jnp.logical_not(is_whole))
    def _():
        plain[...] = values
        plgpu.commit_smem()
        store_rows(plan, warpgroup, kv_head, work, plain, outputs.out)

    plgpu.wait_smem_to_gmem(0)


def store_runs(plan: PrefillPlan, warpgroup, kv_head, work: Work, rows, out):
    """A tile that holds tokens of its row only: a copy a run of octets."""
    for octet in range(0, WARPGROUP_ROWS // OCTET, plan.run):
        head, token = octet_at(plan, warpgroup, octet)
        target = pl.ds(pl.multiple_of(work.token + token, OCTET), plan.run * OCTET)
        source = rows.at[pl.ds(octet * OCTET, plan.run * OCTET)]

        @pl.when(head < plan.group)
        def _(source=source, target=target, head=head):
            plgpu.copy_smem_to_gmem(source, out.at[target, kv_head * plan.group + head])


def store_rows(plan: PrefillPlan, warpgroup, kv_head, work: Work, rows, out):
    """A tile that shares its octets with other rows: a copy a token and head, of its own tokens only."""

    def store(row, _):
        head, token = octet_at(plan, warpgroup, div(row, OCTET))
        token += work.token + lax.rem(row, jnp.int32(OCTET))

        @pl.when((head < plan.group) & (token >= work.first) & (token < work.stop))
        def _():
            plgpu.copy_smem_to_gmem(
                rows.at[pl.ds(row, 1)], out.at[pl.ds(token, 1), kv_head * plan.group + head]
            )

    lax.fori_loop(0, WARPGROUP_ROWS, store, None)
