"""TMA copies of rows that end where the array does, in Mosaic GPU's own operations.

Pallas copies tiles of 8 rows and of a swizzle's columns, each whole: of lengths that are no multiples of 8 it
would copy rows of the next sequence, of head dims that are none of a swizzle's width columns of the next
head. Here the copy engine itself ends rows and columns: what it loads past them is 0, and it stores none.
"""

import functools
import math
from typing import Any, NamedTuple

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


def is_whole(shape: tuple[int, ...], tile: Any) -> bool:
    """Whether Pallas's copies end where an array [..., T, heads, H] does, of a tile in shared memory."""
    return shape[-3] % OCTET == 0 and tile.shape[1:] == shape[-1:]


def load_tile(array: Any, place: tuple, target: Any, barrier: Any) -> None:
    """Starts the copy of rows of a head into shared memory, one arrival at the barrier.

    array: [..., T, heads, H] in global memory; place: indices of the dims before T, the first row, the head;
    target: [rows, columns], swizzled, columns >= H, or such in blocks of columns [blocks, rows, width].
    """
    if is_whole(array.shape, target):
        *batch, row, head = place
        source = array.at[*batch, pl.ds(row, target.shape[0]), head]
        plgpu.copy_gmem_to_smem(source, target, barrier)
        return
    load_exactly(array, place, target, barrier)


def store_tile(source: Any, array: Any, place: tuple, inside: bool = False) -> None:
    """Starts the copy of rows of a head from shared memory; arguments as those of load_tile.

    inside: all rows are in octets that the array has whole, which saves the code for others.
    """
    if is_whole(array.shape, source):
        *batch, row, head = place
        plgpu.copy_smem_to_gmem(source, array.at[*batch, pl.ds(row, source.shape[0]), head])
        return
    store_exactly(source, array, place, inside)


def load_exactly(array: Any, place: tuple, target: Any, barrier: Any) -> None:
    """load_tile, of any array."""
    num_bytes = math.prod(target.shape) * jnp.dtype(target.dtype).itemsize
    transforms = swizzle_transforms(target.shape[-1], target.dtype)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (SPLAT,) * len(place), plgpu.RefType(transforms), SPLAT))
    def load(ctx, source, indices, smem, address):
        loaded = _expecting(address, num_bytes)
        copy = functools.partial(ctx.async_copy, src_ref=source, barrier=loaded, arrive=False)
        _copy_parts(lambda part, **options: copy(dst_ref=part, **options), source, indices, smem)

    load(array, tuple(map(int32, place)), target, barrier_address(barrier))


