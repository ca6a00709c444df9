"""Queries, keys, values and output cotangents as the kernels load them: never what lies past a length."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.mosaic import pl, rem
from pallas_kernels.mosaic_copy import load_tile


class Operand(NamedTuple):
    """Rows in global memory, of which those past a batch row's length may hold anything.

    Weights there are 0, but 0 x NaN is NaN: the tile in which a length ends is loaded from a copy that has
    zeros past it. (Zeroing whole operands took 79 of 339 us, and 181 of 1,411 with the backward: B = 8, T =
    4,096, N = 16, H = 128, causal, on an H200.)
    """

    array: Any  # [B, rows, heads, H]
    tail: Any = None  # [B, tile, heads, H], where there are lengths

    @classmethod
    def of(cls, array: Any, lengths: Any, tile: int) -> "Operand":
        """lengths: i32[B] or None. tile: rows that are loaded at a time, from multiples of it on."""
        if lengths is None:
            return cls(array)
        rows = (lengths // tile * tile)[:, None] + jnp.arange(tile)
        found = jnp.minimum(rows, array.shape[1] - 1)[:, :, None, None]
        inside = (rows < lengths[:, None])[:, :, None, None]
        return cls(array, jnp.where(inside, jnp.take_along_axis(array, found, axis=1), 0))

    def rows(self, batch, first_row, num_rows: int, head, length) -> Callable[[Any, Any], None]:
        """copy(target, barrier): starts the copy of a tile, or of some rows of it, into shared memory.

        Of a tile that lies past the length whole it copies other rows: nothing sees them.
        """

        def copy_from(array, first, target, barrier):
            load_tile(array, (batch, first, head), target, barrier)

        def copy(target, barrier):
            if self.tail is None:
                copy_from(self.array, first_row, target, barrier)
                return
            tile_row = rem(first_row, self.tail.shape[1])
            is_inside = first_row + num_rows <= length
            pl.when(is_inside)(lambda: copy_from(self.array, first_row, target, barrier))
            pl.when(~is_inside)(lambda: copy_from(self.tail, tile_row, target, barrier))

        return copy


def backward_operands(
    inputs: AttentionInputs, query, key, value, out_grad, q_tile: int, kv_tile: int
) -> tuple[Operand, Operand, Operand, Operand]:
    """A call's padded arrays, as a kernel loads them that takes q_tile queries and kv_tile keys at a time."""
    q_lengths, kv_lengths = inputs.q_lengths, inputs.kv_lengths
    return (
        Operand.of(query, q_lengths, q_tile),
        Operand.of(key, kv_lengths, kv_tile),
        Operand.of(value, kv_lengths, kv_tile),
        Operand.of(out_grad, q_lengths, q_tile),
    )
