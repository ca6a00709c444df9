"""FlashAttention forward on Hopper: TMA loads, wgmma, warp specialization (FlashAttention-3, sections 3.1 and
3.2).

A thread block stays on its multiprocessor and works through items: tile_q queries a compute warpgroup, of one
head. One more warpgroup streams queries, keys and values through shared memory by TMA and runs ahead of the
others, into the next item: nothing waits for the first loads of an item, or for the last stores of another.
What happens to one tile is in forward_tile.py.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import num_multiprocessors
from pallas_kernels.flash_attention import halves
from pallas_kernels.flash_attention.extras import Extras, Footprint, prepare
from pallas_kernels.flash_attention.forward_plan import FIRST, ForwardPlan
from pallas_kernels.flash_attention.forward_ring import KeyValueRing
from pallas_kernels.flash_attention.forward_tile import (
    FLOOR,
    Rows,
    Softmax,
    Tile,
    Turn,
    attend_ahead,
    attend_behind,
    attend_first,
    attend_last,
    attend_tile,
    finish_rows,
    skip_tile,
)
from pallas_kernels.flash_attention.forward_work import Work, own_tiles
from pallas_kernels.flash_attention.items import Items, Tickets
from pallas_kernels.flash_attention.operands import Operand
from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.kv_tiles import KvTiles, Steps
from pallas_kernels.mosaic import (
    call_in_place,
    div,
    make_kernel,
    pl,
    plgpu,
    register_zeros,
    rem,
    row_full,
    specialize,
    where,
)
from pallas_kernels.mosaic_copy import load_tile


class Buffers(NamedTuple):
    """Shared memory of a thread block, but for keys and values."""

    q: Any  # [q_stages x warpgroups, tile_q, H], or in blocks of columns
    out: Any  # [q_stages x warpgroups, tile_q, Hv], or such; or None where q's space serves
    lse: Any  # f32[q_stages x warpgroups, tile_q]
    ids: Any  # i32[q_stages x warpgroups, tile_q]: the queries' segment ids; or None


class Barriers(NamedTuple):
    """What the warpgroups wait for, but for keys and values; one a buffer."""

    q_loaded: Any
    q_free: Any  # its queries were used, and the output that took their place was stored
    turn: Any  # one for each of two warpgroups: its turn on the tensor cores has come; or None


def launch(plan: ForwardPlan, inputs: AttentionInputs, query, key, value):
    """Launches the kernel: (out [B, T, N, Hv], lse f32[B, N, T]). The output has the arrays' dtype;
    plan.keeps_fp32: it is fp32.

    A vector is copied without bounds: the log-sum-exp has whole row tiles.
    """
    config = plan.config
    num_buffers = config.q_stages * config.warpgroups
    q, out = (plan.tiles(num_buffers, config.tile_q, dim) for dim in (plan.head_dim, plan.value_dim))
    buffers = Buffers(
        q=q,
        out=None if plan.head_dim == plan.value_dim else out,
        lse=plgpu.SMEM((num_buffers, config.tile_q), jnp.float32),
        ids=plgpu.SMEM((num_buffers, config.tile_q), jnp.int32) if plan.has_segments else None,
    )
    turn = plgpu.Barrier(num_barriers=2) if config.ping_pong else None
    q_loaded = plgpu.Barrier(num_barriers=num_buffers, num_arrivals=1 + plan.has_segments)
    q_free = plgpu.Barrier(num_barriers=num_buffers)
    batch, rows, heads, _ = query.shape
    num_blocks = min(plan.order.num_blocks, num_multiprocessors())
    tickets = Tickets.types(plan) if plan.draws_items else None
    extras = prepare(plan, inputs, Footprint(config.tile_q, config.tile_kv, config.warpgroups))
    out_type = (
        halves.out_type(plan, (batch, rows, heads, value.shape[3])),
        jax.ShapeDtypeStruct((batch, heads, plan.num_row_tiles * plan.block_rows), jnp.float32),
    )
    kernel = make_kernel(
        functools.partial(_forward_body, plan, num_blocks),
        out_type=out_type,
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(buffers, Barriers(q_loaded, q_free, turn), KeyValueRing.types(plan), tickets),
        # Rows are reduced within four lanes, and need no shared memory.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="flash_attention_forward",
    )
    # Keys past a length may be anything: their logits are masked.
    operands = Operand(key), Operand.of(value, inputs.kv_lengths)
    call = functools.partial(kernel, query, *operands, extras)
    if not plan.draws_items:
        out, lse = call(plan.schedule.dealt())
    else:
        _, out, lse = call_in_place(call, jnp.zeros(1, jnp.int32), out_type)
    return halves.join(plan, out), lse


def _forward_body(
    plan: ForwardPlan, num_blocks, q, k, v, extras, table, out, lse, buffers, barriers, ring, tickets
):
    warpgroup = lax.axis_index("warpgroup")
    items = Items(plan, extras, num_blocks, table, tickets)
    specialize(
        plan.config.warpgroups,
        warpgroup,
        compute=lambda: attend_items(plan, warpgroup, items, extras, out, lse, buffers, barriers, ring),
        load=lambda: load_items(plan, items, extras, q, k, v, buffers, barriers, ring),
    )


# --- the loading warpgroup ---


def load_items(
    plan: ForwardPlan,
    items: Items,
    extras: Extras,
    q,
    k: Operand,
    v: Operand,
    buffers: Buffers,
    barriers: Barriers,
    ring: KeyValueRing,
):
    """Keeps q_stages items' queries and `stages` K and V tiles in flight."""
    config = plan.config

    def load_queries(work, turn):
        for warpgroup in range(config.warpgroups):
            buffer = _buffer_of(plan, turn, warpgroup)
            first_row = plan.first_row(work.row_tile, warpgroup)
            first = lax.max(first_row, 0) if plan.num_spare_rows else first_row
            free = functools.partial(plgpu.barrier_wait, barriers.q_free.at[buffer])
            pl.when(turn >= config.q_stages)(free)
            loaded = barriers.q_loaded.at[buffer]
            load_tile(q, (work.batch, first, work.head), buffers.q.at[buffer], loaded)
            if plan.has_segments:
                ids = extras.q_segment_ids.at[work.batch, pl.ds(first, config.tile_q)]
                plgpu.copy_gmem_to_smem(ids, buffers.ids.at[buffer], loaded)

    def load_item(turn, work: Work, position):
        count = work.tiles.stop - work.tiles.start
        kv_head, first_row = div(work.head, plan.group), plan.first_row(work.row_tile, FIRST)

        def tile_of(step):
            place = lax.max(work.tiles.stop - 1 - step, 0)
            return extras.tile_at(place, work.batch, work.head, first_row, config.tile_kv)

        def rows(operand: Operand, tile):
            return operand.rows(work.batch, tile * config.tile_kv, config.tile_kv, kv_head, work.kv_length)

        def load_keys(step, tile):
            ids = extras.kv_segment_ids
            ids = None if ids is None else ids.at[work.batch, pl.ds(tile * config.tile_kv, config.tile_kv)]
            ring.load_keys(position + step, rows(k, tile), ids)

        # Before the wait for a free buffer, which is free when the item before last has been stored.
        first = tile_of(0)
        pl.when(count > 0)(lambda: load_keys(0, first))
        load_queries(work, turn)

        def load_tile(step, tile):
            following = tile_of(step + 1)
            ring.load_values(position + step, rows(v, tile))
            pl.when(step + 1 < count)(lambda: load_keys(step + 1, following))
            return following

        lax.fori_loop(0, count, load_tile, first)
        return position + count

    num_items, stop = items.visit_loading(load_item, jnp.int32(0))
    ring.drain(stop)

    def drain_queries(turn, _):
        for warpgroup in range(config.warpgroups):
            plgpu.barrier_wait(barriers.q_free.at[_buffer_of(plan, turn, warpgroup)])

    lax.fori_loop(lax.max(0, num_items - config.q_stages), num_items, drain_queries, None)


