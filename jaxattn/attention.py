"""Attention over whole sequences: the only caller of the flash kernels, and the choice of who computes it.

`dot_product_attention` takes everything `jax.nn.dot_product_attention` takes and more. Where there is a
Hopper GPU it runs the Pallas kernel, on other NVIDIA GPUs cuDNN or XLA, on a CPU the chunked reference.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import checks, flash_attention
from pallas_kernels.device import is_hopper

__all__ = ["IMPLEMENTATIONS", "FlashAttention", "dot_product_attention"]

logger = logging.getLogger("jaxattn")

CUDNN_MAX_HEAD_DIM = 128
ALIGNMENTS = ("top_left", "bottom_right")


class _Call(NamedTuple):
    """One attention call in canonical form: rank 4, arrays first, static arguments after."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H]
    value: jax.Array  # [B, S, K, Hv]
    bias: jax.Array | None  # [B|1, N|1, T|1, S|1]
    mask: jax.Array | None  # bool [B|1, N|1, T|1, S|1]
    q_segment_ids: jax.Array | None  # i32[B, T]
    kv_segment_ids: jax.Array | None  # i32[B, S]
    q_lengths: jax.Array | None  # i32[B]
    kv_lengths: jax.Array | None  # i32[B]
    dropout_key: jax.Array | None
    is_causal: bool
    causal_alignment: str
    window: tuple[int | None, int | None]
    scale: float
    logits_soft_cap: float | None
    dropout_rate: float
    return_residual: bool
    deterministic: bool


