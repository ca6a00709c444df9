"""The one place that imports Pallas Mosaic GPU, whose API changes with each JAX release, and idioms all
kernels share. What Pallas has no words for is in mosaic_inline.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from pallas_kernels.mosaic_quick import use_quick_answers

plgpu: Any = mosaic_gpu  # its annotations do not cover what kernels use

__all__ = [
    "LOG2_E",
    "SMEM_BYTES",
    "TMA_ALIGNMENT",
    "broadcast",
    "broadcast_columns",
    "broadcast_rows",
    "call_in_place",
    "ceil_div",
    "clip",
    "div",
    "int32",
    "load_columns",
    "load_rows",
    "make_kernel",
    "mutable",
    "opaque",
    "pl",
    "plgpu",
    "register_full",
    "register_zeros",
    "rem",
    "row_full",
    "row_iota",
    "smem_in_blocks",
    "specialize",
    "swizzle_bytes",
    "swizzle_transforms",
    "swizzled_smem",
    "tell_transforms",
    "traced",
    "where",
]

LOG2_E = 1.4426950408889634
SMEM_BYTES = 232_448  # what one thread block may use on sm_90
TMA_ALIGNMENT = 128  # bytes, of a TMA copy's end in shared memory
REGISTERS = {1: None, 2: (240, 24), 3: (160, 32)}  # of compute and loading warpgroups; they share 65,536
WITH_CONVERT = {1: (256, 104, 144), 2: (192, 40, 88)}  # and of one that converts


def make_kernel(body: Callable, *, scratch_types: Sequence[Any], **options: Any) -> Callable:
    """plgpu.kernel, but for the transforms of its buffers: they are told once, as the kernel begins. Told
    with a buffer's type they would be lowered anew wherever it is used.
    """
    use_quick_answers()
    types, tree = jax.tree.flatten(tuple(scratch_types))
    known = [() if isinstance(x, plgpu.RefUnion) else getattr(x, "transforms", ()) for x in types]
    plain = [dataclasses.replace(x, transforms=()) if y else x for x, y in zip(types, known, strict=True)]

    def telling(*refs):
        buffers = tree.flatten_up_to(refs[len(refs) - len(scratch_types) :])
        tell_transforms([(ref, x) for ref, x in zip(buffers, known, strict=True) if x])
        body(*refs)

    return plgpu.kernel(telling, scratch_types=tree.unflatten(plain), **options)


def tell_transforms(buffers: Sequence[tuple[Any, Any]]) -> None:
    """Says how buffers in shared memory are laid out: (reference, transforms) of each. It does no more."""
    if buffers:
        refs, transforms = zip(*buffers, strict=True)
        tell = plgpu.inline_mgpu(arg_types=tuple(map(plgpu.RefType, transforms)))
        tell(lambda *_: None)(*refs)


def specialize(
    warpgroups: int,
    warpgroup: Any,
    compute: Callable[[], None],
    load: Callable[[], None],
    convert: Callable[[], None] | None = None,
) -> None:
    """Runs compute() in the first `warpgroups` warpgroups, load() in the one after them, whose registers
    they get, and convert() in the next.
    """
    registers = REGISTERS[warpgroups] if convert is None else WITH_CONVERT[warpgroups]

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

    if convert is not None:

        @pl.when(warpgroup == warpgroups + 1)
        def _convert():
            plgpu.set_max_registers(registers[2], action="decrease")
            convert()


def swizzled_smem(shape: Sequence[int], dtype: Any, row: int | None = None) -> Any:
    """Shared memory laid out for wgmma and TMA: 8 x (swizzle width) tiles, the widest swizzle the last dim
    allows, or rows of `row` elements: both operands of a wgmma have the same.
    """
    return plgpu.SMEM(tuple(shape), dtype, transforms=swizzle_transforms(row or shape[-1], dtype))


def smem_in_blocks(lead: Sequence[int], rows: int, columns: int, dtype: Any) -> Any:
    """swizzled_smem of tiles [rows, columns] that lie block by block, each as wide as the swizzle: of each
    the copy engine takes all rows at once, and ends rows and columns (mosaic_copy.py).
    """
    width = swizzle_bytes(columns * jnp.dtype(dtype).itemsize) // jnp.dtype(dtype).itemsize
    return swizzled_smem((*lead, columns // width, rows, width), dtype)


def swizzle_transforms(columns: int, dtype: Any) -> tuple[Any, Any]:
    """Of rows of so many columns, with the widest swizzle that they allow."""
    size = jnp.dtype(dtype).itemsize
    swizzle = swizzle_bytes(columns * size)
    return plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)


def swizzle_bytes(row_bytes: int) -> int:
    """The widest swizzle that rows of so many bytes allow."""
    return next(width for width in (128, 64, 32) if row_bytes % width == 0)


def register_full(shape: Sequence[int], value: float, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
    """One fp32 value everywhere, in the registers of a warpgroup."""
    return broadcast(jnp.float32(value), shape, (), layout)


def register_zeros(shape: Sequence[int]) -> jax.Array:
    """fp32 zeros in the registers of a warpgroup, laid out as a wgmma accumulator."""
    return register_full(shape, 0.0)


def row_full(rows: int, value: float) -> jax.Array:
    """One fp32 statistic for each row of a wgmma accumulator."""
    return register_full((rows,), value, plgpu.Layout.WGMMA.reduce(1))


def row_iota(rows: int) -> jax.Array:
    """The row indices of a wgmma accumulator."""
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=plgpu.Layout.WGMMA.reduce(1))


def load_rows(ref: Any) -> jax.Array:
    """A vector in memory, a number for each row of a wgmma accumulator."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)


