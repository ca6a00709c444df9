"""Self-attention that does not know where its keys and values live."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from jaxattn.layers.rope import Angles, apply_rope


class SelfAttention(nnx.Module):
    """Projects to heads, hands them to an attention object, projects back.

    One kernel holds the projections of query, key and value, grouped by KV head: column order [K, G + 2, H],
    where the G = N/K query heads of a group come first, then its key, then its value. One matmul reads the
    input once, and a cut over the KV heads keeps every group whole on its device.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        use_bias: bool,
        out_bias: bool,
        stddev: float,
        out_stddev: float,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
    ):
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.qkv = nnx.Linear(
            embed_dim,
            (num_heads + 2 * num_kv_heads) * head_dim,
            use_bias=use_bias,
            kernel_init=initializers.normal(stddev),
            param_dtype=dtype,
            rngs=rngs,
        )
        self.out = nnx.Linear(
            num_heads * head_dim,
            embed_dim,
            use_bias=out_bias,
            kernel_init=initializers.normal(out_stddev),
            param_dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        x: jax.Array,
        angles: Angles | None,
        attention: Any,
        layer: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """x[..., D] -> y[..., D] and the attention object to carry on with."""
        group = self.num_heads // self.num_kv_heads
        grouped = self.qkv(x).reshape(*x.shape[:-1], self.num_kv_heads, group + 2, self.head_dim)
        query = grouped[..., :group, :].reshape(*x.shape[:-1], self.num_heads, self.head_dim)
        key, value = grouped[..., group, :], grouped[..., group + 1, :]
        if angles is not None:
            query, key = apply_rope(query, angles), apply_rope(key, angles)
        y, attention = attention(layer, query, key, value, dropout_key=dropout_key)
        return self.out(y.reshape(*x.shape[:-1], self.num_heads * self.head_dim)), attention
