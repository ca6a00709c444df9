"""Writes a step's keys and values into their pages on Hopper, in place.

A program takes a few tokens to shared memory with one TMA copy for K and one for V, and writes each token's
heads to its slot with one strided TMA copy. The pool is a mutable reference: no layer of it is ever copied.
"""

import functools

import jax
from jax import lax

from pallas_kernels.kv_pages import write_quantized_sm90
from pallas_kernels.kv_pages.pool import QUANTIZED, Arrays
from pallas_kernels.manual import unsupported_layout
from pallas_kernels.mosaic import SMEM_BYTES, TMA_ALIGNMENT, div, mutable, pl, plgpu, rem

# Beyond so many, a program takes more tokens. Short programs keep more copies on their way: 8192 tokens of
# 8 heads x 128 in bf16 take 19.2 us on an H200, and 20.2 us with 132 * 4.
NUM_PROGRAMS = 132 * 16
SMEM_BUDGET = 48 * 1024  # of K and V together, so that four programs share a multiprocessor
MAX_BOX = 256  # elements that one TMA copy takes along a dimension


def unsupported(pages: jax.Array, key: jax.Array | None = None) -> str | None:
    """Says why kv_pages' kernels cannot serve a pool, or a write of keys to it; None if they can."""
    _, _, num_kv_heads, _, head_dim = pages.shape
    if head_dim * pages.dtype.itemsize % 16 or head_dim > MAX_BOX:
        return f"the head dim must be at most {MAX_BOX} and 16 bytes or a multiple, got {head_dim}"
    if num_kv_heads > MAX_BOX:
        return f"there must be at most {MAX_BOX} KV heads, got {num_kv_heads}"
    return (_unsupported_keys(pages, key) if key is not None else None) or unsupported_layout(pages)


def _unsupported_keys(pages: jax.Array, key: jax.Array) -> str | None:
    if pages.dtype in QUANTIZED:
        return write_quantized_sm90.unsupported(key)
    _, num_kv_heads, head_dim = key.shape
    token_bytes = num_kv_heads * head_dim * pages.dtype.itemsize
    if (needed := write_quantized_sm90.shared_bytes(token_bytes, token_bytes)) > SMEM_BYTES:
        return f"K and V of a token need {needed} bytes of shared memory, of {SMEM_BYTES} that there are"
    return None


def write_kv(arrays: Arrays, key, value, slots, layer) -> Arrays:
    """Writes one token's K and V [K, H] to each slot that lies in a page."""
    if len(arrays) == 4:
        return write_quantized_sm90.write_kv(arrays, key, value, slots, layer)
    num_tokens, num_kv_heads, head_dim = key.shape
    token_bytes = num_kv_heads * head_dim * key.dtype.itemsize
    block = max(1, min(-(-num_tokens // NUM_PROGRAMS), SMEM_BUDGET // (2 * token_bytes)))
    if token_bytes % TMA_ALIGNMENT:  # only a block's first token begins where a TMA copy can
        block = 1
    refs = [mutable(array) for array in arrays]
    tokens_smem = plgpu.SMEM((block, num_kv_heads, head_dim), key.dtype)
    plgpu.kernel(
        functools.partial(_kernel, block, num_tokens),
        out_type=(),
        grid=(-(-num_tokens // block),),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[tokens_smem, tokens_smem, plgpu.Barrier(num_arrivals=2)],
    )(*refs, key, value, slots, layer[None])
    return tuple(jax.freeze(ref) for ref in refs)


def _kernel(block: int, num_tokens: int, k_pages, v_pages, key, value, slots, layer, k_smem, v_smem, loaded):
    _, num_pages, _, page_size, _ = k_pages.shape
    first = lax.axis_index("block") * block
    tokens = pl.ds(first, block)
    plgpu.copy_gmem_to_smem(key.at[tokens], k_smem, loaded)
    plgpu.copy_gmem_to_smem(value.at[tokens], v_smem, loaded)
    plgpu.barrier_wait(loaded)

    def write(index, _):
        slot = slots[lax.min(first + index, num_tokens - 1)]
        is_page = (slot >= page_size) & (div(slot, page_size) < num_pages)  # before it lies NULL_PAGE
        is_ours = (first + index < num_tokens) & is_page

        @pl.when(is_ours)
        def _():
            page, offset = div(slot, page_size), rem(slot, page_size)
            plgpu.copy_smem_to_gmem(k_smem.at[index], k_pages.at[layer[0], page, :, offset])
            plgpu.copy_smem_to_gmem(v_smem.at[index], v_pages.at[layer[0], page, :, offset])

    lax.fori_loop(0, block, write, None)
    plgpu.wait_smem_to_gmem(0)
