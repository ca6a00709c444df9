"""Moves whole pages on Hopper, every layer of every page in one launch: within the pool, out of it to a dense
buffer, and back. The pool is a mutable reference: it is read and written in place.

A program moves one page of one layer through shared memory, K and V side by side, in blocks of
[heads, tokens, H]; then their scales, if the pool is quantized, in blocks of [heads, tokens].
"""

import functools
from typing import Any

import jax
from jax import lax

from pallas_kernels.kv_pages.pool import NULL_PAGE, Arrays
from pallas_kernels.mosaic import clip, div, mutable, pl, plgpu, rem

BLOCK_BYTES = 32 * 1024  # of K, and again of V: three programs share a multiprocessor


def copy_pages(arrays: Arrays, src_pages, dst_pages) -> Arrays:
    """Copies page src to page dst in every layer, for every pair of pages 1..P-1; skips other pairs."""
    refs = [mutable(array) for array in arrays]
    _launch(_copy, arrays, src_pages.shape[0])(*refs, src_pages, dst_pages)
    return tuple(jax.freeze(ref) for ref in refs)


def gather_pages(arrays: Arrays, pages) -> Arrays:
    """Copies pages, side by side, into new arrays [L, C, ...]."""
    num_layers, num_pages = arrays[0].shape[0], pages.shape[0]
    out_type = [jax.ShapeDtypeStruct((num_layers, num_pages, *x.shape[2:]), x.dtype) for x in arrays]
    return tuple(_launch(_gather, arrays, num_pages, out_type)(*arrays, pages))


def scatter_pages(arrays: Arrays, buffers: Arrays, pages) -> Arrays:
    """Copies entry c of buffers [L, C, ...] to page pages[c], if that is one of 1..P-1."""
    refs = [mutable(array) for array in arrays]
    _launch(_scatter, arrays, pages.shape[0])(*refs, *buffers, pages)
    return tuple(jax.freeze(ref) for ref in refs)


def _launch(body, arrays: Arrays, num_moves: int, out_type=()):
    return plgpu.kernel(
        functools.partial(body, len(arrays)),
        out_type=out_type,
        grid=(arrays[0].shape[0], num_moves),
        grid_names=("layer", "move"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[*map(_block, arrays), plgpu.Barrier(num_arrivals=2)],
    )


def _block(array: jax.Array) -> Any:
    num_kv_heads, page_size, *head_dim = array.shape[2:]
    heads, tokens = block_shape(num_kv_heads, page_size, array.dtype.itemsize * (*head_dim, 1)[0])
    return plgpu.SMEM((heads, tokens, *head_dim), array.dtype)


def block_shape(num_kv_heads: int, page_size: int, token_bytes: int) -> tuple[int, int]:
    """Heads and tokens of a block: as much of a page as BLOCK_BYTES hold, in parts of equal size."""
    tokens = page_size
    while tokens * token_bytes > BLOCK_BYTES:
        tokens //= 2
    divisors = (size for size in range(num_kv_heads, 0, -1) if num_kv_heads % size == 0)
    heads = next(size for size in divisors if size == 1 or size * tokens * token_bytes <= BLOCK_BYTES)
    return heads, tokens


def _copy(size: int, *refs):
    pools, (src_pages, dst_pages), scratch = refs[:size], refs[size : size + 2], refs[size + 2 :]
    move = lax.axis_index("move")
    src, dst = src_pages[move], dst_pages[move]

    @pl.when(_is_page(pools[0], src) & _is_page(pools[0], dst))
    def _():
        _move_page(pools, src, pools, dst, *scratch)


def _gather(size: int, *refs):
    pools, pages, buffers, scratch = refs[:size], refs[size], refs[size + 1 : -size - 1], refs[-size - 1 :]
    move = lax.axis_index("move")
    page = clip(pages[move], 0, pools[0].shape[1] - 1)
    _move_page(pools, page, buffers, move, *scratch)


def _scatter(size: int, *refs):
    pools, buffers, pages, scratch = refs[:size], refs[size : 2 * size], refs[2 * size], refs[2 * size + 1 :]
    move = lax.axis_index("move")
    page = pages[move]

    @pl.when(_is_page(pools[0], page))
    def _():
        _move_page(buffers, move, pools, page, *scratch)


def _is_page(pool, page):
    return (page > NULL_PAGE) & (page < pool.shape[1])


def _move_page(sources, src, destinations, dst, *scratch):
    """Moves entry src of the sources' second dim to entry dst of the destinations'."""
    *blocks, loaded = scratch
    for pair in (slice(0, 2), slice(2, 4))[: len(blocks) // 2]:  # K and V, then their scales
        _move_pair(sources[pair], src, destinations[pair], dst, blocks[pair], loaded)
    plgpu.wait_smem_to_gmem(0)


def _move_pair(sources, src, destinations, dst, blocks, loaded):
    layer = lax.axis_index("layer")
    num_kv_heads, page_size = sources[0].shape[2:4]
    heads, tokens = blocks[0].shape[:2]
    blocks_a_head = page_size // tokens

    def move(index, _):
        part = (
            pl.ds(div(index, blocks_a_head) * heads, heads),
            pl.ds(rem(index, blocks_a_head) * tokens, tokens),
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the block before may still be on its way
        for source, block in zip(sources, blocks, strict=True):
            plgpu.copy_gmem_to_smem(source.at[layer, src, *part], block, loaded)
        plgpu.barrier_wait(loaded)
        for block, destination in zip(blocks, destinations, strict=True):
            plgpu.copy_smem_to_gmem(block, destination.at[layer, dst, *part])

    lax.fori_loop(0, num_kv_heads // heads * blocks_a_head, move, None)
