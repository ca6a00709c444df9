"""Queries, keys, values and output cotangents as the kernels load them: never what lies past a length."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.mosaic import pl
from pallas_kernels.mosaic_copy import OCTET, load_ended, load_tile


class Operand(NamedTuple):
    """Rows in global memory, of which those past a batch row's length may hold anything.

    Weights there are 0, but 0 x NaN is NaN: the octet of rows in which a length ends is loaded from a copy
    that has zeros past it, and what lies behind from past the end of the array, where there are zeros.
    (Zeroing whole operands took 79 of 339 us, and 181 of 1,411 with the backward: B = 8, T = 4,096, N = 16,
    H = 128, causal, on an H200. Copies of whole tiles took 26 of 214: B = 64, T = 256, N = 12, H = 64.)
    """

    array: Any  # [B, rows, heads, H]
    tail: Any = None  # [B, OCTET, heads, H], where there are lengths

    @classmethod
    def of(cls, array: Any, lengths: Any) -> "Operand":
        """lengths: i32[B] or None."""
        if lengths is None:
            return cls(array)
        rows = (lengths // OCTET * OCTET)[:, None] + jnp.arange(OCTET)
        found = jnp.minimum(rows, array.shape[1] - 1)[:, :, None, None]
        inside = (rows < lengths[:, None])[:, :, None, None]
        return cls(array, jnp.where(inside, jnp.take_along_axis(array, found, axis=1), 0))

    def rows(self, batch, first_row, num_rows: int, head, length) -> Callable[[Any, Any], None]:
        """copy(target, barrier): starts the copy of a tile, or of some rows of it, into shared memory."""
        place = batch, first_row, head

        def copy(target, barrier):
            if self.tail is None:
                load_tile(self.array, place, target, barrier)
                return
            is_inside = first_row + num_rows <= length
            pl.when(is_inside)(lambda: load_tile(self.array, place, target, barrier))
            pl.when(~is_inside)(lambda: load_ended(self.array, self.tail, place, length, target, barrier))

        return copy


def backward_operands(
    inputs: AttentionInputs, query, key, value, out_grad
) -> tuple[Operand, Operand, Operand, Operand]:
    """A call's padded arrays, as the backward kernels load them."""
    q_lengths, kv_lengths = inputs.q_lengths, inputs.kv_lengths
    return (
        Operand.of(query, q_lengths),
        Operand.of(key, kv_lengths),
        Operand.of(value, kv_lengths),
        Operand.of(out_grad, q_lengths),
    )
