"""What one attention call computes: the static description and the arrays, as every variant receives them."""

import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int, Integer, UInt32

from pallas_kernels.flash_attention.block_tiles import BlockTiles
from pallas_kernels.flash_attention.config import FlashConfig


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """The static part of a call; hashable, so that equal calls share one trace."""

    scale: float
    is_causal: bool = False
    bottom_right: bool = False  # the last query stands at the last key, else the first at the first
    window: tuple[int | None, int | None] = (None, None)  # keys visible to the left and right of a query
    logits_soft_cap: float | None = None
    dropout_rate: float = 0.0
    deterministic: bool = False
    config: FlashConfig | None = None

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """(left, right): position p sees the keys p - left .. p + right; causal means right <= 0."""
        left, right = self.window
        if self.is_causal:
            right = 0 if right is None else min(right, 0)
        return left, right


class AttentionInputs(NamedTuple):
    """The arrays of a call: gradients flow to the first five."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K Hv"]
    bias: Float[Array, "#B #N #T #S"] | None = None
    sinks: Float[Array, "N"] | None = None
    alibi_slopes: Float[Array, "#B N"] | None = None
    q_segment_ids: Integer[Array, "B T"] | None = None
    kv_segment_ids: Integer[Array, "B S"] | None = None
    q_lengths: Int[Array, "B"] | None = None
    kv_lengths: Int[Array, "B"] | None = None
    dropout_seed: UInt32[Array, "2"] | None = None
    block_mask: BlockTiles | None = None


class AttentionGradients(NamedTuple):
    """Cotangents of AttentionInputs' first five fields."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    bias: jax.Array | None = None
    sinks: jax.Array | None = None
