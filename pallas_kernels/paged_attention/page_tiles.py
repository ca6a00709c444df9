"""Tiles of pages in shared memory: copied by all warps, codes widened to what wgmma multiplies, values that
nobody sees zeroed."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import broadcast_rows, int32, pl, plgpu, swizzle_bytes, where

ROWS = 64  # of wgmma's layouts
WARPS = 4  # of a warpgroup


def copy_by_warps(copy, arguments):
    """Calls copy for each of the arguments; one thread starts a copy every 100 cycles or so: four share, in
    code that is written out once for all of them.
    """
    if len(arguments) < WARPS:
        for each in arguments:
            copy(*each)
    else:
        share_among_warps(copy, arguments)


def share_among_warps(copy, arguments):
    """Calls copy for each of the arguments, in one of the warps."""

    @plgpu.warp_map
    def _(warp):
        for first in range(0, len(arguments), WARPS):
            share = arguments[first : first + WARPS]
            start = functools.partial(copy, *choose(warp, share))
            if len(share) == WARPS:
                start()
            else:
                pl.when(warp < len(share))(start)


def choose(index, choices):
    """choices[index], tuples of numbers; the last one beyond the end."""
    is_at = functools.cache(lambda place: index == place)  # once for all numbers

    def choose_number(*numbers):
        *others, chosen = numbers
        for place, number in enumerate(others):
            chosen = lax.select(is_at(place), int32(number), int32(chosen))
        return chosen

    return tuple(map(choose_number, *choices))


def load_wide(codes_ref: Any, dtype: Any) -> jax.Array:
    """Codes from shared memory as the arithmetic's dtype, in registers.

    They are loaded four to a thread, as 32 bits; cast to WGMMA's layout, neighbours exchange pairs.
    """
    codes = plgpu.load(codes_ref, layout=plgpu.Layout.WGMMA_UPCAST_2X)
    if codes.dtype == jnp.int8:
        return codes.astype(dtype)
    return codes.astype(jnp.float16).astype(jnp.float32).astype(dtype)  # what sm_90 has instructions for


def widen(codes_ref: Any, wide_ref: Any, width: int) -> None:
    """Codes as the dtype of wide_ref, through registers, 64 x `width` at once: wgmma takes its right operand,
    and what it transposes, from shared memory only."""
    rows, columns = codes_ref.shape
    for row, column in itertools.product(range(0, rows, ROWS), range(0, columns, width)):
        block = pl.ds(row, ROWS), pl.ds(column, width)
        wide_ref.at[block][...] = load_wide(codes_ref.at[block], wide_ref.dtype)


def zero_invisible(values_ref: Any, start: Any, first: Any, stop: Any, share: tuple[Any, int] = (0, 1)):
    """Zeroes the values of tokens outside first <= token < stop, of a tile whose first token is `start`:
    their weights are zero, but what lies there may be NaN.

    share: (i, n): does the i-th of n parts of the work, where so many warpgroups do it together.
    """
    rows, columns = values_ref.shape
    itemsize = jnp.dtype(values_ref.dtype).itemsize
    width = swizzle_bytes(columns * itemsize) // itemsize  # a few registers

    blocks = list(itertools.product(range(0, rows, ROWS), range(0, columns, width)))
    part, parts = share
    for index in range(0, len(blocks), parts):
        ours = blocks[index : index + parts]
        row, column = choose(part, ours)
        block = values_ref.at[pl.ds(row, ROWS), pl.ds(column, width)]
        zero = functools.partial(_zero_block, block, start + row, first, stop)
        if len(ours) == parts:
            zero()
        else:
            pl.when(part < len(ours))(zero)


def _zero_block(block: Any, start: Any, first: Any, stop: Any):
    is_code = jnp.dtype(block.dtype).itemsize == 1
    layout = plgpu.Layout.WGMMA_UPCAST_2X if is_code else plgpu.Layout.WGMMA
    values = plgpu.load(block, layout=layout)
    if is_code:  # there are no selects of 8 bits
        values = values.astype(jnp.float16).astype(jnp.float32)
    token = lax.iota(jnp.int32, values.shape[0]) + start
    is_seen = broadcast_rows((token >= first) & (token < stop), values.shape[1], layout)
    values = where(is_seen, values, 0.0)
    block[...] = values.astype(block.dtype)
