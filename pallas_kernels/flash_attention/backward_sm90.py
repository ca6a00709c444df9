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

from pallas_kernels.flash_attention.extras import Extras, Footprint, prepare
from pallas_kernels.flash_attention.operands import backward_operands
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.scores import TilePlace, logit_gradients, weigh
from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.flash_attention.streams import Ends, Owned, Stream, run_tiles
from pallas_kernels.flash_attention.tiles import NO_TILES, KvTiles, TileOrder, kv_tiles
from pallas_kernels.mosaic import (
    broadcast_rows,
    make_kernel,
    opaque,
    pl,
    plgpu,
    register_zeros,
    row_iota,
    specialize,
)
from pallas_kernels.mosaic_inline import load_by_column


def statistics_multiple(plan: AttentionPlan) -> int:
    """What T must be a multiple of in lse2 and delta: vectors are copied without bounds, in whole tiles."""
    dq, dkv = plan.config.dq, plan.config.dkv
    return math.lcm(dq.own * dq.warpgroups, dkv.other)


def launch(plan: AttentionPlan, inputs: AttentionInputs, query, key, value, out_grad, lse2, delta):
    """dQ [B, T, N, H], dK [B, S, K, H], dV [B, S, K, Hv] in the inputs' dtype.

    query, key and value are those of the inputs, padded; lse2 f32[B, N, T] is the log-sum-exp in base 2, +inf
    for rows that see nothing; delta f32[B, N, T] as above; both padded to statistics_multiple.
    """
    arrays = (query, key, value, out_grad, lse2, delta)
    (d_query,) = _launch(plan, inputs, "dq", (query,), arrays)
    if plan.config.dkv_passes == 1:
        d_key, d_value = _launch(plan, inputs, "dkv", (key, value), arrays)
    else:  # both accumulators do not fit in registers
        (d_key,) = _launch(plan, inputs, "dk", (key,), arrays)
        (d_value,) = _launch(plan, inputs, "dv", (value,), arrays)
    return d_query, d_key, d_value


def _launch(plan: AttentionPlan, inputs: AttentionInputs, which: str, like, arrays):
    owns_queries = which == "dq"
    body, config = (_dq_body, plan.config.dq) if owns_queries else (_dkv_body, plan.config.dkv)
    num_rows = plan.num_queries if owns_queries else plan.num_keys
    *operands, lse2, delta = arrays
    q_tile, kv_tile = (config.own, config.other) if owns_queries else (config.other, config.own)
    operands = backward_operands(inputs, *operands, q_tile=q_tile, kv_tile=kv_tile)
    extras = prepare(plan, inputs, Footprint(config.own, config.other, config.warpgroups, owns_queries))
    num_heads = plan.num_heads if owns_queries else plan.num_kv_heads
    order = TileOrder.plan(
        num_tiles=math.ceil(num_rows / (config.own * config.warpgroups)),
        num_heads=plan.batch * num_heads,
        section=plan.group if owns_queries else 1,
        is_uneven=plan.is_uneven,
        heavy_last=owns_queries,
    )
    return make_kernel(
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
    )(*operands, lse2, delta, extras)


class Block(NamedTuple):
    """Where a thread block, or one of its warpgroups, stands."""

    batch: Any
    head: Any  # of the owned rows: a query head in the dq kernel, a KV head in the dk,dv kernel
    first_row: Any
    q_length: Any
    kv_length: Any
    tiles: KvTiles  # of the streamed operands
    extras: Extras

    def ids_of(self, ids, first_row, num_rows: int) -> tuple[Any, ...]:
        """Segment ids of some rows: none where there are no segments."""
        return () if ids is None else (ids.at[self.batch, pl.ds(first_row, num_rows)],)


