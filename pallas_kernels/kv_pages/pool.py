"""The page pool's shape and the checks of arguments that describe it, shared by the ops that take a pool."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import checks

NULL_PAGE = 0  # never allocated: padding reads may go there, nothing is written there
PAGE_SIZES = (8, 16, 32, 64, 128, 256)  # a TMA copy takes at most 256 rows, a swizzled tile has 8
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
QUANTIZED = (jnp.int8, jnp.float8_e4m3fn)
# Heads first within a page. Measured on an H200 (examples/benchmarks/page_layout.py; K = 8, Z = 16, H = 128,
# bf16) against tokens first, [Z, K, H]: decode's reads run at 4.40 and 4.42 TB/s, a write of 16384 tokens
# takes 40.7 and 42.0 us, one of 256 tokens 2.40 and 2.37: to TMA either order is as good, from pages of 8
# tokens on. What decides are the scales of quantized pages: those of a head are 4 Z bytes on end, one TMA
# copy. Tokens first they would lie 4 K bytes apart, in pieces of 4 bytes, which TMA cannot take.
POOL = "L P K Z H"
SCALES = "L P K Z"

Arrays = tuple[jax.Array, ...]  # a pool: (k_pages, v_pages), and if quantized (k_scale, v_scale) after them


def check_pool(k_pages: Any, v_pages: Any, dtypes: Sequence[Any] = FLOATS + QUANTIZED) -> None:
    """Holds both pools to one shape [L, P, K, Z, H], one dtype of `dtypes`, and a supported page size."""
    checks.check_rank("k_pages", k_pages, POOL)
    checks.check_shape("v_pages", v_pages, k_pages.shape, POOL)
    checks.check_dtype("k_pages", k_pages, dtypes)
    checks.check_dtype("v_pages", v_pages, (k_pages.dtype,))
    checks.check_choice("the page size k_pages.shape[3]", k_pages.shape[3], PAGE_SIZES)


def check_scales(k_pages: Any, k_scale: Any, v_scale: Any) -> None:
    """Holds the scales to f32[L, P, K, Z], one a slot and head: given for quantized pages and no others."""
    is_quantized = k_pages.dtype in QUANTIZED
    for name, array in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (array is not None) != is_quantized:
            raise ValueError(
                f"{name} must be given for int8 and fp8 pages and for no others, "
                f"got {'none' if array is None else 'one'} with {k_pages.dtype} pages"
            )
        if array is not None:
            checks.check_shape(name, array, k_pages.shape[:4], SCALES)
            checks.check_dtype(name, array, (jnp.float32,))


def arrays_of(k_pages: Any, v_pages: Any, k_scale: Any, v_scale: Any) -> Arrays:
    """The arrays of a pool, checked: two, or four if it is quantized."""
    check_pool(k_pages, v_pages)
    check_scales(k_pages, k_scale, v_scale)
    return (k_pages, v_pages) if k_scale is None else (k_pages, v_pages, k_scale, v_scale)


def check_buffers(buffers: Sequence[Any], arrays: Arrays, num_pages: int) -> None:
    """Holds dense buffers to the shapes [L, C, ...] and dtypes of C pages of a pool."""
    try:
        held = len(buffers)
    except TypeError:
        held = checks.describe(buffers)
    if held != len(arrays):
        raise ValueError(f"buffers must hold {len(arrays)} arrays, as the pool does, got {held}")
    for index, (buffer, array) in enumerate(zip(buffers, arrays, strict=True)):
        shape, letters = (array.shape[0], num_pages, *array.shape[2:]), "L C K Z H"[: 2 * array.ndim - 1]
        checks.check_shape(f"buffers[{index}]", buffer, shape, letters)
        checks.check_dtype(f"buffers[{index}]", buffer, (array.dtype,))


def check_layer(layer: Any, num_layers: int) -> jax.Array:
    """Holds a layer index to a scalar integer within the pool, if the host knows it; returns i32[]."""
    try:
        known = 0 if isinstance(layer, jax.Array) else operator.index(layer)  # a device is not waited for
    except TypeError:  # no integer
        known = 0
    if not 0 <= known < num_layers:
        raise ValueError(f"layer must lie in 0..{num_layers - 1}, got {known}")
    try:
        index = jnp.asarray(layer)
    except (TypeError, ValueError):
        raise ValueError(f"layer must be an integer scalar, got {layer!r}") from None
    if index.ndim != 0 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"layer must be an integer scalar, got {index.dtype}{list(index.shape)}")
    return index.astype(jnp.int32)


def check_indices(name: str, array: Any, shape: Sequence[int], letters: str) -> Any:
    """Holds an array of ids, slots or lengths to its shape and an integer dtype; returns it as i32, in which
    a sum of two of them does not overflow."""
    checks.check_shape(name, array, shape, letters)
    checks.check_integers(name, array)
    return checks.as_int32(array)
