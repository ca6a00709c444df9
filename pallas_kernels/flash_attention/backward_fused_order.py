"""A deterministic order for the fused backward's sums of dQ: thread blocks take turns at every tile of it.

Each thread block of the fused kernel adds to the tiles of dQ that see its keys. Here the blocks that work on
a head at the same time go through its queries one behind the other, at a distance, so that whose turn it is
has long passed on (FlashAttention-2 and 3 have blocks take turns, too, but all begin with the same queries).

Work is cut into units of equal time: a tile of keys, or under a causal mask, of n tiles, a tile p of the
first half, which more queries see, and then n - 1 - p. The units p, p + classes, p + 2 classes, ... of a head
make a wave: they run at the same time, with those of as many heads as find room. A unit goes through, in
tiles of keys, of n whose first half is of n // 2:

    full:                 p, p + 1, ..., n - 1, 0, ..., p - 1
    causal, first half:   p; the second half, from n // 2 + p on and around; p + 1, ..., n // 2 - 1
    causal, second half:  q; n - 1, n - 2, ..., q + 1

Units of a wave that start together never meet: the second half of the queries is first gone through by the
units' first tiles, then by their second ones. Only a tile's own queries need a mask, and come first.

Blocks of a wave wait for each other, in a circle: all of them have to run. There are no more than
multiprocessors, and a block has one for itself.
"""

import dataclasses
import math

import jax
import numpy as np
from jax import lax

from pallas_kernels.device import num_multiprocessors
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.tiles import KvTiles, on_device, table_of
from pallas_kernels.mosaic import ceil_div, div, int32, rem, where

MAX_CLASSES = 8
# Time that a wave of one class takes of one of more, whose blocks are further behind each other.
ONE_CLASS = 1.2


