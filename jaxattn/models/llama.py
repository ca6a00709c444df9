"""LLaMA: Touvron et al. 2023, and the models of its architecture (SmolLM2, TinyLlama, Llama 2, 3)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.layers import (
    Embedding,
    GatedMLP,
    RMSNorm,
    SelfAttention,
    dropout,
    rope_angles,
    rope_frequencies,
    run_blocks,
)
from jaxattn.layers.rope import Angles
from jaxattn.models.config import LlamaConfig

INIT_STDDEV = 0.02


class LlamaBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        scales = {"stddev": INIT_STDDEV, "out_stddev": INIT_STDDEV / math.sqrt(2 * config.num_layers)}
        options = {**scales, "rngs": rngs, "dtype": dtype}
        bias = config.attention_bias
        self.dropout_rate = config.dropout_rate
        sizes = (config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.attention = SelfAttention(*sizes, use_bias=bias, out_bias=bias, **options)
        self.mlp_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.mlp = GatedMLP(config.embed_dim, config.mlp_dim, use_bias=config.mlp_bias, **options)

    def __call__(
        self, x: jax.Array, angles: Angles, attention: Any, layer: jax.Array, *, dropout_key: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        y, attention = self.attention(self.attention_norm(x), angles, attention, layer, dropout_key=keys[0])
        x = x + dropout(y, self.dropout_rate, keys[1])
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout_rate, keys[2]), attention


class Llama(nnx.Module):
    """A decoder with rotary positions; `model(tokens, positions, attention)` then `logits`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        embed = {"stddev": INIT_STDDEV, "rngs": rngs, "dtype": dtype}
        self.token_embedding = Embedding(config.vocab_size, config.embed_dim, **embed)
        self.blocks = nnx.List([LlamaBlock(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            self.output_embedding = Embedding(config.vocab_size, config.embed_dim, **embed)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        attention: Any,
        *,
        dropout_key: jax.Array | None = None,
        remat: bool = False,
    ) -> tuple[jax.Array, Any]:
        """tokens i32[...], positions i32[...] -> hidden [..., D] (after the last norm), attention object."""
        config = self.config
        if config.dropout_rate == 0.0:
            dropout_key = None
        x = self.token_embedding(tokens)
        if dropout_key is not None:
            dropout_key, embedding_key = jax.random.split(dropout_key)
            x = dropout(x, config.dropout_rate, embedding_key)
        frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        angles = rope_angles(positions, frequencies)
        x, attention = run_blocks(self.blocks, x, angles, attention, dropout_key=dropout_key, remat=remat)
        return self.final_norm(x), attention

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits f32[..., V]."""
        head = self.token_embedding if self.config.tie_embeddings else self.output_embedding
        return head.attend(hidden)
