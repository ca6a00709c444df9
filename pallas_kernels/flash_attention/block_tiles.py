"""Which tiles of a block-sparse mask a kernel visits: tile indices, and the elements of partial tiles."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Int8, Int32

from pallas_kernels import checks

Array = jax.Array | np.ndarray

TILE = 128  # queries, and keys, of a tile: what the kernels load at a time
FULL = -1  # in TileList.mask: every element of the tile is visible
NOT_VISITED = 0  # of tile_kinds


class BlockTiles(NamedTuple):
    """The visible tiles of a mask [T, S], by rows of tiles for the output and dq, by columns for dk and dv.

    Tq = ceil(T / tile_q) and Ts = ceil(S / tile_kv) tiles; elements beyond T and S are not visible. A list
    holds its partial tiles first, each class ascending; entries beyond its count repeat a valid index, so
    that a kernel may load ahead. The lists cost 4 bytes a tile of the longest one: at T = S = 128k at most
    4 MiB each.
    """

    num_kv: Int32[Array, "#B #N Tq"]  # KV tiles that a query tile visits
    num_partial: Int32[Array, "#B #N Tq"]  # of which the first so many take an element mask
    kv_index: Int32[Array, "#B #N Tq A"]
    kv_mask: Int32[Array, "#B #N Tq Ap"]  # index into masks, of the partial tiles
    num_q: Int32[Array, "#B #N Ts"]  # the same of the query tiles that a KV tile is visited by
    num_q_partial: Int32[Array, "#B #N Ts"]
    q_index: Int32[Array, "#B #N Ts C"]
    q_mask: Int32[Array, "#B #N Ts Cp"]
    masks: Int8[Array, "U tile_q tile_kv"]  # the distinct partial tiles, 1 where visible; at least one

    @property
    def tile(self) -> tuple[int, int]:
        """(tile_q, tile_kv)."""
        return self.masks.shape[1], self.masks.shape[2]


class TileList(NamedTuple):
    """The same as one entry a visible tile, on the host: what masks are built from and combined as."""

    batch: Int[np.ndarray, "E"]
    head: Int[np.ndarray, "E"]
    q: Int[np.ndarray, "E"]
    kv: Int[np.ndarray, "E"]
    mask: Int[np.ndarray, "E"]  # index into the masks, or FULL


def pack_tiles(tiles: TileList, masks: np.ndarray, grid: tuple[int, ...]) -> BlockTiles:
    """The kernels' form of a list over a grid of (B|1, N|1, Tq, Ts) tiles; masks [U, tile_q, tile_kv]."""
    *leading, num_q_tiles, num_kv_tiles = grid
    if len(masks) == 0:
        raise ValueError("masks must hold at least one tile, got none")
    packed = BlockTiles(
        *_lists(tiles, tiles.q, tiles.kv, (*leading, num_q_tiles)),
        *_lists(tiles, tiles.kv, tiles.q, (*leading, num_kv_tiles)),
        masks=masks.astype(np.int8),
    )
    arrays: Any = packed
    for array in arrays:  # masks are compared and hashed by what they hold
        array.setflags(write=False)
    return packed


