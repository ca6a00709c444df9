"""What Pallas has no words for, in Mosaic GPU's own operations: registers one by one, and PTX.

Beside mosaic.py, mosaic_wgmma.py and mosaic_copy.py the one place that imports them; each function stands in
a kernel as a call of Pallas would.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

from pallas_kernels.mosaic import int32, plgpu, swizzle_bytes, swizzle_transforms

THREADS = 128  # of a warpgroup
BY_THREAD = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)  # of a vector: a number a thread
REDUCTION_SIZE = 512  # fp32 numbers that a reduction across warps puts into shared memory at a time


def fresh_iota(size: int, axis: int) -> jax.Array:
    """The row (axis 0) or column (axis 1) indices of a wgmma accumulator, found anew wherever they are asked
    for: what follows from those of broadcasted_iota is kept in registers, through all loops around.
    """
    kept = fragmented_array.WGMMA_LAYOUT.reduce((1 - axis,))
    result = plgpu.ShapeDtypeStruct((size,), jnp.int32, layout=plgpu.Layout.WGMMA.reduce(1 - axis))
    width = 1 if axis == 0 else 2  # of a register

    @plgpu.inline_mgpu(return_type=result)
    def iota(_):
        i32 = ir.IntegerType.get_signless(32)

        def constant(x):
            return arith.constant(i32, x)

        thread = _fresh_thread()
        lane = arith.andi(thread, constant(31))
        if axis == 0:
            warp = arith.andi(arith.shrui(thread, constant(5)), constant(3))
            first = arith.addi(arith.muli(warp, constant(16)), arith.shrui(lane, constant(2)))
            places = [64 * block + 8 * half for block in range(size // 64) for half in range(2)]
        else:
            first = arith.muli(arith.andi(lane, constant(3)), constant(2))
            places = range(0, size, 8)
        vectors = [[arith.addi(first, constant(place + i)) for i in range(width)] for place in places]
        registers = [vector.from_elements(ir.VectorType.get((width,), i32), x) for x in vectors]
        registers = np.array(registers, dtype=object).reshape(kept.registers_shape((size,)))
        return fragmented_array.FragmentedArray(_registers=registers, _layout=kept, _is_signed=True)

    return iota()


def load_by_column(ref: Any, place: Sequence[Any], shape: tuple[int, int]) -> jax.Array:
    """A vector in shared memory, from ref[*place] on, a number for each column of a wgmma accumulator.

    In one step, which finds it and tells the layouts: those that are inferred take time, and more of it in
    larger kernels.
    """
    result = plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=plgpu.Layout.WGMMA)
    is_signed = True if ref.dtype == jnp.int32 else None
    splats = (plgpu.Layout.WG_SPLAT,) * len(place)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splats), return_type=result)
    def load(_, source, indices):
        *row, first = _to_indices(indices)
        vector_ref = mgpu_utils.memref_slice(source, (*row, mgpu_utils.DynamicSlice(first, shape[1])))
        layout = fragmented_array.WGMMA_LAYOUT
        columns = fragmented_array.FragmentedArray.load_untiled(
            vector_ref, layout=layout.reduce((0,)), is_signed=is_signed, optimized=False
        )
        return columns.broadcast_in_dim(shape, (1,), layout)

    return load(ref, tuple(map(int32, place)))


def load_numbers(ref: Any, places: Sequence[Any]) -> list[jax.Array]:
    """[ref[place] for place in places], scalars of i32[...] in shared memory.

    In one step: alone, each would be one more reference to memory whose layout is inferred.
    """
    splat = plgpu.Layout.WG_SPLAT
    number = plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat)
    count = len(places)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (splat,) * count), return_type=(number,) * count)
    def load(_, source, indices):
        numbers = [memref.load(source, [index]) for index in _to_indices(indices)]
        return tuple(fragmented_array.FragmentedArray.splat(x, (), is_signed=True) for x in numbers)

    return load(ref, tuple(map(int32, places)))


def gather(ref: Any, places: jax.Array) -> jax.Array:
    """ref[places] of i32[...] in shared memory, a number a thread."""
    result = plgpu.ShapeDtypeStruct(places.shape, jnp.int32, layout=BY_THREAD)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), BY_THREAD), return_type=result)
    def load(_, source, indices):
        place = arith.index_cast(ir.IndexType.get(), _extract(indices.registers.item(), 0))
        return _by_thread(memref.load(source, [place]))

    return load(ref, places)


def store_records(ref: Any, places: jax.Array, columns: Sequence[jax.Array]) -> None:
    """ref[size * places[i] + column] = columns[column][i] for i32[...] in global memory, of `size` columns, a
    multiple of 4: a record a thread."""
    size = len(columns)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(BY_THREAD,) * (size + 1)))
    def store(_, target, indices, *arrays):
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        place = arith.muli(_extract(indices.registers.item(), 0), arith.constant(i32, 4 * size))
        base = arith.addi(llvm.ptrtoint(i64, mgpu_utils.memref_ptr(target)), arith.extui(i64, place))
        numbers = [_extract(array.registers.item(), 0) for array in arrays]
        for first in range(0, size, 4):
            ptx = f"st.global.v4.s32 [$0 + {4 * first}], {{$1, $2, $3, $4}};"
            mgpu_utils.inline_ptx(ptx, base, *numbers[first : first + 4], has_side_effects=True)

    store(ref, places, *columns)


def reduce_rows(kind: str, x: jax.Array, space: Any) -> jax.Array:
    """The maximum ("max") or the sum ("add") over axis 0 of a wgmma accumulator, across a warpgroup's warps.

    space: f32[REDUCTION_SIZE] in shared memory, this warpgroup's alone. (Of jnp's reductions Mosaic chooses
    the place as it compiles, the same for all warpgroups: two would take each other's numbers.)
    """
    result = plgpu.ShapeDtypeStruct(x.shape[1:], x.dtype, layout=plgpu.Layout.WGMMA.reduce(0))

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()), return_type=result)
    def reduce(_, array, space_ref):
        return array.reduce(kind, 0, space_ref)

    return reduce(x, space)


def meet() -> None:
    """The threads of a warpgroup wait for each other, and see what others stored in shared memory; copies and
    wgmma do not yet, as they do after commit_smem, which takes longer.
    """
    plgpu.inline_mgpu()(lambda _: mgpu_utils.warpgroup_barrier())()


def draw(counter: Any, target: Any, offset: int, previous: Any) -> None:
    """target[0] = offset + counter[0]++, whichever thread block asks: counter is i32[1] in global memory,
    target i32[1] in shared memory. The whole warpgroup calls it.

    previous: what this block drew before, of which a counter that all blocks drew from in turn would make
    previous + offset.
    """
    del previous

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def fetch_add(_, counter_ref, target_ref):
        i32 = ir.IntegerType.get_signless(32)
        zero = arith.constant(ir.IndexType.get(), 0)
        with mgpu_utils.single_thread(scope=mgpu_utils.ThreadSubset.WARPGROUP):
            drawn = mgpu_utils.inline_ptx(
                "atom.add.relaxed.gpu.global.s32 $0, [$1], 1;",
                mgpu_utils.memref_ptr(counter_ref),
                result_types=i32,
                has_side_effects=True,
            )
            memref.store(arith.addi(drawn, arith.constant(i32, offset)), target_ref, [zero])
        mgpu_utils.warpgroup_barrier()

    fetch_add(counter, target)


def store_rows(ref: Any, x: jax.Array, row: jax.Array) -> None:
    """ref[row[i]] = x[i] for a wgmma accumulator x [64, columns], where row[i] >= 0; ref [..., columns] in
    global memory, whose rows count over all dims before the last.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)))
    def store(_, target, array, indices):
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        lane = arith.andi(_fresh_thread(), arith.constant(i32, 3))
        itemsize = mgpu_utils.bitwidth(array.mlir_dtype) // 8
        base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(target))
        base = arith.addi(base, arith.extui(i64, arith.muli(lane, arith.constant(i32, 2 * itemsize))))
        registers = array.registers.reshape(array.shape[1] // 8, 2)
        for half in range(2):
            index = _extract(indices.registers.flat[half], 0)
            is_kept = arith.cmpi(arith.CmpIPredicate.sge, index, arith.constant(i32, 0))
            row_bytes = arith.constant(i64, array.shape[1] * itemsize)
            place = arith.addi(base, arith.muli(arith.extsi(i64, index), row_bytes))
            for octet, register in enumerate(registers[:, half]):
                ptx = f"st.global.b32 [$0 + {8 * octet * itemsize}], $1;"
                word = mgpu_utils.bitcast(register, i32)
                mgpu_utils.inline_ptx(ptx, place, word, predicate=is_kept, has_side_effects=True)

    store(ref, x.astype(ref.dtype), row)


def hide_after(x: jax.Array, last: jax.Array, value: float) -> jax.Array:
    """x of a wgmma accumulator where column <= last[row], `value` elsewhere.

    In one step, which compares with constants: columns that meet rows would take a register each.
    """
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout.reduce(1)), return_type=result)
    def hide(_, array, rows):
        i32 = ir.IntegerType.get_signless(32)

        def constant(x):
            return arith.constant(i32, x)

        first = arith.muli(arith.andi(_fresh_thread(), constant(3)), constant(2))
        ends = [arith.subi(_extract(register, 0), first) for register in rows.registers.flat]
        hidden = mgpu_utils.c(value, array.mlir_dtype)
        registers = array.registers.copy().reshape(-1, x.shape[1] // 8, 2)
        for block, octet, half in np.ndindex(registers.shape):
            register, end = registers[block, octet, half], ends[2 * block + half]
            is_seen = [arith.cmpi(arith.CmpIPredicate.sge, end, constant(8 * octet + i)) for i in range(2)]
            pair = [arith.select(seen, _extract(register, i), hidden) for i, seen in enumerate(is_seen)]
            registers[block, octet, half] = vector.from_elements(register.type, pair)
        registers = registers.reshape(array.registers.shape)
        return fragmented_array.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return hide(x, last)


# Bytes (0, 2) and (1, 3) of $2 as two fp16 each. int8: the byte + 128 is the mantissa of 1024 + 128 + code.
INT8_TO_FP16 = """{
    .reg .b32 code, low, high, offset;
    xor.b32 code, $2, 0x80808080;
    prmt.b32 low, code, 0x64646464, 0x4240;
    prmt.b32 high, code, 0x64646464, 0x4341;
    mov.b32 offset, 0x64806480;
    sub.f16x2 $0, low, offset;
    sub.f16x2 $1, high, offset;
}"""
E4M3_TO_FP16 = """{
    .reg .b32 code;
    .reg .b16 low, high;
    prmt.b32 code, $2, 0, 0x3120;
    mov.b32 {low, high}, code;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}"""


def load_codes_transposed(codes: Any, first: int) -> jax.Array:
    """fp16[64, rows]: columns first..first + 63 of 8-bit codes [rows, columns] (int8 or e4m3) in swizzled
    shared memory, transposed, rows interleaved as `deinterleave` undoes; exact.

    The matrix loads of sm_90 transpose pairs of bytes: a thread gets two neighbouring columns of two rows,
    which are two rows of wgmma's left operand, 8 apart.
    """
    rows, columns = codes.shape
    is_integer = codes.dtype == jnp.int8
    result = plgpu.ShapeDtypeStruct((64, rows), jnp.float16, layout=plgpu.Layout.WGMMA)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(swizzle_transforms(columns, codes.dtype)),), return_type=result
    )
    def load(_, ref):
        i32 = ir.IntegerType.get_signless(32)
        pointer = _matrix_pointer(ref, columns, first)
        registers = []
        for token in range(0, rows, 32):
            words = mgpu_utils.inline_ptx(
                "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];",
                arith.addi(pointer, arith.constant(i32, token * columns)),
                result_types=[i32] * 4,
                has_side_effects=True,
                convergent=True,
            )
            registers += [half for word in words for half in _halves_of_codes(word, is_integer)]
        layout = fragmented_array.WGMMA_LAYOUT
        registers = np.array(registers, dtype=object).reshape(layout.registers_shape((64, rows)))
        return fragmented_array.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return load(codes)


