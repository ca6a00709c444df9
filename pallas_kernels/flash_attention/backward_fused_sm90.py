"""FlashAttention backward on Hopper in one kernel of 5 matmuls; the order of dQ's sums is not fixed.

A thread block owns a tile of keys and values, half of it each compute warpgroup, and streams the queries of
every head of the group. dK and dV are summed in registers. dS of both halves meets in shared memory; each
warpgroup multiplies half of dQ's tile, which the copy engine adds to fp32 sums in global memory
(FlashAttention-3, section 3.1; FlashAttention-2, section 3.2).

    S^T = K Q^T,  P = exp(S - lse),  dP^T = V dO^T,  dS = P * (dP - delta)
    dV = P^T dO,  dK = scale dS^T Q,  dQ += scale dS K
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.extras import Extras, Footprint, prepare
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.scores import TilePlace, weigh
from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.flash_attention.tiles import KvTiles, TileOrder, kv_tiles
from pallas_kernels.mosaic import (
    broadcast_columns,
    opaque,
    pl,
    plgpu,
    register_zeros,
    specialize,
    swizzled_smem,
    traced,
)

WARPGROUPS = 2  # that compute
HALF = 64  # keys of each: the rows of a wgmma
PART = 64  # queries that are in registers at a time
BLOCK_KEYS = WARPGROUPS * HALF


class Buffers(NamedTuple):
    """Shared memory of a thread block."""

    k: Any  # [2, 64, H]
    v: Any  # [2, 64, Hv]
    q: Any  # [stages, tile_q, H]
    d_out: Any  # [stages, tile_q, Hv]
    lse: Any  # f32[stages, tile_q]
    delta: Any  # f32[stages, tile_q]
    d_logits: Any  # [2 tiles in turn, 2, 64, tile_q]: dS^T of each warpgroup's keys
    d_q: Any  # f32[2, rows, columns]: each warpgroup's part of dQ's tile


class Barriers(NamedTuple):
    """What the warpgroups wait for."""

    k_loaded: Any
    v_loaded: Any
    loaded: Any  # a tile of queries, output cotangents and their statistics
    consumed: Any
    d_logits_written: Any
    finished: Any


class Block(NamedTuple):
    """Where a thread block stands."""

    batch: Any
    kv_head: Any
    first_key: Any
    q_length: Any
    kv_length: Any
    tiles: KvTiles  # of queries


def serves(plan: AttentionPlan, inputs: AttentionInputs) -> bool:
    """Whether the config asks for this kernel, the head dims suit it, and it knows what the call asks."""
    fused = plan.config.fused
    if plan.has_segments or plan.has_block_mask or plan.dropout_rate > 0:
        return False
    if inputs.bias is not None or inputs.alibi_slopes is not None:
        return False
    if plan.reach[0] is not None or plan.logits_soft_cap is not None:
        return False
    if plan.group > 1 and plan.head_dim > 64:  # the loop over heads takes registers: 236 bytes of spills
        return False
    return fused is not None and plan.head_dim == plan.value_dim == (64 if fused.tile_q == 128 else 128)


def statistics_multiple(plan: AttentionPlan) -> int:
    """What T must be a multiple of in lse2 and delta."""
    return plan.fused.tile_q


def launch(plan: AttentionPlan, inputs: AttentionInputs, query, key, value, out_grad, lse2, delta):
    """dQ [B, T, N, H], dK [B, S, K, H], dV [B, S, K, Hv] in the inputs' dtype; arguments as the
    deterministic kernels have them, with lse2 and delta padded to statistics_multiple.
    """
    config = plan.fused
    extras = prepare(plan, inputs, Footprint(HALF, config.tile_q, WARPGROUPS, owns_queries=False))
    order = TileOrder.plan(
        num_tiles=math.ceil(plan.num_keys / BLOCK_KEYS),
        num_heads=plan.batch * plan.num_kv_heads,
        heads_per_kv=1,
        kv_bytes=plan.num_queries * plan.group * (plan.token_bytes + 4 * plan.head_dim),
        heavy_last=False,
    )
    d_query = jax.new_ref(jnp.zeros(query.shape, jnp.float32))
    d_key, d_value = plgpu.kernel(
        functools.partial(_body, plan, order),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)),
        grid=(order.num_blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=(_buffers(plan, config), _barriers(config)),
        # Barriers around every store would cost a fifth of the causal speed; nothing is read back.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="flash_attention_backward",
    )(query, key, value, out_grad, lse2, delta, d_query, extras)
    return (jax.freeze(d_query) * plan.scale).astype(plan.dtype), d_key, d_value


def _buffers(plan: AttentionPlan, config) -> Buffers:
    owned, streamed = (WARPGROUPS, HALF), (config.stages, config.tile_q)
    statistic = plgpu.SMEM(streamed, jnp.float32)
    return Buffers(
        k=swizzled_smem((*owned, plan.head_dim), plan.dtype),
        v=swizzled_smem((*owned, plan.value_dim), plan.dtype),
        q=swizzled_smem((*streamed, plan.head_dim), plan.dtype),
        d_out=swizzled_smem((*streamed, plan.value_dim), plan.dtype),
        lse=statistic,
        delta=statistic,
        d_logits=swizzled_smem((2, *owned, config.tile_q), plan.dtype),
        d_q=swizzled_smem((WARPGROUPS, *_part_of_dq(plan)), jnp.float32),
    )


def _barriers(config) -> Barriers:
    loaded = plgpu.Barrier(num_barriers=config.stages, num_arrivals=4)
    consumed = plgpu.Barrier(num_barriers=config.stages, num_arrivals=WARPGROUPS)
    owned = plgpu.Barrier(num_arrivals=WARPGROUPS)
    written = plgpu.Barrier(num_barriers=2, num_arrivals=WARPGROUPS)
    return Barriers(owned, owned, loaded, consumed, written, owned)


def _part_of_dq(plan: AttentionPlan) -> tuple[int, int]:
    """(rows, columns) of dQ's tile that one warpgroup multiplies."""
    tile_q = plan.fused.tile_q
    return (HALF, plan.head_dim) if tile_q == 2 * HALF else (tile_q, plan.head_dim // 2)


def _body(plan: AttentionPlan, order: TileOrder, *refs):
    q, k, v, d_out, lse2, delta, d_q, extras, d_k, d_v, buffers, barriers = refs
    warpgroup = lax.axis_index("warpgroup")
    tile, batch_head = order.locate(lax.axis_index("block"))
    batch, kv_head = plan.split_heads(batch_head, plan.num_kv_heads)
    q_length, kv_length = plan.lengths_of(batch, extras)
    first_key = tile * BLOCK_KEYS
    tiles = _tiles(plan, first_key, q_length, kv_length)
    block = traced(Block(batch, kv_head, first_key, q_length, kv_length, tiles))
    specialize(
        WARPGROUPS,
        warpgroup,
        compute=lambda: _compute(plan, block, extras, warpgroup, (d_q, d_k, d_v), buffers, barriers),
        load=lambda: _load(plan, block, (q, k, v, d_out, lse2, delta), buffers, barriers),
    )


def _tiles(plan: AttentionPlan, first_key, q_length, kv_length) -> KvTiles:
    """The tiles of queries that see the block's keys. Queries past the end are zeros and need no mask."""
    _, right = plan.reach
    offset = -plan.offset(q_length, kv_length)
    tile_q = plan.fused.tile_q
    tiles = kv_tiles(
        first_key, BLOCK_KEYS, offset, kv_length, q_length, (right, None), tile_q, mask_end=False
    )
    if not plan.has_ragged_keys:
        return tiles
    # Keys past the end have weights too, which would reach dQ: a block that has some masks every tile.
    full_stop = jnp.where(first_key + BLOCK_KEYS > kv_length, tiles.full_start, tiles.full_stop)
    return tiles._replace(full_stop=full_stop)


# --- The loading warpgroup ---


def _load(plan: AttentionPlan, block: Block, sources, buffers: Buffers, barriers: Barriers):
    q, k, v, d_out, lse2, delta = sources
    config, tiles = plan.fused, block.tiles
    per_head = tiles.stop - tiles.start
    for gmem, smem, loaded in ((k, buffers.k, barriers.k_loaded), (v, buffers.v, barriers.v_loaded)):
        for half in range(WARPGROUPS):
            keys = pl.ds(block.first_key + half * HALF, HALF)
            plgpu.copy_gmem_to_smem(gmem.at[block.batch, keys, block.kv_head], smem.at[half], loaded)

    def load_head(group, _):
        head = block.kv_head * plan.group + group

        def load(tile, _):
            index = group * per_head + tile - tiles.start
            slot = lax.rem(index, jnp.int32(config.stages))
            rows = pl.ds(tile * config.tile_q, config.tile_q)
            by_row, by_head = (block.batch, rows, head), (block.batch, head, rows)
            pl.when(index >= config.stages)(lambda: plgpu.barrier_wait(barriers.consumed.at[slot]))
            for source, target in (
                (q.at[by_row], buffers.q),
                (lse2.at[by_head], buffers.lse),
                (d_out.at[by_row], buffers.d_out),
                (delta.at[by_head], buffers.delta),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], barriers.loaded.at[slot])

        lax.fori_loop(tiles.start, tiles.stop, load, None)

    _for_each_head(plan, load_head)

    def drain(index, _):
        slot = lax.rem(index, jnp.int32(config.stages))
        plgpu.barrier_wait(barriers.consumed.at[slot])

    # Every arrival is seen before the block ends.
    total = plan.group * per_head
    lax.fori_loop(jnp.maximum(0, total - config.stages), total, drain, None)


