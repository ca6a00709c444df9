"""What the forward kernel's tiles make of a launch."""

import dataclasses
import math
from typing import Any

import numpy as np

from pallas_kernels.device import num_multiprocessors
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.tiles import Schedule, TileOrder
from pallas_kernels.mosaic import SMEM_BYTES, smem_in_blocks, swizzled_smem, where

STATISTICS_BYTES = 4096  # of shared memory: the log-sum-exp's buffers, barriers, tickets
FIRST = 0  # of the warpgroups
ITEM_COST = 1  # of what an item costs beside its KV tiles, in their time


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardPlan(AttentionPlan):
    """AttentionPlan, and what follows from the forward kernel's tiles, and from how many columns in global
    memory heads have: those of shared memory past them are zeros."""

    key_columns: int  # of Q and K
    value_columns: int  # of V and of the output

    @property
    def splits_columns(self) -> bool:
        """Whether heads end within the columns of a tile, which plgpu.wgmma takes whole."""
        return self.key_columns < self.head_dim or self.value_columns < self.value_dim

    @property
    def splits_values(self) -> bool:
        """Whether P V takes rows or columns of a tile of values that plgpu.wgmma does not."""
        return self.config.splits_rows or self.splits_columns

    @property
    def in_column_blocks(self) -> bool:
        """Whether such tiles lie in blocks of columns. Of one block that would be no other place, and takes
        longer (H = 48, full T = 2,048: 165 and 159 us)."""
        return self.splits_columns and max(self.head_dim, self.value_dim) > 64

    def tiles(self, count: int, rows: int, columns: int) -> Any:
        """Shared memory of so many tiles."""
        if self.in_column_blocks:
            return smem_in_blocks((count,), rows, columns, self.dtype)
        return swizzled_smem((count, rows, columns), self.dtype)

    @property
    def block_rows(self) -> int:
        return self.config.tile_q * self.config.warpgroups

    @property
    def leading_rows(self) -> int:
        """Rows, from the first warpgroup's on, that see all keys that a block streams."""
        return self.config.tile_q if self.folds else self.block_rows

    @property
    def num_row_tiles(self) -> int:
        return math.ceil(self.num_queries / self.block_rows)

    @property
    def num_spare_rows(self) -> int:
        """Rows before the first query in the first thread block."""
        if self.folds:
            return 0
        return self.spare_rows(self.config.tile_q, self.config.warpgroups)

    @property
    def folds(self) -> bool:
        """Whether a block's two warpgroups take a tile of either end: the first one's sees all that the other
        does only where later queries see more."""
        return self.config.folds and self.starts_light

    def first_row(self, row_tile: Any, warpgroup: Any) -> Any:
        """The first query of a warpgroup of a thread block. Folded, the first one takes the last rows that
        are left, the second the first ones: where later queries see more keys, all blocks see as many. In the
        middle one tile may be left, and the second has none."""
        tile_q = self.config.tile_q
        if not self.folds:
            return row_tile * self.block_rows - self.num_spare_rows + warpgroup * tile_q
        num_tiles = math.ceil(self.num_queries / tile_q)
        last = num_tiles - 1 - row_tile
        if isinstance(warpgroup, int) and warpgroup == FIRST:
            return last * tile_q
        first = where(row_tile == last, np.int32(num_tiles), row_tile)
        return (first if isinstance(warpgroup, int) else where(warpgroup == 0, last, first)) * tile_q

    @property
    def has_masked_end(self) -> bool:
        """Whether the last KV tiles of some rows need a mask."""
        return self.has_masked_tail or self.has_kv_lengths or self.num_keys % self.config.tile_kv > 0

    @property
    def has_masked_first(self) -> bool:
        """Whether the first KV tiles may: a list holds its partial tiles first."""
        return self.has_masked_start or self.has_block_mask

    @property
    def has_idle_tiles(self) -> bool:
        """Whether a warpgroup may see fewer KV tiles than its thread block."""
        ragged = self.has_q_lengths or self.num_queries % self.block_rows > 0
        return ragged or self.has_segments or self.reach != (None, None)

    @property
    def order(self) -> TileOrder:
        return TileOrder.plan(
            num_tiles=self.num_row_tiles,
            num_heads=self.batch * self.num_heads,
            section=self.group,
            is_uneven=self.is_uneven,
        )

    @property
    def draws_items(self) -> bool:
        """Whether items are drawn, for what is left of each is unknown; where there is room to pass on what
        was drawn."""
        return self.has_unknown_ends and self.tile_bytes <= SMEM_BYTES - STATISTICS_BYTES

    @property
    def tile_bytes(self) -> int:
        """Shared memory of queries, keys and values."""
        config = self.config
        queries = config.q_stages * self.block_rows * max(self.head_dim, self.value_dim)
        keys = config.stages * self.head_dim + (config.value_stages or config.stages) * self.value_dim
        return (queries + keys * config.tile_kv) * self.dtype.itemsize

    @property
    def schedule(self) -> Schedule:
        costs = tuple(ITEM_COST + self.num_kv_tiles(tile) for tile in range(self.order.num_tiles))
        return Schedule(self.order, num_multiprocessors(), costs)

    def num_kv_tiles(self, row_tile: int) -> int:
        """How many KV tiles the rows of a block see, where no lengths are given."""
        left, right = self.reach
        first = self.first_row(row_tile, FIRST)
        first += self.num_keys - self.num_queries if self.bottom_right else 0
        stop = self.num_keys if right is None else min(first + self.leading_rows + right, self.num_keys)
        start = 0 if left is None else max(first - left, 0)
        return max(0, math.ceil(stop / self.config.tile_kv) - start // self.config.tile_kv)
