"""write_kv and copy_pages: validation and the table of variants."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from pallas_kernels.device import is_hopper
from pallas_kernels.kv_pages import copy_sm90, pool, reference, write_sm90
from pallas_kernels.variants import choose

Pools = tuple[Float[Array, "L P K Z H"], Float[Array, "L P K Z H"]]


class Variant(NamedTuple):
    """One way to write and copy pages. `unsupported` says why it cannot serve a pool, or None if it can."""

    write: Callable[..., Pools]
    copy: Callable[..., Pools]
    unsupported: Callable[[jax.Array], str | None]
    is_available: Callable[[], bool]


VARIANTS = {
    "sm90": Variant(write_sm90.write_kv, copy_sm90.copy_pages, write_sm90.unsupported, is_hopper),
    "reference": Variant(reference.write_kv, reference.copy_pages, lambda pages: None, lambda: True),
}


def write_kv(
    k_pages: Float[Array, "L P K Z H"],
    v_pages: Float[Array, "L P K Z H"],
    key: Float[Array, "tokens K H"],
    value: Float[Array, "tokens K H"],
    slots: Int[Array, "tokens"],
    *,
    layer: int | Int[Array, ""] = 0,
    implementation: str | None = None,
) -> Pools:
    """Writes the keys and values of tokens to their slots in one layer of the page pool.

        k_pages[layer, slot // Z, :, slot % Z] = key[token],   likewise v_pages

    Functional: the written pools are returned. Where the pools are donated (or dead afterwards inside a jit)
    they are updated in place, never copied.

    Arguments:
        k_pages, v_pages: [L, P, K, Z, H], the whole pool.
        key, value: [tokens, K, H], cast to the pool's dtype.
        slots: page_id * Z + offset of each token; negative: not written. Distinct where not negative.
        layer: which layer of the pool; may be traced.
        implementation: a name of VARIANTS. By default the first that can serve the pool.

    Raises ValueError for wrong arguments, NotImplementedError where the implementation named cannot serve.
    From: Kwon et al., PagedAttention (2023), section 5.1, "fused reshape and block write".
    """
    pool.check_pool(k_pages, v_pages, pool.FLOATS)
    _, _, num_kv_heads, _, head_dim = k_pages.shape
    checks.check_rank("key", key, "tokens K H")
    shape = (key.shape[0], num_kv_heads, head_dim)
    checks.check_shape("key", key, shape, "tokens K H")
    checks.check_shape("value", value, shape, "tokens K H")
    for name, array in (("key", key), ("value", value)):
        checks.check_dtype(name, array, pool.FLOATS)
    pool.check_indices("slots", slots, shape[:1], "tokens")
    index = pool.check_layer(layer, k_pages.shape[0])
    return _write(choose(VARIANTS, implementation, k_pages), k_pages, v_pages, key, value, slots, index)


def copy_pages(
    k_pages: Float[Array, "L P K Z H"],
    v_pages: Float[Array, "L P K Z H"],
    src_pages: Int[Array, "C"],
    dst_pages: Int[Array, "C"],
    *,
    implementation: str | None = None,
) -> Pools:
    """Copies pages to other pages in every layer: the copy of copy-on-write, many pairs in one launch.

        k_pages[:, dst] = k_pages[:, src],   likewise v_pages

    Functional and in place as write_kv is. A pair whose src is NULL_PAGE (0) does nothing. The dst pages of
    the other pairs are distinct, and none of them is the src of another pair: pairs run in any order.

    Arguments:
        k_pages, v_pages: [L, P, K, Z, H], the whole pool.
        src_pages, dst_pages: page ids of each pair, within 0..P-1.
        implementation: a name of VARIANTS. By default the first that can serve the pool.

    Raises ValueError for wrong arguments, NotImplementedError where the implementation named cannot serve.
    From: Kwon et al., PagedAttention (2023), section 5.1, "fused block copy".
    """
    pool.check_pool(k_pages, v_pages)
    checks.check_rank("src_pages", src_pages, "C")
    for name, pages in (("src_pages", src_pages), ("dst_pages", dst_pages)):
        pool.check_indices(name, pages, src_pages.shape, "C")
    return _copy(choose(VARIANTS, implementation, k_pages), k_pages, v_pages, src_pages, dst_pages)


# Jitted, so that the layers of an unrolled model share one trace and one lowered kernel.
@functools.partial(jax.jit, static_argnums=0)
def _write(implementation: str, k_pages, v_pages, key, value, slots, layer) -> Pools:
    key, value = (x.astype(k_pages.dtype) for x in (key, value))
    return VARIANTS[implementation].write(k_pages, v_pages, key, value, slots.astype(jnp.int32), layer)


@functools.partial(jax.jit, static_argnums=0)
def _copy(implementation: str, k_pages, v_pages, src_pages, dst_pages) -> Pools:
    return VARIANTS[implementation].copy(
        k_pages, v_pages, src_pages.astype(jnp.int32), dst_pages.astype(jnp.int32)
    )
