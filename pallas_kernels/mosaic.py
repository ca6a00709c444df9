"""The one place that imports Pallas Mosaic GPU, whose API changes with each JAX release, and idioms all
kernels share.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

plgpu: Any = mosaic_gpu  # its annotations do not cover what kernels use

__all__ = [
    "LOG2_E",
    "SMEM_BYTES",
    "broadcast_columns",
    "broadcast_rows",
    "ceil_div",
    "div",
    "pl",
    "plgpu",
    "register_zeros",
    "row_full",
    "row_iota",
    "specialize",
    "swizzled_smem",
]

LOG2_E = 1.4426950408889634
SMEM_BYTES = 232_448  # what one thread block may use on sm_90
REGISTERS = {1: None, 2: (240, 24), 3: (160, 32)}  # of compute and loading warpgroups; they share 65,536


def specialize(
    warpgroups: int, warpgroup: Any, compute: Callable[[], None], load: Callable[[], None]
) -> None:
    """Runs compute() in the first `warpgroups` warpgroups and load() in the one after them, whose registers
    they get.
    """
    registers = REGISTERS[warpgroups]

    @pl.when(warpgroup < warpgroups)
    def _compute():
        if registers:
            plgpu.set_max_registers(registers[0], action="increase")
        compute()

    @pl.when(warpgroup == warpgroups)
    def _load():
        if registers:
            plgpu.set_max_registers(registers[1], action="decrease")
        load()


def swizzled_smem(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory laid out for wgmma and TMA: 8 x (swizzle width) tiles, the widest swizzle the last dim
    allows.
    """
    row_bytes = shape[-1] * jnp.dtype(dtype).itemsize
    swizzle = next(width for width in (128, 64, 32) if row_bytes % width == 0)
    tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(tuple(shape), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def register_zeros(shape: Sequence[int]) -> jax.Array:
    """fp32 zeros in the registers of a warpgroup, laid out as a wgmma accumulator."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def row_full(rows: int, value: float) -> jax.Array:
    """One fp32 statistic for each row of a wgmma accumulator."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def row_iota(rows: int) -> jax.Array:
    """The row indices of a wgmma accumulator."""
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=plgpu.Layout.WGMMA.reduce(1))


def broadcast_rows(x: jax.Array, columns: int) -> jax.Array:
    """[rows] -> [rows, columns]."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def broadcast_columns(x: jax.Array, rows: int) -> jax.Array:
    """[columns] -> [rows, columns]."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def div(x: Any, y: int) -> jax.Array:
    """x // y for x >= 0, without the sign handling of Python's floor division."""
    return lax.div(jnp.int32(x), jnp.int32(y))


def ceil_div(x: Any, y: int) -> jax.Array:
    """ceil(x / y) for x >= 0."""
    return div(x + (y - 1), y)
