"""What a call brings beside queries, keys and values, in the form one kernel launch reads it from global
memory.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, Integer

from pallas_kernels.flash_attention.block_tiles import BlockTiles
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.kv_tiles import KvTiles, kv_tiles
from pallas_kernels.mosaic import clip, div, pl, rem


class TileLists(NamedTuple):
    """A block mask as a kernel reads it: what each tile of own rows visits, partial tiles first."""

    count: Any  # i32[B|1, N|1, tiles]
    num_masked: Any  # i32[B|1, N|1, tiles], of which the first so many need an element mask
    index: Any  # i32[B|1, N|1, tiles, A]
    mask: Any  # i32[B|1, N|1, tiles, A], of masks; or of partial tiles alone, where no others need one
    masks: Any  # i8[U, own, other]

    @classmethod
    def of(cls, tiles: BlockTiles, owns_queries: bool, mask_all: bool) -> "TileLists":
        """mask_all: other masks than this one hide elements, so that no tile goes without; whole tiles have
        an element mask too.
        """
        count, num_partial, index, mask = tiles[:4] if owns_queries else tiles[4:8]
        masks = tiles.masks if owns_queries else tiles.masks.swapaxes(1, 2)
        if not mask_all:
            return cls(count, num_partial, index, mask, masks)
        place = jnp.arange(index.shape[3])
        mask = jnp.where(
            place < num_partial[..., None],
            jnp.take(mask, jnp.minimum(place, mask.shape[3] - 1), axis=3),
            masks.shape[0],
        )
        masks = jnp.concatenate([masks, jnp.ones_like(masks[:1])])
        return cls(count, count, index, mask, masks)

    def row_of(self, batch, head, first_row):
        """Where the lists of a tile of own rows stand."""
        batches, heads = self.count.shape[:2]
        tile = div(first_row, self.masks.shape[1])
        return batch if batches > 1 else 0, head if heads > 1 else 0, tile


class Extras(NamedTuple):
    """Arrays, or in a kernel references to global memory; None where the call has no such thing.

    O is queries and X keys where a kernel owns rows of queries, the reverse where it owns keys. What is read
    in tiles is padded to whole ones: such reads have no bounds.
    """

    q_lengths: Any = None  # i32[B]
    kv_lengths: Any = None  # i32[B]
    q_segment_ids: Any = None  # i32[B, T]
    kv_segment_ids: Any = None  # i32[B, S]
    segment_tiles: Any = None  # i32[B, tiles, 4], see tiles_that_meet
    by_weight: Any = None  # i32[B, thread blocks of own rows], see tiles_by_weight; or None
    bias: Any = None  # [B|1, N|1, O|1, X|1]
    alibi_slopes: Any = None  # f32[B|1, N]
    sinks: Any = None  # f32[N]
    dropout_seed: Any = None  # u32[2]
    lists: TileLists | None = None

    def own_tile(self, batch, place):
        """The tile of own rows at a place in the order of work."""
        return place if self.by_weight is None else self.by_weight[batch, place]

    def visits(self, tiles: KvTiles, batch, head, first_row, own: int, other: int, count: int) -> KvTiles:
        """The tiles of others that `count` tiles of own rows visit, of those that position alone allows.

        With a block mask these are places in a list, and `tile_at` says which tiles they stand for.
        """
        if self.lists is None:
            return self.narrow(tiles, batch, div(first_row, own), count)
        row = self.lists.row_of(batch, head, first_row)
        parts = self.lists.masks.shape[2] // other
        stop = self.lists.count[row] * parts
        return KvTiles(jnp.int32(0), self.lists.num_masked[row] * parts, stop, stop)

    def tile_at(self, place, batch, head, first_row, other: int):
        """The tile of others at a place of `visits`."""
        if self.lists is None:
            return place
        parts = self.lists.masks.shape[2] // other
        row = self.lists.row_of(batch, head, first_row)
        return self.lists.index[*row, div(place, parts)] * parts + rem(place, parts)

    def elements_at(self, place, batch, head, first_row, shape: tuple[int, int]):
        """The element mask of a masked place of `visits`, as a reference; None without a block mask."""
        if self.lists is None:
            return None
        parts = self.lists.masks.shape[2] // shape[1]
        row = self.lists.row_of(batch, head, first_row)
        listed = lax.min(div(place, parts), self.lists.mask.shape[3] - 1)
        mask = self.lists.masks.at[self.lists.mask[*row, listed]]
        first_row = rem(first_row, self.lists.masks.shape[1])
        first_column = rem(place, parts) * shape[1]
        return mask.at[pl.ds(first_row, shape[0]), pl.ds(first_column, shape[1])]

    def narrow(self, tiles: KvTiles, batch, first_tile, count: int) -> KvTiles:
        """Of the tiles that `count` tiles of own rows see, those where segment ids may be equal."""
        if self.segment_tiles is None:
            return tiles
        starts, full_starts, full_stops, stops = (
            [self.segment_tiles[batch, first_tile + i, bound] for i in range(count)] for bound in range(4)
        )
        lowest, highest = (functools.partial(functools.reduce, f) for f in (lax.min, lax.max))
        start = lax.max(tiles.start, lowest(starts))
        stop = lax.max(start, lax.min(tiles.stop, highest(stops)))
        full_start = clip(lax.max(tiles.full_start, highest(full_starts)), start, stop)
        full_stop = clip(lax.min(tiles.full_stop, lowest(full_stops)), full_start, stop)
        return KvTiles(start, full_start, full_stop, stop)


class Footprint(NamedTuple):
    """The tiles of one kernel: a thread block owns own x warpgroups rows and streams tiles of `other`."""

    own: int
    other: int
    warpgroups: int
    owns_queries: bool = True


def prepare(plan: AttentionPlan, inputs: AttentionInputs, footprint: Footprint) -> Extras:
    """The extras of one launch."""
    own, other, warpgroups, owns_queries = footprint
    block = own * warpgroups
    q_multiple, kv_multiple = (block, other) if owns_queries else (other, block)
    if inputs.block_mask is not None:  # whole tiles of it are visited, beyond the end too
        tile_q, tile_kv = inputs.block_mask.tile
        q_multiple, kv_multiple = math.lcm(q_multiple, tile_q), math.lcm(kv_multiple, tile_kv)
    q_ids = _whole_tiles(inputs.q_segment_ids, 1, q_multiple)
    kv_ids = _whole_tiles(inputs.kv_segment_ids, 1, kv_multiple)
    ids = (q_ids, kv_ids) if owns_queries else (kv_ids, q_ids)
    bias = inputs.bias
    if bias is not None:
        bias = _whole_tiles(_whole_tiles(bias, 2, q_multiple), 3, kv_multiple)
        bias = bias if owns_queries else bias.swapaxes(2, 3)
    lists = None
    if inputs.block_mask is not None:
        mask_all = plan.reach != (None, None) or plan.has_segments or plan.has_kv_lengths
        lists = TileLists.of(inputs.block_mask, owns_queries, mask_all)
    extras = Extras(
        q_lengths=_int32(inputs.q_lengths),
        kv_lengths=_int32(inputs.kv_lengths),
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
        segment_tiles=None if q_ids is None else tiles_that_meet(*ids, own, other),
        bias=bias,
        alibi_slopes=_f32(inputs.alibi_slopes),
        sinks=_f32(inputs.sinks),
        dropout_seed=inputs.dropout_seed,
        lists=lists,
    )
    return extras if q_ids is None else extras._replace(by_weight=tiles_by_weight(plan, extras, footprint))


def tiles_that_meet(
    own_ids: Integer[Array, "B O"], other_ids: Integer[Array, "B X"], own: int, other: int
) -> Int32[Array, "B tiles 4"]:
    """(start, full_start, full_stop, stop) for each tile of own rows: the tiles of others that it may see.

    Tiles whose ranges of ids do not overlap have no id in common; those outside [start, stop) are such. In
    [full_start, full_stop) all ids are equal. Right for ids in any order, sharp where equal ones lie
    together. A tile that meets none has start > stop.
    """
    own_low, own_high = _extremes(own_ids, own)
    other_low, other_high = _extremes(other_ids, other)
    meets = (own_low[:, :, None] <= other_high[:, None]) & (other_low[:, None] <= own_high[:, :, None])
    is_one = (own_low == own_high)[:, :, None] & (other_low == other_high)[:, None]
    start, stop, _ = _span(meets)
    full_start, full_stop, num_full = _span(meets & is_one)
    # All are sums over the same tiles, in one launch; to end a first of several runs would take another.
    full_stop = jnp.where(num_full == full_stop - full_start, full_stop, full_start)
    return jnp.stack([start, full_start, full_stop, stop], axis=2)


def _span(is_in: Bool[Array, "B O X"]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(first, one beyond the last, how many) of X are in, i32[B, O]; of none first is X and last 0."""
    index = jnp.arange(is_in.shape[2], dtype=jnp.int32)
    first = jnp.min(jnp.where(is_in, index, is_in.shape[2]), axis=2)
    return first, jnp.max(jnp.where(is_in, index + 1, 0), axis=2), is_in.sum(axis=2, dtype=jnp.int32)