def _opaque(warpgroup, owned: Owned, slot):
    """(warpgroup, its rows, slot) of one tile: descriptors of shared memory are computed where they are used,
    instead of once, in registers that live through the loop.
    """
    warpgroup = opaque(warpgroup)
    return warpgroup, owned.at(warpgroup), opaque(slot)


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
    q, k, v, d_out, lse2, delta, extras, d_q, owned, stream = refs
    config = plan.config.dq
    warpgroup = lax.axis_index("warpgroup")
    tile, batch_head = order.locate(lax.axis_index("block"))
    batch, head = plan.split_heads(batch_head, plan.num_heads)
    tile = extras.own_tile(batch, tile)
    q_length, kv_length = plan.lengths_of(batch, extras)
    rows = config.own * config.warpgroups
    first_row = tile * rows - plan.spare_rows(config.own, config.warpgroups)
    block = Block(batch, head, first_row, q_length, kv_length, NO_TILES, extras)
    block = block._replace(tiles=_keys_of(plan, block, block.first_row, config.warpgroups))
    specialize(
        config.warpgroups,
        warpgroup,
        compute=lambda: _dq_rows(plan, block, warpgroup, (q, d_out, lse2, delta), d_q, owned, stream),
        load=lambda: _dq_stream(plan, block, k, v, stream),
    )


def _keys_of(plan: AttentionPlan, block: Block, first_row, count: int) -> KvTiles:
    """What `count` warpgroups' rows see."""
    config, q_length, kv_length = plan.config.dq, block.q_length, block.kv_length
    offset, rows = plan.offset(q_length, kv_length), config.own * count
    tiles = kv_tiles(first_row, rows, offset, q_length, kv_length, plan.reach, config.other)
    if count == 1 and plan.spare_rows(config.own, config.warpgroups):
        tiles = tiles._replace(stop=jnp.where(first_row < 0, 0, tiles.stop))
    return block.extras.visits(tiles, block.batch, block.head, first_row, config.own, config.other, count)


def _dq_stream(plan: AttentionPlan, block: Block, k, v, stream: Stream):
    config, tiles = plan.config.dq, block.tiles
    kv_head = lax.div(block.head, jnp.int32(plan.group))

    def load(tile, _):
        slot = lax.rem(tile - tiles.start, jnp.int32(config.stages))
        pl.when(tile - tiles.start >= config.stages)(lambda: stream.wait_consumed(slot))
        first_key = block.extras.tile_at(tile, block.batch, block.head, block.first_row, config.other)
        first_key *= config.other
        place = (block.batch, first_key, config.other, kv_head, block.kv_length)
        ids = block.ids_of(block.extras.kv_segment_ids, first_key, config.other)
        stream.load(slot, k.rows(*place), v.rows(*place), *ids)

    lax.fori_loop(tiles.start, tiles.stop, load, None)
    first_unseen = jnp.maximum(tiles.start, tiles.stop - config.stages)
    drain = lambda tile, _: stream.wait_consumed(lax.rem(tile - tiles.start, jnp.int32(config.stages)))
    lax.fori_loop(first_unseen, tiles.stop, drain, None)


def _dq_rows(plan: AttentionPlan, block: Block, warpgroup, sources, d_q, owned: Owned, stream: Stream):
    config = plan.config.dq
    all_owned, owned = owned, owned.at(warpgroup)
    first_row = block.first_row + warpgroup * config.own
    num_spare = plan.spare_rows(config.own, config.warpgroups)
    known_row = jnp.maximum(first_row, 0) if num_spare else first_row
    rows = pl.ds(known_row, config.own)
    q, d_out, lse2, delta = sources
    by_row, by_head = (block.batch, rows, block.head), (block.batch, block.head, rows)
    place = (block.batch, known_row, config.own, block.head, block.q_length)
    ids = block.ids_of(block.extras.q_segment_ids, known_row, config.own)
    owned.load(q.rows(*place), d_out.rows(*place), lse2.at[by_head], delta.at[by_head], *ids)
    statistics = [
        broadcast_rows(plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)), config.other)
        for ref in (owned.lse, owned.delta)
    ]
    own = _keys_of(plan, block, first_row, 1)
    step = functools.partial(_dq_tile, plan, block, warpgroup, statistics, all_owned, stream)
    skip = lambda tile, _: stream.skip(lax.rem(tile - block.tiles.start, jnp.int32(config.stages)))
    ragged = plan.has_kv_lengths or plan.has_segments or plan.num_keys % config.other > 0
    idle = plan.has_q_lengths or plan.num_queries % (config.own * config.warpgroups) > 0
    in_list = plan.has_block_mask  # its partial tiles come first
    ends = Ends(plan.has_masked_start or in_list, plan.reach[1] is not None or ragged, idle)
    acc = register_zeros((config.own, plan.head_dim))
    acc = run_tiles(block.tiles, own, step, skip, acc, ends)
    owned.first[...] = (acc * plan.scale).astype(plan.dtype)
    plgpu.commit_smem()
    is_ours = first_row >= 0 if num_spare else True
    pl.when(is_ours)(functools.partial(plgpu.copy_smem_to_gmem, owned.first, d_q.at[by_row]))
    plgpu.wait_smem_to_gmem(0)