def load_ended(array: Any, tail: Any, place: tuple, length: Any, target: Any, barrier: Any) -> None:
    """load_tile of rows that end at a length: what it loads past that is 0, whatever the array holds there.

    tail: [..., OCTET, heads, H], the octet in which each length ends, zeros past it. Octets behind that one
    are asked for past the end of the array.
    """
    num_octets = target.shape[-2] // OCTET
    num_bytes = math.prod(target.shape) * jnp.dtype(target.dtype).itemsize
    transforms, in_gmem = plgpu.RefType(swizzle_transforms(target.shape[-1], target.dtype)), plgpu.RefType()

    @plgpu.inline_mgpu(arg_types=(in_gmem, in_gmem, (SPLAT,) * len(place), SPLAT, transforms, SPLAT))
    def load(ctx, whole, ended, indices, stop, smem, address):
        i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
        loaded, smem = _expecting(address, num_bytes), tiles_of(smem)
        *batch, _, head = map(_to_index, indices)
        first_row, stop = indices[-2].registers.item(), stop.registers.item()
        past_end = mgpu_utils.c(math.ceil(array.shape[-3] / OCTET) * OCTET, i32)
        # The octet where the length ends. In 32 bits: of 64, registers of the loading warpgroup are too few.
        last = arith.shrsi(arith.subi(stop, first_row), mgpu_utils.c(OCTET.bit_length() - 1, i32))

        def copy_part(source, row, part, predicate):
            copy = functools.partial(ctx.async_copy, src_ref=source, barrier=loaded, arrive=False)
            to_smem = lambda target, **options: copy(dst_ref=target, **options)
            _copy_rows(to_smem, (batch, row, head), OCTET, smem, part, predicate)

        def copy_other(octet, part):
            number = arith.index_cast(i32, octet)
            is_before = arith.cmpi(arith.CmpIPredicate.slt, number, last)
            is_other = arith.cmpi(arith.CmpIPredicate.ne, number, last)
            row = arith.addi(first_row, arith.muli(number, mgpu_utils.c(OCTET, i32)))
            row = arith.index_cast(index, arith.select(is_before, row, past_end))
            leads = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARP)
            copy_part(whole, row, part, arith.andi(leads, is_other))

        is_here = arith.cmpi(arith.CmpIPredicate.ult, last, mgpu_utils.c(num_octets, i32))
        leads = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARPGROUP)
        for part in _parts_of_octet(ended, smem, arith.index_cast(index, last)):
            copy_part(ended, _index(0), part, arith.andi(leads, is_here))
        _share_octets(whole, smem, copy_other)

    load(array, tail, tuple(map(int32, place)), int32(length), target, barrier_address(barrier))


def store_exactly(source: Any, array: Any, place: tuple, inside: bool = False) -> None:
    """store_tile, of any array."""
    transforms = swizzle_transforms(source.shape[-1], source.dtype)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(transforms), plgpu.RefType(), (SPLAT,) * len(place)))
    def store(ctx, smem, target, indices):
        copy = functools.partial(ctx.async_copy, dst_ref=target, arrive=False)
        _copy_parts(lambda part, **options: copy(src_ref=part, **options), target, indices, smem, inside)
        nvvm.cp_async_bulk_commit_group()

    store(source, array, tuple(map(int32, place)))


def load_block(array: Any, place: tuple, column: int, target: Any, barrier: Any) -> None:
    """Starts the copy of some columns of rows into shared memory, one arrival at the barrier; for one warp.

    array: [..., H] in global memory; place: of each dim before the last an index, or pl.ds of the rows;
    target: [rows, columns], swizzled, as wide as the swizzle; of OCTET rows as wide as H too. It gets columns
    from `column` on, and 0 for those past H, and for rows past the last, which count as bytes too.
    """
    rows, columns = target.shape
    num_bytes = rows * columns * jnp.dtype(target.dtype).itemsize
    transforms = swizzle_transforms(columns, target.dtype)
    starts = tuple(int32(x.start if isinstance(x, pl.Slice) else x) for x in place)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), (SPLAT,) * len(place), plgpu.RefType(transforms), SPLAT))
    def load(ctx, source, indices, smem, address):
        loaded = _barrier_at(address)
        leads = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARP)
        loaded.arrive_expect_tx(num_bytes, leads)
        loaded.arrive(THREADS - 1, predicate=leads)  # for the threads of a warpgroup, which a barrier awaits
        gmem_slice = list(map(_to_index, indices))
        for dim, index in enumerate(place):
            if isinstance(index, pl.Slice):
                gmem_slice[dim] = mgpu_utils.DynamicSlice(gmem_slice[dim], rows)
        octets, blocks, _, width = ir.MemRefType(smem.type).shape
        if blocks == 1:
            part, across = mgpu_utils.memref_fold(mgpu_utils.memref_slice(smem, (slice(None), 0)), 0, 2), ()
        else:
            assert octets == 1, f"of several blocks of columns one octet is contiguous, got {target.shape}"
            part, across = mgpu_utils.memref_slice(smem, (0,)), _blocks_first(width)
        ctx.async_copy(
            src_ref=source,
            dst_ref=part,
            gmem_slice=(*gmem_slice, mgpu_utils.DynamicSlice(_index(column), columns)),
            gmem_transform=across,
            swizzle=width * jnp.dtype(target.dtype).itemsize,
            barrier=loaded,
            arrive=False,
            predicate=leads,
        )

    load(array, starts, target, barrier_address(barrier))