def _lists(
    tiles: TileList, own: np.ndarray, other: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(count, partial count, indices of `other`, masks) of each of `own`'s tiles."""
    row = np.ravel_multi_index((tiles.batch, tiles.head, own), shape)
    is_full = tiles.mask == FULL
    order = np.lexsort((other, is_full, row))
    row, other, mask, is_full = row[order], other[order], tiles.mask[order], is_full[order]
    num_rows = int(np.prod(shape))
    counts = np.bincount(row, minlength=num_rows)
    partial_counts = np.bincount(row[~is_full], minlength=num_rows)
    place = np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    index = np.zeros((num_rows, max(1, counts.max())), np.int32)
    index[row, place] = other
    last = index[np.arange(num_rows), np.maximum(counts - 1, 0)]
    index = np.where(np.arange(index.shape[1]) < counts[:, None], index, last[:, None])
    masks = np.zeros((num_rows, max(1, partial_counts.max())), np.int32)
    masks[row[~is_full], place[~is_full]] = mask[~is_full]
    shaped = lambda x: x.astype(np.int32).reshape(*shape, *x.shape[1:])
    return shaped(counts), shaped(partial_counts), shaped(index), shaped(masks)


def unpack_tiles(tiles: BlockTiles) -> TileList:
    """The list that pack_tiles made these from, by rows: partial tiles first."""
    num_kv, num_partial, kv_index, kv_mask = (np.asarray(x) for x in tiles[:4])
    place = np.arange(kv_index.shape[-1])
    batch, head, q, place = np.nonzero(place < num_kv[..., None])
    is_full = place >= num_partial[batch, head, q]
    mask = kv_mask[batch, head, q, np.minimum(place, kv_mask.shape[-1] - 1)]
    return TileList(batch, head, q, kv_index[batch, head, q, place], np.where(is_full, FULL, mask))


def visible_elements(tiles: BlockTiles, rows: jax.Array, num_keys: int) -> jax.Array:
    """bool[B|1, N|1, len(rows), S]: the keys that these queries see."""
    tile_q, _ = tiles.tile
    kinds = tile_kinds(tiles, jnp.minimum(rows // tile_q, tiles.num_kv.shape[2] - 1))
    elements = elements_by_kind(tiles)[kinds, (rows % tile_q)[:, None]]
    return elements.reshape(*kinds.shape[:3], -1)[..., :num_keys] != 0


def tile_kinds(tiles: BlockTiles, q_tile: jax.Array) -> Int32[jax.Array, "#B #N Q Ts"]:
    """What each tile of some rows of tiles is: NOT_VISITED, 1 full, 2 + m the partial tile m."""
    num_kv, num_partial, kv_index, kv_mask = (jnp.take(x, q_tile, axis=2) for x in tiles[:4])
    place = jnp.arange(kv_index.shape[-1])
    partial_kind = 2 + jnp.take(kv_mask, jnp.minimum(place, kv_mask.shape[-1] - 1), axis=-1)
    kind = jnp.where(place < num_partial[..., None], partial_kind, 1)
    num_kv_tiles = tiles.num_q.shape[-1]
    target = jnp.where(place < num_kv[..., None], kv_index, num_kv_tiles)
    kinds = jnp.full((*num_kv.shape, num_kv_tiles), NOT_VISITED, jnp.int32)
    return jnp.put_along_axis(kinds, target, kind, axis=-1, inplace=False, mode="drop")


def elements_by_kind(tiles: BlockTiles) -> Int8[jax.Array, "2+U tile_q tile_kv"]:
    """The elements of each kind of tile, 1 where visible."""
    whole = jnp.arange(2, dtype=jnp.int8)[:, None, None] * jnp.ones(tiles.tile, jnp.int8)
    return jnp.concatenate([whole, tiles.masks])


def check_block_tiles(tiles: BlockTiles, batch: int, num_heads: int, num_queries: int, num_keys: int) -> None:
    """Holds the shapes and dtypes of a call's block_mask to those of its queries and keys."""
    if not isinstance(tiles, BlockTiles):
        raise ValueError(f"block_mask must be a BlockTiles (see BlockMask.tiles), got {type(tiles).__name__}")
    checks.check_rank("block_mask.masks", tiles.masks, "U tile_q tile_kv")
    for name, array in tiles._asdict().items():
        checks.check_dtype(f"block_mask.{name}", array, (np.int8 if name == "masks" else np.int32,))
    (tile_q, tile_kv), allowed = tiles.tile, ((1, batch), (1, num_heads))
    for letter, length, tile, arrays in (
        ("Tq", num_queries, tile_q, tiles._fields[:4]),
        ("Ts", num_keys, tile_kv, tiles._fields[4:8]),
    ):
        for name in arrays:
            array = getattr(tiles, name)
            letters, sizes = f"B|1 N|1 {letter}", [*allowed, -(-length // tile)]
            if array.ndim == 4:
                letters, sizes = f"{letters} A", [*sizes, array.shape[3]]
            checks.check_shape(f"block_mask.{name}", array, sizes, letters)
            allowed = array.shape[:2]
