"""TMA copies of rows that end where the array does, in Mosaic GPU's own operations.

Pallas copies tiles of 8 rows and of a swizzle's columns, each whole: of lengths that are no multiples of 8 it
would copy rows of the next sequence, of head dims that are none of a swizzle's width columns of the next
head. Here the copy engine itself ends rows and columns: what it loads past them is 0, and it stores none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import core
from jax._src.pallas.mosaic_gpu import core as mosaic_core
from jax._src.pallas.mosaic_gpu import lowering, primitives
from jax.experimental.mosaic import gpu
from jax.experimental.mosaic.gpu import launch_context
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf

from pallas_kernels.mosaic import int32, pl, plgpu, swizzle_transforms

NOT_UNROLLED = "#llvm.loop_annotation<unroll = <disable = true>>"
OCTET = 8  # rows of a swizzled tile
THREADS, WARPS = 128, 4  # of a warpgroup; each thread arrives at a barrier
THREAD_SUBSETS = mgpu_utils.ThreadSubset.WARPGROUP, mgpu_utils.ThreadSubset.WARP  # one leads each
SPLAT = plgpu.Layout.WG_SPLAT
BARRIER: Any = mgpu_utils.BarrierRef  # without phases: it is not waited for
mgpu: Any = gpu


def is_whole(shape: tuple[int, ...], columns: int) -> bool:
    """Whether Pallas's copies end where an array [..., T, heads, H] does, in tiles of so many columns."""
    return shape[-3] % OCTET == 0 and shape[-1] == columns


def load_tile(array: Any, place: tuple, target: Any, barrier: Any) -> None:
    """Starts the copy of rows of a head into shared memory, one arrival at the barrier.

    array: [..., T, heads, H] in global memory; place: indices of the dims before T, the first row, the head;
    target: [rows, columns], swizzled, columns >= H.
    """
    rows, columns = target.shape
    if is_whole(array.shape, columns):
        *batch, row, head = place
        plgpu.copy_gmem_to_smem(array.at[*batch, pl.ds(row, rows), head], target, barrier)
        return
    load_exactly(array, place, target, barrier)


def store_tile(source: Any, array: Any, place: tuple) -> None:
    """Starts the copy of rows of a head from shared memory; arguments as those of load_tile."""
    rows, columns = source.shape
    if is_whole(array.shape, columns):
        *batch, row, head = place
        plgpu.copy_smem_to_gmem(source, array.at[*batch, pl.ds(row, rows), head])
        return
    store_exactly(source, array, place)


def load_exactly(array: Any, place: tuple, target: Any, barrier: Any) -> None:
    """load_tile, of any array."""
    rows, columns = target.shape
    num_bytes = rows * columns * jnp.dtype(target.dtype).itemsize
    transforms = swizzle_transforms(columns, target.dtype)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (SPLAT,) * len(place), plgpu.RefType(transforms), SPLAT))
    def load(ctx, source, indices, smem, address):
        i32 = ir.IntegerType.get_signless(32)
        pointer = llvm.inttoptr(llvm.PointerType.get(3), address.registers.item())
        loaded = BARRIER(pointer, mgpu_utils.c(0, i32), phases=None, num_barriers=1)
        nvvm.mbarrier_arrive_expect_tx(pointer, mgpu_utils.c(num_bytes // THREADS, i32))  # each thread's
        copy = functools.partial(ctx.async_copy, src_ref=source, barrier=loaded, arrive=False)
        _copy_parts(lambda part, **options: copy(dst_ref=part, **options), source, indices, smem)

    load(array, tuple(map(int32, place)), target, barrier_address(barrier))


def store_exactly(source: Any, array: Any, place: tuple) -> None:
    """store_tile, of any array."""
    transforms = swizzle_transforms(source.shape[1], source.dtype)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), plgpu.RefType(), (SPLAT,) * len(place)))
    def store(ctx, smem, target, indices):
        copy = functools.partial(ctx.async_copy, dst_ref=target, arrive=False)
        _copy_parts(lambda part, **options: copy(src_ref=part, **options), target, indices, smem)
        nvvm.cp_async_bulk_commit_group()

    store(source, array, tuple(map(int32, place)))


def load_block(array: Any, place: tuple, column: int, target: Any, barrier: Any) -> None:
    """Starts the copy of some columns of rows into shared memory, one arrival at the barrier; for one warp.

    array: [..., H] in global memory; place: of each dim before the last an index, or pl.ds of the rows;
    target: [rows, columns], swizzled, as wide as the swizzle. It gets columns from `column` on, and 0 for
    those past H, which count as bytes too.
    """
    rows, columns = target.shape
    num_bytes = rows * columns * jnp.dtype(target.dtype).itemsize
    transforms = swizzle_transforms(columns, target.dtype)
    starts = tuple(int32(x.start if isinstance(x, pl.Slice) else x) for x in place)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (SPLAT,) * len(place), plgpu.RefType(transforms), SPLAT))
    def load(ctx, source, indices, smem, address):
        i32 = ir.IntegerType.get_signless(32)
        pointer = llvm.inttoptr(llvm.PointerType.get(3), address.registers.item())
        loaded = BARRIER(pointer, mgpu_utils.c(0, i32), phases=None, num_barriers=1)
        leads = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARP)
        loaded.arrive_expect_tx(num_bytes, leads)
        loaded.arrive(THREADS - 1, predicate=leads)  # for the threads of a warpgroup, which a barrier awaits
        gmem_slice = [arith.index_cast(ir.IndexType.get(), x.registers.item()) for x in indices]
        for dim, index in enumerate(place):
            if isinstance(index, pl.Slice):
                gmem_slice[dim] = mgpu_utils.DynamicSlice(gmem_slice[dim], rows)
        ctx.async_copy(
            src_ref=source,
            dst_ref=mgpu_utils.memref_fold(mgpu_utils.memref_slice(smem, (slice(None), 0)), 0, 2),
            gmem_slice=(*gmem_slice, mgpu_utils.DynamicSlice(_index(column), columns)),
            swizzle=columns * jnp.dtype(target.dtype).itemsize,
            barrier=loaded,
            arrive=False,
            predicate=leads,
        )

    load(array, starts, target, barrier_address(barrier))


