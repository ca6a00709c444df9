"""The static facts of one kernel launch, shared by the forward and the backward kernels on Hopper."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.config import FlashConfig


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Shapes, mask and tiles of a launch. T and S are the real lengths; the arrays may be padded."""

    batch: int
    num_queries: int
    num_keys: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    dtype: Any
    scale: float
    reach: tuple[int | None, int | None]
    bottom_right: bool
    logits_soft_cap: float | None
    has_q_lengths: bool
    has_kv_lengths: bool
    config: FlashConfig

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def token_bytes(self) -> int:
        """Of one token's K and V, or Q and dO, of one head."""
        return (self.head_dim + self.value_dim) * jnp.dtype(self.dtype).itemsize

    def lengths_of(self, batch, lengths):
        """(q_length, kv_length) of a batch row: read where they were given, else T and S."""
        q_length, kv_length = jnp.int32(self.num_queries), jnp.int32(self.num_keys)
        lengths = list(lengths)
        if self.has_q_lengths:
            q_length = lengths.pop(0)[batch]
        if self.has_kv_lengths:
            kv_length = lengths.pop(0)[batch]
        return q_length, kv_length

    def offset(self, q_length, kv_length):
        """Query i stands at position i + offset."""
        return kv_length - q_length if self.bottom_right else jnp.int32(0)

    def split_heads(self, batch_head, num_heads: int):
        """(batch, head) of an index in [0, B x heads)."""
        return lax.div(batch_head, jnp.int32(num_heads)), lax.rem(batch_head, jnp.int32(num_heads))
