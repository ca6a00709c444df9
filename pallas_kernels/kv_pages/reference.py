"""Page writes and copies as XLA scatters: the oracle, and the path where there is no kernel.

Indices out of range are dropped, which is how slots and pairs that must not be written are left out. Under
donation XLA scatters in place: no copy of the pool.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.kv_pages.pool import NULL_PAGE, Arrays
from pallas_kernels.kv_pages.quantize import quantize


def write_kv(arrays: Arrays, key, value, slots, layer) -> Arrays:
    """Writes one token's K and V [K, H], and the scales [K] of quantized pages, to each slot."""
    num_pages, page_size = arrays[0].shape[1], arrays[0].shape[3]
    page = slots // page_size
    page = jnp.where(_is_page(arrays, page), page, num_pages)
    offset = slots % page_size

    def write(pages: jax.Array, tokens: jax.Array) -> jax.Array:
        return pages.at[layer, page, :, offset].set(tokens.astype(pages.dtype), mode="drop")

    tokens = (key, value)
    if len(arrays) == 4:
        codes, scales = zip(*(quantize(x, arrays[0].dtype) for x in tokens), strict=True)
        tokens = codes + scales
    return tuple(map(write, arrays, tokens))


def copy_pages(arrays: Arrays, src_pages, dst_pages) -> Arrays:
    """Copies whole pages of every layer."""
    dst_pages = jnp.where(_is_page(arrays, src_pages), dst_pages, NULL_PAGE)
    return scatter_pages(arrays, gather_pages(arrays, src_pages), dst_pages)


def gather_pages(arrays: Arrays, pages) -> Arrays:
    """Whole pages of every layer, side by side."""
    pages = jnp.clip(pages, 0, arrays[0].shape[1] - 1)
    return tuple(array[:, pages] for array in arrays)


def scatter_pages(arrays: Arrays, buffers: Arrays, pages) -> Arrays:
    """Puts whole pages of every layer where `pages` says; outside 1..P-1: nowhere."""
    pages = jnp.where(_is_page(arrays, pages), pages, arrays[0].shape[1])
    return tuple(
        array.at[:, pages].set(buffer, mode="drop") for array, buffer in zip(arrays, buffers, strict=True)
    )


def _is_page(arrays: Arrays, pages):
    return (pages > NULL_PAGE) & (pages < arrays[0].shape[1])
