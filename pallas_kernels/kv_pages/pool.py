"""The page pool's shape and the checks of arguments that describe it, shared by the ops that take a pool."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import checks

NULL_PAGE = 0  # never allocated: padding reads may go there, nothing is written there
PAGE_SIZES = (8, 16, 32, 64, 128, 256)  # a TMA copy takes at most 256 rows, a swizzled tile has 8
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
QUANTIZED = (jnp.int8, jnp.float8_e4m3fn)
POOL = "L P K Z H"


def check_pool(k_pages: Any, v_pages: Any, dtypes: Sequence[Any] = FLOATS + QUANTIZED) -> None:
    """Holds both pools to one shape [L, P, K, Z, H], one dtype of `dtypes`, and a supported page size."""
    checks.check_rank("k_pages", k_pages, POOL)
    checks.check_shape("v_pages", v_pages, k_pages.shape, POOL)
    checks.check_dtype("k_pages", k_pages, dtypes)
    checks.check_dtype("v_pages", v_pages, (k_pages.dtype,))
    checks.check_choice("the page size k_pages.shape[3]", k_pages.shape[3], PAGE_SIZES)


def check_layer(layer: Any, num_layers: int) -> jax.Array:
    """Holds a layer index to a scalar integer within the pool, if its value is known; returns i32[]."""
    if isinstance(layer, int) and not 0 <= layer < num_layers:
        raise ValueError(f"layer must lie in 0..{num_layers - 1}, got {layer}")
    index = jnp.asarray(layer)
    if index.ndim != 0 or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"layer must be an integer scalar, got {index.dtype}{list(index.shape)}")
    return index.astype(jnp.int32)


def check_indices(name: str, array: Any, shape: Sequence[int], letters: str) -> None:
    """Holds an array of ids, slots or lengths to its shape and an integer dtype."""
    checks.check_shape(name, array, shape, letters)
    checks.check_integers(name, array)
