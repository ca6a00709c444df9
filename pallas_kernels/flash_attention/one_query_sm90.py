"""One query a row on many keys: the decode kernel of paged attention, over keys and values as they lie.

It cuts the keys of a row over the GPU, reads them once for all query heads that share them, and pads G
queries to 8 columns of a wgmma; tiles of queries would hold one row each, and read K and V G times.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.spec import AttentionInputs, AttentionSpec
from pallas_kernels.paged_attention import decode_plan, decode_sm90
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec

# Fewer were not measured. In a sweep on an H200, in us (tiles of queries): 256 keys of 32/8
# heads of 128, one row 3.9 (5.1), 32 rows 8.0 (30.2); where it lost most, four rows of 512 keys of 16/16
# heads of 64, 7.1 (6.3).
MIN_KEYS = 256


def serves(inputs: AttentionInputs, spec: AttentionSpec) -> bool:
    """Whether the forward pass of a call is decode; reads only shapes and dtypes.

    Tiles that were asked for are those of the other kernel.
    """
    has_others = (inputs.bias, inputs.q_segment_ids, inputs.q_lengths, inputs.dropout_seed, inputs.block_mask)
    if any(x is not None for x in has_others) or spec.config is not None:
        return False
    (_, num_queries, _, head_dim), (_, num_keys, _, value_dim) = inputs.query.shape, inputs.value.shape
    if num_queries != 1 or num_keys < MIN_KEYS or head_dim != value_dim:
        return False
    # Decode's query stands at its row's last key.
    if not spec.bottom_right and (spec.reach[1] is not None or inputs.alibi_slopes is not None):
        return False
    if inputs.alibi_slopes is not None and inputs.alibi_slopes.shape[0] > 1:
        return False
    return decode_plan.unsupported_shapes(jax.eval_shape(_caches, inputs)) is None


def forward(inputs: AttentionInputs, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """The output [B, 1, N, H] and the log-sum-exp f32[B, N, 1]."""
    caches = _caches(inputs)
    left = spec.reach[0] if spec.bottom_right else None  # from position 0 on there is nothing to the left
    plan = decode_plan.make_plan(caches, PagedSpec(spec.scale, left, spec.logits_soft_cap))
    # Custom partitioning takes no function that makes a reference, from which units would be drawn.
    plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, dynamic=False))
    # A jit of its own, for it takes none with constants either.
    out, lse = jax.jit(decode_sm90.attend, static_argnums=0)(plan, caches)
    return out[:, None], lse[..., None]


def _caches(inputs: AttentionInputs) -> PagedInputs:
    """Keys and values as caches of decode."""
    batch, num_keys = inputs.key.shape[:2]
    return PagedInputs(
        query=inputs.query[:, 0],
        k_pages=inputs.key,
        v_pages=inputs.value,
        block_tables=None,
        kv_lengths=jnp.full(batch, num_keys, jnp.int32) if inputs.kv_lengths is None else inputs.kv_lengths,
        layer=jnp.zeros((), jnp.int32),
        sinks=inputs.sinks,
        alibi_slopes=None if inputs.alibi_slopes is None else inputs.alibi_slopes[0],
    )
