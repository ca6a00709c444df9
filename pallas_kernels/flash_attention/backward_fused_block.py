"""What a thread block of the fused backward kernel holds in shared memory, and where it stands."""

import enum
import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.backward_fused_order import AddOrder
from pallas_kernels.flash_attention.extras import Extras
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.scores import TilePlace
from pallas_kernels.flash_attention.tiles import TileOrder
from pallas_kernels.kv_tiles import KvTiles, kv_tiles
from pallas_kernels.mosaic import div, pl, plgpu, rem, swizzled_smem, traced, where

WARPGROUPS = 2  # that compute
HALF = 64  # keys of each: the rows of a wgmma
PART = 64  # queries that are in registers at a time
ITEM = 3  # numbers of an item


class Add(enum.IntEnum):
    """What is known of a tile of queries whose dQ is to be added in order."""

    QUERY_TILE = 0  # which it is
    COUNTER = 1  # where it is counted who has added
    TURN = 2  # after how many others


def block_keys(plan: AttentionPlan) -> int:
    """Keys that a thread block owns: of more, the sums of dK and dV would not fit the registers."""
    return HALF if plan.head_dim > 128 else WARPGROUPS * HALF


def add_order(plan: AttentionPlan) -> AddOrder:
    """In which thread blocks add to dQ, of a deterministic call."""
    return AddOrder.of(plan, block_keys(plan))


def num_adds(plan: AttentionPlan) -> int:
    """Of how many tiles of queries it is to be known when we add to them: of those that are loaded, of the
    one whose dQ is multiplied, and of the one whose dQ is being added.
    """
    return plan.fused.stages + 2


def add_place(plan: AttentionPlan, number):
    """Where in `item` of Buffers the Add of a tile of queries begins."""
    return ITEM + rem(number, num_adds(plan)) * len(Add)


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
    # i32[3 + 3 tiles]: what the block works on, how many tiles of queries it took before, and what was drawn;
    # then, where adds to dQ are in order, of some tiles of queries an Add. There is no room for two buffers.
    item: Any
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
            item=plgpu.SMEM((ITEM + plan.is_deterministic * len(Add) * num_adds(plan),), jnp.int32),
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
    d_q_free: Any  # where adds are in order; or None

    @classmethod
    def types(cls, plan: AttentionPlan) -> "Barriers":
        stages = plan.fused.stages
        loaded = plgpu.Barrier(num_barriers=stages, num_arrivals=4 + brings_ids(plan) + plan.is_deterministic)
        consumed = plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS)
        owned = plgpu.Barrier(num_arrivals=WARPGROUPS)
        written = plgpu.Barrier(num_barriers=2, num_arrivals=WARPGROUPS)
        item_loaded = plgpu.Barrier(num_arrivals=item_arrivals(plan))
        d_q_free = plgpu.Barrier() if plan.is_deterministic else None
        return cls(item_loaded, owned, owned, loaded, consumed, written, d_q_free)


def brings_ids(plan: AttentionPlan) -> bool:
    """Whether segment ids come to shared memory: at H = 128 there is no room."""
    return plan.has_segments and plan.head_dim < 128


def item_arrivals(plan: AttentionPlan) -> int:
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
    numbers: Any  # item of Buffers

    @classmethod
    def locate(
        cls,
        plan: AttentionPlan,
        order: TileOrder,
        extras: Extras,
        item,
        num_taken: Any = 0,
        numbers: Any = None,
    ) -> "Block":
        """num_taken: tiles of queries of the items before. numbers: item of Buffers."""
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
        return cls(batch, head, kv_head, first_key, q_length, kv_length, indices, extras, shift, numbers)

    def number(self, index):
        """Which of all tiles that the thread block takes an index is."""
        return index + self.shift

    def row_at(self, plan: AttentionPlan, index):
        """The first query of an index."""
        if plan.is_deterministic:
            return self.numbers[add_place(plan, self.number(index))] * plan.fused.tile_q
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
    if plan.is_deterministic:
        tiles = add_order(plan).visits()
    else:
        tiles = kv_tiles(first_key, keys, offset, kv_length, q_length, (right, left), tile_q, mask_end=False)
        tiles = extras.visits(tiles, batch, head, first_key, HALF, tile_q, keys // HALF)
    if not plan.has_ragged_keys:
        return tiles
    # Keys past the end have weights too, which would reach dQ: a block that has some masks every tile.
    full_stop = where(first_key + keys > kv_length, tiles.full_start, tiles.full_stop)
    return tiles._replace(full_stop=full_stop)


def slot_of(plan: AttentionPlan, number):
    """Where a tile of queries lies."""
    return rem(number, plan.fused.stages)
