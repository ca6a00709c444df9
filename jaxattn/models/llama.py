"""LLaMA: Touvron et al. 2023, and the models of its architecture (SmolLM2, TinyLlama, Llama 2, 3)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.layers import (
    Embedding,
    GatedMLP,
    PreNormBlock,
    RMSNorm,
    SelfAttention,
    dropout,
    rope_angles,
    rope_frequencies,
    run_blocks,
)
from jaxattn.models.config import LlamaConfig

INIT_STDDEV = 0.02


class LlamaBlock(PreNormBlock):
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
