"""Which tiles of keys rows see: arithmetic that the kernels of dense and of paged attention share."""

from typing import Any, NamedTuple

from jax import lax

from pallas_kernels.mosaic import ceil_div, clip, div, where


class Steps(NamedTuple):
    """KV tiles of an item, counted from its last: [start, stop) are seen, those outside
    [masked_stop, full_stop) need a mask.
    """

    start: Any
    masked_stop: Any
    full_stop: Any
    stop: Any


class KvTiles(NamedTuple):
    """KV tiles [start, stop) that rows see, of which [full_start, full_stop) need no mask."""

    start: Any
    full_start: Any
    full_stop: Any
    stop: Any

    def clamp(self, outer: "KvTiles") -> "KvTiles":
        """The same tiles, as a range inside outer's even when empty."""
        start = clip(self.start, outer.start, outer.stop)
        stop = clip(self.stop, start, outer.stop)
        full_start = clip(self.full_start, start, stop)
        return KvTiles(start, full_start, clip(self.full_stop, full_start, stop), stop)

    def steps_before(self, stop) -> Steps:
        """These tiles as steps of an item whose tiles end at `stop`."""
        return Steps(*(stop - tile for tile in (self.stop, self.full_stop, self.full_start, self.start)))


NO_TILES = KvTiles(0, 0, 0, 0)


def kv_tiles(
    first_row, num_rows: int, offset, q_length, kv_length, reach, tile_kv: int, mask_end: bool = True
) -> KvTiles:
    """The KV tiles that the rows first_row .. first_row + num_rows - 1 see.

    Row i stands at position i + offset and sees the keys position - left .. position + right below kv_length;
    mask_end: whether keys from kv_length on, in the last tile, need a mask.
    """
    left, right = reach
    first = first_row + offset
    last = first + (num_rows - 1)
    start = full_start = 0
    stop = full_stop = kv_length
    if left is not None:
        start, full_start = lax.max(first - left, 0), lax.max(last - left, 0)
    if right is not None:
        stop, full_stop = clip(last + (right + 1), 0, kv_length), clip(first + (right + 1), 0, kv_length)
    stop = where(first_row < q_length, stop, 0)
    start, stop = div(start, tile_kv), ceil_div(stop, tile_kv)
    stop = lax.max(start, stop)
    full_start = clip(ceil_div(full_start, tile_kv), start, stop)
    round_end = div if mask_end or right is not None else ceil_div
    return KvTiles(start, full_start, clip(round_end(full_stop, tile_kv), full_start, stop), stop)
