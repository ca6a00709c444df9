"""Who can compute an attention call: our kernels and their reference, cuDNN and XLA as jax.nn reaches them.

An implementation returns (out, log-sum-exp or None), or raises Unsupported for what it cannot do or
would do otherwise than we define it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.block_mask import BlockMask
from pallas_kernels import flash_attention
from pallas_kernels.flash_attention.arguments import clip_lengths
from pallas_kernels.flash_attention.block_tiles import visible_elements
from pallas_kernels.flash_attention.reference import HIDDEN, zero_beyond
from pallas_kernels.variants import Unsupported

__all__ = ["IMPLEMENTATIONS", "AttentionCall"]

CUDNN_MAX_HEAD_DIM = 128


class AttentionCall(NamedTuple):
    """One attention call in canonical form: rank 4, arrays first, static arguments after."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H]
    value: jax.Array  # [B, S, K, Hv]
    bias: jax.Array | None  # [B|1, N|1, T|1, S|1]
    alibi_slopes: jax.Array | None  # [B|1, N]
    sinks: jax.Array | None  # [N]
    mask: jax.Array | None  # bool [B|1, N|1, T|1, S|1]
    q_segment_ids: jax.Array | None  # i32[B, T]
    kv_segment_ids: jax.Array | None  # i32[B, S]
    q_lengths: jax.Array | None  # i32[B]
    kv_lengths: jax.Array | None  # i32[B]
    dropout_key: jax.Array | None
    block_mask: BlockMask | None
    is_causal: bool
    causal_alignment: str
    window: tuple[int | None, int | None]
    scale: float
    logits_soft_cap: float | None
    dropout_rate: float
    return_residual: bool
    deterministic: bool


def _flash(call: AttentionCall, *, variant: str) -> tuple[jax.Array, jax.Array | None]:
    result: Any = flash_attention(
        call.query,
        call.key,
        call.value,
        bias=_bias_with_mask(call),
        alibi_slopes=call.alibi_slopes,
        sinks=call.sinks,
        q_segment_ids=call.q_segment_ids,
        kv_segment_ids=call.kv_segment_ids,
        q_lengths=call.q_lengths,
        kv_lengths=call.kv_lengths,
        block_mask=None if call.block_mask is None else call.block_mask.tiles(),
        is_causal=call.is_causal,
        causal_alignment=call.causal_alignment,
        local_window_size=call.window,
        scale=call.scale,
        logits_soft_cap=call.logits_soft_cap,
        dropout_rate=call.dropout_rate,
        dropout_key=call.dropout_key if call.dropout_rate > 0 else None,
        return_lse=call.return_residual,
        deterministic=call.deterministic,
        implementation=variant,
    )
    return result if call.return_residual else (result, None)


def _bias_with_mask(call: AttentionCall) -> jax.Array | None:
    """The mask as a bias of 0 and -inf. Its gradient is never asked for, that of the bias may be."""
    if call.mask is None:
        return call.bias
    return jnp.where(call.mask, 0.0 if call.bias is None else call.bias, -jnp.inf).astype(jnp.float32)


def _cudnn(call: AttentionCall) -> tuple[jax.Array, None]:
    if reason := _cudnn_cannot(call):
        raise Unsupported(f"implementation='cudnn' cannot serve this call: {reason}")
    call = _without_padding(call)
    num_queries, num_keys = call.query.shape[1], call.key.shape[1]
    bias = call.bias  # of every row and column: it broadcasts over batch rows and heads alone
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], num_queries, num_keys))
    attend = _cudnn_of_odd_lengths if num_queries % 2 or num_keys % 2 else _of_jax_nn
    left, right = call.window
    options = (call.scale, call.is_causal, None if left is None else (left, right or 0))
    out = attend("cudnn", options, call.query, call.key, call.value, bias, call.q_lengths, call.kv_lengths)
    if call.kv_lengths is not None:  # a row of no keys is zeros here, the mean of garbage there
        out = jnp.where((call.kv_lengths > 0)[:, None, None, None], out, 0)
    return out, None


def _of_jax_nn(implementation, options, query, key, value, bias, q_lengths, kv_lengths):
    scale, is_causal, window = options
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=q_lengths,
        key_value_seq_lengths=kv_lengths,
        local_window_size=window,
        implementation=implementation,
    )


# JAX has no gradients of odd lengths by cuDNN: XLA computes those.
_cudnn_of_odd_lengths = jax.custom_vjp(_of_jax_nn, nondiff_argnums=(0, 1))


def _xla_forward(_, options, *arrays):
    return jax.vjp(functools.partial(_of_jax_nn, "xla", options), *arrays)


_cudnn_of_odd_lengths.defvjp(_xla_forward, lambda _, options, vjp, cotangent: vjp(cotangent))


