"""The Hopper variant of flash_attention: what it can serve, and the shapes and padding its kernels want."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import backward_sm90, forward_sm90, reference
from pallas_kernels.flash_attention.config import default_config
from pallas_kernels.flash_attention.forward_sm90 import ForwardPlan
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.spec import AttentionGradients, AttentionInputs, AttentionSpec
from pallas_kernels.mosaic import LOG2_E

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
    plan = ForwardPlan(**_plan_fields(inputs, spec))
    num_queries, value_dim = inputs.query.shape[1], inputs.value.shape[-1]
    # Weights beyond the lengths are 0, but 0 x NaN is NaN.
    value = reference.zero_beyond(inputs.value, inputs.kv_lengths)
    arrays = [_pad(x) for x in (inputs.query, inputs.key, value)]
    out, lse = forward_sm90.launch(plan, *arrays, *_lengths(inputs))
    return out[:, :num_queries, :, :value_dim], lse[:, :, :num_queries]


def backward(
    inputs: AttentionInputs,
    spec: AttentionSpec,
    out: jax.Array,
    lse: jax.Array,
    out_grad: jax.Array,
    lse_grad: jax.Array,
) -> AttentionGradients:
    """Gradients of query, key and value."""
    plan = AttentionPlan(**_plan_fields(inputs, spec))
    out_grad = reference.zero_beyond(out_grad, inputs.q_lengths)
    query = reference.zero_beyond(inputs.query, inputs.q_lengths)
    key, value = (reference.zero_beyond(x, inputs.kv_lengths) for x in (inputs.key, inputs.value))
    products = jnp.einsum("bthd,bthd->bht", out_grad, out, preferred_element_type=jnp.float32)
    sees_nothing = jnp.isneginf(lse)
    delta = jnp.where(sees_nothing, 0.0, products - lse_grad)
    lse2 = jnp.where(sees_nothing, jnp.inf, lse * LOG2_E)  # exp2(logits - inf) = 0
    arrays = [_pad(x) for x in (query, key, value, out_grad)]
    tile = backward_sm90.statistics_multiple(plan)
    statistics = [_pad_rows(lse2, 2, tile, jnp.inf), _pad_rows(delta, 2, tile)]
    gradients = backward_sm90.launch(plan, *arrays, *statistics, *_lengths(inputs))
    return AttentionGradients(
        *(g[:, : x.shape[1], :, : x.shape[3]] for g, x in zip(gradients, inputs[:3], strict=True))
    )


def _lengths(inputs: AttentionInputs) -> list[jax.Array]:
    return [x.astype(jnp.int32) for x in (inputs.q_lengths, inputs.kv_lengths) if x is not None]


def _plan_fields(inputs: AttentionInputs, spec: AttentionSpec) -> dict[str, Any]:
    batch, num_queries, num_heads, head_dim = inputs.query.shape
    head_dim, value_dim = (dim + -dim % HEAD_MULTIPLE for dim in (head_dim, inputs.value.shape[3]))
    crowded = spec.reach[0] is not None or spec.logits_soft_cap is not None
    return {
        "batch": batch,
        "num_queries": num_queries,
        "num_keys": inputs.key.shape[1],
        "num_heads": num_heads,
        "num_kv_heads": inputs.key.shape[2],
        "head_dim": head_dim,
        "value_dim": value_dim,
        "dtype": inputs.query.dtype,
        "scale": spec.scale,
        "reach": spec.reach,
        "bottom_right": spec.bottom_right,
        "logits_soft_cap": spec.logits_soft_cap,
        "has_q_lengths": inputs.q_lengths is not None,
        "has_kv_lengths": inputs.kv_lengths is not None,
        "config": spec.config or default_config(max(head_dim, value_dim), crowded),
    }


def _pad(x: jax.Array) -> jax.Array:
    """[B, T, N, H] with T and H as the kernels want them."""
    x, head_dim = _pad_rows(x, 1, ROW_MULTIPLE), -x.shape[3] % HEAD_MULTIPLE
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, head_dim))) if head_dim else x


def _pad_rows(x: jax.Array, axis: int, multiple: int, value: float = 0.0) -> jax.Array:
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding, constant_values=value) if padding[axis][1] else x