def _buffer_of(plan: ForwardPlan, turn, warpgroup):
    stage = rem(turn, plan.config.q_stages) if plan.config.q_stages > 1 else 0
    return stage * plan.config.warpgroups + warpgroup


# --- a compute warpgroup ---


def attend_items(
    plan: ForwardPlan,
    warpgroup,
    items: Items,
    extras: Extras,
    out,
    lse,
    buffers: Buffers,
    barriers: Barriers,
    ring: KeyValueRing,
):
    """Attends to its rows of each item of the thread block."""
    turn_of = None
    if plan.config.ping_pong:
        turn_of = Turn(barriers.turn.at[warpgroup], barriers.turn.at[1 - warpgroup])
        pl.when(warpgroup == 1)(turn_of.give)

    def attend_item(turn, work: Work, position):
        buffer = _buffer_of(plan, turn, warpgroup)
        plgpu.barrier_wait(barriers.q_loaded.at[buffer])

        def release():
            if plan.config.q_stages > 1:
                pl.when(turn > 0)(lambda: _release_buffer(plan, barriers, turn - 1, warpgroup))

        def rows_of(work: Work) -> Rows:
            place = work.batch, work.head, plan.first_row(work.row_tile, warpgroup)
            ids = None if buffers.ids is None else buffers.ids.at[buffer]
            lengths, queries = (work.q_length, work.kv_length), buffers.q.at[buffer]
            return Rows(*place, *lengths, extras, queries, ids, position)

        own = own_tiles(plan, work, warpgroup, extras)
        acc, softmax = attend_rows(plan, work.tiles, own, rows_of(work), ring, turn_of, release)
        # Found again: where the item stands would take registers from the tiles.
        if plan.draws_items:
            work = items.again(turn, warpgroup)
        out_smem = (buffers.q if buffers.out is None else buffers.out).at[buffer]
        lse_smem = buffers.lse.at[buffer]
        rest = finish_rows(plan, rows_of(work), acc, softmax, out_smem, lse_smem)
        if not plan.draws_items and (plan.config.warpgroups > 2 or plan.config.splits_rows):
            work = items.again(turn, warpgroup)
        first_row = plan.first_row(work.row_tile, warpgroup)
        plgpu.commit_smem()
        is_ours = first_row >= 0 if plan.num_spare_rows else True
        place = work.batch, first_row, work.head

        @pl.when(is_ours)
        def _():
            halves.store(plan, out_smem, out, 0, place)
            to = lse.at[work.batch, work.head, pl.ds(first_row, plan.config.tile_q)]
            plgpu.copy_smem_to_gmem(lse_smem, to)

        for half, part in enumerate(rest, 1):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[...] = part
            plgpu.commit_smem()
            pl.when(is_ours)(functools.partial(halves.store, plan, out_smem, out, half, place))

        if plan.config.q_stages == 1:
            _release_buffer(plan, barriers, turn, warpgroup)
        return position + work.tiles.stop - work.tiles.start

    num_items, _ = items.visit(warpgroup, attend_item, jnp.int32(0))
    if turn_of is not None:
        pl.when(warpgroup == 0)(turn_of.wait)
    if plan.config.q_stages > 1:
        _release_buffer(plan, barriers, num_items - 1, warpgroup)
    plgpu.wait_smem_to_gmem(0)


