"""Writes a step's keys and values into quantized pages on Hopper, in place.

A program takes the heads of a few tokens, K or V, to shared memory with one TMA copy; quantizes them in
registers, a head a row; and writes each token's codes to its slot with one strided TMA copy. The scales of a
token lie Z apart: they are stored one by one.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_pages.pool import Arrays
from pallas_kernels.kv_pages.quantize import LIMITS, scale_and_inverse, to_codes
from pallas_kernels.mosaic import (
    SMEM_BYTES,
    TMA_ALIGNMENT,
    broadcast_rows,
    buffer_bytes,
    div,
    mutable,
    pl,
    plgpu,
    rem,
)

ROWS = 64  # rows of a register tile of one warpgroup
MAX_BLOCK = 16  # tokens of a program, whose slots are held in registers
MAX_GRID_Y = 65_535  # programs along CUDA's y: Pallas makes a grid's last dimension CUDA's first
REDUCTION_BYTES = 2048  # of shared memory, which Mosaic takes where a kernel reduces
BARRIER_BYTES = 8


def unsupported(key: jax.Array) -> str | None:
    """Says why the kernel cannot write keys [tokens, K, H], or None if it can."""
    num_tokens, num_kv_heads, head_dim = key.shape
    block, _, num_rows = _cut(num_kv_heads, head_dim)
    numbers = num_rows * head_dim
    needed = shared_bytes(numbers * key.dtype.itemsize, numbers, 4 * num_rows) + REDUCTION_BYTES
    if needed > SMEM_BYTES:
        return f"the heads of a token need {needed} bytes of shared memory, of {SMEM_BYTES} that there are"
    if num_tokens > (most := block * MAX_GRID_Y):
        return f"there must be at most {most} tokens of {num_kv_heads} KV heads, got {num_tokens}"
    return None


def shared_bytes(*sizes: int) -> int:
    """Shared memory of buffers and of a barrier."""
    return buffer_bytes(*sizes) + BARRIER_BYTES


def write_kv(arrays: Arrays, key, value, slots, layer) -> Arrays:
    """Writes one token's codes [K, H] and scales [K], of K and of V, to each slot that lies in a page."""
    num_tokens, num_kv_heads, head_dim = key.shape
    block, pitch, num_rows = _cut(num_kv_heads, head_dim)
    refs = [mutable(array) for array in arrays]
    rows = functools.partial(_rows, pitch=pitch, at_least=num_rows)
    plgpu.kernel(
        functools.partial(_kernel, block, pitch, num_tokens),
        out_type=(),
        grid=(-(-num_tokens // block), 2),
        grid_names=("block", "kv"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((num_rows, head_dim), key.dtype),
            plgpu.SMEM((num_rows, head_dim), arrays[0].dtype),
            plgpu.SMEM((num_rows,), jnp.float32),
            plgpu.Barrier(),
        ],
    )(*refs, rows(key), rows(value), slots, layer[None])
    return tuple(jax.freeze(ref) for ref in refs)


def _cut(num_kv_heads: int, head_dim: int) -> tuple[int, int, int]:
    """Tokens of a program, rows of a token, and rows of a program's tiles."""
    pitch = padded_heads(num_kv_heads, head_dim)
    block = max(1, min(ROWS // pitch, MAX_BLOCK))
    return block, pitch, -(-block * pitch // ROWS) * ROWS


def padded_heads(num_kv_heads: int, head_dim: int) -> int:
    """KV heads, padded so that the codes of every token begin where a TMA copy can."""
    multiple = TMA_ALIGNMENT // math.gcd(TMA_ALIGNMENT, head_dim)
    return -(-num_kv_heads // multiple) * multiple


def _rows(tokens: jax.Array, pitch: int, at_least: int) -> jax.Array:
    """[tokens, K, H] -> [rows, H], `pitch` rows a token; no copy where nothing has to be padded.

    A tiled TMA copy takes rows by eights.
    """
    num_tokens, num_kv_heads, head_dim = tokens.shape
    wanted = max(num_tokens, -(-at_least // pitch))
    missing = -(-wanted // 8) * 8 - num_tokens if wanted * pitch % 8 else wanted - num_tokens
    tokens = jnp.pad(tokens, ((0, missing), (0, pitch - num_kv_heads), (0, 0)))
    return tokens.reshape(-1, head_dim)


def _kernel(block: int, pitch: int, num_tokens: int, *refs):
    k_pages, v_pages, k_scale, v_scale, key, value, slots, layer, *scratch = refs
    first = lax.axis_index("block") * block
    # All slots first: between copies each load would be waited for.
    tokens = [lax.min(first + i, num_tokens - 1) for i in range(block)]
    targets = [_target(slots[token], k_pages.shape, first + i < num_tokens) for i, token in enumerate(tokens)]
    for which, (rows, pages, scales) in enumerate(((key, k_pages, k_scale), (value, v_pages, v_scale))):

        @pl.when(lax.axis_index("kv") == which)
        def _(rows=rows, pages=pages, scales=scales):
            _quantize_rows(rows.at[pl.ds(first * pitch, scratch[0].shape[0])], *scratch)
            _store_tokens(pages.at[layer[0]], scales.at[layer[0]], targets, pitch, *scratch[1:3])


def _target(slot, pool_shape, is_token):
    """Page and offset of a slot, and whether to write there."""
    _, num_pages, _, page_size, _ = pool_shape
    page, offset = div(slot, page_size), rem(slot, page_size)
    return page, offset, is_token & (slot >= page_size) & (page < num_pages)  # before it lies NULL_PAGE


def _quantize_rows(rows, rows_smem, codes_smem, scale_smem, loaded):
    """codes_smem, scale_smem = quantize(rows), 64 rows at a time."""
    plgpu.copy_gmem_to_smem(rows, rows_smem, loaded)
    plgpu.barrier_wait(loaded)
    num_rows, head_dim = rows_smem.shape
    # Four threads a row, each with vectors of 8 (or 4) neighbours: whole words of codes are stored.
    layout = plgpu.Layout.WGMMA_UPCAST_4X if head_dim % 32 == 0 else plgpu.Layout.WGMMA_8BIT
    for first in range(0, num_rows, ROWS):
        part = pl.ds(first, ROWS)
        vectors = plgpu.load(rows_smem.at[part], layout=layout, optimized=False).astype(jnp.float32)
        largest = jnp.max(jnp.abs(vectors), axis=1)
        scale, inverse = scale_and_inverse(largest, LIMITS[codes_smem.dtype])
        codes_smem[part] = to_codes(vectors * broadcast_rows(inverse, head_dim, layout), codes_smem.dtype)
        scale_smem[part] = scale
    plgpu.commit_smem()


def _store_tokens(pages, scales, targets, pitch: int, codes_smem, scale_smem):
    num_kv_heads = pages.shape[1]
    for token, (page, offset, is_ours) in enumerate(targets):

        @pl.when(is_ours)
        def _(token=token, page=page, offset=offset):
            codes = codes_smem.at[pl.ds(token * pitch, num_kv_heads)]
            plgpu.copy_smem_to_gmem(codes, pages.at[page, :, offset])

            def store_scale(head, _):
                scales[page, head, offset] = scale_smem[token * pitch + head]

            lax.fori_loop(0, num_kv_heads, store_scale, None)

    plgpu.wait_smem_to_gmem(0)