def _barrier_at(address: Any) -> Any:
    pointer = llvm.inttoptr(llvm.PointerType.get(3), address.registers.item())
    return BARRIER(pointer, mgpu_utils.c(0, ir.IntegerType.get_signless(32)), phases=None, num_barriers=1)


def _expecting(address: Any, num_bytes: int) -> Any:
    """The barrier at an address, at which a warpgroup arrives that copies so many bytes."""
    loaded, i32 = _barrier_at(address), ir.IntegerType.get_signless(32)
    nvvm.mbarrier_arrive_expect_tx(loaded.get_ptr(), mgpu_utils.c(num_bytes // THREADS, i32))  # each thread's
    return loaded


class Part(NamedTuple):
    """Some columns of rows, and where they lie in shared memory."""

    smem: Any
    column: Any  # the first
    columns: int
    transforms: tuple = ()  # of what lies in global memory


def _copy_parts(copy: Any, gmem: Any, indices: tuple, smem: Any, inside: bool = False) -> None:
    """Copies a tile in as few parts as end where the array does; smem: [octets, blocks, 8, width], or block
    by block [blocks, octets, 1, 8, width].

    Columns that lie block by block, or of one block: a part a block. Columns that fill their blocks: one, or
    each octet where rows end within. Else each block of each octet: a part is contiguous in shared memory,
    and ends in both dims alone.
    """
    if len(ir.MemRefType(smem.type).shape) == 5:
        _copy_blocks(copy, indices, smem)
        return
    octets, blocks, _, width = ir.MemRefType(smem.type).shape
    *_, length, _, head_dim = ir.MemRefType(gmem.type).shape
    *batch, first, head = map(_to_index, indices)
    leads, leads_warp = map(mgpu_utils.single_thread_predicate, THREAD_SUBSETS)
    copy_whole = functools.partial(_copy_rows, copy, (batch, first, head), OCTET * octets, smem)

    def copy_part(octet, part):
        row = arith.addi(first, arith.muli(octet, _index(OCTET)))
        _copy_rows(copy, (batch, row, head), OCTET, smem, part, leads_warp)

    in_tiles = launch_context.TileTransform((OCTET, width), launch_context.Rounding.DOWN)
    tiles = Part(smem, _index(0), head_dim, (in_tiles,))
    if blocks == 1:
        rows = mgpu_utils.memref_fold(mgpu_utils.memref_slice(smem, (slice(None), 0)), 0, 2)
        copy_whole(Part(rows, _index(0), width), leads)
    elif head_dim < blocks * width:
        _share_octets(gmem, smem, copy_part)
    elif inside:
        copy_whole(tiles, leads)
    else:
        end = arith.addi(first, _index(OCTET * octets))
        is_inside = arith.cmpi(arith.CmpIPredicate.ule, end, _index(length // OCTET * OCTET))
        branch: Any = scf.IfOp(is_inside, has_else=True)
        with ir.InsertionPoint(branch.then_block):
            copy_whole(tiles, leads)
            scf.yield_([])
        with ir.InsertionPoint(branch.else_block):
            _share_octets(gmem, smem, copy_part)
            scf.yield_([])


def _copy_blocks(copy: Any, indices: tuple, smem: Any) -> None:
    """Copies a tile that lies block by block, by all warps."""
    blocks, octets, _, _, width = ir.MemRefType(smem.type).shape
    *batch, first, head = map(_to_index, indices)
    leads = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARP)

    def copy_block(block):
        rows = mgpu_utils.memref_fold(mgpu_utils.memref_slice(smem, (block, slice(None), 0)), 0, 2)
        part = Part(rows, arith.muli(block, _index(width)), width)
        _copy_rows(copy, (batch, first, head), OCTET * octets, smem, part, leads)

    _share(blocks, copy_block)


def tiles_of(smem: Any) -> Any:
    """A tile as [octets, blocks, 8, width], also where it lies block by block."""
    if len(ir.MemRefType(smem.type).shape) == 4:
        return smem
    blocks = mgpu_utils.memref_slice(smem, (slice(None), slice(None), 0))
    return mgpu_utils.memref_transpose(blocks, (1, 0, 2, 3))


def _copy_rows(copy: Any, place: tuple, rows: int, smem: Any, part: Part, predicate: Any) -> None:
    """Starts the copy of a part of a tile in swizzled memory, in one direction or the other."""
    (batch, row, head), tile_type = place, ir.MemRefType(smem.type)
    columns = mgpu_utils.DynamicSlice(part.column, part.columns)
    copy(
        part.smem,
        gmem_slice=(*batch, mgpu_utils.DynamicSlice(row, rows), head, columns),
        gmem_transform=part.transforms,
        swizzle=tile_type.shape[-1] * mgpu_utils.bitwidth(tile_type.element_type) // 8,
        predicate=predicate,
    )


def _parts_of_octet(gmem: Any, smem: Any, octet: Any) -> list[Part]:
    """All columns of an octet of rows, if they fill their blocks, or block by block."""
    _, blocks, _, width = ir.MemRefType(smem.type).shape
    head_dim = ir.MemRefType(gmem.type).shape[-1]
    if blocks > 1 and head_dim == blocks * width:
        part = mgpu_utils.memref_slice(smem, (octet,))
        return [Part(part, _index(0), head_dim, _blocks_first(width))]
    return [_block_of_octet(smem, octet, _index(block)) for block in range(blocks)]


def _blocks_first(width: int) -> tuple[Any, Any]:
    """[rows, H] as an octet lies in shared memory, [blocks, rows, width]."""
    return launch_context.TileTransform((width,)), launch_context.TransposeTransform((1, 0, 2))


def _block_of_octet(smem: Any, octet: Any, block: Any) -> Part:
    width = ir.MemRefType(smem.type).shape[-1]
    return Part(mgpu_utils.memref_slice(smem, (octet, block)), arith.muli(block, _index(width)), width)


def _share_octets(gmem: Any, smem: Any, copy_part: Any) -> None:
    """copy_part(octet, part) for the parts of all octets, by all warps."""
    octets, blocks, _, width = ir.MemRefType(smem.type).shape
    if ir.MemRefType(gmem.type).shape[-1] == blocks * width:
        _share(octets, lambda octet: copy_part(octet, *_parts_of_octet(gmem, smem, octet)))
        return

    def copy_block(number):
        # One loop over both: the blocks of an octet one by one would take the loader's registers.
        octet, block = arith.divui(number, _index(blocks)), arith.remui(number, _index(blocks))
        copy_part(octet, _block_of_octet(smem, octet, block))

    _share(octets * blocks, copy_block)


def _share(count: int, start: Any) -> None:
    """start(number) for each number below count: each warp takes every fourth."""
    i32 = ir.IntegerType.get_signless(32)
    warp = arith.remui(mgpu_utils.warp_idx(sync=True), mgpu_utils.c(WARPS, i32))
    warp = arith.index_cast(ir.IndexType.get(), warp)
    loop = scf.ForOp(warp, _index(count), _index(WARPS), [])
    loop.attributes["llvm.loop_annotation"] = ir.Attribute.parse(NOT_UNROLLED)
    with ir.InsertionPoint(loop.body):
        start(loop.induction_variable)
        scf.yield_([])


def _index(x: int) -> Any:
    return mgpu_utils.c(x, ir.IndexType.get())


def _to_index(number: Any) -> Any:
    return arith.index_cast(ir.IndexType.get(), number.registers.item())


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
