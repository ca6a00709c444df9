"""What a thread block of the fused backward kernel holds in shared memory, where it stands, and its loads."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.extras import Extras
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.scores import TilePlace
from pallas_kernels.flash_attention.tiles import KvTiles, TileOrder, kv_tiles
from pallas_kernels.mosaic import div, pl, plgpu, rem, swizzled_smem, traced, where

WARPGROUPS = 2  # that compute
HALF = 64  # keys of each: the rows of a wgmma
PART = 64  # queries that are in registers at a time


def block_keys(plan: AttentionPlan) -> int:
    """Keys that a thread block owns: of more, the sums of dK and dV would not fit the registers."""
    return HALF if plan.head_dim > 128 else WARPGROUPS * HALF


class Buffers(NamedTuple):
    """Shared memory of a thread block."""

    k: Any  # [2, 64, H]
    v: Any  # [2, 64, Hv]
    q: Any  # [stages, tile_q, H]
    d_out: Any  # [stages, tile_q, Hv]
    statistics: Any  # f32[2, stages, tile_q]: lse and delta; alone, each would take twice as much
    ids: Any  # i32[stages, tile_q]: segment ids of the queries; or None
    key_ids: Any  # i32[2, 64]: those of each warpgroup's keys; or None
    d_logits: Any  # [2 tiles in turn, 2, 64, tile_q]: dS^T of each warpgroup's keys
    out: Any  # [2, 64, H]: dV, then dK, of each warpgroup's keys on their way out
    item: Any  # i32[3]: what the block works on, how many tiles of queries it took before, and what was drawn
    d_q: Any  # f32[2, rows, columns]: each warpgroup's part of dQ's tile; one for each where they differ

    @classmethod
    def types(cls, plan: AttentionPlan) -> "Buffers":
        config = plan.fused
        owned, streamed = (WARPGROUPS, HALF), (config.stages, config.tile_q)
        parts = parts_of_dq(plan)
        d_q = tuple(swizzled_smem(part, jnp.float32) for part in parts)
        return cls(
            k=swizzled_smem((*owned, plan.head_dim), plan.dtype),
            v=swizzled_smem((*owned, plan.value_dim), plan.dtype),
            q=swizzled_smem((*streamed, plan.head_dim), plan.dtype),
            d_out=swizzled_smem((*streamed, plan.value_dim), plan.dtype),
            statistics=plgpu.SMEM((2, *streamed), jnp.float32),
            ids=plgpu.SMEM(streamed, jnp.int32) if brings_ids(plan) else None,
            key_ids=plgpu.SMEM(owned, jnp.int32) if brings_ids(plan) else None,
            d_logits=swizzled_smem((2, *owned, config.tile_q), plan.dtype, row=plan.head_dim),
            item=plgpu.SMEM((3,), jnp.int32),
            out=swizzled_smem((*owned, plan.head_dim), plan.dtype),
            d_q=d_q if len({*parts}) > 1 else swizzled_smem((WARPGROUPS, *parts[0]), jnp.float32),
        )

    def lse(self, slot, rows: Any = slice(None)):
        return self.statistics.at[0, slot, rows]

    def delta(self, slot, rows: Any = slice(None)):
        return self.statistics.at[1, slot, rows]

    def ids_at(self, slot, rows, warpgroup) -> tuple[Any, Any]:
        """Segment ids of some queries of a slot, and of a warpgroup's keys."""
        if self.ids is None:
            return None, None
        return self.ids.at[slot, rows], self.key_ids.at[warpgroup]


class Barriers(NamedTuple):
    """What the warpgroups wait for."""

    item_loaded: Any  # its keys and values, and which it is
    k_free: Any
    v_free: Any
    loaded: Any  # a tile of queries, output cotangents and their statistics
    consumed: Any
    d_logits_written: Any

    @classmethod
    def types(cls, plan: AttentionPlan) -> "Barriers":
        stages = plan.fused.stages
        loaded = plgpu.Barrier(num_barriers=stages, num_arrivals=4 + brings_ids(plan))
        consumed = plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS)
        owned = plgpu.Barrier(num_arrivals=WARPGROUPS)
        written = plgpu.Barrier(num_barriers=2, num_arrivals=WARPGROUPS)
        item_loaded = plgpu.Barrier(num_arrivals=_arrivals(plan))
        return cls(item_loaded, owned, owned, loaded, consumed, written)


def brings_ids(plan: AttentionPlan) -> bool:
    """Whether segment ids come to shared memory: at H = 128 there is no room."""
    return plan.has_segments and plan.head_dim < 128


