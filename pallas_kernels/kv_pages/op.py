"""write_kv, copy_pages, gather_pages, scatter_pages: validation and the table of variants."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import checks
from pallas_kernels.device import is_hopper
from pallas_kernels.kv_pages import copy_sm90, pool, reference, write_sm90
from pallas_kernels.kv_pages.pool import Arrays
from pallas_kernels.manual import jit_kernels
from pallas_kernels.variants import choose


class Variant(NamedTuple):
    """One way to write and move pages. `unsupported` says why it cannot serve a pool, or a write of keys to
    it; None if it can.
    """

    write: Callable[..., Arrays]
    copy: Callable[..., Arrays]
    gather: Callable[..., Arrays]
    scatter: Callable[..., Arrays]
    unsupported: Callable[..., str | None]
    is_available: Callable[[], bool]


VARIANTS = {
    "sm90": Variant(
        write_sm90.write_kv,
        copy_sm90.copy_pages,
        copy_sm90.gather_pages,
        copy_sm90.scatter_pages,
        write_sm90.unsupported,
        is_hopper,
    ),
    "reference": Variant(
        reference.write_kv,
        reference.copy_pages,
        reference.gather_pages,
        reference.scatter_pages,
        lambda pages, key=None: None,
        lambda: True,
    ),
}


def write_kv(
    k_pages: Num[Array, "L P K Z H"],
    v_pages: Num[Array, "L P K Z H"],
    key: Float[Array, "tokens K H"],
    value: Float[Array, "tokens K H"],
    slots: Int[Array, "tokens"],
    *,
    layer: int | Int[Array, ""] = 0,
    k_scale: Float[Array, "L P K Z"] | None = None,
    v_scale: Float[Array, "L P K Z"] | None = None,
    implementation: str | None = None,
) -> Arrays:
    """Writes the keys and values of tokens to their slots in one layer of the page pool.

        k_pages[layer, slot // Z, :, slot % Z] = key[token],   likewise v_pages

    Functional: (k_pages, v_pages) as written are returned, and (k_scale, v_scale) after them if they were
    given. Where the pool is donated (or dead afterwards inside a jit) it is updated in place, never copied.

    Quantized pages (int8, float8_e4m3fn) get codes, and a scale for each slot and head:

        scale = max |x| / limit,   code = round(x limit / max |x|),   limit = 127 or 448

    with max over the H numbers of a head. What is read back, code * scale, is off by at most max |x| / 254
    for int8 and max(|x| / 16, max |x| / 458752) for fp8. A head that holds a NaN or an infinity reads as NaN.

    Arguments:
        k_pages, v_pages: [L, P, K, Z, H], the whole pool.
        key, value: [tokens, K, H], bf16, fp16 or f32; cast to the pool's dtype, or quantized.
        slots: page_id * Z + offset of each token; in NULL_PAGE (0), negative or beyond the pool: not written.
            Others distinct.
        layer: which layer of the pool; may be traced, and is then taken to be one: what any other writes is
            undefined.
        k_scale, v_scale: of a quantized pool.
        implementation: a name of VARIANTS. By default the first that can serve the pool.

    Raises ValueError for wrong arguments, NotImplementedError where the implementation named cannot serve.
    From: Kwon et al., PagedAttention (2023), section 5.1, "fused reshape and block write".
    """
    arrays = pool.arrays_of(k_pages, v_pages, k_scale, v_scale)
    num_layers, _, num_kv_heads, _, head_dim = k_pages.shape
    checks.check_rank("key", key, "tokens K H")
    shape = (key.shape[0], num_kv_heads, head_dim)
    checks.check_shape("key", key, shape, "tokens K H")
    checks.check_shape("value", value, shape, "tokens K H")
    for name, array in (("key", key), ("value", value)):
        checks.check_dtype(name, array, pool.FLOATS)
    slots = pool.check_indices("slots", slots, shape[:1], "tokens")
    index = pool.check_layer(layer, num_layers)
    variant = choose("write_kv", VARIANTS, implementation, k_pages, key)
    return _write(variant, arrays, key, value, slots, index)


def copy_pages(
    k_pages: Num[Array, "L P K Z H"],
    v_pages: Num[Array, "L P K Z H"],
    src_pages: Int[Array, "C"],
    dst_pages: Int[Array, "C"],
    *,
    k_scale: Float[Array, "L P K Z"] | None = None,
    v_scale: Float[Array, "L P K Z"] | None = None,
    implementation: str | None = None,
) -> Arrays:
    """Copies pages to other pages in every layer: the copy of copy-on-write, many pairs in one launch.

        k_pages[:, dst] = k_pages[:, src],   likewise v_pages, k_scale, v_scale

    Functional and in place as write_kv is. A pair does nothing unless both its pages are among 1..P-1: page 0
    is NULL_PAGE. The dst pages of the other pairs are distinct, and none of them is the src of another pair:
    pairs run in any order.

    Arguments:
        k_pages, v_pages: [L, P, K, Z, H], the whole pool.
        src_pages, dst_pages: page ids of each pair.
        k_scale, v_scale: of a quantized pool.
        implementation: a name of VARIANTS. By default the first that can serve the pool.

    Raises ValueError for wrong arguments, NotImplementedError where the implementation named cannot serve.
    From: Kwon et al., PagedAttention (2023), section 5.1, "fused block copy".
    """
    arrays = pool.arrays_of(k_pages, v_pages, k_scale, v_scale)
    checks.check_rank("src_pages", src_pages, "C")
    shape = src_pages.shape
    src_pages = pool.check_indices("src_pages", src_pages, shape, "C")
    dst_pages = pool.check_indices("dst_pages", dst_pages, shape, "C")
    variant = choose("copy_pages", VARIANTS, implementation, k_pages)
    return _copy(variant, arrays, src_pages, dst_pages)


def gather_pages(
    k_pages: Num[Array, "L P K Z H"],
    v_pages: Num[Array, "L P K Z H"],
    pages: Int[Array, "C"],
    *,
    k_scale: Float[Array, "L P K Z"] | None = None,
    v_scale: Float[Array, "L P K Z"] | None = None,
    implementation: str | None = None,
) -> Arrays:
    """Copies pages of every layer out of the pool into dense buffers, as they are sent to host memory.

        k_buffer[:, c] = k_pages[:, pages[c]],   likewise for v_pages, k_scale, v_scale

    Arguments:
        k_pages, v_pages: [L, P, K, Z, H], the whole pool.
        pages: page ids, clamped into 0..P-1; NULL_PAGE (0) pads.
        k_scale, v_scale: of a quantized pool.
        implementation: a name of VARIANTS. By default the first that can serve the pool.

    Returns k_buffer, v_buffer [L, C, K, Z, H], and f32[L, C, K, Z] of each scale if they were given.
    Raises ValueError for wrong arguments, NotImplementedError where the implementation named cannot serve.
    From: Kwon et al., PagedAttention (2023), section 4.5, "swapping".
    """
    arrays = pool.arrays_of(k_pages, v_pages, k_scale, v_scale)
    checks.check_rank("pages", pages, "C")
    pages = pool.check_indices("pages", pages, pages.shape, "C")
    variant = choose("gather_pages", VARIANTS, implementation, k_pages)
    return _gather(variant, arrays, pages)


def scatter_pages(
    k_pages: Num[Array, "L P K Z H"],
    v_pages: Num[Array, "L P K Z H"],
    buffers: Sequence[Num[Array, "L C ..."]],
    pages: Int[Array, "C"],
    *,
    k_scale: Float[Array, "L P K Z"] | None = None,
    v_scale: Float[Array, "L P K Z"] | None = None,
    implementation: str | None = None,
) -> Arrays:
    """Copies dense buffers, as gather_pages returns them, into pages of the pool.

        k_pages[:, pages[c]] = k_buffer[:, c],   likewise for v_pages, k_scale, v_scale

    Functional and in place as write_kv is.

    Arguments:
        k_pages, v_pages: [L, P, K, Z, H], the whole pool.
        buffers: what gather_pages returned: (k_buffer, v_buffer), or four of a quantized pool.
        pages: page ids; entries outside 1..P-1 are left out, the others are distinct.
        k_scale, v_scale: of a quantized pool.
        implementation: a name of VARIANTS. By default the first that can serve the pool.

    Raises ValueError for wrong arguments, NotImplementedError where the implementation named cannot serve.
    From: Kwon et al., PagedAttention (2023), section 4.5, "swapping".
    """
    arrays = pool.arrays_of(k_pages, v_pages, k_scale, v_scale)
    checks.check_rank("pages", pages, "C")
    pages = pool.check_indices("pages", pages, pages.shape, "C")
    pool.check_buffers(buffers, arrays, pages.shape[0])
    variant = choose("scatter_pages", VARIANTS, implementation, k_pages)
    return _scatter(variant, arrays, tuple(buffers), pages)


@jit_kernels(1)
def _write(implementation: str, arrays: Arrays, key, value, slots, layer) -> Arrays:
    if len(arrays) == 2:
        key, value = (x.astype(arrays[0].dtype) for x in (key, value))
    elif key.dtype != value.dtype:
        key, value = (x.astype(jnp.float32) for x in (key, value))
    return VARIANTS[implementation].write(arrays, key, value, slots, layer)


@jit_kernels(1)
def _copy(implementation: str, arrays: Arrays, src_pages, dst_pages) -> Arrays:
    return VARIANTS[implementation].copy(arrays, src_pages, dst_pages)


@jit_kernels(1)
def _gather(implementation: str, arrays: Arrays, pages) -> Arrays:
    return VARIANTS[implementation].gather(arrays, pages)


@jit_kernels(1)
def _scatter(implementation: str, arrays: Arrays, buffers: Arrays, pages) -> Arrays:
    return VARIANTS[implementation].scatter(arrays, buffers, pages)
