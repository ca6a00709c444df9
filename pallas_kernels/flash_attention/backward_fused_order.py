"""A deterministic order for the fused backward's sums of dQ: thread blocks take turns at every tile of it.

Each thread block of the fused kernel owns a tile of a head's keys, goes through the head's queries, and adds
to every tile of dQ. Here the blocks that work on a head at the same time go through its queries one behind
the other, at a distance, so that whose turn it is has long passed on (FlashAttention-2 and 3 have blocks take
turns, too, but all begin with the same queries): tile p begins with the queries at its own place, goes on to
the last, and then from the first. The tiles p, p + classes, p + 2 classes, ... of a head make a wave: they
run at the same time, with those of as many heads as find room.

Blocks of a wave wait for each other, in a circle: all of them have to run. There are no more than
multiprocessors, and a block has one for itself.

Under a causal mask tiles p and n - 1 - p make a unit of even length, and their blocks need not meet either;
it was built, and took longer than the two kernels (CHANGELOG).
"""

import dataclasses
import math

import jax
import numpy as np
from jax import lax

from pallas_kernels.device import num_multiprocessors
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.tiles import on_device, table_of
from pallas_kernels.kv_tiles import KvTiles
from pallas_kernels.mosaic import ceil_div, div, int32, rem, where

MAX_CLASSES = 8
# Of Q, dO and dQ of the heads that are worked on together. At T = 4,096, H = 128 4 heads (17 MB) and 8 (34)
# took as long, 16 (67) 1.15 times, with the forward (a sweep on an H200).
L2_BYTES = 50 << 20


@dataclasses.dataclass(frozen=True)
class AddOrder:
    """Who adds to which tile of dQ, and after whom. Methods take Python's integers or a kernel's."""

    num_tiles: int  # of keys, of a head
    num_query_tiles: int  # of a head
    parts: int  # tiles of queries that are as long as one of keys
    num_heads: int  # batch x heads
    num_multiprocessors: int
    head_bytes: int  # of Q, dO and dQ of a head
    classes: int = 1  # of tiles of a head, which come one after the other

    @classmethod
    def of(cls, plan: AttentionPlan, keys: int) -> "AddOrder":
        """keys: of a tile."""
        tile_q = plan.fused.tile_q
        num_tiles, num_query_tiles = math.ceil(plan.num_keys / keys), math.ceil(plan.num_queries / tile_q)
        num_heads = plan.batch * plan.num_heads
        head_bytes = plan.num_queries * (plan.token_bytes + 4 * plan.head_dim)
        parts, multiprocessors = keys // tile_q, num_multiprocessors()
        order = cls(num_tiles, num_query_tiles, parts, num_heads, multiprocessors, head_bytes)
        return order.in_best_classes()

    def in_best_classes(self) -> "AddOrder":
        """With as many classes as take the fewest waves, of heads that fit in L2; of equal ones rather two
        than one, whose blocks are less far behind each other.
        """
        fewest = ceil_div(self.num_tiles, self.num_multiprocessors)
        orders = [dataclasses.replace(self, classes=fewest + more) for more in range(MAX_CLASSES)]
        fitting = [order for order in orders if order.wave_heads * self.head_bytes <= L2_BYTES]
        key = lambda order: (order.num_waves, order.classes == 1, order.classes)
        return min(fitting or orders[:1], key=key)

    @property
    def wave_tiles(self) -> int:
        """Of a head, that run at the same time."""
        return ceil_div(self.num_tiles, self.classes)

    @property
    def wave_heads(self) -> int:
        return min(self.num_heads, self.num_multiprocessors // self.wave_tiles)

    @property
    def num_waves(self) -> int:
        return ceil_div(self.num_heads, self.wave_heads) * self.classes

    def dealt(self) -> jax.Array:
        """The table, on the device."""
        return on_device(self.table())

    def table(self) -> np.ndarray:
        """Which items each block works on, as Schedule.table has them."""
        blocks: list[list[int]] = [[] for _ in range(self.wave_heads * self.wave_tiles)]
        for head in range(self.num_heads):
            first_block = head % self.wave_heads * self.wave_tiles
            for tile in sorted(range(self.num_tiles), key=lambda tile: tile % self.classes):
                blocks[first_block + tile // self.classes].append(tile * self.num_heads + head)
        return table_of(blocks)

    def visits(self) -> KvTiles:
        """The places of the tiles of queries that a tile of keys goes through; query_tile says which."""
        stop = int32(self.num_query_tiles)
        return KvTiles(int32(0), int32(0), stop, stop)

    def query_tile(self, tile, place):
        """The tile of queries at a place of `visits`."""
        index = tile * self.parts + place
        return index - where(index >= self.num_query_tiles, int32(self.num_query_tiles), 0)

    def num_before(self, tile, query_tile):
        """How many others add to a tile of queries before a tile of keys does: all of classes before, and of
        its own those that stand at these queries or before, the nearest first, and then, from the end, those
        that stand behind them.
        """
        last, row, own = self.num_tiles - 1, div(query_tile, self.parts), rem(tile, self.classes)
        row = lax.min(row, int32(last))  # in tiles of keys
        of_classes = div(self.num_tiles, self.classes) * own + lax.min(rem(self.num_tiles, self.classes), own)
        behind = div(row - tile, self.classes)
        around = div(row - own + self.classes, self.classes) + div(last - tile, self.classes)
        return of_classes + where(tile <= row, behind, around)


def orders_adds(plan: AttentionPlan) -> bool:
    """Whether the sums of dQ can be in a fixed order: every block's work is known beforehand, and it is such
    that no block waits long. With tiles of queries as long as those of keys (H <= 64) the next would hardly
    have the time to be told.
    """
    sees_all = plan.reach == (None, None) and not plan.has_unknown_ends
    fits = plan.head_dim in (96, 128) and plan.fused.stages == 2
    return sees_all and fits and plan.num_queries >= plan.num_keys
