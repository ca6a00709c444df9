"""Dropout with an explicit key: modules hold no random state, so a step under jit cannot repeat a mask."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x * Bernoulli(1 - rate) / (1 - rate); x itself without a key or at rate 0 (Srivastava et al. 2014)."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)