def load_columns(ref: Any) -> jax.Array:
    """A vector in memory, a number for each column of a wgmma accumulator."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def broadcast_rows(x: jax.Array, columns: int, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
    """[rows] -> [rows, columns]."""
    return broadcast(x, (x.shape[0], columns), (0,), layout)


def broadcast_columns(x: jax.Array, rows: int) -> jax.Array:
    """[columns] -> [rows, columns], as a wgmma accumulator."""
    return broadcast(x, (rows, x.shape[0]), (1,), plgpu.Layout.WGMMA)


def broadcast(x: jax.Array, shape: Sequence[int], dims: tuple[int, ...], layout: Any) -> jax.Array:
    """lax.broadcast_in_dim of a number (dims = ()), or of a vector that lies along dims[0] of a layout.

    In one step, which tells the layouts: of lax's, which does not, each would be guessed.
    """
    source = layout.reduce(1 - dims[0]) if dims else plgpu.Layout.WG_SPLAT
    result = plgpu.ShapeDtypeStruct(tuple(shape), x.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(source,), return_type=result)
    def spread(_, array):
        return array.broadcast_in_dim(result.shape, dims, layout.to_mgpu())

    return spread(x)


def mutable(array: jax.Array) -> Any:
    """A reference to the array, which kernels write to in place.

    Behind a barrier: of a slice XLA (its dynamic_slice_fusion, seen in JAX 0.11.2) would give the kernel a
    new buffer, with nothing of the slice's in it.
    """
    return jax.new_ref(lax.optimization_barrier(array))


def buffer_bytes(*sizes: int, alignment: int = 1024) -> int:
    """Shared memory of buffers of these sizes, each of which begins at a multiple of so many bytes."""
    return sum(-(-size // alignment) * alignment for size in sizes)


def call_in_place(call: Callable[[Any], tuple], array: Any, out_type: tuple) -> list[Any]:
    """[array, as call(ref) left it, *results]: call runs a kernel on a mutable reference to the array, or to
    each of a tree. (Custom partitioning takes no function that makes one with jax.new_ref.)
    """

    def run(refs):
        ref, *results = refs
        for target, result in zip(results, call(ref), strict=True):
            target[...] = result

    return list(pl.run_state(run)((array, *(jnp.zeros(x.shape, x.dtype) for x in out_type))))


def opaque(x: Any) -> Any:
    """x, of which the compiler knows nothing: it computes what follows from x where it is used, instead of
    once, in registers that live through a loop.
    """
    return lax.optimization_barrier(int32(x))


def traced(tree: Any) -> Any:
    """A tree's integers as values of the kernel: pl.run_state cannot close over constants."""
    return jax.tree.map(lambda x: lax.add(x, np.int32(0)), tree)


# As jnp's functions, of which clip and where are traced and lowered as functions of their own; jnp.int32 of a
# constant makes an array on the device.


def div(x: Any, y: int) -> Any:
    """x // y for x >= 0, without the sign handling of Python's floor division."""
    return x // y if isinstance(x, int) else lax.div(x, np.int32(y))


def ceil_div(x: Any, y: int) -> Any:
    """ceil(x / y) for x >= 0."""
    return div(x + (y - 1), y)


def rem(x: Any, y: int) -> Any:
    """x % y for x >= 0."""
    return x % y if isinstance(x, int) else lax.rem(x, np.int32(y))


def clip(x: Any, low: Any, high: Any) -> jax.Array:
    """x, or the nearer end of [low, high]; high where that is empty."""
    return lax.min(int32(high), lax.max(int32(low), int32(x)))


def where(condition: Any, x: Any, y: Any) -> jax.Array:
    """x where the condition holds, else y: arrays of its shape, one of which may be a number."""
    like = y if isinstance(x, int | float) else x
    return lax.select(condition, _filled(like, x), _filled(like, y))


def _filled(like: Any, x: Any) -> Any:
    if not isinstance(x, int | float):
        return x
    return lax.full_like(like, x) if like.ndim else like.dtype.type(x)


def int32(x: Any) -> Any:
    """x, if it is a Python int as a number of 32 bits."""
    return np.int32(x) if isinstance(x, int) else x
