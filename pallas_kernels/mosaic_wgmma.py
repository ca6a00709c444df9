"""A matmul that plgpu.wgmma has no words for, in Mosaic GPU's own operations."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.mosaic.gpu.wgmma import WGMMAAccumulator, wgmma_fence, wgmma_m64
from jaxlib.mlir.dialects import arith, nvvm

from pallas_kernels.mosaic import plgpu, swizzle_bytes, swizzle_transforms

WGMMA_ROWS = 16  # of the right operand that an instruction takes, of 16 bits


def queue_product(acc: jax.Array, a: jax.Array, ref: Any) -> jax.Array:
    """acc + a @ ref, of any multiple of 16 rows of ref [rows, columns] in swizzled shared memory, where
    plgpu.wgmma takes multiples of 64; a in 16 bits, acc in fp32, [64 n, ...].

    Queued as by plgpu.wgmma: what it takes and gives is the tensor cores' until plgpu.wgmma_wait.
    """
    rows, columns = ref.shape
    swizzle = swizzle_bytes(columns * jnp.dtype(ref.dtype).itemsize)
    layout, transforms = plgpu.Layout.WGMMA, swizzle_transforms(columns, ref.dtype)
    result = plgpu.ShapeDtypeStruct(acc.shape, acc.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout, plgpu.RefType(transforms)), return_type=result)
    def multiply(_, acc, a, b):
        described: Any = mma_utils.create_descriptor(
            b, swizzle, group_size=(WGMMA_ROWS, columns), logical_k_major=True
        )
        (descriptor, (_, (stride,))), *_ = described
        step = mgpu_utils.c(mma_utils.encode_addr(stride), descriptor.type)
        sums, a = WGMMAAccumulator.from_registers(acc)._value, wgmma_fence(a)
        for first in range(0, rows, WGMMA_ROWS):
            for block in range(acc.shape[0] // 64):
                sums.registers[block : block + 1] = wgmma_m64(
                    sums.registers[block : block + 1],
                    a[64 * block : 64 * (block + 1), first : first + WGMMA_ROWS],
                    descriptor,
                    a_transpose=None,
                    b_transpose=True,
                    a_k_stride=None,
                    b_k_stride=stride,
                    n=columns,
                    swizzle=2 * WGMMA_ROWS,  # bytes of a row of a: one instruction's
                    a_element_type=a.mlir_dtype,
                    b_element_type=a.mlir_dtype,
                )
            descriptor = arith.addi(descriptor, step)
        nvvm.wgmma_commit_group_sync_aligned()
        return sums.to_layout(acc.layout)

    return multiply(acc, a, ref)