def dot_product_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K Hv"],
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    query_segment_ids: Int[Array, "*B T"] | None = None,
    key_value_segment_ids: Int[Array, "*B S"] | None = None,
    causal_alignment: str = "top_left",
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    deterministic: bool = False,
) -> Any:
    """Scaled dot-product attention; the arguments of `jax.nn.dot_product_attention`, and ours after them.

        out = dropout(softmax(mask(cap(scale Q K^T) + bias))) V,   cap(x) = c tanh(x / c)

    Rows that see no key give zeros and a log-sum-exp of -inf (jax.nn gives the mean of all values there).

    Arguments:
        query, key, value: BTNH, BSKH, BSKHv, or TNH, SKH, SKHv; float32, bfloat16 or float16, one dtype. N is
            a multiple of K: query head n reads KV head n // (N/K).
        bias: added to the logits, broadcastable to BNTS. mask: boolean, True where a key takes part.
        scale: 1 / sqrt(H) by default.
        is_causal: query i sees keys 0..i ("top_left"), or keys 0..i + S - T ("bottom_right", the lengths in
            the place of S and T where they are given).
        query_seq_lengths, key_value_seq_lengths: tokens in use of each batch row.
        local_window_size: keys visible left and right of a query; an int means both sides, None no limit.
        implementation: a name of IMPLEMENTATIONS ("sm90", "cudnn", "xla", "reference"); by default the first
            that the device has and that can do all that is asked.
        return_residual: also return the log-sum-exp of each row's logits, f32 BTN or TN.
        query_segment_ids, key_value_segment_ids: packed documents; a query sees the keys of its own id only.
        dropout_rate, dropout_key: drops attention weights; a rate above 0 needs a key.
        deterministic: the same inputs give the same gradient bits (the forward always does).

    Raises ValueError for wrong arguments and NotImplementedError where the implementation named cannot do
    what is asked. From: Dao et al., FlashAttention (2022), FlashAttention-2 (2023).
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    is_batched = query.ndim == 4
    checks.check_rank("query", query, "B T N H" if is_batched else "T N H")
    call = _Call(
        *(_batched(x, is_batched) for x in (query, key, value)),
        bias=_rank_4("bias", bias),
        mask=_rank_4("mask", mask),
        q_segment_ids=_batched(query_segment_ids, is_batched),
        kv_segment_ids=_batched(key_value_segment_ids, is_batched),
        q_lengths=_lengths(query_seq_lengths),
        kv_lengths=_lengths(key_value_seq_lengths),
        dropout_key=dropout_key,
        is_causal=bool(is_causal),
        causal_alignment=causal_alignment,
        window=checks.normalize_window(local_window_size),
        scale=float(1 / math.sqrt(query.shape[-1]) if scale is None else scale),
        logits_soft_cap=logits_soft_cap,
        dropout_rate=float(dropout_rate),
        return_residual=return_residual,
        deterministic=deterministic,
    )
    _check(call)
    out, residual = _choose(call, implementation)(call)
    out = out if is_batched else out[0]
    if not return_residual:
        return out
    assert residual is not None  # an implementation that cannot return it has refused
    return out, residual if is_batched else residual[0]


def _batched(x: Any, is_batched: bool) -> Any:
    return None if x is None else jnp.asarray(x) if is_batched else jnp.asarray(x)[None]


def _rank_4(name: str, x: Any) -> jax.Array | None:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.ndim > 4:
        raise ValueError(f"{name}: shape {x.shape} must be broadcastable to [B, N, T, S]")
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _lengths(x: Any) -> jax.Array | None:
    return None if x is None else jnp.atleast_1d(jnp.asarray(x))


def _check(call: _Call) -> None:
    """What `flash_attention` does not see for itself in every implementation."""
    checks.check_choice("causal_alignment", call.causal_alignment, ALIGNMENTS)
    checks.check_soft_cap(call.logits_soft_cap)
    checks.check_rank("key", call.key, "B S K H")
    checks.check_rank("value", call.value, "B S K Hv")
    batch, num_queries, num_heads, head_dim = call.query.shape
    _, num_keys, num_kv_heads, _ = call.key.shape
    checks.check_shape("key", call.key, (batch, num_keys, num_kv_heads, head_dim), "B S K H")
    checks.check_head_groups(num_heads, num_kv_heads)
    if call.mask is not None:
        sizes = [(1, size) for size in (batch, num_heads, num_queries, num_keys)]
        checks.check_shape("mask", call.mask, sizes, "B|1 N|1 T|1 S|1")
        checks.check_dtype("mask", call.mask, (jnp.bool_,))
    for name, lengths in (("query_seq_lengths", call.q_lengths), ("key_value_seq_lengths", call.kv_lengths)):
        if lengths is not None:
            checks.check_shape(name, lengths, (batch,), "B")
            checks.check_integers(name, lengths)
    if (call.q_segment_ids is None) != (call.kv_segment_ids is None):
        raise ValueError("query_segment_ids and key_value_segment_ids: give both or neither, got one of them")
    if call.dropout_rate > 0 and call.dropout_key is None:
        raise ValueError(f"dropout_key: must be given with dropout_rate={call.dropout_rate}, got None")


# --- the implementations: each returns (out, log-sum-exp or None) or raises NotImplementedError -------------


def _flash(call: _Call, *, variant: str) -> tuple[jax.Array, jax.Array | None]:
    result: Any = flash_attention(
        call.query,
        call.key,
        call.value,
        bias=_bias_with_mask(call),
        q_segment_ids=call.q_segment_ids,
        kv_segment_ids=call.kv_segment_ids,
        q_lengths=call.q_lengths,
        kv_lengths=call.kv_lengths,
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


def _bias_with_mask(call: _Call) -> jax.Array | None:
    """The mask as a bias of 0 and -inf. Its gradient is never asked for, that of the bias may be."""
    if call.mask is None:
        return call.bias
    return jnp.where(call.mask, 0.0 if call.bias is None else call.bias, -jnp.inf).astype(jnp.float32)


def _cudnn(call: _Call) -> tuple[jax.Array, None]:
    if reason := _cudnn_cannot(call):
        raise NotImplementedError(f"implementation='cudnn' cannot serve this call: {reason}")
    left, right = call.window
    out = jax.nn.dot_product_attention(
        call.query,
        call.key,
        call.value,
        call.bias,
        scale=call.scale,
        is_causal=call.is_causal,
        query_seq_lengths=call.q_lengths,
        key_value_seq_lengths=call.kv_lengths,
        local_window_size=None if left is None else (left, right or 0),
        implementation="cudnn",
    )
    if call.kv_lengths is not None:  # a row of no keys is zeros here, the mean of garbage there
        out = jnp.where((call.kv_lengths > 0)[:, None, None, None], out, 0)
    return out, None


def _cudnn_cannot(call: _Call) -> str | None:
    """Why cuDNN, as jax.nn reaches it, would refuse this call or compute something else; None if it is
    right."""
    _, num_queries, _, head_dim = call.query.shape
    has_lengths = call.q_lengths is not None or call.kv_lengths is not None
    is_shifted = call.causal_alignment == "bottom_right" and (has_lengths or num_queries != call.key.shape[1])
    uses_position = call.is_causal or call.window != (None, None)
    reasons = {
        f"dtype {call.query.dtype} (only bfloat16 and float16)": call.query.dtype
        not in (jnp.bfloat16, jnp.float16),
        f"head dim {head_dim} (multiples of 8 up to {CUDNN_MAX_HEAD_DIM})": head_dim % 8 != 0
        or head_dim > CUDNN_MAX_HEAD_DIM,
        "a head dim of the values of its own": call.value.shape[-1] != head_dim,
        "a boolean mask with zeros for rows that see nothing": call.mask is not None,
        "segment ids": call.q_segment_ids is not None,
        "logits_soft_cap": call.logits_soft_cap is not None,
        "dropout": call.dropout_rate > 0,
        "a float32 log-sum-exp": call.return_residual,
        "causal_alignment='bottom_right' with T != S or lengths": is_shifted and uses_position,
        "a window with lengths, without is_causal, or open to the left": call.window != (None, None)
        and (has_lengths or not call.is_causal or call.window[0] is None),
        "deterministic gradients": call.deterministic,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _xla(call: _Call) -> tuple[jax.Array, None]:
    if reason := _xla_cannot(call):
        raise NotImplementedError(f"implementation='xla' cannot serve this call: {reason}")
    visible = _visible(call)
    value = call.value
    if call.kv_lengths is not None:  # 0 x NaN is NaN: what lies beyond the length must not be multiplied
        inside = jnp.arange(value.shape[1]) < call.kv_lengths[:, None]
        value = jnp.where(inside[..., None, None], value, 0)
    out = jax.nn.dot_product_attention(
        call.query, call.key, value, call.bias, visible, scale=call.scale, implementation="xla"
    )
    if visible is not None:
        sees_any = jnp.swapaxes(visible.any(axis=-1), 1, 2)  # [B|1, T|1, N|1]
        out = jnp.where(sees_any[..., None], out, 0)
    return out, None


def _xla_cannot(call: _Call) -> str | None:
    """Why plain XLA attention of jax.nn cannot serve this call; None if it can."""
    reasons = {
        "a head dim of the values of its own": call.value.shape[-1] != call.query.shape[-1],
        "logits_soft_cap": call.logits_soft_cap is not None,
        "dropout": call.dropout_rate > 0,
        "a float32 log-sum-exp": call.return_residual,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _visible(call: _Call) -> jax.Array | None:
    """bool [B|1, N|1, T, S]: which keys each query sees; None when all do."""
    num_queries, num_keys = call.query.shape[1], call.key.shape[1]
    q_index, kv_index = jnp.arange(num_queries)[None, :, None], jnp.arange(num_keys)[None, None, :]
    q_lengths = num_queries if call.q_lengths is None else call.q_lengths[:, None, None]
    kv_lengths = num_keys if call.kv_lengths is None else call.kv_lengths[:, None, None]
    position = q_index + (kv_lengths - q_lengths if call.causal_alignment == "bottom_right" else 0)
    left, right = call.window
    conditions = [
        None if call.mask is None else call.mask,
        kv_index <= position if call.is_causal else None,
        None if left is None else kv_index >= position - left,
        None if right is None else kv_index <= position + right,
        None if call.q_lengths is None else q_index < q_lengths,
        None if call.kv_lengths is None else kv_index < kv_lengths,
    ]
    if call.q_segment_ids is not None and call.kv_segment_ids is not None:
        conditions.append(call.q_segment_ids[:, :, None] == call.kv_segment_ids[:, None, :])
    given = [c if c.ndim == 4 else c[:, None] for c in conditions if c is not None]
    return functools.reduce(jnp.logical_and, given) if given else None


IMPLEMENTATIONS: dict[str, Callable[[_Call], tuple[jax.Array, jax.Array | None]]] = {
    "sm90": functools.partial(_flash, variant="sm90"),
    "cudnn": _cudnn,
    "xla": _xla,
    "reference": functools.partial(_flash, variant="reference"),
}


def _choose(call: _Call, implementation: str | None) -> Callable[[_Call], tuple[jax.Array, jax.Array | None]]:
    if implementation is not None:
        checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
        return IMPLEMENTATIONS[implementation]
    return functools.partial(_first_that_can, names=_candidates())


def _first_that_can(call: _Call, *, names: tuple[str, ...]) -> tuple[jax.Array, jax.Array | None]:
    refusals = []
    for name in names:
        try:
            result = IMPLEMENTATIONS[name](call)
        except NotImplementedError as refusal:
            refusals.append(str(refusal))
            continue
        _announce(name, _device_name(), "; ".join(refusals))
        return result
    raise NotImplementedError(
        f"no implementation on {_device_name()} serves this call: {'; '.join(refusals)}"
    )


@functools.cache
def _candidates() -> tuple[str, ...]:
    """What the default device can run, best first. Asking touches the backend."""
    if is_hopper():
        return ("sm90", "cudnn", "xla", "reference")
    device = jax.devices()[0]
    if device.platform == "gpu" and hasattr(device, "compute_capability"):
        return ("cudnn", "xla", "reference")
    return ("reference",) if device.platform == "cpu" else ("xla", "reference")


def _device_name() -> str:
    return jax.devices()[0].device_kind


@functools.cache  # one sentence for each answer, not one for each layer
def _announce(name: str, device: str, refusals: str) -> None:
    level = logging.WARNING if refusals else logging.INFO
    because = f"because {refusals}" if refusals else "the first choice there"
    logger.log(level, "attention on %s is computed by %r: %s", device, name, because)


# --- for models ---------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashAttention:
    """The attention object of a full-sequence forward: models call it once a layer.

    `attention(layer, q[B, T, N, H], k[B, T, K, H], v, dropout_key=None)` -> (y[B, T, N, H], attention).
    Attention weights are dropped at `dropout_rate` in forwards that are given a dropout key.
    """

    segment_ids: Int[Array, "B T"] | None = None  # packed documents: tokens see their own document only
    lengths: Int[Array, "B"] | None = None  # tokens in use of each batch row
    is_causal: bool = dataclasses.field(default=True, metadata={"static": True})
    dropout_rate: float = dataclasses.field(default=0.0, metadata={"static": True})
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(
        self,
        layer: jax.Array | int,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T N H"], "FlashAttention"]:
        out = dot_product_attention(
            query,
            key,
            value,
            is_causal=self.is_causal,
            query_seq_lengths=self.lengths,
            key_value_seq_lengths=self.lengths,
            query_segment_ids=self.segment_ids,
            key_value_segment_ids=self.segment_ids,
            dropout_rate=self.dropout_rate if dropout_key is not None else 0.0,
            dropout_key=dropout_key,
            implementation=self.implementation,
        )
        return out, self