def _cudnn_cannot(call: AttentionCall) -> str | None:
    """Why cuDNN, as jax.nn reaches it, would refuse this call or compute something else; None if it is
    right."""
    _, num_queries, _, head_dim = call.query.shape
    num_keys = call.key.shape[1]
    has_lengths = call.q_lengths is not None or call.kv_lengths is not None
    is_shifted = call.causal_alignment == "bottom_right" and (has_lengths or num_queries != num_keys)
    uses_position = call.is_causal or call.window != (None, None)
    reasons = {
        f"dtype {call.query.dtype} (only bfloat16 and float16)": call.query.dtype
        not in (jnp.bfloat16, jnp.float16),
        f"head dim {head_dim} (multiples of 8 up to {CUDNN_MAX_HEAD_DIM})": head_dim % 8 != 0
        or head_dim > CUDNN_MAX_HEAD_DIM,
        "a head dim of the values of its own": call.value.shape[-1] != head_dim,
        "a boolean mask with zeros for rows that see nothing": call.mask is not None,
        "segment ids": call.q_segment_ids is not None,
        "a block mask": call.block_mask is not None,
        "logits_soft_cap": call.logits_soft_cap is not None,
        "alibi_slopes": call.alibi_slopes is not None,
        "sinks": call.sinks is not None,
        "dropout": call.dropout_rate > 0,
        "a float32 log-sum-exp": call.return_residual,
        "causal_alignment='bottom_right' with T != S or lengths": is_shifted and uses_position,
        "a window with lengths, without is_causal, or open to the left": call.window != (None, None)
        and (has_lengths or not call.is_causal or call.window[0] is None),
        "deterministic gradients": call.deterministic,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _xla(call: AttentionCall) -> tuple[jax.Array, None]:
    if reason := _xla_cannot(call):
        raise Unsupported(f"implementation='xla' cannot serve this call: {reason}")
    call = _without_padding(call)
    visible, bias = _visible(call), call.bias
    if bias is not None:  # -inf in all of a row would be NaN
        bias = jnp.where(_hides(bias), 0, bias)
    out = jax.nn.dot_product_attention(
        call.query, call.key, call.value, bias, visible, scale=call.scale, implementation="xla"
    )
    if visible is not None:
        sees_any = jnp.swapaxes(visible.any(axis=-1), 1, 2)  # [B|1, T|1, N|1]
        out = jnp.where(sees_any[..., None], out, 0)
    return out, None


def _xla_cannot(call: AttentionCall) -> str | None:
    """Why plain XLA attention of jax.nn cannot serve this call; None if it can."""
    reasons = {
        "a head dim of the values of its own": call.value.shape[-1] != call.query.shape[-1],
        "logits_soft_cap": call.logits_soft_cap is not None,
        "alibi_slopes": call.alibi_slopes is not None,
        "sinks": call.sinks is not None,
        "dropout": call.dropout_rate > 0,
        "a float32 log-sum-exp": call.return_residual,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _without_padding(call: AttentionCall) -> AttentionCall:
    """Zeros what lies beyond the lengths: weights there are 0, but 0 x NaN is NaN."""
    q_lengths = clip_lengths(call.q_lengths, call.query.shape[1])
    kv_lengths = clip_lengths(call.kv_lengths, call.key.shape[1])
    return call._replace(
        query=zero_beyond(call.query, q_lengths),
        key=zero_beyond(call.key, kv_lengths),
        value=zero_beyond(call.value, kv_lengths),
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
    )


def _visible(call: AttentionCall) -> jax.Array | None:
    """bool [B|1, N|1, T, S]: which keys each query sees; None when all do."""
    num_queries, num_keys = call.query.shape[1], call.key.shape[1]
    q_index, kv_index = jnp.arange(num_queries)[None, :, None], jnp.arange(num_keys)[None, None, :]
    q_lengths = num_queries if call.q_lengths is None else call.q_lengths[:, None, None]
    kv_lengths = num_keys if call.kv_lengths is None else call.kv_lengths[:, None, None]
    position = q_index + (kv_lengths - q_lengths if call.causal_alignment == "bottom_right" else 0)
    left, right = call.window
    conditions = [
        call.mask,
        None if call.bias is None else ~_hides(call.bias),
        kv_index <= position if call.is_causal else None,
        None if left is None else kv_index >= position - left,
        None if right is None else kv_index <= position + right,
        None if call.q_lengths is None else q_index < q_lengths,
        None if call.kv_lengths is None else kv_index < kv_lengths,
    ]
    if call.block_mask is not None:
        conditions.append(visible_elements(call.block_mask.tiles(), jnp.arange(num_queries), num_keys))
    if call.q_segment_ids is not None and call.kv_segment_ids is not None:
        conditions.append(call.q_segment_ids[:, :, None] == call.kv_segment_ids[:, None, :])
    given = [c if c.ndim == 4 else c[:, None] for c in conditions if c is not None]
    return functools.reduce(jnp.logical_and, given) if given else None


def _hides(bias: jax.Array) -> jax.Array:
    return bias.astype(jnp.float32) < HIDDEN


IMPLEMENTATIONS: dict[str, Callable[[AttentionCall], tuple[jax.Array, jax.Array | None]]] = {
    "sm90": functools.partial(_flash, variant="sm90"),
    "cudnn": _cudnn,
    "xla": _xla,
    "reference": functools.partial(_flash, variant="reference"),
}