def _matrix_pointer(ref: Any, columns: int, first: int) -> Any:
    """Where a thread's part of the first matrix load lies: lane l's in row l, warp w's at first + 16 w."""
    i32, swizzle = ir.IntegerType.get_signless(32), swizzle_bytes(columns)
    chunks = swizzle // 16

    def constant(x):
        return arith.constant(i32, x)

    thread = mgpu_utils.thread_idx()
    row = arith.andi(thread, constant(31))
    warp = arith.andi(arith.shrui(thread, constant(5)), constant(3))
    chunk = arith.addi(constant(first // 16), warp)
    octet, place = arith.divui(row, constant(8)), arith.andi(row, constant(7))
    tile, inside = arith.divui(chunk, constant(chunks)), arith.remui(chunk, constant(chunks))
    inside = arith.xori(inside, arith.divui(place, constant(8 // chunks)))
    terms = ((octet, 8 * columns), (tile, 8 * swizzle), (place, swizzle), (inside, 16))
    base = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref))
    for x, factor in terms:
        base = arith.addi(base, arith.muli(x, constant(factor)))
    return base


def _halves_of_codes(word: Any, is_integer: bool) -> list[Any]:
    """Bytes (0, 2) and (1, 3) of a word as two vectors of two fp16."""
    i32 = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    ptx = INT8_TO_FP16 if is_integer else E4M3_TO_FP16
    halves = mgpu_utils.inline_ptx(ptx, word, result_types=[i32, i32])
    return [mgpu_utils.bitcast(half, pair) for half in halves]


def deinterleave(x: jax.Array) -> jax.Array:
    """Rows of x [16 n, ...] in their order, of each 16 given as 0, 2, ..., 14, 1, 3, ..., 15."""
    return x.reshape(-1, 2, 8, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def store_deinterleaved(ref: Any, x: jax.Array) -> None:
    """ref[...] = deinterleave(x).T for a wgmma accumulator x [64 n, columns]; ref in shared memory, plain."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store(_, target, array):
        index = ir.IndexType.get()
        thread = arith.index_cast(index, mgpu_utils.thread_idx())

        def constant(value):
            return arith.constant(index, value)

        warp = arith.remui(arith.divui(thread, constant(32)), constant(4))
        lane = arith.remui(thread, constant(32))
        row = arith.divui(lane, constant(4))
        row = arith.addi(arith.muli(warp, constant(16)), arith.muli(row, constant(2)))
        column = arith.muli(arith.remui(lane, constant(4)), constant(2))
        rows, columns = array.shape
        registers = array.registers.reshape(rows // 64, columns // 8, 2)
        for block, octet, pair in np.ndindex(rows // 64, columns // 8, 2):
            values = [_extract(register, pair) for register in registers[block, octet]]
            place = [arith.addi(column, constant(8 * octet + pair)), arith.addi(row, constant(64 * block))]
            pair_type = ir.VectorType.get((2,), array.mlir_dtype)
            vector.store(vector.from_elements(pair_type, values), target, place)

    store(ref, x.astype(ref.dtype))


def _fresh_thread() -> Any:
    """The thread's index, asked for anew: what follows from it is not kept in registers."""
    i32 = ir.IntegerType.get_signless(32)
    return mgpu_utils.inline_ptx("mov.u32 $0, %tid.x;", result_types=i32, has_side_effects=True)


def _to_indices(scalars: Sequence[Any]) -> list[Any]:
    return [arith.index_cast(ir.IndexType.get(), scalar.registers.item()) for scalar in scalars]


def _by_thread(number: Any) -> Any:
    """A thread's number as its part of a vector."""
    registers = np.array([vector.from_elements(ir.VectorType.get((1,), number.type), [number])], dtype=object)
    return fragmented_array.FragmentedArray(
        _registers=registers, _layout=BY_THREAD.to_mgpu(), _is_signed=True
    )


def _extract(register: Any, place: int) -> Any:
    return vector.extract(register, dynamic_position=[], static_position=[place])
