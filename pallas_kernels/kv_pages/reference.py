"""Page writes and copies as XLA scatters: the oracle, and the path where there is no kernel.

Indices out of range are dropped, which is how slots and pairs that must not be written are left out. Under
donation XLA scatters in place: no copy of the pool.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.kv_pages.pool import NULL_PAGE


def write_kv(k_pages, v_pages, key, value, slots, layer):
    """Writes one token's K and V [K, H] to each slot."""
    num_pages, page_size = k_pages.shape[1], k_pages.shape[3]
    page = jnp.where(slots >= 0, slots // page_size, num_pages)
    offset = slots % page_size

    def write(pages: jax.Array, tokens: jax.Array) -> jax.Array:
        return pages.at[layer, page, :, offset].set(tokens.astype(pages.dtype), mode="drop")

    return write(k_pages, key), write(v_pages, value)


def copy_pages(k_pages, v_pages, src_pages, dst_pages):
    """Copies whole pages of every layer."""
    dst = jnp.where(src_pages == NULL_PAGE, k_pages.shape[1], dst_pages)

    def copy(pages: jax.Array) -> jax.Array:
        return pages.at[:, dst].set(pages.at[:, src_pages].get(mode="clip"), mode="drop")

    return copy(k_pages), copy(v_pages)
