"""Matmuls that plgpu.wgmma has no words for, in Mosaic GPU's own operations: of parts of swizzled tiles.

Both are queued as by plgpu.wgmma: what they take and give is the tensor cores' until plgpu.wgmma_wait.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.mosaic.gpu.wgmma import WGMMAAccumulator, wgmma_fence, wgmma_m64
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm

from pallas_kernels.mosaic import plgpu, swizzle_bytes, swizzle_transforms
from pallas_kernels.mosaic_copy import tiles_of

WGMMA_ROWS = 64  # of the left operand that an instruction takes, and
WGMMA_DEPTH = 16  # of its columns, of 16 bits
DEPTH_BYTES = 2 * WGMMA_DEPTH


def queue_logits(a: Any, b: Any, depth: int) -> jax.Array:
    """a @ b^T of their first `depth` columns, a multiple of 16, where plgpu.wgmma takes a swizzle's whole.

    a: [64 n, columns], b: [8 m, columns], of 16 bits, in swizzled shared memory, or in blocks of columns
    [blocks, 64 n, width], [blocks, 8 m, width]; the result in fp32.
    """
    rows, keys, size = a.shape[-2], b.shape[-2], jnp.dtype(a.dtype).itemsize
    swizzle = swizzle_bytes(a.shape[-1] * size)
    layout, transforms = plgpu.Layout.WGMMA, plgpu.RefType(swizzle_transforms(a.shape[-1], a.dtype))
    result = plgpu.ShapeDtypeStruct((rows, keys), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(transforms, transforms), return_type=result)
    def multiply(_, a, b):
        a, b = tiles_of(a), tiles_of(b)
        dtype, width = ir.MemRefType(a.type).element_type, swizzle // size
        a_start, a_block, a_swizzle = _describe(a, swizzle, (WGMMA_ROWS, width), logical_k_major=False)
        # As if it were a left operand: the columns of either are those that are summed over.
        b_start, _, b_swizzle = _describe(b, swizzle, (keys, width), logical_k_major=False)
        sums = WGMMAAccumulator.zero(rows, keys)._value
        for block in range(rows // WGMMA_ROWS):
            for column in range(0, depth, WGMMA_DEPTH):
                number, within = divmod(column, width)
                _add_product(
                    sums,
                    block,
                    _advance(a_start, block * a_block + number * a_swizzle + within * size),
                    _advance(b_start, number * b_swizzle + within * size),
                    dtype,
                    a_transpose=False,
                    b_transpose=False,
                    a_k_stride=DEPTH_BYTES,
                    b_k_stride=DEPTH_BYTES,
                )
        nvvm.wgmma_commit_group_sync_aligned()
        return sums.to_layout(layout.to_mgpu())

    return multiply(a, b)


def queue_product(acc: jax.Array, a: jax.Array, ref: Any) -> jax.Array:
    """acc + a @ ref, of any multiple of 16 rows of ref [rows, columns] in swizzled shared memory and of its
    first columns, as many as acc has, any multiple of 8: plgpu.wgmma takes rows in multiples of 64, and all
    columns. a in 16 bits, acc in fp32, [64 n, ...]; ref may lie in blocks of columns [blocks, rows, width].
    """
    rows, columns = ref.shape[-2], math.prod(ref.shape) // ref.shape[-2]
    swizzle = swizzle_bytes(ref.shape[-1] * jnp.dtype(ref.dtype).itemsize)
    layout, transforms = plgpu.Layout.WGMMA, swizzle_transforms(ref.shape[-1], ref.dtype)
    result = plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout, plgpu.RefType(transforms)), return_type=result)
    def multiply(_, acc, a, b):
        descriptor, _, stride = _describe(tiles_of(b), swizzle, (WGMMA_DEPTH, columns), logical_k_major=True)
        sums, a = WGMMAAccumulator.from_registers(acc)._value, wgmma_fence(a)
        for first in range(0, rows, WGMMA_DEPTH):
            for block in range(acc.shape[0] // WGMMA_ROWS):
                _add_product(
                    sums,
                    block,
                    a[WGMMA_ROWS * block : WGMMA_ROWS * (block + 1), first : first + WGMMA_DEPTH],
                    descriptor,
                    a.mlir_dtype,
                    a_transpose=None,
                    b_transpose=True,
                    a_k_stride=None,
                    b_k_stride=stride,
                )
            descriptor = _advance(descriptor, stride)
        nvvm.wgmma_commit_group_sync_aligned()
        return sums.to_layout(acc.layout)

    return multiply(acc, a, ref)


def _describe(operand: Any, swizzle: int, group: tuple[int, int], logical_k_major: bool) -> tuple:
    """Its descriptor, and the bytes to the next of such groups, along rows or columns of the result and along
    what is summed over."""
    described: Any = mma_utils.create_descriptor(
        operand, swizzle, group_size=group, logical_k_major=logical_k_major
    )
    (descriptor, _), (across, along), _ = described
    return descriptor, across, along


def _advance(descriptor: Any, num_bytes: int) -> Any:
    return arith.addi(descriptor, mgpu_utils.c(mma_utils.encode_addr(num_bytes), descriptor.type))


def _add_product(sums: Any, block: int, a: Any, b: Any, dtype: Any, **kinds: Any) -> None:
    """One instruction: adds a @ b to 64 rows of the sums, of as many columns as they have."""
    registers = sums.registers[block : block + 1]
    sums.registers[block : block + 1] = wgmma_m64(
        registers,
        a,
        b,
        n=sums.shape[1],
        swizzle=DEPTH_BYTES,  # bytes of a row of a: one instruction's
        a_element_type=dtype,
        b_element_type=dtype,
        **kinds,
    )
