"""The kernel of dQ: a thread block owns queries, and streams keys and values."""

import functools

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import halves
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.scores import TilePlace, logit_gradients, weigh
from pallas_kernels.flash_attention.streams import Block, Ends, Owned, Stream, opaque_place, run_tiles
from pallas_kernels.flash_attention.tiles import TileOrder
from pallas_kernels.kv_tiles import KvTiles, kv_tiles
from pallas_kernels.mosaic import broadcast_rows, div, pl, plgpu, register_zeros, rem, specialize, where


def body(plan: AttentionPlan, order: TileOrder, which: str, *refs):
    q, k, v, d_out, lse2, delta, extras, d_q, owned, stream = refs
    config = plan.config.dq
    warpgroup = lax.axis_index("warpgroup")
    block = Block.locate(plan, order, extras, plan.num_heads, config.own * config.warpgroups)
    first_row = block.first_row - plan.spare_rows(config.own, config.warpgroups)
    block = block._replace(first_row=first_row, tiles=_keys_of(plan, block, first_row, config.warpgroups))
    specialize(
        config.warpgroups,
        warpgroup,
        compute=lambda: _sum_rows(plan, block, warpgroup, (q, d_out, lse2, delta), d_q, owned, stream),
        load=lambda: _load(plan, block, k, v, stream),
    )


def _keys_of(plan: AttentionPlan, block: Block, first_row, count: int) -> KvTiles:
    """What `count` warpgroups' rows see."""
    config, q_length, kv_length = plan.config.dq, block.q_length, block.kv_length
    offset, rows = plan.offset(q_length, kv_length), config.own * count
    tiles = kv_tiles(first_row, rows, offset, q_length, kv_length, plan.reach, config.other)
    if count == 1 and plan.spare_rows(config.own, config.warpgroups):
        tiles = tiles._replace(stop=where(first_row < 0, 0, tiles.stop))
    return block.extras.visits(tiles, block.batch, block.head, first_row, config.own, config.other, count)


def _load(plan: AttentionPlan, block: Block, k, v, stream: Stream):
    config, tiles = plan.config.dq, block.tiles
    kv_head = div(block.head, plan.group)

    def load(tile, _):
        slot = rem(tile - tiles.start, config.stages)
        pl.when(tile - tiles.start >= config.stages)(lambda: stream.wait_consumed(slot))
        first_key = block.extras.tile_at(tile, block.batch, block.head, block.first_row, config.other)
        first_key *= config.other
        place = (block.batch, first_key, config.other, kv_head, block.kv_length)
        ids = block.ids_of(block.extras.kv_segment_ids, first_key, config.other)
        stream.load(slot, k.rows(*place), v.rows(*place), *ids)

    lax.fori_loop(tiles.start, tiles.stop, load, None)
    first_unseen = lax.max(tiles.start, tiles.stop - config.stages)
    drain = lambda tile, _: stream.wait_consumed(rem(tile - tiles.start, config.stages))
    lax.fori_loop(first_unseen, tiles.stop, drain, None)


def _sum_rows(plan: AttentionPlan, block: Block, warpgroup, sources, d_q, owned: Owned, stream: Stream):
    config = plan.config.dq
    all_owned, owned = owned, owned.at(warpgroup)
    first_row = block.first_row + warpgroup * config.own
    num_spare = plan.spare_rows(config.own, config.warpgroups)
    known_row = lax.max(first_row, 0) if num_spare else first_row
    rows = pl.ds(known_row, config.own)
    q, d_out, lse2, delta = sources
    by_row, by_head = (block.batch, known_row, block.head), (block.batch, block.head, rows)
    place = (block.batch, known_row, config.own, block.head, block.q_length)
    ids = block.ids_of(block.extras.q_segment_ids, known_row, config.own)
    owned.load(q.rows(*place), d_out.rows(*place), lse2.at[by_head], delta.at[by_head], *ids)
    statistics = [
        broadcast_rows(plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)), config.other)
        for ref in (owned.lse, owned.delta)
    ]
    own = _keys_of(plan, block, first_row, 1)
    step = functools.partial(_add_tile, plan, block, warpgroup, statistics, all_owned, stream)
    skip = lambda tile, _: stream.skip(rem(tile - block.tiles.start, config.stages))
    ragged = plan.has_kv_lengths or plan.has_segments or plan.num_keys % config.other > 0
    idle = plan.has_q_lengths or plan.num_queries % (config.own * config.warpgroups) > 0
    in_list = plan.has_block_mask  # its partial tiles come first
    ends = Ends(plan.has_masked_start or in_list, plan.reach[1] is not None or ragged, idle)
    acc = register_zeros((config.own, plan.head_dim))
    acc = run_tiles(block.tiles, own, step, skip, acc, ends)
    for half, part in enumerate(halves.split(plan, acc * plan.scale)):
        owned.first[...] = part
        plgpu.commit_smem()
        is_ours = first_row >= 0 if num_spare else True
        pl.when(is_ours)(functools.partial(halves.store, plan, owned.first, d_q, half, by_row))
        plgpu.wait_smem_to_gmem(0)


def _add_tile(
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
    warpgroup, owned, slot = opaque_place(warpgroup, owned, rem(tile - block.tiles.start, config.stages))
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


def _add_matmul(acc, x, y):
    """acc + x @ y, x in registers."""
    return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, x, y))(plgpu.ACC.init(acc))