def _release_buffer(plan: ForwardPlan, barriers: Barriers, turn, warpgroup):
    """Gives the loader an item's buffer, once the copy of its output has been read."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(barriers.q_free.at[_buffer_of(plan, turn, warpgroup)])


def attend_rows(
    plan: ForwardPlan, tiles: KvTiles, own: KvTiles, rows: Rows, ring: KeyValueRing, turn, release
):
    """Online softmax over the block's KV tiles that the rows see (own), from the last to the first: (acc,
    softmax).

    Only the ends of the rows' own range need a mask. That range may be empty. release() frees the buffer of
    the item before, whose output may still be on its way: called late enough not to wait for it.
    """
    config = plan.config
    steps = own.steps_before(tiles.stop)
    skip = functools.partial(skip_tile, ring, rows, turn)
    tile = Tile(plan, ring, rows, tiles.stop - 1, turn)
    acc = register_zeros((config.tile_q, plan.value_columns))
    softmax = Softmax(row_full(config.tile_q, FLOOR), row_full(config.tile_q, 0.0))
    if plan.has_idle_tiles:
        lax.fori_loop(0, steps.start, skip, None)
    attend = _attend_overlapped if config.overlap else _attend_in_order
    acc, softmax = attend(plan, steps, tile, acc, softmax, release)
    if plan.has_masked_first:
        lax.fori_loop(steps.stop, tiles.stop - tiles.start, skip, None)
    if turn is not None:
        pl.when(tiles.start < tiles.stop)(turn.give)
    return acc, softmax


def _attend_in_order(plan: ForwardPlan, steps: Steps, tile: Tile, acc, softmax: Softmax, release):
    attend = functools.partial(attend_tile, tile)
    masked = functools.partial(attend, masked=True)
    carry = (acc, softmax)
    if plan.has_masked_end:
        carry = lax.fori_loop(steps.start, steps.masked_stop, masked, carry)
    release()
    carry = lax.fori_loop(steps.masked_stop, steps.full_stop, attend, carry)
    if plan.has_masked_first:
        carry = lax.fori_loop(steps.full_stop, steps.stop, masked, carry)
    return carry


def _attend_overlapped(plan: ForwardPlan, steps: Steps, tile: Tile, acc, softmax: Softmax, release):
    """As _attend_in_order, the softmax always one tile ahead (FlashAttention-3, algorithm 2)."""
    second = lax.min(steps.start + 1, steps.stop)
    masked_stop = lax.max(steps.masked_stop, second)
    full_stop = lax.max(steps.full_stop, second)
    weights16 = register_zeros((plan.config.tile_q, plan.config.tile_kv)).astype(plan.dtype)
    first_masked = plan.has_masked_end or plan.has_masked_first
    if plan.has_block_mask:  # element masks are in global memory, and most lists end with whole tiles
        first_masked = (steps.start < steps.masked_stop) | (steps.start >= steps.full_stop)
    first = functools.partial(attend_first, tile, masked=first_masked)
    attend = functools.partial(attend_ahead, tile)
    masked = functools.partial(attend_ahead if plan.value_dim <= 128 else attend_behind, tile, masked=True)
    softmax, weights16 = _once(plan, steps, steps.start, first, (softmax, weights16))
    release()
    carry = (acc, softmax, weights16)
    if plan.has_masked_end and plan.is_cut_once(plan.config.tile_q, plan.config.tile_kv):
        masked_stop = second
    elif plan.has_masked_end:
        carry = lax.fori_loop(second, masked_stop, masked, carry)
    carry = lax.fori_loop(masked_stop, full_stop, attend, carry)
    if plan.has_masked_first:
        carry = lax.fori_loop(full_stop, steps.stop, masked, carry)
    acc, softmax, weights16 = carry
    last = functools.partial(attend_last, tile, weights16)
    return _once(plan, steps, steps.stop - 1, last, acc), softmax


def _once(plan: ForwardPlan, steps: Steps, step, attend, carry):
    """attend(step, carry), unless there is no tile.

    A loop of one pass lets the assembler move less than a branch (T = 4,096 at H = 64, causal, three
    warpgroups: 502 and 497 TFLOP/s; H = 256, full: 717 and, with 28 bytes spilled, 692), but the branch
    begins sooner, which tells where items are short (an eighth of all blocks: 600 and 607).
    """
    if plan.has_block_mask:
        return lax.cond(
            steps.start < steps.stop, lambda carry: attend(step, carry), lambda carry: carry, carry
        )
    return lax.fori_loop(where(steps.start < steps.stop, step, step + 1), step + 1, attend, carry)
