"""FlashAttention forward on Hopper: TMA loads, wgmma, warp specialization (FlashAttention-3, sections 3.1 and
3.2).

A thread block owns tile_q queries a compute warpgroup and one head; one more warpgroup streams K and V tiles
through shared memory by TMA. Two compute warpgroups take turns: while one does its softmax, the tensor cores
work for the other.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.tiles import KvTiles, TileOrder, kv_tiles, visible_keys
from pallas_kernels.mosaic import (
    LOG2_E,
    broadcast_rows,
    pl,
    plgpu,
    register_zeros,
    row_full,
    row_iota,
    specialize,
    swizzled_smem,
)

FLOOR = -1e30  # the running maximum before a key was seen: finite, so that no difference is NaN


class ForwardPlan(AttentionPlan):
    """AttentionPlan, and what follows from the forward kernel's tiles."""

    @property
    def block_rows(self) -> int:
        return self.config.tile_q * self.config.warpgroups

    @property
    def num_row_tiles(self) -> int:
        return math.ceil(self.num_queries / self.block_rows)

    @property
    def has_masked_tail(self) -> bool:
        """Whether the last KV tiles of some rows need a mask."""
        ragged = self.has_kv_lengths or self.num_keys % self.config.tile_kv > 0
        return ragged or self.reach[1] is not None

    @property
    def has_idle_tiles(self) -> bool:
        """Whether a warpgroup may see fewer KV tiles than its thread block."""
        ragged = self.has_q_lengths or self.num_queries % self.block_rows > 0
        return ragged or self.reach != (None, None)

    @property
    def order(self) -> TileOrder:
        return TileOrder.plan(
            num_tiles=self.num_row_tiles,
            num_heads=self.batch * self.num_heads,
            heads_per_kv=self.group,
            kv_bytes=self.num_keys * self.token_bytes,
        )


class Buffers(NamedTuple):
    """Shared memory of a thread block."""

    q: Any  # [warpgroups, tile_q, H]
    k: Any  # [stages, tile_kv, H]
    v: Any  # [stages, tile_kv, Hv]
    out: Any  # [warpgroups, tile_q, Hv], or None where q's space serves
    lse: Any  # f32[warpgroups, tile_q]


class Barriers(NamedTuple):
    """What the warpgroups wait for."""

    q_loaded: Any
    k_loaded: Any
    v_loaded: Any
    k_consumed: Any
    v_consumed: Any
    turn: Any  # whose turn the tensor cores are, or None


class Work(NamedTuple):
    """Where a thread block stands."""

    batch: Any
    head: Any
    kv_head: Any
    first_row: Any
    q_length: Any
    kv_length: Any
    tiles: KvTiles  # those any warpgroup of the block sees


