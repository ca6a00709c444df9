"""Which tiles a thread block works on, and in which order: index arithmetic shared by the sm_90 kernels."""

import dataclasses
import heapq
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic import ceil_div, div

L2_BYTES = 32 << 20  # of 50 MiB: what the K and V that thread blocks share at one time may take


class KvTiles(NamedTuple):
    """KV tiles [start, stop) that rows see, of which [full_start, full_stop) need no mask."""

    start: Any
    full_start: Any
    full_stop: Any
    stop: Any

    def clamp(self, outer: "KvTiles") -> "KvTiles":
        """The same tiles, as a range inside outer's even when empty."""
        start = jnp.clip(self.start, outer.start, outer.stop)
        stop = jnp.clip(self.stop, start, outer.stop)
        full_start = jnp.clip(self.full_start, start, stop)
        return KvTiles(start, full_start, jnp.clip(self.full_stop, full_start, stop), stop)


NO_TILES = KvTiles(0, 0, 0, 0)


def kv_tiles(
    first_row, num_rows: int, offset, q_length, kv_length, reach, tile_kv: int, mask_end: bool = True
) -> KvTiles:
    """The KV tiles that the rows first_row .. first_row + num_rows - 1 see.

    Row i stands at position i + offset and sees the keys position - left .. position + right below kv_length;
    mask_end: whether keys from kv_length on, in the last tile, need a mask.
    """
    left, right = reach
    first, last = first_row + offset, first_row + offset + num_rows - 1
    start = full_start = jnp.int32(0)
    stop = full_stop = kv_length
    if left is not None:
        start, full_start = jnp.maximum(first - left, 0), jnp.maximum(last - left, 0)
    if right is not None:
        stop = jnp.clip(last + right + 1, 0, kv_length)
        full_stop = jnp.clip(first + right + 1, 0, kv_length)
    stop = jnp.where(first_row < q_length, stop, 0)
    start, stop = div(start, tile_kv), ceil_div(stop, tile_kv)
    stop = jnp.maximum(start, stop)
    full_start = jnp.clip(ceil_div(full_start, tile_kv), start, stop)
    round_end = div if mask_end or right is not None else ceil_div
    return KvTiles(start, full_start, jnp.clip(round_end(full_stop, tile_kv), full_start, stop), stop)


@dataclasses.dataclass(frozen=True)
class TileOrder:
    """The order of thread blocks: heads in sections whose K and V fit the L2 cache; in a section, heavy tiles
    first.

    Blocks start in index order, so the longest start first. A causal tile of queries has the more work the
    later it stands (heavy_last), a tile of keys the earlier.
    """

    num_tiles: int
    num_heads: int  # batch x heads
    section: int  # heads that run together; divides num_heads
    heavy_last: bool = True

    @classmethod
    def plan(
        cls, num_tiles: int, num_heads: int, heads_per_kv: int, kv_bytes: int, heavy_last: bool = True
    ) -> "TileOrder":
        fit = max(1, L2_BYTES // kv_bytes) * heads_per_kv
        section = max(size for size in range(1, num_heads + 1) if num_heads % size == 0 and size <= fit)
        return cls(num_tiles, num_heads, section, heavy_last)

    @property
    def num_blocks(self) -> int:
        return self.num_tiles * self.num_heads

    def tile_of(self, block: int) -> int:
        """The tile of a thread block, for the host."""
        tile = block % (self.num_tiles * self.section) // self.section
        return self.num_tiles - 1 - tile if self.heavy_last else tile

    def locate(self, block):
        """(tile, head) of a thread block."""
        index = lax.rem(block, jnp.int32(self.num_tiles * self.section))
        tile = div(index, self.section)
        if self.heavy_last:
            tile = self.num_tiles - 1 - tile
        head = div(block, self.num_tiles * self.section) * self.section + lax.rem(
            index, jnp.int32(self.section)
        )
        return tile, head


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which items of an order each thread block works on, in turn.

    There is a block a multiprocessor, its items dealt beforehand as a queue would deal them: each to the
    block that is free first. A fixed pattern (every 132nd item) leaves multiprocessors idle for up to 40% of
    the time where a block has few items.
    """

    order: TileOrder
    num_multiprocessors: int
    costs: tuple[int, ...]  # of each tile of a head

    def table(self) -> np.ndarray:
        """i32[blocks, 1 + most items a block has]: how many items a block has, and which."""
        blocks = self._queues()
        table = np.zeros((len(blocks), 1 + max(map(len, blocks))), np.int32)
        for row, items in zip(table, blocks, strict=True):
            row[: 1 + len(items)] = len(items), *items
        return table

    def _queues(self) -> list[list[int]]:
        blocks: list[list[int]] = [[] for _ in range(min(self.order.num_blocks, self.num_multiprocessors))]
        free = [(0, block) for block in range(len(blocks))]
        for item in range(self.order.num_blocks):
            time, block = free[0]
            blocks[block].append(item)
            heapq.heapreplace(free, (time + self.costs[self.order.tile_of(item)], block))
        return blocks