@dataclasses.dataclass(frozen=True)
class AddOrder:
    """Who adds to which tile of dQ, and after whom. Methods take Python's integers or a kernel's."""

    num_tiles: int  # of keys, of a head: n
    num_query_tiles: int  # of a head
    parts: int  # tiles of queries that are as long as one of keys
    num_heads: int  # batch x heads
    is_causal: bool
    num_multiprocessors: int
    classes: int = 1  # of units of a head, which come one after the other

    @classmethod
    def of(cls, plan: AttentionPlan, keys: int) -> "AddOrder":
        """keys: of a tile."""
        tile_q = plan.fused.tile_q
        num_tiles, num_heads = math.ceil(plan.num_keys / keys), plan.batch * plan.num_heads
        is_causal = plan.reach[1] is not None
        parts = keys // tile_q
        num_query_tiles = num_tiles * parts if is_causal else math.ceil(plan.num_queries / tile_q)
        order = cls(num_tiles, num_query_tiles, parts, num_heads, is_causal, num_multiprocessors())
        return order.in_best_classes()

    def in_best_classes(self) -> "AddOrder":
        """With as many classes as take the least time."""
        least = ceil_div(self.num_units, self.num_multiprocessors)
        orders = [dataclasses.replace(self, classes=least + more) for more in range(MAX_CLASSES)]
        return min(orders, key=lambda order: order.num_waves * (ONE_CLASS if order.classes == 1 else 1))

    @property
    def num_units(self) -> int:
        """Of a head."""
        return ceil_div(self.num_tiles, 2) if self.is_causal else self.num_tiles

    @property
    def wave_units(self) -> int:
        """Of a head, that run at the same time."""
        return ceil_div(self.num_units, self.classes)

    @property
    def wave_heads(self) -> int:
        return min(self.num_heads, self.num_multiprocessors // self.wave_units)

    @property
    def num_waves(self) -> int:
        return ceil_div(self.num_heads, self.wave_heads) * self.classes

    def table(self) -> np.ndarray:
        """Which items each block works on, as Schedule.table has them."""
        blocks: list[list[int]] = [[] for _ in range(self.wave_heads * self.wave_units)]
        for head in range(self.num_heads):
            first_block = head % self.wave_heads * self.wave_units
            for unit in sorted(range(self.num_units), key=lambda unit: unit % self.classes):
                other = self.num_tiles - 1 - unit
                tiles = (unit, other) if self.is_causal and other != unit else (unit,)
                items = [tile * self.num_heads + head for tile in tiles]
                blocks[first_block + unit // self.classes] += items
        return table_of(blocks)

    def dealt(self) -> jax.Array:
        """The table on the device."""
        return on_device(self.table())

    def visits(self, tile) -> KvTiles:
        """The places of the tiles of queries that a tile of keys goes through; query_tile says which."""
        if not self.is_causal:
            stop = int32(self.num_query_tiles)
            return KvTiles(int32(0), int32(0), stop, stop)
        stop = self.parts * (self.num_tiles - tile)
        return KvTiles(int32(0), int32(self.parts), stop, stop)

    def query_tile(self, tile, place):
        """The tile of queries at a place of `visits`."""
        if not self.is_causal:
            index = tile * self.parts + place
            return index - where(index >= self.num_query_tiles, int32(self.num_query_tiles), 0)
        half = self.num_tiles // 2
        late, step = self.num_tiles - half, div(place, self.parts)
        row = tile + step - 1
        row = half + row - where(row >= late, int32(late), 0)
        row = where(step > late, tile + step - late, row)
        row = where(tile < half, row, self.num_tiles - step)
        return where(step == 0, tile, row) * self.parts + rem(place, self.parts)

    def num_before(self, tile, query_tile):
        """How many others add to a tile of queries before a tile of keys does: those of classes before, and
        of its own first tiles, down from the one that begins with these queries, and around; then second
        tiles, from the lowest on, but for the one that begins with them.
        """
        n, half, last_unit = self.num_tiles, self.num_tiles // 2, self.num_units - 1
        row = lax.min(div(query_tile, self.parts), int32(n - 1))  # in tiles of keys
        if not self.is_causal:
            return self._num_of_classes(n, self._class_of(tile)) + self._num_above(tile, row, n - 1)
        unit = where(tile < half, tile, n - 1 - tile)
        own = self._class_of(unit)
        earlier = self._num_of_classes(lax.min(int32(half), row + 1), own)
        earlier_second = self._num_of_classes(last_unit + 1, own) - self._num_of_classes(n - 1 - row, own)
        earlier += where(row < half, int32(0), earlier_second)

        first = self._num_above(tile, row - where(row < half, int32(0), half), half - 1)
        num_lower = div(last_unit - unit, self.classes)  # second tiles
        is_own_before = (self._class_of(n - 1 - row) == own) & (2 * row <= tile + n)
        other = num_lower + where(is_own_before, int32(1), 0)
        second = where(tile == row, lax.max(num_lower - div(n - row, self.classes), 0), other)
        second += self._num_up_to(int32(half - 1), own)
        return earlier + where(tile < half, first, second)

    def _class_of(self, unit):
        return rem(unit, self.classes)

    def _num_of_classes(self, stop, own):
        """Of the units [0, stop), those of classes before one."""
        return div(stop, self.classes) * own + lax.min(rem(int32(stop), self.classes), own)

    def _num_up_to(self, last, own):
        """Of the units [0, last], those of a class."""
        return div(last - own + self.classes, self.classes)

    def _num_above(self, unit, start, last):
        """Of a unit's class, of the units [0, last], those before it, down from `start` and around."""
        behind = div(lax.min(start, int32(last)) - unit, self.classes)
        around = self._num_up_to(start, self._class_of(unit)) + div(last - unit, self.classes)
        return where(unit <= start, behind, around)


def orders_adds(plan: AttentionPlan) -> bool:
    """Whether the sums of dQ can be in a fixed order: every block's work is known beforehand, and it is such
    that no block waits long. With tiles of queries as long as those of keys (H <= 64) the next would hardly
    have the time to be told.
    """
    if plan.has_unknown_ends or plan.head_dim not in (96, 128) or plan.fused.stages != 2:
        return False
    if plan.reach == (None, None):
        return plan.num_queries >= plan.num_keys
    return plan.reach == (None, 0) and plan.num_queries == plan.num_keys