def _arrivals(plan: AttentionPlan) -> int:
    """Of an item: two halves of its keys, of its values, and of its segment ids, and what it is."""
    return 2 * WARPGROUPS + 1 + WARPGROUPS * brings_ids(plan)


class Block(NamedTuple):
    """An item of a thread block: where it stands, and the tiles of queries that it goes through (places in a
    list, with a block mask).
    """

    batch: Any
    head: Any
    kv_head: Any
    first_key: Any
    q_length: Any
    kv_length: Any
    indices: KvTiles
    extras: Extras
    shift: Any  # from an index to its number

    @classmethod
    def locate(
        cls, plan: AttentionPlan, order: TileOrder, extras: Extras, item, num_taken: Any = 0
    ) -> "Block":
        """num_taken: tiles of queries of the items before."""
        tile, batch_head = order.locate(item)
        batch, head = plan.split_heads(batch_head, plan.num_heads)
        first_key = extras.own_tile(batch, tile) * block_keys(plan)
        q_length, kv_length = plan.lengths_of(batch, extras)
        indices = _tiles(plan, extras, batch, head, first_key, q_length, kv_length)
        kv_head = div(head, plan.group)
        shift = num_taken - indices.start
        batch, head, kv_head, first_key, q_length, kv_length, indices, shift = traced(
            (batch, head, kv_head, first_key, q_length, kv_length, indices, shift)
        )
        return cls(batch, head, kv_head, first_key, q_length, kv_length, indices, extras, shift)

    def number(self, index):
        """Which of all tiles that the thread block takes an index is."""
        return index + self.shift

    def row_at(self, plan: AttentionPlan, index):
        """The first query of an index."""
        tile = self.extras.tile_at(index, self.batch, self.head, self.first_key, plan.fused.tile_q)
        return tile * plan.fused.tile_q

    def queries_at(self, plan: AttentionPlan, index):
        """Where the queries of an index lie in an Operand, and their statistics in an array."""
        first_row, num_rows = self.row_at(plan, index), plan.fused.tile_q
        by_row = (self.batch, first_row, num_rows, self.head, self.q_length)
        return by_row, (self.batch, self.head, pl.ds(first_row, num_rows))

    def keys_at(self, half: int = 0):
        """Where HALF of the block's keys lie in an Operand."""
        return self.batch, self.first_key + half * HALF, HALF, self.kv_head, self.kv_length

    def elements_at(self, plan: AttentionPlan, index, first_key):
        """The element mask of a masked index, from first_key on; None without a block mask."""
        shape = HALF, plan.fused.tile_q
        return self.extras.elements_at(index, self.batch, self.head, first_key, shape)

    def place_at(
        self, plan: AttentionPlan, index, first_key, masked, part: int = 0, ids: tuple = (None, None)
    ) -> TilePlace:
        """Of HALF keys from first_key on, and a part of an index's queries."""
        first_query = self.row_at(plan, index)
        elements = None if masked is False else self.elements_at(plan, index, first_key)
        if elements is not None:
            elements = elements.at[:, pl.ds(part * PART, PART)]
        return TilePlace(
            self.batch,
            self.head,
            first_query + part * PART,
            first_key,
            self.q_length,
            self.kv_length,
            (HALF, PART),
            keys_first=True,
            hides_tail=plan.has_ragged_keys,
            elements=elements,
            ids=ids,
        )


def visit_queries(plan: AttentionPlan, indices: KvTiles, take) -> None:
    """The loops over a block's queries: take(index, _), masked where it is needed."""
    start, full_start, full_stop, stop = indices
    masked_start = plan.has_masked_tail or plan.has_block_mask  # the earliest queries see the last keys
    masked_stop = plan.has_masked_start or plan.has_ragged_keys
    second = lax.min(start + 1, stop)
    full_start, full_stop = lax.max(full_start, second), lax.max(full_stop, second)
    masked = functools.partial(take, masked=True)
    first_masked = masked_start or masked_stop
    if plan.has_block_mask:  # element masks are in global memory, and most tiles are whole
        first_masked = (start < indices.full_start) | (start >= indices.full_stop)
    first = functools.partial(take, masked=first_masked, is_first=True)
    lax.fori_loop(start, second, first, None)
    has_masked_second = masked_start and not plan.is_cut_once(block_keys(plan), plan.fused.tile_q)
    if has_masked_second:
        lax.fori_loop(second, full_start, masked, None)
    lax.fori_loop(full_start if has_masked_second else second, full_stop, take, None)
    if masked_stop:
        lax.fori_loop(full_stop, stop, masked, None)


def visit_last(indices: KvTiles, finish) -> None:
    """finish(index, _) of the last tile of queries, if there is one."""
    start, *_, stop = indices
    lax.fori_loop(lax.max(start, stop - 1), stop, finish, None)


