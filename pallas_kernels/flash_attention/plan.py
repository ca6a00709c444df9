"""The static facts of one kernel launch, shared by the forward and the backward kernels on Hopper."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention.config import FlashConfig, FusedConfig
from pallas_kernels.mosaic import div, rem

# Of a float32 call, whose operands are scaled (scaling.py), powers of two: by what its logits and, in the
# backward pass, its weights are multiplied, and what the rows of V and dO are shorter than. Weights are at
# most 1 and fp16's largest is below 2^16: the rest is for lse's rounding.
LOGITS_EXPONENT, WEIGHTS_EXPONENT, NORM_EXPONENT = 6, 14, 14


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """Shapes, mask and tiles of a launch. T and S are the real lengths; head dims are those of shared memory,
    where tiles have whole swizzled columns."""

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
    has_segments: bool = False
    has_block_mask: bool = False
    dropout_rate: float = 0.0
    is_deterministic: bool = False  # in the backward pass; the forward always is
    keeps_fp32: bool = False  # a float32 call: operands come scaled (scaling.py), results leave in halves

    @property
    def d_weights_exponent(self) -> int:
        """r: 2^-r |dP| < 1 in a float32 call, after dropout's 1 / (1 - rate)."""
        upscale = math.ceil(-math.log2(1 - self.dropout_rate))
        return 2 * NORM_EXPONENT + upscale if self.keeps_fp32 else 0

    @property
    def has_masked_start(self) -> bool:
        """Whether the first KV tiles that rows see may need a mask."""
        return self.reach[0] is not None or self.has_segments

    @property
    def has_masked_tail(self) -> bool:
        """Whether the last ones may, for another reason than the end of the keys."""
        return self.reach[1] is not None or self.has_segments

    def is_cut_once(self, own: int, other: int) -> bool:
        """Whether the right end of what rows see lies in one tile of `other` for all rows of a tile of `own`,
        so that no second one needs a mask for it; own: queries and other: keys, or the reverse.
        """
        _, right = self.reach
        if self.has_segments or self.has_block_mask:
            return False
        if right is None:
            return True
        if self.bottom_right and (self.has_q_lengths or self.has_kv_lengths):
            return False
        diagonal = right + (self.num_keys - self.num_queries if self.bottom_right else 0)
        return other % own == 0 and diagonal % own == 0

    @property
    def sees_prefixes(self) -> bool:
        """Whether rows see all keys up to one of their own."""
        return self.reach[0] is None and not (self.has_segments or self.has_block_mask)

    @property
    def is_uneven(self) -> bool:
        """Whether tiles of a head differ in how much they see: there is an end on one side alone, or there
        are documents."""
        return self.has_segments or (self.reach[0] is None) != (self.reach[1] is None)

    @property
    def has_unknown_ends(self) -> bool:
        """Whether the tiles that rows see are not known before a kernel runs."""
        return self.has_segments or self.has_block_mask or self.has_q_lengths or self.has_kv_lengths

    @property
    def starts_light(self) -> bool:
        """Whether later queries see the keys of earlier ones and more, known before a kernel runs."""
        return not self.has_unknown_ends and self.reach[0] is None and self.reach[1] is not None

    def spare_rows(self, tile: int, warpgroups: int) -> int:
        """Rows before the first query, in the first of the thread blocks that own queries: whole tiles, whose
        warpgroups stay idle.

        Where later queries see more keys, the block that is not full had better be the first: T = 1,024 in
        blocks of 192 rows would end with 64 rows that keep a thread block for all 1,024 keys.
        """
        if not self.starts_light:
            return 0
        return -self.num_queries % (tile * warpgroups) // tile * tile

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def fused(self) -> FusedConfig:
        """Tiles of the fused backward kernel, in a config that has them."""
        assert self.config.fused is not None
        return self.config.fused

    @property
    def has_ragged_keys(self) -> bool:
        """Whether the last tile of 128 keys may hold keys past the end."""
        return self.has_kv_lengths or self.num_keys % 128 > 0

    @property
    def token_bytes(self) -> int:
        """Of one token's K and V, or Q and dO, of one head."""
        return (self.head_dim + self.value_dim) * jnp.dtype(self.dtype).itemsize

    def lengths_of(self, batch, extras):
        """(q_length, kv_length) of a batch row: read where they were given, else T and S."""
        q_lengths, kv_lengths = extras.q_lengths, extras.kv_lengths
        q_length = np.int32(self.num_queries) if q_lengths is None else q_lengths[batch]
        kv_length = np.int32(self.num_keys) if kv_lengths is None else kv_lengths[batch]
        return q_length, kv_length

    def offset(self, q_length, kv_length):
        """Query i stands at position i + offset."""
        return kv_length - q_length if self.bottom_right else 0

    def split_heads(self, batch_head, num_heads: int):
        """(batch, head) of an index in [0, B x heads)."""
        return div(batch_head, num_heads), rem(batch_head, num_heads)