def tiles_by_weight(plan: AttentionPlan, extras: Extras, footprint: Footprint) -> Int32[Array, "B blocks"]:
    """The tiles of each batch row that thread blocks own, those that visit the fewest others first where
    queries are owned, last where keys are: as under a causal mask alone (TileOrder).

    8 documents in T = 8,192 at H = 128, causal: taken by their places, an H200's 132 multiprocessors would
    wait for the last for 4% of the time.
    """
    own, other, count, owns_queries = footprint
    num_rows = plan.num_queries if owns_queries else plan.num_keys
    assert extras.segment_tiles is not None
    num_blocks = math.ceil(num_rows / (own * count))
    # Part by part, not as a reduction, which would be a launch of its own.
    parts = [extras.segment_tiles[:, part : num_blocks * count : count] for part in range(count)]
    lowest = functools.reduce(lax.min, [part[:, :, 0] for part in parts])
    highest = functools.reduce(lax.max, [part[:, :, 3] for part in parts])
    lengths = [jnp.broadcast_to(x, plan.batch) for x in plan.lengths_of(slice(None), extras)]

    def num_visited(lengths, tile, lowest, highest):
        q_length, kv_length = lengths
        first_row, offset = tile * own * count, plan.offset(q_length, kv_length)
        if owns_queries:
            tiles = kv_tiles(first_row, own * count, offset, q_length, kv_length, plan.reach, other)
        else:
            tiles = kv_tiles(first_row, own * count, -offset, kv_length, q_length, plan.reach[::-1], other)
        return lax.max(lax.min(tiles.stop, highest) - lax.max(tiles.start, lowest), 0)

    blocks = jnp.arange(num_blocks, dtype=jnp.int32)
    of_row = jax.vmap(num_visited, (None, 0, 0, 0))
    visited = jax.vmap(of_row, (0, None, 0, 0))(lengths, blocks, lowest, highest)
    return jnp.argsort(visited if owns_queries else -visited, axis=1).astype(jnp.int32)


def _extremes(ids, tile: int):
    """(lowest, highest) id of each tile."""
    tiles = ids.reshape(ids.shape[0], -1, tile)
    return tiles.min(axis=2), tiles.max(axis=2)


def _whole_tiles(x: Any, axis: int, multiple: int) -> Any:
    """Repeats the last element up to a multiple; a dimension of 1 is one that broadcasts."""
    if x is None or (x.shape[axis] == 1 and x.ndim == 4):
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, math.ceil(x.shape[axis] / multiple) * multiple - x.shape[axis])
    x = jnp.pad(x, padding, mode="edge") if padding[axis][1] else x
    return x.astype(jnp.int32) if x.ndim == 2 else x


def _int32(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else x.astype(jnp.int32)


def _f32(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else x.astype(jnp.float32)
