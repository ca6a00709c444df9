"""Which tiles a thread block works on, and in which order: index arithmetic shared by the sm_90 kernels."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import broadcast_rows, ceil_div, div, plgpu, row_iota

FAR = 1 << 30  # beyond any sequence
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


def visible_keys(first_row, first_key, shape: Sequence[int], offset, kv_length, reach) -> Any:
    """bool[rows, keys] of a tile, laid out as a wgmma accumulator; kv_length None: no key is padding."""
    left, right = reach
    key = first_key + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    row = row_iota(shape[0])
    visible = None
    if right is not None:
        last = row + (first_row + offset + right)
        visible = key <= broadcast_rows(
            last if kv_length is None else jnp.minimum(last, kv_length - 1), shape[1]
        )
    elif kv_length is not None:
        # Through a row vector, where a splat would do: broadcast rows tell the compiler their layout.
        visible = key <= broadcast_rows(jnp.minimum(row + FAR, kv_length - 1), shape[1])
    if left is not None:
        not_before = key >= broadcast_rows(row + (first_row + offset - left), shape[1])
        visible = not_before if visible is None else visible & not_before
    return visible


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
