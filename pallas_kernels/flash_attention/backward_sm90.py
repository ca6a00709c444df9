"""FlashAttention backward on Hopper, in two kernels that redo the logits: same inputs, same bits.

One kernel owns tiles of keys and values, streams the queries of every head of the group and sums dK and dV;
the other owns tiles of queries, streams keys and values and sums dQ (FlashAttention-2, section 3.1; together
7 matmuls, where one kernel that adds dQ into global memory takes 5). Nothing is stored but the results: the
logits are recomputed from the log-sum-exp of the forward pass.

    P = exp(S - lse),  dP = dO V^T,  dS = P * (dP - delta),  delta = rowsum(dO * O) - d lse
    dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.config import GradientConfig
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.streams import Ends, Owned, Stream, run_tiles
from pallas_kernels.flash_attention.tiles import KvTiles, TileOrder, kv_tiles, visible_keys
from pallas_kernels.mosaic import (
    LOG2_E,
    broadcast_columns,
    broadcast_rows,
    pl,
    plgpu,
    register_zeros,
    row_iota,
    specialize,
)


def statistics_multiple(plan: AttentionPlan) -> int:
    """What T must be a multiple of in lse2 and delta: vectors are copied without bounds, in whole tiles."""
    dq, dkv = plan.config.dq, plan.config.dkv
    return math.lcm(dq.own * dq.warpgroups, dkv.other)


def launch(plan: AttentionPlan, query, key, value, out_grad, lse2, delta, *lengths):
    """dQ [B, T, N, H], dK [B, S, K, H], dV [B, S, K, Hv] in the inputs' dtype.

    lse2 f32[B, N, T] is the log-sum-exp in base 2, +inf for rows that see nothing; delta f32[B, N, T] as
    above; both padded to statistics_multiple.
    """
    arrays = (query, key, value, out_grad, lse2, delta, *lengths)
    (d_query,) = _launch(plan, plan.config.dq, _dq_body, "dq", plan.num_queries, (query,), arrays)
    if plan.config.dkv_passes == 1:
        d_key, d_value = _launch(plan, plan.config.dkv, _dkv_body, "dkv", plan.num_keys, (key, value), arrays)
    else:  # both accumulators do not fit in registers
        (d_key,) = _launch(plan, plan.config.dkv, _dkv_body, "dk", plan.num_keys, (key,), arrays)
        (d_value,) = _launch(plan, plan.config.dkv, _dkv_body, "dv", plan.num_keys, (value,), arrays)
    return d_query, d_key, d_value


def _launch(plan: AttentionPlan, config: GradientConfig, body, which: str, num_rows: int, like, arrays):
    owns_queries = which == "dq"
    num_heads = plan.num_heads if owns_queries else plan.num_kv_heads
    streamed = plan.num_keys if owns_queries else plan.num_queries * plan.group
    order = TileOrder.plan(
        num_tiles=math.ceil(num_rows / (config.own * config.warpgroups)),
        num_heads=plan.batch * num_heads,
        heads_per_kv=plan.group if owns_queries else 1,
        kv_bytes=streamed * plan.token_bytes,
        heavy_last=owns_queries,
    )
    return plgpu.kernel(
        functools.partial(body, plan, order, which),
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like),
        grid=(order.num_blocks,),
        grid_names=("block",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(
            Owned.types(plan, config, with_statistics=owns_queries),
            Stream.types(plan, config, with_statistics=not owns_queries),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"flash_attention_{which}",
    )(*arrays)


class Block(NamedTuple):
    """Where a thread block, or one of its warpgroups, stands."""

    batch: Any
    head: Any  # of the owned rows: a query head in the dq kernel, a KV head in the dk,dv kernel
    first_row: Any
    q_length: Any
    kv_length: Any
    tiles: KvTiles  # of the streamed operands


def _weights(plan: AttentionPlan, logits, lse2, visible):
    """P = exp(S - lse) from Q K^T, and dS / (P (dP - delta)) where a soft cap bends the logits, else None."""
    slope, scale = None, plan.scale * LOG2_E
    if plan.logits_soft_cap is not None:
        logits = jnp.tanh(logits * (plan.scale / plan.logits_soft_cap))
        slope, scale = 1 - logits * logits, plan.logits_soft_cap * LOG2_E
    weights = jnp.exp2(logits * scale - lse2)
    if visible is not None:
        weights = jnp.where(visible, weights, 0.0)
    return weights, slope


def _matmul(x, y, shape):
    """x @ y of shared memory, into registers."""

    def multiply(acc):
        plgpu.wgmma(acc, x, y)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _add_matmul(acc, x, y):
    """acc + x @ y, x in registers."""
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, x, y))(plgpu.ACC.init(acc))


# --- dQ: owns queries, streams keys and values ---


def _dq_body(plan: AttentionPlan, order: TileOrder, which: str, *refs):
    q, k, v, d_out, lse2, delta, *lengths, d_q, owned, stream = refs
    config = plan.config.dq
    warpgroup = lax.axis_index("warpgroup")
    tile, batch_head = order.locate(lax.axis_index("block"))
    batch, head = plan.split_heads(batch_head, plan.num_heads)
    q_length, kv_length = plan.lengths_of(batch, lengths)
    rows = config.own * config.warpgroups
    tiles = _keys_of(plan, tile * rows, rows, q_length, kv_length)
    block = Block(batch, head, tile * rows, q_length, kv_length, tiles)
    specialize(
        config.warpgroups,
        warpgroup,
        compute=lambda: _dq_rows(plan, block, warpgroup, (q, d_out, lse2, delta), d_q, owned, stream),
        load=lambda: _dq_stream(plan, block, k, v, stream),
    )


def _keys_of(plan: AttentionPlan, first_row, num_rows: int, q_length, kv_length) -> KvTiles:
    offset = plan.offset(q_length, kv_length)
    return kv_tiles(first_row, num_rows, offset, q_length, kv_length, plan.reach, plan.config.dq.other)


def _dq_stream(plan: AttentionPlan, block: Block, k, v, stream: Stream):
    config, tiles = plan.config.dq, block.tiles
    kv_head = lax.div(block.head, jnp.int32(plan.group))

    def load(tile, _):
        slot = lax.rem(tile - tiles.start, jnp.int32(config.stages))
        pl.when(tile - tiles.start >= config.stages)(lambda: stream.wait_consumed(slot))
        source = (block.batch, pl.ds(tile * config.other, config.other), kv_head)
        stream.load(slot, k.at[source], v.at[source])

    lax.fori_loop(tiles.start, tiles.stop, load, None)
    first_unseen = jnp.maximum(tiles.start, tiles.stop - config.stages)
    drain = lambda tile, _: stream.wait_consumed(lax.rem(tile - tiles.start, jnp.int32(config.stages)))
    lax.fori_loop(first_unseen, tiles.stop, drain, None)


def _dq_rows(plan: AttentionPlan, block: Block, warpgroup, sources, d_q, owned: Owned, stream: Stream):
    config = plan.config.dq
    owned = owned.at(warpgroup)
    first_row = block.first_row + warpgroup * config.own
    rows = pl.ds(first_row, config.own)
    q, d_out, lse2, delta = sources
    by_row, by_head = (block.batch, rows, block.head), (block.batch, block.head, rows)
    owned.load(q.at[by_row], d_out.at[by_row], lse2.at[by_head], delta.at[by_head])
    statistics = [
        broadcast_rows(plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)), config.other)
        for ref in (owned.lse, owned.delta)
    ]
    own = _keys_of(plan, first_row, config.own, block.q_length, block.kv_length)
    step = functools.partial(_dq_tile, plan, block, first_row, statistics, owned, stream)
    skip = lambda tile, _: stream.skip(lax.rem(tile - block.tiles.start, jnp.int32(config.stages)))
    ragged = plan.has_kv_lengths or plan.num_keys % config.other > 0
    idle = plan.has_q_lengths or plan.num_queries % (config.own * config.warpgroups) > 0
    ends = Ends(plan.reach[0] is not None, plan.reach[1] is not None or ragged, idle)
    acc = register_zeros((config.own, plan.head_dim))
    acc = run_tiles(block.tiles, own, step, skip, acc, ends)
    owned.first[...] = (acc * plan.scale).astype(plan.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(owned.first, d_q.at[by_row])
    plgpu.wait_smem_to_gmem(0)


def _dq_tile(
    plan: AttentionPlan,
    block: Block,
    first_row,
    statistics,
    owned: Owned,
    stream: Stream,
    tile,
    acc,
    masked=False,
):
    config = plan.config.dq
    lse2, delta = statistics
    shape = (config.own, config.other)
    slot = lax.rem(tile - block.tiles.start, jnp.int32(config.stages))
    visible = None
    if masked:
        offset = plan.offset(block.q_length, block.kv_length)
        visible = visible_keys(first_row, tile * config.other, shape, offset, block.kv_length, plan.reach)
    stream.wait_loaded(slot)

    def multiply(logits_acc, d_weights_acc):
        plgpu.wgmma(logits_acc, owned.first, stream.first.at[slot].transpose((1, 0)))
        plgpu.wgmma(d_weights_acc, owned.second, stream.second.at[slot].transpose((1, 0)))
        weights, slope = _weights(plan, plgpu.wgmma_accumulator_load(logits_acc, wait_n=1), lse2, visible)
        return weights, slope, d_weights_acc[...]

    acc_type = plgpu.ACC(shape, jnp.float32)
    weights, slope, d_weights = pl.run_scoped(multiply, acc_type, acc_type)
    d_logits = weights * (d_weights - delta)
    if slope is not None:
        d_logits *= slope
    acc = _add_matmul(acc, d_logits.astype(plan.dtype), stream.first.at[slot])
    stream.release(slot)
    return acc


# --- dK and dV: owns keys and values, streams queries; all matrices are transposed, keys first ---


def _dkv_body(plan: AttentionPlan, order: TileOrder, which: str, *refs):
    num_outputs = 2 if which == "dkv" else 1
    q, k, v, d_out, lse2, delta, *rest = refs
    *rest, owned, stream = rest
    lengths, outputs = rest[:-num_outputs], rest[-num_outputs:]
    config = plan.config.dkv
    warpgroup = lax.axis_index("warpgroup")
    tile, batch_head = order.locate(lax.axis_index("block"))
    batch, kv_head = plan.split_heads(batch_head, plan.num_kv_heads)
    q_length, kv_length = plan.lengths_of(batch, lengths)
    rows = config.own * config.warpgroups
    tiles = _queries_of(plan, tile * rows, rows, q_length, kv_length)
    block = Block(batch, kv_head, tile * rows, q_length, kv_length, tiles)
    specialize(
        config.warpgroups,
        warpgroup,
        compute=lambda: _dkv_rows(plan, which, block, warpgroup, (k, v), outputs, owned, stream),
        load=lambda: _dkv_stream(plan, block, (q, d_out, lse2, delta), stream),
    )


def _queries_of(plan: AttentionPlan, first_key, num_keys: int, q_length, kv_length) -> KvTiles:
    """The mirror image of _keys_of. Queries past the end are zeros and need no mask."""
    left, right = plan.reach
    offset = -plan.offset(q_length, kv_length)
    reach = (right, left)
    return kv_tiles(
        first_key, num_keys, offset, kv_length, q_length, reach, plan.config.dkv.other, mask_end=False
    )


def _dkv_stream(plan: AttentionPlan, block: Block, sources, stream: Stream):
    config, tiles = plan.config.dkv, block.tiles
    q, d_out, lse2, delta = sources
    per_head = tiles.stop - tiles.start

    def load_head(group, _):
        head = block.head * plan.group + group

        def load(tile, _):
            index = group * per_head + tile - tiles.start
            slot = lax.rem(index, jnp.int32(config.stages))
            pl.when(index >= config.stages)(lambda: stream.wait_consumed(slot))
            rows = pl.ds(tile * config.other, config.other)
            by_row, by_head = (block.batch, rows, head), (block.batch, head, rows)
            stream.load(slot, q.at[by_row], d_out.at[by_row], lse2.at[by_head], delta.at[by_head])

        lax.fori_loop(tiles.start, tiles.stop, load, None)

    if plan.group > 1:
        lax.fori_loop(0, plan.group, load_head, None)
    else:
        load_head(0, None)
    total = plan.group * per_head
    drain = lambda index, _: stream.wait_consumed(lax.rem(index, jnp.int32(config.stages)))
    lax.fori_loop(jnp.maximum(0, total - config.stages), total, drain, None)


def _dkv_rows(
    plan: AttentionPlan, which: str, block: Block, warpgroup, sources, outputs, owned: Owned, stream
):
    config, tiles = plan.config.dkv, block.tiles
    owned = owned.at(warpgroup)
    first_key = block.first_row + warpgroup * config.own
    by_row = (block.batch, pl.ds(first_key, config.own), block.head)
    owned.load(*(source.at[by_row] for source in sources))
    own = _queries_of(plan, first_key, config.own, block.q_length, block.kv_length)
    idle = plan.has_kv_lengths or plan.num_keys % (config.own * config.warpgroups) > 0
    ends = Ends(plan.reach[1] is not None, plan.reach[0] is not None, idle)
    per_head = tiles.stop - tiles.start

    def attend_head(group, carry):
        first_index = group * per_head - tiles.start
        slot_of = lambda tile: lax.rem(first_index + tile, jnp.int32(config.stages))
        step = functools.partial(_dkv_tile, plan, which, block, first_key, slot_of, owned, stream)
        skip = lambda tile, _: stream.skip(slot_of(tile))
        return run_tiles(tiles, own, step, skip, carry, ends)

    dims = {"dkv": (plan.head_dim, plan.value_dim), "dk": (plan.head_dim,), "dv": (plan.value_dim,)}[which]
    carry = tuple(register_zeros((config.own, dim)) for dim in dims)
    carry = lax.fori_loop(0, plan.group, attend_head, carry) if plan.group > 1 else attend_head(0, carry)
    live = None
    if plan.has_kv_lengths:
        live = first_key + row_iota(config.own) < block.kv_length
    scales = {"dkv": (plan.scale, 1.0), "dk": (plan.scale,), "dv": (1.0,)}[which]
    staging = {"dkv": (owned.first, owned.second), "dk": (owned.first,), "dv": (owned.second,)}[which]
    for acc, scale, smem in zip(carry, scales, staging, strict=True):
        if live is not None:
            acc = jnp.where(broadcast_rows(live, acc.shape[1]), acc, 0.0)
        smem[...] = (acc * scale).astype(plan.dtype)
    plgpu.commit_smem()
    for smem, output in zip(staging, outputs, strict=True):
        plgpu.copy_smem_to_gmem(smem, output.at[by_row])
    plgpu.wait_smem_to_gmem(0)


def _dkv_tile(
    plan: AttentionPlan,
    which: str,
    block: Block,
    first_key,
    slot_of,
    owned: Owned,
    stream: Stream,
    tile,
    carry,
    masked=False,
):
    config = plan.config.dkv
    shape = (config.own, config.other)
    slot = slot_of(tile)
    visible = None
    if masked:
        left, right = plan.reach
        offset = -plan.offset(block.q_length, block.kv_length)
        visible = visible_keys(first_key, tile * config.other, shape, offset, None, (right, left))
    by_column = plgpu.Layout.WGMMA.reduce(0)
    queries, out_grads = stream.first.at[slot], stream.second.at[slot]

    def weigh(logits):
        lse2 = broadcast_columns(plgpu.load(stream.lse.at[slot], layout=by_column), config.own)
        return _weights(plan, logits, lse2, visible)

    stream.wait_loaded(slot)
    if which == "dv":
        weights, _ = weigh(_matmul(owned.first, queries.transpose((1, 0)), shape))
        accumulate = lambda refs: plgpu.wgmma(refs[0], weights.astype(plan.dtype), out_grads)
    else:

        def multiply(logits_acc, d_weights_acc):
            plgpu.wgmma(logits_acc, owned.first, queries.transpose((1, 0)))
            plgpu.wgmma(d_weights_acc, owned.second, out_grads.transpose((1, 0)))
            weights, slope = weigh(plgpu.wgmma_accumulator_load(logits_acc, wait_n=1))
            return weights, slope, d_weights_acc[...]

        acc_type = plgpu.ACC(shape, jnp.float32)
        weights, slope, d_weights = pl.run_scoped(multiply, acc_type, acc_type)

        delta = broadcast_columns(plgpu.load(stream.delta.at[slot], layout=by_column), config.own)
        d_logits = weights * (d_weights - delta)
        if slope is not None:
            d_logits *= slope

        def accumulate(refs):
            if which == "dkv":
                plgpu.wgmma(refs[1], weights.astype(plan.dtype), out_grads)
            plgpu.wgmma(refs[0], d_logits.astype(plan.dtype), queries)

    carry = pl.run_state(accumulate)(tuple(plgpu.ACC.init(acc) for acc in carry))
    plgpu.commit_smem()  # our reads of the statistics come before the copies that replace them
    stream.release(slot)
    return carry
