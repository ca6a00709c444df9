"""Copies pages within the pool on Hopper, in place, every layer of every pair in one launch.

A program copies one page of one layer through shared memory, K and V side by side, in blocks of
[heads, tokens, H].
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_pages.pool import NULL_PAGE
from pallas_kernels.mosaic import div, pl, plgpu

BLOCK_BYTES = 32 * 1024  # of K, and again of V: three programs share a multiprocessor


def copy_pages(k_pages, v_pages, src_pages, dst_pages):
    """Copies page src to page dst in every layer, for every pair whose src is not NULL_PAGE."""
    num_layers, _, num_kv_heads, page_size, head_dim = k_pages.shape
    heads, tokens = block_shape(num_kv_heads, page_size, head_dim * k_pages.dtype.itemsize)
    k_ref, v_ref = jax.new_ref(k_pages), jax.new_ref(v_pages)
    block = plgpu.SMEM((heads, tokens, head_dim), k_pages.dtype)
    plgpu.kernel(
        functools.partial(_kernel, heads, tokens),
        out_type=(),
        grid=(num_layers, src_pages.shape[0]),
        grid_names=("layer", "pair"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[block, block, plgpu.Barrier(num_arrivals=2)],
    )(k_ref, v_ref, src_pages, dst_pages)
    return jax.freeze(k_ref), jax.freeze(v_ref)


def block_shape(num_kv_heads: int, page_size: int, token_bytes: int) -> tuple[int, int]:
    """Heads and tokens of a block: as much of a page as BLOCK_BYTES hold, in parts of equal size."""
    tokens = page_size
    while tokens * token_bytes > BLOCK_BYTES:
        tokens //= 2
    divisors = (size for size in range(num_kv_heads, 0, -1) if num_kv_heads % size == 0)
    heads = next(size for size in divisors if size == 1 or size * tokens * token_bytes <= BLOCK_BYTES)
    return heads, tokens


def _kernel(heads: int, tokens: int, k_pages, v_pages, src_pages, dst_pages, k_smem, v_smem, loaded):
    _, _, num_kv_heads, page_size, _ = k_pages.shape
    layer, pair = lax.axis_index("layer"), lax.axis_index("pair")
    src, dst = src_pages[pair], dst_pages[pair]
    blocks_a_head = page_size // tokens

    def copy(index, _):
        part = (
            pl.ds(div(index, blocks_a_head) * heads, heads),
            pl.ds(lax.rem(index, jnp.int32(blocks_a_head)) * tokens, tokens),
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the block before may still be on its way
        plgpu.copy_gmem_to_smem(k_pages.at[layer, src, *part], k_smem, loaded)
        plgpu.copy_gmem_to_smem(v_pages.at[layer, src, *part], v_smem, loaded)
        plgpu.barrier_wait(loaded)
        plgpu.copy_smem_to_gmem(k_smem, k_pages.at[layer, dst, *part])
        plgpu.copy_smem_to_gmem(v_smem, v_pages.at[layer, dst, *part])

    @pl.when(src != NULL_PAGE)
    def _():
        lax.fori_loop(0, num_kv_heads // heads * blocks_a_head, copy, None)

    plgpu.wait_smem_to_gmem(0)
