"""GPT-2: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxattn.layers import MLP, Embedding, LayerNorm, PreNormBlock, SelfAttention, dropout, run_blocks
from jaxattn.models.config import GPT2Config

INIT_STDDEV = 0.02


class GPT2Block(PreNormBlock):
    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        # each of the 2L residual projections adds to the stream: their scale keeps its variance near 1
        scales = {"stddev": INIT_STDDEV, "out_stddev": INIT_STDDEV / math.sqrt(2 * config.num_layers)}
        self.dropout_rate = config.dropout_rate
        sizes = (config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim)
        self.attention_norm = LayerNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.attention = SelfAttention(*sizes, use_bias=True, out_bias=True, **scales, rngs=rngs, dtype=dtype)
        self.mlp_norm = LayerNorm(config.embed_dim, config.norm_eps, dtype=dtype)
        self.mlp = MLP(config.embed_dim, config.mlp_dim, **scales, rngs=rngs, dtype=dtype)


class GPT2(nnx.Module):
    """A decoder whose positions are learned vectors; `model(tokens, positions, attention)` then `logits`."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        embed = {"stddev": INIT_STDDEV, "rngs": rngs, "dtype": dtype}
        self.token_embedding = Embedding(config.vocab_size, config.embed_dim, **embed)
        self.position_embedding = Embedding(config.max_positions, config.embed_dim, **embed)
        self.blocks = nnx.List([GPT2Block(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.final_norm = LayerNorm(config.embed_dim, config.norm_eps, dtype=dtype)
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
        if self.config.dropout_rate == 0.0:
            dropout_key = None
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        if dropout_key is not None:
            dropout_key, embedding_key = jax.random.split(dropout_key)
            x = dropout(x, self.config.dropout_rate, embedding_key)
        x, attention = run_blocks(self.blocks, x, None, attention, dropout_key=dropout_key, remat=remat)
        return self.final_norm(x), attention

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits f32[..., V]."""
        head = self.token_embedding if self.config.tie_embeddings else self.output_embedding
        return head.attend(hidden)