def _copy_parts(copy: Any, gmem: Any, indices: tuple, smem: Any) -> None:
    """Copies a tile in as few parts as end where the array does; smem: [octets, blocks, 8, width].

    Columns of one block: one part. Columns that fill their blocks: one, or each octet where rows end within.
    Else each block of each octet: a part is contiguous in shared memory, and ends in both dims alone.
    """
    octets, blocks, _, width = ir.MemRefType(smem.type).shape
    *_, length, _, head_dim = ir.MemRefType(gmem.type).shape
    swizzle = width * mgpu_utils.bitwidth(ir.MemRefType(smem.type).element_type) // 8
    *batch, first, head = (arith.index_cast(ir.IndexType.get(), x.registers.item()) for x in indices)
    leads, leads_warp = map(mgpu_utils.single_thread_predicate, THREAD_SUBSETS)

    def start(part, row, rows, column, columns, transforms, predicate):
        place = (*batch, mgpu_utils.DynamicSlice(row, rows), head, mgpu_utils.DynamicSlice(column, columns))
        copy(part, gmem_slice=place, gmem_transform=transforms, swizzle=swizzle, predicate=predicate)

    def in_blocks(octet, row):
        for block in range(blocks):
            part = mgpu_utils.memref_slice(smem, (octet, block))
            start(part, row, OCTET, block * width, width, (), leads_warp)

    def in_octets(octet, row):
        across = launch_context.TileTransform((width,)), launch_context.TransposeTransform((1, 0, 2))
        start(mgpu_utils.memref_slice(smem, (octet,)), row, OCTET, 0, head_dim, across, leads_warp)

    if blocks == 1:
        part = mgpu_utils.memref_fold(mgpu_utils.memref_slice(smem, (slice(None), 0)), 0, 2)
        start(part, first, OCTET * octets, 0, width, (), leads)
    elif head_dim < blocks * width:
        _for_octets(octets, first, in_blocks)
    else:
        end = arith.addi(first, _index(OCTET * octets))
        is_inside = arith.cmpi(arith.CmpIPredicate.ule, end, _index(length // OCTET * OCTET))
        branch: Any = scf.IfOp(is_inside, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            tiles = launch_context.TileTransform((OCTET, width), launch_context.Rounding.DOWN)
            start(smem, first, OCTET * octets, 0, head_dim, (tiles,), leads)
            scf.yield_([])
        with ir.InsertionPoint(branch.else_block):
            _for_octets(octets, first, in_octets)
            scf.yield_([])


def _for_octets(octets: int, first: Any, start: Any) -> None:
    """start(octet, its row): each warp takes every fourth."""
    i32 = ir.IntegerType.get_signless(32)
    warp = arith.remui(mgpu_utils.warp_idx(sync=True), mgpu_utils.c(WARPS, i32))
    warp = arith.index_cast(ir.IndexType.get(), warp)
    loop = scf.ForOp(warp, _index(octets), _index(WARPS), [])
    loop.attributes["llvm.loop_annotation"] = ir.Attribute.parse(NOT_UNROLLED)
    with ir.InsertionPoint(loop.body):
        octet = loop.induction_variable
        start(octet, arith.addi(first, arith.muli(octet, _index(OCTET))))
        scf.yield_([])


def _index(x: int) -> Any:
    return mgpu_utils.c(x, ir.IndexType.get())


# --- where a barrier lies ---

barrier_address_p = core.Primitive("barrier_address")


def barrier_address(barrier: Any) -> jax.Array:
    """The address in shared memory of barrier.at[i]: i32."""
    ref, transforms = (barrier.ref, barrier.transforms) if hasattr(barrier, "transforms") else (barrier, ())
    leaves, tree = jax.tree.flatten(transforms)
    return barrier_address_p.bind(ref, *leaves, tree=tree)


@barrier_address_p.def_effectful_abstract_eval
def _barrier_address_type(barrier, *leaves, tree):
    return core.ShapedArray((), jnp.int32), {mosaic_core._memory_effect}


@lowering.register_lowering_rule(barrier_address_p, mgpu.LoweringSemantics.Warpgroup)
@lowering.register_lowering_rule(barrier_address_p, *mosaic_core.WGxWARP_SEMANTICS)
def _lower_barrier_address(ctx, barrier, *leaves, tree):
    place = primitives._get_barrier_base_index(ctx.avals_in[0], tree.unflatten(leaves))
    barrier = barrier if place is None else barrier[place]
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), barrier.barrier_ref.get_ptr())