def _for_each_head(plan: AttentionPlan, attend_head):
    if plan.group > 1:
        lax.fori_loop(0, plan.group, attend_head, None)
    else:
        attend_head(0, None)


# --- The computing warpgroups ---


class Step(NamedTuple):
    """What a warpgroup needs to take one tile of queries."""

    plan: AttentionPlan
    block: Block
    extras: Extras
    warpgroup: Any
    head: Any
    first_index: Any  # of the head's tile 0, counted over all tiles of the block
    d_q: Any
    buffers: Buffers
    barriers: Barriers

    def slot(self, tile):
        return lax.rem(self.first_index + tile, jnp.int32(self.plan.fused.stages))

    def turn(self, tile):
        """Which of the two buffers of dS a tile uses."""
        return lax.rem(self.first_index + tile, jnp.int32(2))


def _compute(
    plan: AttentionPlan,
    block: Block,
    extras: Extras,
    warpgroup,
    outputs,
    buffers: Buffers,
    barriers: Barriers,
):
    d_q, d_k, d_v = outputs
    tiles = block.tiles
    plgpu.barrier_wait(barriers.k_loaded)
    plgpu.barrier_wait(barriers.v_loaded)

    def attend(sums):
        def attend_head(group, _):
            first_index = group * (tiles.stop - tiles.start) - tiles.start
            head = block.kv_head * plan.group + group
            step = Step(plan, block, extras, warpgroup, head, first_index, d_q, buffers, barriers)
            _attend_head(step, sums)

        _for_each_head(plan, attend_head)

    zeros = tuple(plgpu.ACC.init(register_zeros((HALF, dim))) for dim in (plan.head_dim, plan.value_dim))
    sum_dk, sum_dv = pl.run_state(attend)(zeros)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(barriers.finished)  # no one reads the keys any more
    plgpu.barrier_wait(barriers.finished)
    keys = pl.ds(block.first_key + warpgroup * HALF, HALF)
    staging = buffers.k.at[warpgroup], buffers.v.at[warpgroup]
    staging[0][...] = (sum_dk * plan.scale).astype(plan.dtype)
    staging[1][...] = sum_dv.astype(plan.dtype)
    plgpu.commit_smem()
    for smem, output in zip(staging, (d_k, d_v), strict=True):
        plgpu.copy_smem_to_gmem(smem, output.at[block.batch, keys, block.kv_head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _attend_head(step: Step, sums):
    plan, tiles = step.plan, step.block.tiles
    masks = plan.reach[1] is not None or plan.has_ragged_keys
    second = jnp.minimum(tiles.start + 1, tiles.stop)
    full_start, full_stop = jnp.maximum(tiles.full_start, second), jnp.maximum(tiles.full_stop, second)
    take = functools.partial(_take_tile, step, sums)
    lax.fori_loop(tiles.start, second, functools.partial(take, masked=masks, is_first=True), None)
    if plan.reach[1] is not None:
        lax.fori_loop(second, full_start, functools.partial(take, masked=True), None)
    lax.fori_loop(full_start if plan.reach[1] is not None else second, full_stop, take, None)
    if plan.has_ragged_keys:
        lax.fori_loop(full_stop, tiles.stop, functools.partial(take, masked=True), None)
    lax.fori_loop(
        jnp.maximum(tiles.start, tiles.stop - 1), tiles.stop, functools.partial(_finish_head, step), None
    )


def _take_tile(step: Step, sums, tile, _, masked=False, is_first=False):
    """Adds a tile of queries to dK and dV, writes its dS, and multiplies dQ of the tile before it, of which
    the other warpgroup has long written its half of dS.
    """
    step = step._replace(warpgroup=opaque(step.warpgroup))
    plan, buffers, barriers = step.plan, step.buffers, step.barriers
    slot = step.slot(tile)
    parts = plan.fused.tile_q // PART
    plgpu.barrier_wait(barriers.loaded.at[slot])
    d_logits = []
    for part in range(parts):
        d_logits.append(_differentiate_logits(step, sums[1], tile, part, masked))
        if part < parts - 1:
            plgpu.wgmma(sums[0], d_logits[part], buffers.q.at[slot, _part(part)])

    def add_dk():
        plgpu.wgmma(sums[0], d_logits[-1], buffers.q.at[slot, _part(parts - 1)])

    if is_first:
        add_dk()
        _publish(step, tile, d_logits)
    else:
        plgpu.barrier_wait(barriers.d_logits_written.at[step.turn(tile - 1)])

        def multiply(acc):
            _multiply_dq(step, acc, tile - 1)
            add_dk()
            return plgpu.wgmma_accumulator_load(acc, wait_n=1)

        d_q = pl.run_scoped(multiply, plgpu.ACC(_part_of_dq(plan), jnp.float32))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        buffers.d_q.at[step.warpgroup][...] = d_q
        _publish(step, tile, d_logits)
        _add_dq(step, tile - 1)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(barriers.consumed.at[slot])


def _differentiate_logits(step: Step, sum_dv, tile, part: int, masked: bool):
    """dS^T of our keys and a part of the tile's queries, in 16 bits; adds to dV on the way."""
    plan, buffers = step.plan, step.buffers
    slot, rows = step.slot(tile), _part(part)
    queries, d_outs = buffers.q.at[slot, rows], buffers.d_out.at[slot, rows]
    place = TilePlace(
        step.block.batch,
        step.head,
        tile * plan.fused.tile_q + part * PART,
        step.block.first_key + step.warpgroup * HALF,
        step.block.q_length,
        step.block.kv_length,
        (HALF, PART),
        keys_first=True,
        hides_tail=plan.has_ragged_keys,
    )

    def differentiate(logits_acc, d_weights_acc):
        plgpu.wgmma(logits_acc, buffers.k.at[step.warpgroup], queries.transpose((1, 0)))
        plgpu.wgmma(d_weights_acc, buffers.v.at[step.warpgroup], d_outs.transpose((1, 0)))
        lse2 = _by_column(buffers.lse.at[slot, rows])
        logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
        weights = lax.optimization_barrier(
            weigh(plan, step.extras, place, logits, lse2, masked).values.astype(plan.dtype)
        )
        plgpu.wgmma(sum_dv, weights, d_outs)
        delta = _by_column(buffers.delta.at[slot, rows])
        d_weights = plgpu.wgmma_accumulator_load(d_weights_acc, wait_n=1)
        # Rounded weights take half the registers while dP is on its way.
        return (weights.astype(jnp.float32) * (d_weights - delta)).astype(plan.dtype)

    acc_type = plgpu.ACC((HALF, PART), jnp.float32)
    return pl.run_scoped(differentiate, acc_type, acc_type)


def _part(part: int):
    return pl.ds(part * PART, PART)


def _by_column(statistic):
    return broadcast_columns(plgpu.load(statistic, layout=plgpu.Layout.WGMMA.reduce(0)), HALF)


def _publish(step: Step, tile, d_logits):
    """Shows dS of our keys to the other warpgroup."""
    turn = step.turn(tile)
    for part, values in enumerate(d_logits):
        step.buffers.d_logits.at[turn, step.warpgroup, :, _part(part)][...] = values
    plgpu.commit_smem()
    plgpu.barrier_arrive(step.barriers.d_logits_written.at[turn])


def _multiply_dq(step: Step, acc, tile):
    """acc += dS K, our part of the tile's rows or columns."""
    plan, buffers = step.plan, step.buffers
    turn = step.turn(tile)
    rows, columns = _part_of_dq(plan)
    for half in range(WARPGROUPS):
        half = opaque(half)
        d_logits, keys = buffers.d_logits.at[turn, half], buffers.k.at[half]
        if rows < plan.fused.tile_q:
            d_logits = d_logits.at[:, pl.ds(step.warpgroup * rows, rows)]
        else:
            keys = keys.at[:, pl.ds(step.warpgroup * columns, columns)]
        plgpu.wgmma(acc, d_logits.transpose((1, 0)), keys)


def _add_dq(step: Step, tile):
    """Lets the copy engine add our part of dQ to the sums in global memory."""
    plan = step.plan
    rows, columns = _part_of_dq(plan)
    first_row, first_column = tile * plan.fused.tile_q, 0
    if rows < plan.fused.tile_q:
        first_row += step.warpgroup * rows
    else:
        first_column = step.warpgroup * columns
    target = step.d_q.at[step.block.batch, pl.ds(first_row, rows), step.head, pl.ds(first_column, columns)]
    plgpu.copy_smem_to_gmem(step.buffers.d_q.at[step.warpgroup], target, reduction_op="add")


def _finish_head(step: Step, tile, _):
    """What the last tile of a head left open."""

    plgpu.barrier_wait(step.barriers.d_logits_written.at[step.turn(tile)])

    def multiply(acc):
        _multiply_dq(step, acc, tile)
        return acc[...]

    d_q = pl.run_scoped(multiply, plgpu.ACC(_part_of_dq(step.plan), jnp.float32))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    step.buffers.d_q.at[step.warpgroup][...] = d_q
    plgpu.commit_smem()
    _add_dq(step, tile)