def _dq_tile(
    plan: AttentionPlan,
    block: Block,
    warpgroup,
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
    warpgroup, owned, slot = _opaque(
        warpgroup, owned, lax.rem(tile - block.tiles.start, jnp.int32(config.stages))
    )
    first_row = block.first_row + warpgroup * config.own
    extras, row = block.extras, (block.batch, block.head, first_row)
    first_key = extras.tile_at(tile, *row, config.other) * config.other
    elements = extras.elements_at(tile, *row, shape) if masked else None
    lengths, ids = (block.q_length, block.kv_length), (owned.ids, stream.ids_at(slot))
    place = TilePlace(*row, first_key, *lengths, shape, elements=elements, ids=ids)
    stream.wait_loaded(slot)

    def multiply(logits_acc, d_weights_acc):
        plgpu.wgmma(logits_acc, owned.first, stream.first.at[slot].transpose((1, 0)))
        plgpu.wgmma(d_weights_acc, owned.second, stream.second.at[slot].transpose((1, 0)))
        logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
        weights = weigh(plan, extras, place, logits, lse2, masked)
        return logit_gradients(plan, weights, d_weights_acc[...], delta)

    acc_type = plgpu.ACC(shape, jnp.float32)
    d_logits = pl.run_scoped(multiply, acc_type, acc_type)
    acc = _add_matmul(acc, d_logits.astype(plan.dtype), stream.first.at[slot])
    stream.release(slot)
    return acc


# --- dK and dV: owns keys and values, streams queries; all matrices are transposed, keys first ---


def _dkv_body(plan: AttentionPlan, order: TileOrder, which: str, *refs):
    q, k, v, d_out, lse2, delta, extras, *outputs, owned, stream = refs
    config = plan.config.dkv
    warpgroup = lax.axis_index("warpgroup")
    tile, batch_head = order.locate(lax.axis_index("block"))
    batch, kv_head = plan.split_heads(batch_head, plan.num_kv_heads)
    tile = extras.own_tile(batch, tile)
    q_length, kv_length = plan.lengths_of(batch, extras)
    rows = config.own * config.warpgroups
    block = Block(batch, kv_head, tile * rows, q_length, kv_length, NO_TILES, extras)
    block = block._replace(tiles=_queries_of(plan, block, block.first_row, config.warpgroups))
    specialize(
        config.warpgroups,
        warpgroup,
        compute=lambda: _dkv_rows(plan, which, block, warpgroup, (k, v), outputs, owned, stream),
        load=lambda: _dkv_stream(plan, block, (q, d_out, lse2, delta), stream),
    )


def _queries_of(plan: AttentionPlan, block: Block, first_key, count: int) -> KvTiles:
    """The mirror image of _keys_of. Queries past the end are zeros and need no mask."""
    config, q_length, kv_length = plan.config.dkv, block.q_length, block.kv_length
    (left, right), offset, keys = plan.reach, -plan.offset(q_length, kv_length), config.own * count
    tiles = kv_tiles(
        first_key, keys, offset, kv_length, q_length, (right, left), config.other, mask_end=False
    )
    head = block.head * plan.group  # a block mask for each query head comes without groups
    return block.extras.visits(tiles, block.batch, head, first_key, config.own, config.other, count)


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
            place = block.extras.tile_at(tile, block.batch, head, block.first_row, config.other)
            first_query = place * config.other
            by_row = (block.batch, first_query, config.other, head, block.q_length)
            by_head = (block.batch, head, pl.ds(first_query, config.other))
            ids = block.ids_of(block.extras.q_segment_ids, first_query, config.other)
            vectors = lse2.at[by_head], delta.at[by_head], *ids
            stream.load(slot, q.rows(*by_row), d_out.rows(*by_row), *vectors)

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
    all_owned, owned = owned, owned.at(warpgroup)
    first_key = block.first_row + warpgroup * config.own
    by_row = (block.batch, pl.ds(first_key, config.own), block.head)
    place = (block.batch, first_key, config.own, block.head, block.kv_length)
    ids = block.ids_of(block.extras.kv_segment_ids, first_key, config.own)
    owned.load(*(source.rows(*place) for source in sources), *ids)
    own = _queries_of(plan, block, first_key, 1)
    idle = plan.has_kv_lengths or plan.num_keys % (config.own * config.warpgroups) > 0
    ends = Ends(plan.has_masked_tail or plan.has_block_mask, plan.has_masked_start, idle)
    per_head = tiles.stop - tiles.start

    def attend_head(group, carry):
        first_index = group * per_head - tiles.start
        slot_of = lambda tile: lax.rem(first_index + tile, jnp.int32(config.stages))
        head = block.head * plan.group + group
        step = functools.partial(_dkv_tile, plan, which, block, head, warpgroup, slot_of, all_owned, stream)
        skip = lambda tile, _: stream.skip(slot_of(tile))
        return run_tiles(tiles, own, step, skip, carry, ends)

    dims = {"dkv": (plan.head_dim, plan.value_dim), "dk": (plan.head_dim,), "dv": (plan.value_dim,)}[which]
    carry = tuple(register_zeros((config.own, dim)) for dim in dims)
    carry = lax.fori_loop(0, plan.group, attend_head, carry) if plan.group > 1 else attend_head(0, carry)
    live = None
    if plan.has_kv_lengths:
        live = first_key + row_iota(config.own) < block.kv_length
    upscale = 1 / (1 - plan.dropout_rate)
    scales = {"dkv": (plan.scale, upscale), "dk": (plan.scale,), "dv": (upscale,)}[which]
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
    head,
    warpgroup,
    slot_of,
    owned: Owned,
    stream: Stream,
    tile,
    carry,
    masked=False,
):
    config = plan.config.dkv
    shape = (config.own, config.other)
    warpgroup, owned, slot = _opaque(warpgroup, owned, slot_of(tile))
    first_key = block.first_row + warpgroup * config.own
    lengths = block.q_length, block.kv_length
    extras, row = block.extras, (block.batch, head, first_key)
    first_query = extras.tile_at(tile, *row, config.other) * config.other
    elements = extras.elements_at(tile, *row, shape) if masked else None
    ids, row = (stream.ids_at(slot), owned.ids), (block.batch, head, first_query, first_key)
    place = TilePlace(*row, *lengths, shape, keys_first=True, elements=elements, ids=ids)
    queries, out_grads = stream.first.at[slot], stream.second.at[slot]

    def weigh_tile(logits):
        lse2 = load_by_column(stream.lse.at[slot], config.own)
        return weigh(plan, extras, place, logits, lse2, masked)

    stream.wait_loaded(slot)
    if which == "dv":
        kept = weigh_tile(_matmul(owned.first, queries.transpose((1, 0)), shape)).kept
        accumulate = lambda refs: plgpu.wgmma(refs[0], kept.astype(plan.dtype), out_grads)
    else:

        def multiply(logits_acc, d_weights_acc):
            plgpu.wgmma(logits_acc, owned.first, queries.transpose((1, 0)))
            plgpu.wgmma(d_weights_acc, owned.second, out_grads.transpose((1, 0)))
            weights = weigh_tile(plgpu.wgmma_accumulator_load(logits_acc, wait_n=1))
            return weights, d_weights_acc[...]

        acc_type = plgpu.ACC(shape, jnp.float32)
        weights, d_weights = pl.run_scoped(multiply, acc_type, acc_type)
        delta = load_by_column(stream.delta.at[slot], config.own)
        d_logits = logit_gradients(plan, weights, d_weights, delta)

        def accumulate(refs):
            if which == "dkv":
                plgpu.wgmma(refs[1], weights.kept.astype(plan.dtype), out_grads)
            plgpu.wgmma(refs[0], d_logits.astype(plan.dtype), queries)

    carry = pl.run_state(accumulate)(tuple(plgpu.ACC.init(acc) for acc in carry))
    plgpu.commit_smem()  # our reads of the statistics come before the copies that replace them
    stream.release(slot)
    return carry
