"""The Hopper variant of flash_attention: what it can serve, and the shapes and padding its kernels want."""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import forward_sm90, reference
from pallas_kernels.flash_attention.config import default_config
from pallas_kernels.flash_attention.forward_sm90 import ForwardPlan
from pallas_kernels.flash_attention.spec import AttentionGradients, AttentionInputs, AttentionSpec

ROW_MULTIPLE = (
    8  # TMA moves 8-row tiles: it would read or write past a batch row whose length is not a multiple
)
HEAD_MULTIPLE = 64  # 128 bytes, the width of the swizzle


def unsupported(inputs: AttentionInputs, spec: AttentionSpec) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    if inputs.query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, got {inputs.query.dtype}"
    if spec.scale <= 0:
        return f"it takes a positive scale, got {spec.scale}"
    for name, given in (
        ("bias", inputs.bias is not None),
        ("segment ids", inputs.q_segment_ids is not None),
        ("dropout", spec.dropout_rate > 0),
    ):
        if given:
            return f"it does not take {name} yet"
    return None


def forward(inputs: AttentionInputs, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, Hv] and the log-sum-exp f32[B, N, T]."""
    inputs = _zero_padding(inputs)
    num_queries, value_dim = inputs.query.shape[1], inputs.value.shape[-1]
    query, key, value = (_pad(x) for x in (inputs.query, inputs.key, inputs.value))
    lengths = [x.astype(jnp.int32) for x in (inputs.q_lengths, inputs.kv_lengths) if x is not None]
    out, lse = forward_sm90.launch(_plan(inputs, spec, query, value), query, key, value, *lengths)
    return out[:, :num_queries, :, :value_dim], lse[:, :, :num_queries]


def backward(inputs: AttentionInputs, spec: AttentionSpec, *saved) -> AttentionGradients:
    """Gradients of query, key and value."""
    return reference.backward(inputs, spec, *saved)


def _plan(inputs: AttentionInputs, spec: AttentionSpec, query: jax.Array, value: jax.Array) -> ForwardPlan:
    return ForwardPlan(
        batch=query.shape[0],
        num_queries=inputs.query.shape[1],
        num_keys=inputs.key.shape[1],
        num_heads=query.shape[2],
        num_kv_heads=value.shape[2],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        dtype=query.dtype,
        scale=spec.scale,
        reach=spec.reach,
        bottom_right=spec.bottom_right,
        logits_soft_cap=spec.logits_soft_cap,
        has_q_lengths=inputs.q_lengths is not None,
        has_kv_lengths=inputs.kv_lengths is not None,
        config=spec.config or default_config(max(query.shape[3], value.shape[3])),
    )


def _pad(x: jax.Array) -> jax.Array:
    rows, head_dim = -x.shape[1] % ROW_MULTIPLE, -x.shape[3] % HEAD_MULTIPLE
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, head_dim))) if rows or head_dim else x


def _zero_padding(inputs: AttentionInputs) -> AttentionInputs:
    """Zeros values beyond the lengths: their weights are 0, but they may be NaN."""
    return inputs._replace(value=reference.zero_beyond(inputs.value, inputs.kv_lengths))