def launch(plan: ForwardPlan, query, key, value, *lengths):
    """Launches the kernel: (out [B, T, N, Hv], lse f32[B, N, T]); T and S come padded to multiples of 8.

    A vector is copied without bounds: the log-sum-exp has whole row tiles.
    """
    config = plan.config
    q_shape = (config.warpgroups, config.tile_q, plan.head_dim)
    out_shape = (config.warpgroups, config.tile_q, plan.value_dim)
    kv_stages = (config.stages, config.tile_kv)
    out_smem = None if plan.head_dim == plan.value_dim else swizzled_smem(out_shape, plan.dtype)
    buffers = Buffers(
        q=swizzled_smem(q_shape, plan.dtype),
        k=swizzled_smem((*kv_stages, plan.head_dim), plan.dtype),
        v=swizzled_smem((*kv_stages, plan.value_dim), plan.dtype),
        out=out_smem,
        lse=plgpu.SMEM((config.warpgroups, config.tile_q), jnp.float32),
    )
    loaded = plgpu.Barrier(num_barriers=config.stages)
    consumed = plgpu.Barrier(num_barriers=config.stages, num_arrivals=config.warpgroups)
    turn = plgpu.Barrier(num_arrivals=2) if config.ping_pong else None
    barriers = Barriers(
        plgpu.Barrier(num_barriers=config.warpgroups), loaded, loaded, consumed, consumed, turn
    )
    batch, rows, heads, _ = query.shape
    return plgpu.kernel(
        functools.partial(_forward_body, plan),
        out_type=(
            jax.ShapeDtypeStruct((batch, rows, heads, plan.value_dim), plan.dtype),
            jax.ShapeDtypeStruct((batch, heads, plan.num_row_tiles * plan.block_rows), jnp.float32),
        ),
        grid=(plan.order.num_blocks,),
        grid_names=("block",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(buffers, barriers),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="flash_attention_forward",
    )(query, key, value, *lengths)


def _forward_body(plan: ForwardPlan, q, k, v, *refs):
    *lengths, out, lse, buffers, barriers = refs
    config = plan.config
    warpgroup = lax.axis_index("warpgroup")
    work = _find_work(plan, lengths)
    specialize(
        config.warpgroups,
        warpgroup,
        compute=lambda: attend_rows(plan, work, warpgroup, q, out, lse, buffers, barriers),
        load=lambda: stream_tiles(plan, work, k, v, buffers, barriers),
    )


def _find_work(plan: ForwardPlan, lengths) -> Work:
    tile, batch_head = plan.order.locate(lax.axis_index("block"))
    batch, head = plan.split_heads(batch_head, plan.num_heads)
    q_length, kv_length = plan.lengths_of(batch, lengths)
    first_row = tile * plan.block_rows
    tiles = _tiles_of_rows(plan, first_row, plan.block_rows, q_length, kv_length)
    return Work(batch, head, lax.div(head, jnp.int32(plan.group)), first_row, q_length, kv_length, tiles)


def _tiles_of_rows(plan: ForwardPlan, first_row, num_rows: int, q_length, kv_length) -> KvTiles:
    offset = plan.offset(q_length, kv_length)
    return kv_tiles(first_row, num_rows, offset, q_length, kv_length, plan.reach, plan.config.tile_kv)


def stream_tiles(plan: ForwardPlan, work: Work, k, v, buffers: Buffers, barriers: Barriers):
    """The loading warpgroup: keeps `stages` K and V tiles in flight."""
    config, tiles = plan.config, work.tiles

    def load(tile, _):
        index = tile - tiles.start
        slot = lax.rem(index, jnp.int32(config.stages))
        source = (work.batch, pl.ds(tile * config.tile_kv, config.tile_kv), work.kv_head)
        for gmem, smem, loaded, consumed in (
            (k, buffers.k, barriers.k_loaded, barriers.k_consumed),
            (v, buffers.v, barriers.v_loaded, barriers.v_consumed),
        ):
            pl.when(index >= config.stages)(functools.partial(plgpu.barrier_wait, consumed.at[slot]))
            plgpu.copy_gmem_to_smem(gmem.at[source], smem.at[slot], loaded.at[slot])

    lax.fori_loop(tiles.start, tiles.stop, load, None)

    def drain(tile, _):
        slot = lax.rem(tile - tiles.start, jnp.int32(config.stages))
        plgpu.barrier_wait(barriers.k_consumed.at[slot])
        plgpu.barrier_wait(barriers.v_consumed.at[slot])

    # Every arrival is seen before the block ends.
    lax.fori_loop(jnp.maximum(tiles.start, tiles.stop - config.stages), tiles.stop, drain, None)


def attend_rows(plan: ForwardPlan, work: Work, warpgroup, q, out, lse, buffers: Buffers, barriers: Barriers):
    """A compute warpgroup: online softmax over the KV tiles that its tile_q rows see."""
    config = plan.config
    first_row = work.first_row + warpgroup * config.tile_q
    rows = pl.ds(first_row, config.tile_q)
    own = _tiles_of_rows(plan, first_row, config.tile_q, work.q_length, work.kv_length)
    tiles = work.tiles
    q_smem, lse_smem = buffers.q.at[warpgroup], buffers.lse.at[warpgroup]
    plgpu.copy_gmem_to_smem(q.at[work.batch, rows, work.head], q_smem, barriers.q_loaded.at[warpgroup])
    plgpu.barrier_wait(barriers.q_loaded.at[warpgroup])
    pl.when(tiles.stop > tiles.start)(functools.partial(plgpu.barrier_wait, barriers.k_loaded.at[0]))
    if config.ping_pong:
        pl.when(warpgroup == 1)(functools.partial(_take_turn, barriers))

    skip = functools.partial(_skip_tile, plan, tiles, barriers)
    attend = functools.partial(_attend_tile, plan, work, first_row, q_smem, buffers, barriers)
    carry = (
        register_zeros((config.tile_q, plan.value_dim)),
        row_full(config.tile_q, FLOOR),
        row_full(config.tile_q, 0.0),
    )
    # The rows' own range lies within the block's. Only its ends need a mask.
    own = own.clamp(tiles)
    masked = functools.partial(attend, masked=True)
    if plan.reach[0] is not None:
        lax.fori_loop(tiles.start, own.start, skip, None)
        carry = lax.fori_loop(own.start, own.full_start, masked, carry)
    carry = lax.fori_loop(own.full_start, own.full_stop, attend, carry)
    if plan.has_masked_tail:
        carry = lax.fori_loop(own.full_stop, own.stop, masked, carry)
    if plan.has_idle_tiles:
        lax.fori_loop(own.stop, tiles.stop, skip, None)
    if config.ping_pong:
        pl.when(warpgroup == 0)(functools.partial(_take_turn, barriers))

    acc, row_max, row_sum = carry
    live = row_sum > 0
    if plan.has_q_lengths:
        live = live & (first_row + row_iota(config.tile_q) < work.q_length)
    norm = jnp.where(live, 1 / row_sum, 0.0)
    out_smem = q_smem if buffers.out is None else buffers.out.at[warpgroup]
    out_smem[...] = jnp.where(
        broadcast_rows(live, plan.value_dim), acc * broadcast_rows(norm, plan.value_dim), 0.0
    ).astype(plan.dtype)
    lse_smem[...] = jnp.where(live, (row_max + jnp.log2(row_sum)) * (1 / LOG2_E), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out.at[work.batch, rows, work.head])
    plgpu.copy_smem_to_gmem(lse_smem, lse.at[work.batch, work.head, rows])
    plgpu.wait_smem_to_gmem(0)


def _take_turn(barriers: Barriers):
    plgpu.barrier_arrive(barriers.turn)
    plgpu.barrier_wait(barriers.turn)


def _skip_tile(plan: ForwardPlan, tiles: KvTiles, barriers: Barriers, tile, _):
    """Releases a tile that other warpgroups of the block use and this one does not."""
    slot = lax.rem(tile - tiles.start, jnp.int32(plan.config.stages))
    plgpu.barrier_wait(barriers.v_loaded.at[slot])
    _wait_next_keys(plan, tiles, barriers, tile)
    plgpu.barrier_arrive(barriers.k_consumed.at[slot])
    plgpu.barrier_arrive(barriers.v_consumed.at[slot])
    if plan.config.ping_pong:
        _take_turn(barriers)
        _take_turn(barriers)


def _wait_next_keys(plan: ForwardPlan, tiles: KvTiles, barriers: Barriers, tile):
    """Whoever enters tile i has already waited for its keys."""
    slot = lax.rem(tile + 1 - tiles.start, jnp.int32(plan.config.stages))
    pl.when(tile + 1 < tiles.stop)(lambda: plgpu.barrier_wait(barriers.k_loaded.at[slot]))


def _attend_tile(
    plan: ForwardPlan,
    work: Work,
    first_row,
    q_smem,
    buffers: Buffers,
    barriers: Barriers,
    tile,
    carry,
    masked=False,
):
    config = plan.config
    acc, row_max, row_sum = carry
    slot = lax.rem(tile - work.tiles.start, jnp.int32(config.stages))

    def multiply_keys(logits_acc):
        plgpu.wgmma(logits_acc, q_smem, buffers.k.at[slot].transpose((1, 0)))
        if config.ping_pong:
            _take_turn(barriers)  # our matmul is queued: the other warpgroup may queue its own
        return logits_acc[...]

    logits = pl.run_scoped(multiply_keys, plgpu.ACC((config.tile_q, config.tile_kv), jnp.float32))
    plgpu.barrier_arrive(barriers.k_consumed.at[slot])

    scale = plan.scale * LOG2_E  # exp2 is the hardware's exponential
    if plan.logits_soft_cap is not None:
        logits = jnp.tanh(logits * (plan.scale / plan.logits_soft_cap))
        scale = plan.logits_soft_cap * LOG2_E
    if masked:
        logits = jnp.where(
            visible_keys(
                first_row,
                tile * config.tile_kv,
                logits.shape,
                plan.offset(work.q_length, work.kv_length),
                work.kv_length,
                plan.reach,
            ),
            logits,
            -jnp.inf,
        )

    # The scale is applied where the maximum is subtracted: one fused multiply-add an element.
    new_max = jnp.maximum(row_max, logits.max(axis=1) * scale)
    alpha = jnp.exp2(row_max - new_max)
    weights = jnp.exp2(logits * scale - broadcast_rows(new_max, config.tile_kv))
    acc *= broadcast_rows(alpha, plan.value_dim)
    row_sum *= alpha
    weights16 = weights.astype(plan.dtype)

    def end_softmax():
        if config.ping_pong:
            plgpu.barrier_arrive(barriers.turn)
        plgpu.barrier_wait(barriers.v_loaded.at[slot])
        if config.ping_pong:
            plgpu.barrier_wait(barriers.turn)

    # At 64 x 256 accumulators the sum would hold the weights' registers across the barrier.
    if plan.value_dim <= 128:
        row_sum += weights.sum(axis=1)
        acc, row_sum, new_max, weights16 = lax.optimization_barrier((acc, row_sum, new_max, weights16))
        end_softmax()
    else:
        end_softmax()
        row_sum += weights.sum(axis=1)

    def multiply_values(acc_ref):
        plgpu.wgmma(acc_ref, weights16, buffers.v.at[slot])
        _wait_next_keys(plan, work.tiles, barriers, tile)

    acc = pl.run_state(multiply_values)(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(barriers.v_consumed.at[slot])
    return acc, new_max, row_sum
