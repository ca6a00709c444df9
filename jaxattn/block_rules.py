"""From rules of visibility to the tiles of a block-sparse mask, in memory that grows with those tiles."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from pallas_kernels.flash_attention.block_tiles import FULL, BlockTiles, TileList, pack_tiles, unpack_tiles

EMPTY = FULL - 1  # a tile with no visible element
CHUNK = 256  # tiles whose elements are alive at once: 4 MiB of booleans, whatever T

Rule = Callable[[Any, Any, Any, Any], Any]  # (batch, head, q_index, kv_index) -> bool; broadcasts
Places = Sequence[np.ndarray]  # (batch, head, q tile, KV tile), i64[C] each


def grid_of(shape: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """(Tq, Ts): the tiles that cover T queries and S keys."""
    is_pair = isinstance(tile, tuple | list) and len(tile) == 2
    if not is_pair or any(not isinstance(size, int | np.integer) or size < 8 or size % 8 for size in tile):
        raise ValueError(f"tile must be (tile_q, tile_kv), multiples of 8, got {tile!r}")
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])


def from_rule(
    rule: Rule,
    shape: tuple[int, int],
    tile: tuple[int, int],
    places: Places,
    *,
    leading: tuple[int, int] = (1, 1),
    same: Any = None,
) -> BlockTiles:
    """The mask of a rule that holds nowhere outside the tiles at `places`.

    same: tiles with the same number hold the same elements, apart from the last row and column of tiles,
    which T and S may cut; one of them is evaluated for all.
    """
    q, kv = places[2:]
    grid = grid_of(shape, tile)
    numbers = np.arange(len(q)) if same is None else np.broadcast_to(same, q.shape)
    numbers = 4 * numbers + 2 * (q == grid[0] - 1) + (kv == grid[1] - 1)
    _, evaluated, which = np.unique(numbers, return_index=True, return_inverse=True)
    patterns = Patterns(tile)
    kinds = patterns.number(_elements(rule, shape, tile, tuple(place[evaluated] for place in places)))
    return patterns.pack(places, kinds[which], (*leading, *grid))


def _elements(rule: Rule, shape, tile, places: Places) -> Iterator[Bool[np.ndarray, "C tile_q tile_kv"]]:
    for start in range(0, len(places[0]), CHUNK):
        batch, head, q, kv = (place[start : start + CHUNK, None, None] for place in places)
        q_index = q * tile[0] + np.arange(tile[0])[:, None]
        kv_index = kv * tile[1] + np.arange(tile[1])
        inside = (q_index < shape[0]) & (kv_index < shape[1])
        # Cut to the mask, so that a rule may look its indices up in a table.
        yield inside & rule(
            batch, head, np.minimum(q_index, shape[0] - 1), np.minimum(kv_index, shape[1] - 1)
        )


def band(shape: tuple[int, int], sides: tuple[int | None, int | None], tile: tuple[int, int]) -> BlockTiles:
    """Query i sees the keys i - left .. i + right, sides (left, right): None is no limit."""
    left, right = (sum(shape) if side is None else side for side in sides)
    num_q, num_kv = grid_of(shape, tile)
    first = np.arange(num_q) * tile[0]
    start = np.clip((first - left) // tile[1], 0, num_kv)
    counts = np.clip((first + tile[0] - 1 + right) // tile[1] + 1, start, num_kv) - start
    q = np.repeat(np.arange(num_q), counts)
    kv = np.arange(len(q)) - (np.cumsum(counts) - counts - start)[q]
    rule = lambda batch, head, i, j: (j >= i - left) & (j <= i + right)
    places = (np.zeros_like(q), np.zeros_like(q), q, kv)
    return from_rule(rule, shape, tile, places, same=q * tile[0] - kv * tile[1])


def first_tokens(shape: tuple[int, int], num_tokens: int, axis: int, tile: tuple[int, int]) -> BlockTiles:
    """The first queries see all keys (axis 0), or all queries see the first keys (axis 1)."""
    grid = list(grid_of(shape, tile))
    grid[axis] = min(grid[axis], -(-num_tokens // tile[axis]))
    places = np.nonzero(np.ones((1, 1, *grid), bool))
    rule = lambda *indices: indices[2 + axis] < num_tokens
    return from_rule(rule, shape, tile, places, same=places[2 + axis])


def whole_tiles(
    chosen: Bool[np.ndarray, "B N Tq Ts"], shape: tuple[int, int], tile: tuple[int, int]
) -> BlockTiles:
    """The tiles that are chosen, whole."""
    rule = lambda *indices: np.bool_(True)
    return from_rule(rule, shape, tile, np.nonzero(chosen), leading=chosen.shape[:2], same=0)


def combine(operation: Callable, one: BlockTiles, other: BlockTiles) -> BlockTiles:
    """operation (& or |) of two masks of one shape and tile; batch and head dimensions of 1 broadcast."""
    grid = np.broadcast_shapes(_grid(one), _grid(other))
    (place, kind), (other_place, other_kind) = (_flat(tiles, grid) for tiles in (one, other))
    union = np.union1d(place, other_place)
    pairs = np.full((len(union), 2), EMPTY)
    pairs[np.searchsorted(union, place), 0] = kind
    pairs[np.searchsorted(union, other_place), 1] = other_kind
    pairs, which = np.unique(pairs, axis=0, return_inverse=True)
    patterns = Patterns(one.tile)

    def elements():
        for start in range(0, len(pairs), CHUNK):
            part = pairs[start : start + CHUNK]
            yield operation(*(_look_up(tiles, part[:, i]) for i, tiles in enumerate((one, other))))

    kinds = patterns.number(elements())[which]
    return patterns.pack(np.unravel_index(union, grid), kinds, grid)


def _grid(tiles: BlockTiles) -> tuple[int, ...]:
    return (*tiles.num_kv.shape, tiles.num_q.shape[-1])


def _flat(tiles: BlockTiles, grid: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(place in the grid, kind) of the visible tiles, those of a dimension of 1 repeated along it."""
    listed = unpack_tiles(tiles)
    place = np.ravel_multi_index(listed[:4], grid)[None]
    for axis in (0, 1):
        repeats = grid[axis] // tiles.num_kv.shape[axis]
        stride = int(np.prod(grid[axis + 1 :]))
        place = place + stride * np.arange(repeats)[:, None, None]
        place = place.reshape(repeats * place.shape[1], len(listed.q))  # no -1: nothing may be listed
    return place.reshape(-1), np.tile(listed.mask, len(place))


