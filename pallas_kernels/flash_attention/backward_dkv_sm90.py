"""The kernel of dK and dV, or of one of them: a thread block owns keys and values, and streams queries; all
matrices are transposed, keys first.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import halves
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.scores import TilePlace, logit_gradients, weigh
from pallas_kernels.flash_attention.streams import Block, Ends, Owned, Stream, opaque_place, run_tiles
from pallas_kernels.flash_attention.tiles import TileOrder
from pallas_kernels.kv_tiles import KvTiles, kv_tiles
from pallas_kernels.mosaic import broadcast_rows, pl, plgpu, register_zeros, rem, row_iota, specialize, where
from pallas_kernels.mosaic_inline import load_by_column


def body(plan: AttentionPlan, order: TileOrder, which: str, *refs):
    q, k, v, d_out, lse2, delta, extras, *outputs, owned, stream = refs
    config = plan.config.dkv
    warpgroup = lax.axis_index("warpgroup")
    block = Block.locate(plan, order, extras, plan.num_kv_heads, config.own * config.warpgroups)
    block = block._replace(tiles=_queries_of(plan, block, block.first_row, config.warpgroups))
    specialize(
        config.warpgroups,
        warpgroup,
        compute=lambda: _sum_rows(plan, which, block, warpgroup, (k, v), outputs, owned, stream),
        load=lambda: _load(plan, block, (q, d_out, lse2, delta), stream),
    )


def _queries_of(plan: AttentionPlan, block: Block, first_key, count: int, group: Any = 0) -> KvTiles:
    """The mirror image of _keys_of, for a head of the group. Queries past the end, zeros, need no mask."""
    config, q_length, kv_length = plan.config.dkv, block.q_length, block.kv_length
    (left, right), offset, keys = plan.reach, -plan.offset(q_length, kv_length), config.own * count
    tiles = kv_tiles(
        first_key, keys, offset, kv_length, q_length, (right, left), config.other, mask_end=False
    )
    head = block.head * plan.group + group
    return block.extras.visits(tiles, block.batch, head, first_key, config.own, config.other, count)


def _lists_differ(plan: AttentionPlan, block: Block) -> bool:
    """Whether the heads of a group have lists of their own."""
    lists = block.extras.lists
    return plan.group > 1 and lists is not None and lists.count.shape[1] > 1


def _visit_heads(plan: AttentionPlan, block: Block, visit, carry):
    """carry = visit(group, tiles, first, carry) for each head of the group, first: how many tiles the heads
    before have taken; returns (how many all take, the last carry).
    """
    tiles = block.tiles
    per_head = tiles.stop - tiles.start
    if plan.group == 1:
        return per_head, visit(0, tiles, 0, carry)
    if not _lists_differ(plan, block):
        step = lambda group, carry: visit(group, tiles, group * per_head, carry)
        return plan.group * per_head, lax.fori_loop(0, plan.group, step, carry)

    def visit_list(group, state):
        first, carry = state
        places = _queries_of(plan, block, block.first_row, plan.config.dkv.warpgroups, group)
        return first + places.stop, visit(group, places, first, carry)

    return lax.fori_loop(0, plan.group, visit_list, (jnp.int32(0), carry))


def _load(plan: AttentionPlan, block: Block, sources, stream: Stream):
    config = plan.config.dkv
    q, d_out, lse2, delta = sources

    def load_head(group, tiles, first, _):
        head = block.head * plan.group + group

        def load(tile, _):
            index = first + tile - tiles.start
            slot = rem(index, config.stages)
            pl.when(index >= config.stages)(lambda: stream.wait_consumed(slot))
            place = block.extras.tile_at(tile, block.batch, head, block.first_row, config.other)
            first_query = place * config.other
            by_row = (block.batch, first_query, config.other, head, block.q_length)
            by_head = (block.batch, head, pl.ds(first_query, config.other))
            ids = block.ids_of(block.extras.q_segment_ids, first_query, config.other)
            vectors = lse2.at[by_head], delta.at[by_head], *ids
            stream.load(slot, q.rows(*by_row), d_out.rows(*by_row), *vectors)

        lax.fori_loop(tiles.start, tiles.stop, load, None)

    total, _ = _visit_heads(plan, block, load_head, None)
    drain = lambda index, _: stream.wait_consumed(rem(index, config.stages))
    lax.fori_loop(lax.max(0, total - config.stages), total, drain, None)


def _sum_rows(
    plan: AttentionPlan, which: str, block: Block, warpgroup, sources, outputs, owned: Owned, stream
):
    config = plan.config.dkv
    all_owned, owned = owned, owned.at(warpgroup)
    first_key = block.first_row + warpgroup * config.own
    by_row = (block.batch, first_key, block.head)
    place = (block.batch, first_key, config.own, block.head, block.kv_length)
    ids = block.ids_of(block.extras.kv_segment_ids, first_key, config.own)
    owned.load(*(source.rows(*place) for source in sources), *ids)
    own = _queries_of(plan, block, first_key, 1)
    idle = plan.has_kv_lengths or plan.num_keys % (config.own * config.warpgroups) > 0
    ends = Ends(plan.has_masked_tail or plan.has_block_mask, plan.has_masked_start, idle)

    def attend_head(group, tiles, first, carry):
        first_index = first - tiles.start
        slot_of = lambda tile: rem(first_index + tile, config.stages)
        head = block.head * plan.group + group
        step = functools.partial(_add_tile, plan, which, block, head, warpgroup, slot_of, all_owned, stream)
        skip = lambda tile, _: stream.skip(slot_of(tile))
        seen = tiles if _lists_differ(plan, block) else own  # a list is that of all warpgroups
        return run_tiles(tiles, seen, step, skip, carry, ends)

    dims = {"dkv": (plan.head_dim, plan.value_dim), "dk": (plan.head_dim,), "dv": (plan.value_dim,)}[which]
    carry = tuple(register_zeros((config.own, dim)) for dim in dims)
    _, carry = _visit_heads(plan, block, attend_head, carry)
    live = None
    if plan.has_kv_lengths:
        live = first_key + row_iota(config.own) < block.kv_length
    upscale = 1 / (1 - plan.dropout_rate)
    scales = {"dkv": (plan.scale, upscale), "dk": (plan.scale,), "dv": (upscale,)}[which]
    staging = {"dkv": (owned.first, owned.second), "dk": (owned.first,), "dv": (owned.second,)}[which]

    def parts_of(acc, scale):
        if live is not None:
            acc = where(broadcast_rows(live, acc.shape[1]), acc, 0.0)
        yield from halves.split(plan, acc * scale)

    parts = list(map(parts_of, carry, scales))
    for half in range(1 + plan.keeps_fp32):
        for smem, rest in zip(staging, parts, strict=True):
            smem[...] = next(rest)
        plgpu.commit_smem()
        for smem, output in zip(staging, outputs, strict=True):
            halves.store(plan, smem, output, half, by_row)
        plgpu.wait_smem_to_gmem(0)


def _add_tile(
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
    warpgroup, owned, slot = opaque_place(warpgroup, owned, slot_of(tile))
    first_key = block.first_row + warpgroup * config.own
    lengths = block.q_length, block.kv_length
    extras, row = block.extras, (block.batch, head, first_key)
    first_query = extras.tile_at(tile, *row, config.other) * config.other
    elements = extras.elements_at(tile, *row, shape) if masked else None
    ids, row = (stream.ids_at(slot), owned.ids), (block.batch, head, first_query, first_key)
    place = TilePlace(*row, *lengths, shape, keys_first=True, elements=elements, ids=ids)
    queries, out_grads = stream.first.at[slot], stream.second.at[slot]

    def weigh_tile(logits):
        lse2 = load_by_column(stream.lse, (slot, 0), shape)
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
        delta = load_by_column(stream.delta, (slot, 0), shape)
        d_logits = logit_gradients(plan, weights, d_weights, delta)

        def accumulate(refs):
            if which == "dkv":
                plgpu.wgmma(refs[1], weights.kept.astype(plan.dtype), out_grads)
            plgpu.wgmma(refs[0], d_logits.astype(plan.dtype), queries)

    carry = pl.run_state(accumulate)(tuple(plgpu.ACC.init(acc) for acc in carry))
    plgpu.commit_smem()  # our reads of the statistics come before the copies that replace them
    stream.release(slot)
    return carry


def _matmul(x, y, shape):
    """x @ y of shared memory, into registers."""

    def multiply(acc):
        plgpu.wgmma(acc, x, y)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))