def parts_of_dq(plan: AttentionPlan) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of dQ's tile that each warpgroup multiplies: half of the rows where there are enough,
    else columns, 64 and what is left (half of 96 would not be whole widths of a swizzle that costs no speed).
    """
    tile_q = plan.fused.tile_q
    if tile_q == WARPGROUPS * HALF:
        return ((HALF, plan.head_dim),) * WARPGROUPS
    return (tile_q, HALF), (tile_q, plan.head_dim - HALF)


def _tiles(plan: AttentionPlan, extras: Extras, batch, head, first_key, q_length, kv_length) -> KvTiles:
    """The tiles of queries that see the block's keys. Queries past the end are zeros and need no mask."""
    (left, right), offset, tile_q = plan.reach, -plan.offset(q_length, kv_length), plan.fused.tile_q
    keys = block_keys(plan)
    tiles = kv_tiles(first_key, keys, offset, kv_length, q_length, (right, left), tile_q, mask_end=False)
    tiles = extras.visits(tiles, batch, head, first_key, HALF, tile_q, keys // HALF)
    if not plan.has_ragged_keys:
        return tiles
    # Keys past the end have weights too, which would reach dQ: a block that has some masks every tile.
    full_stop = where(first_key + keys > kv_length, tiles.full_start, tiles.full_stop)
    return tiles._replace(full_stop=full_stop)


def load_item(
    plan: AttentionPlan, block: Block, item, is_later, sources, buffers: Buffers, barriers: Barriers
) -> None:
    """Loads an item's queries, keys and values, as soon as what has their place is no longer needed."""
    q, k, v, d_out, lse2, delta = sources
    start, _, _, stop = block.indices
    second = lax.min(start + 1, stop)

    def load_tile(index, _):
        number = block.number(index)
        slot = slot_of(plan, number)
        by_row, by_head = block.queries_at(plan, index)
        loaded = barriers.loaded.at[slot]
        pl.when(number >= plan.fused.stages)(lambda: plgpu.barrier_wait(barriers.consumed.at[slot]))
        q.rows(*by_row)(buffers.q.at[slot], loaded)
        plgpu.copy_gmem_to_smem(lse2.at[by_head], buffers.lse(slot), loaded)
        d_out.rows(*by_row)(buffers.d_out.at[slot], loaded)
        plgpu.copy_gmem_to_smem(delta.at[by_head], buffers.delta(slot), loaded)
        if brings_ids(plan):
            ids = block.extras.q_segment_ids.at[block.batch, by_head[2]]
            plgpu.copy_gmem_to_smem(ids, buffers.ids.at[slot], loaded)

    # In the order in which the item before releases them.
    lax.fori_loop(start, second, load_tile, None)
    for gmem, smem, free in ((v, buffers.v, barriers.v_free), (k, buffers.k, barriers.k_free)):
        if is_later is not False:
            pl.when(is_later)(functools.partial(plgpu.barrier_wait, free))

        def load_half(half, _, gmem=gmem, smem=smem):
            gmem.rows(*block.keys_at(half))(smem.at[half], barriers.item_loaded)

        lax.fori_loop(0, WARPGROUPS, load_half, None)
    if brings_ids(plan):  # read as long as values are
        for half in range(WARPGROUPS):
            ids = block.extras.kv_segment_ids.at[block.batch, pl.ds(block.first_key + half * HALF, HALF)]
            plgpu.copy_gmem_to_smem(ids, buffers.key_ids.at[half], barriers.item_loaded)
    buffers.item[0], buffers.item[1] = item
    plgpu.barrier_arrive(barriers.item_loaded)
    lax.fori_loop(second, stop, load_tile, None)


def end(plan: AttentionPlan, num_items: int | None, num_tiles, buffers: Buffers, barriers: Barriers) -> None:
    """Sees every arrival before the thread block ends, and says that it does: num_items is no item."""

    def wait_consumed(number, _):
        plgpu.barrier_wait(barriers.consumed.at[slot_of(plan, number)])

    lax.fori_loop(lax.max(0, num_tiles - plan.fused.stages), num_tiles, wait_consumed, None)
    plgpu.barrier_wait(barriers.v_free)
    plgpu.barrier_wait(barriers.k_free)
    if num_items is None:
        return
    buffers.item[0] = jnp.int32(num_items)
    lax.fori_loop(0, _arrivals(plan), lambda *_: plgpu.barrier_arrive(barriers.item_loaded), None)


def slot_of(plan: AttentionPlan, number):
    """Where a tile of queries lies."""
    return rem(number, plan.fused.stages)