def to_dense(tiles: BlockTiles, shape: tuple[int, int]) -> Bool[np.ndarray, "B N T S"]:
    """The elements of a mask [T, S], those of tiles that are not visited False."""
    batch, head, num_q, num_kv = _grid(tiles)
    dense = np.zeros((batch, head, num_q, tiles.tile[0], num_kv, tiles.tile[1]), bool)
    listed = unpack_tiles(tiles)
    dense[listed.batch, listed.head, listed.q, :, listed.kv] = _look_up(tiles, listed.mask)
    rows, columns = num_q * tiles.tile[0], num_kv * tiles.tile[1]
    return dense.reshape(batch, head, rows, columns)[:, :, : shape[0], : shape[1]]


def _look_up(tiles: BlockTiles, kinds: Int[np.ndarray, "C"]) -> Bool[np.ndarray, "C tile_q tile_kv"]:
    elements = np.asarray(tiles.masks)[np.maximum(kinds, 0)] != 0
    elements[kinds == FULL], elements[kinds == EMPTY] = True, False
    return elements


class Patterns:
    """The distinct patterns of partial tiles, numbered in the order in which they are met."""

    def __init__(self, tile: tuple[int, int]):
        self._tile = tile
        self._numbers = {_packed(np.full(tile, True)): FULL, _packed(np.full(tile, False)): EMPTY}

    def number(self, chunks: Iterable[Bool[np.ndarray, "C tile_q tile_kv"]]) -> Int[np.ndarray, "E"]:
        """FULL, EMPTY or the number of the pattern of each tile."""
        numbers = self._numbers
        found = [numbers.setdefault(_packed(tile), len(numbers) - 2) for chunk in chunks for tile in chunk]
        return np.array(found, np.int64)

    def pack(self, places: Any, kinds: Int[np.ndarray, "E"], grid: tuple[int, ...]) -> BlockTiles:
        """The tiles at these places, those that are empty left out.

        Patterns are put in order: however a mask was made, equal ones have equal arrays.
        """
        patterns = list(self._numbers)[2:] or [_packed(np.full(self._tile, False))]
        order = np.array(sorted(range(len(patterns)), key=patterns.__getitem__))
        bits = np.frombuffer(b"".join(patterns), np.uint8).reshape(len(patterns), -1)[order]
        masks = np.unpackbits(bits, axis=1).reshape(-1, *self._tile)
        visible = kinds != EMPTY
        kinds = kinds[visible]
        kinds = np.where(kinds == FULL, FULL, order.argsort()[np.maximum(kinds, 0)])
        batch, head, q, kv = (place[visible] for place in places)
        return pack_tiles(TileList(batch, head, q, kv, kinds), masks, grid)


def _packed(elements: Bool[np.ndarray, "tile_q tile_kv"]) -> bytes:
    return np.packbits(elements).tobytes()
