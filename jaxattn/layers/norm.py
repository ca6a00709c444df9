"""Layer norm and RMS norm, computed in float32 and returned in the input's dtype."""

import jax
import jax.numpy as jnp
from flax import nnx


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis (Ba et al. 2016)."""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype = jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + self.eps)
        return (normal * self.scale[...] + self.bias[...]).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype = jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((size,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        return (normal * self.scale[...]).astype(x.dtype)
