"""Which tiles a thread block works on, and in which order: index arithmetic shared by the sm_90 kernels."""

import dataclasses
import heapq
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic import div, rem, where

LATE_ITEMS = 264  # that are in the last section: two a multiprocessor


@dataclasses.dataclass(frozen=True)
class TileOrder:
    """The order of work: head after head, that few of them are in the L2 cache at a time; of a head its heavy
    tiles first. Where tiles are uneven the last heads are taken together, tile by tile, to end evenly.

    What shares K and V (or Q and dO) is done together, in a section. A causal tile of queries has the more
    work the later it stands (heavy_last), a tile of keys the earlier.

    On an H100, against heads that together filled 32 MB of the 50 MB L2, tile by tile: full T = 1,024 at
    H = 128 624 TFLOP/s instead of 526 (39% of loads were found in L2), T = 4,096 712 and 693, 512 queries on
    8,192 keys with the backward 527 and 448. Head after head to the end took a causal T = 16,384 from 726 to
    697; the lightest tiles of all heads at the end a causal T = 1,024 to 403, where this order shows 486.
    """

    num_tiles: int  # of a head
    num_heads: int  # batch x heads
    section: int  # heads that share what they stream
    num_late: int = 0  # heads in the last section
    heavy_last: bool = True

    @classmethod
    def plan(
        cls, num_tiles: int, num_heads: int, section: int, is_uneven: bool, heavy_last: bool = True
    ) -> "TileOrder":
        """section: divides num_heads. is_uneven: tiles differ in what they see, as under a causal mask."""
        num_late = math.ceil(LATE_ITEMS / (num_tiles * section)) * section if is_uneven else 0
        return cls(num_tiles, num_heads, section, min(num_late, num_heads), heavy_last)

    @property
    def num_blocks(self) -> int:
        return self.num_tiles * self.num_heads

    @property
    def by_tile(self) -> "TileOrder":
        """All first tiles, then all second ones, and so on: the order of which a place says the least."""
        return TileOrder(self.num_tiles, self.num_heads, self.num_heads, heavy_last=False)

    @property
    def in_equal_sections(self) -> "TileOrder":
        """In sections that are all about as large as the last: located with fewer registers."""
        sizes = range(self.section, max(self.section, self.num_late) + 1, self.section)
        section = max(size for size in sizes if self.num_heads % size == 0)
        return dataclasses.replace(self, section=section, num_late=0)

    def place_of(self, block: int) -> tuple[int, int]:
        """(tile, head) of a place in the order, for the host."""
        num_early, section = self.num_heads - self.num_late, self.section
        first = block // (self.num_tiles * section) * section
        if block >= num_early * self.num_tiles:
            first, section = num_early, self.num_late
        index = block - first * self.num_tiles
        tile, head = index // section, first + index % section
        return self.num_tiles - 1 - tile if self.heavy_last else tile, head

    def locate(self, block):
        """(tile, head) of a place in the order."""
        size = self.num_tiles * self.section
        index = rem(block, size)
        tile = div(index, self.section)
        head = div(block, size) * self.section + rem(index, self.section)
        if self.num_late:
            num_early, late = self.num_heads - self.num_late, self.num_late
            index = block - num_early * self.num_tiles
            tile = where(index < 0, tile, div(index, late))
            head = where(index < 0, head, num_early + rem(index, late))
            # Else they are found again wherever they are used, which takes registers.
            tile, head = lax.optimization_barrier((tile, head))
        return self.num_tiles - 1 - tile if self.heavy_last else tile, head


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
        """i32[blocks, 1 + most items a block has]: how many items a block has, and which: places in
        order.by_tile, which the kernel locates with the fewest registers.
        """
        return table_of(self._queues())

    def dealt(self) -> jax.Array:
        """The table on the device."""
        return on_device(self.table())

    def _queues(self) -> list[list[int]]:
        blocks: list[list[int]] = [[] for _ in range(min(self.order.num_blocks, self.num_multiprocessors))]
        free = [(0, block) for block in range(len(blocks))]
        for place in range(self.order.num_blocks):
            tile, head = self.order.place_of(place)
            time, block = free[0]
            blocks[block].append(tile * self.order.num_heads + head)
            heapq.heapreplace(free, (time + self.costs[tile], block))
        return blocks


def span(rows: int, num_queries: int, num_keys: int, num_heads: int, right: int | None, workers: int) -> int:
    """When the last block of `rows` queries ends, heavy ones dealt first, in rows x tiles of 128 keys.

    right: keys that the first query sees beyond its own place; None: all see all. An item costs a tile more.
    """
    stops = range(num_queries, 0, -rows)
    seen = [num_keys if right is None else min(stop + right, num_keys) for stop in stops]
    free = [0] * workers
    for keys in seen:
        for _ in range(num_heads):
            heapq.heapreplace(free, free[0] + 1 + math.ceil(keys / 128))
    return rows * max(free)


def table_of(queues: Sequence[Sequence[int]]) -> np.ndarray:
    """i32[blocks, 1 + most items a block has]: how many items a block has, and which."""
    table = np.zeros((len(queues), 1 + max(map(len, queues))), np.int32)
    for row, items in zip(table, queues, strict=True):
        row[: 1 + len(items)] = len(items), *items
    return table


def on_device(table: np.ndarray) -> jax.Array:
    """The table, of a jit of its own: a custom partitioning takes no function with constants."""
    return jax.jit(lambda: jnp.asarray(table))()
