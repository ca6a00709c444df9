"""Thread blocks that take turns at places in global memory: what one added there comes before the next's.

Beside mosaic_inline.py, in Mosaic GPU's own operations and PTX.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.mosaic import int32, plgpu

# Relaxed: of what others did nothing is read, and their copies are complete before they count. (With acquire
# and release, which wait for all a thread block's memory traffic, each takes about a microsecond.) Who polls
# for ten seconds waits for a block that will never run: an error is better than no end.
WAIT_TURN = """{
    .reg .pred again, lost;
    .reg .s32 passed, polls;
    mov.s32 polls, 0;
    mov.s32 passed, $2;
    bra SEEN;
AGAIN:
    ld.relaxed.gpu.global.s32 passed, [$0];
    add.s32 polls, polls, 1;
    setp.gt.s32 lost, polls, 16777216;
    @lost trap;
SEEN:
    setp.lt.s32 again, passed, $1;
    @again bra AGAIN;
}"""


def peek_turn(counters: Any, place: Any) -> Any:
    """What pass_turn counted at a place until now, which takes until it is used."""
    splat = plgpu.Layout.WG_SPLAT
    result = plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat), return_type=result)
    def peek(_, counters_ref, index):
        pointer = _element_pointer(counters_ref, index.registers.item())
        i32 = ir.IntegerType.get_signless(32)
        ptx = "ld.relaxed.gpu.global.s32 $0, [$1];"
        passed = mgpu_utils.inline_ptx(ptx, pointer, result_types=i32, has_side_effects=True)
        return index.splat(passed, (), is_signed=True)

    return peek(counters, int32(place))


def wait_turn(counters: Any, place: Any, turn: Any, seen: Any) -> None:
    """Waits until pass_turn(counters, place) was called `turn` times, by any thread block: what those added
    to global memory before is added before what this warpgroup copies from now on.

    Only the thread waits that starts a warpgroup's copies. counters: i32[...] in global memory, first zeros;
    seen: by peek_turn.
    """
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat, splat, splat))
    def wait(_, counters_ref, index, count, passed):
        pointer = _element_pointer(counters_ref, index.registers.item())
        with mgpu_utils.single_thread(scope=mgpu_utils.ThreadSubset.WARPGROUP):
            mgpu_utils.inline_ptx(
                WAIT_TURN, pointer, count.registers.item(), passed.registers.item(), has_side_effects=True
            )

    wait(counters, int32(place), int32(turn), seen)


def pass_turn(counters: Any, place: Any) -> None:
    """Lets the next one go on that waits at a place; wait_smem_to_gmem(0) saw our warpgroup's copies."""
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), splat))
    def count(_, counters_ref, index):
        pointer = _element_pointer(counters_ref, index.registers.item())
        with mgpu_utils.single_thread(scope=mgpu_utils.ThreadSubset.WARPGROUP):
            mgpu_utils.inline_ptx("red.relaxed.gpu.global.add.s32 [$0], 1;", pointer, has_side_effects=True)

    count(counters, int32(place))


def _element_pointer(ref: Any, index: Any) -> Any:
    """Of a number of 32 bits in a flat array in global memory."""
    i64 = ir.IntegerType.get_signless(64)
    base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
    return arith.addi(base, arith.muli(arith.extui(i64, index), arith.constant(i64, 4)))
