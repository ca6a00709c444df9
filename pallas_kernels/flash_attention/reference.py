"""Attention in fp32, one chunk of queries at a time: the oracle of every kernel, and the path where there is
no kernel.

A chunk's logits are [B, N, chunk, S] with chunk x B x N x S bounded by a constant, so the memory beyond
inputs and outputs does not grow with T. When all queries fit in one chunk this is plain attention, without a
loop.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.block_tiles import visible_elements
from pallas_kernels.flash_attention.dropout import keep_mask
from pallas_kernels.flash_attention.spec import AttentionGradients, AttentionInputs, AttentionSpec

CHUNK_LOGITS = 1 << 24  # fp32 logits alive at once: 64 MiB, enough to keep every core busy
MIN_CHUNK = 16
HIDDEN = -1e30  # what a bias below this is added to is hidden, as by -inf


def forward(inputs: AttentionInputs, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """Computes softmax(mask(cap(scale Q K^T) + bias)) V and the log-sum-exp f32[B, N, T] of each row."""
    inputs = _zero_padding(inputs)

    sinks = None if inputs.sinks is None else _f32(inputs.sinks).reshape(inputs.key.shape[2], -1, 1)

    def attend_chunk(_, chunk):
        start, query, bias = chunk
        logits, _ = _logits(inputs, spec, query, bias, start)
        row_max = jnp.max(logits, axis=-1)
        if sinks is not None:
            row_max = jnp.maximum(row_max, sinks)
        weights = _exp_minus(logits, row_max)
        row_sum = jnp.sum(weights, axis=-1)
        if sinks is not None:
            row_sum += _exp_minus(sinks[..., None], row_max)[..., 0]
        if inputs.dropout_seed is not None:
            weights *= _dropout(inputs, spec, query, start)
        out = _mix(weights, _f32(inputs.value))
        norm = _from_groups(jnp.where(row_sum > 0, 1 / row_sum, 0.0))
        return None, (out * norm[..., None], _from_groups(row_max + jnp.log(row_sum)))

    _, (out, lse) = _scan_queries(attend_chunk, None, inputs, inputs.query)
    if inputs.q_lengths is not None:
        lse = jnp.where(_inside(lse, inputs.q_lengths)[..., None], lse, -jnp.inf)
    return out.astype(inputs.query.dtype), lse.swapaxes(1, 2)


def backward(
    inputs: AttentionInputs,
    spec: AttentionSpec,
    out: jax.Array,
    lse: jax.Array,
    out_cotangent: jax.Array,
    lse_cotangent: jax.Array,
) -> AttentionGradients:
    """Recomputes each chunk's weights from the log-sum-exp and returns the gradients (FlashAttention, section
    3.1).

    With P the weights, dP = dO V^T and D = rowsum(dO * O), dS = P * (dP - D + dlse); a soft cap multiplies dS
    by 1 - (cap(S) / c)^2.
    """
    inputs = _zero_padding(inputs)
    out_cotangent = zero_beyond(out_cotangent, inputs.q_lengths)
    key, value = _f32(inputs.key), _f32(inputs.value)
    bias_rows = inputs.bias is not None and inputs.bias.shape[2] > 1

    def chunk_gradients(carry, chunk):
        d_key, d_value, d_bias = carry
        start, query, bias, out, lse, d_out, d_lse = chunk
        d_out = _f32(d_out)
        logits, cap_slope = _logits(inputs, spec, query, bias, start)
        weights = _exp_minus(logits, _to_groups(lse, key.shape[2]))
        d_weights = _einsum("btkgh,bskh->bkgts", _split_heads(d_out, key.shape[2]), value)
        dropped = weights
        if inputs.dropout_seed is not None:
            keep = _dropout(inputs, spec, query, start)
            dropped, d_weights = weights * keep, d_weights * keep
        row_term = jnp.where(jnp.isneginf(lse), 0.0, jnp.sum(d_out * _f32(out), axis=-1) - d_lse)
        d_logits = weights * (d_weights - _to_groups(row_term, key.shape[2])[..., None])
        d_bias_chunk = None
        if bias is not None:
            d_bias_chunk = _sum_to(d_logits.reshape(d_logits.shape[0], -1, *d_logits.shape[3:]), bias.shape)
        if cap_slope is not None:
            d_logits *= cap_slope
        d_logits *= spec.scale
        d_query = _mix(d_logits, key)
        d_key += _einsum("bkgts,btkgh->bskh", d_logits, _split_heads(_f32(query), key.shape[2]))
        d_value += _einsum("bkgts,btkgh->bskh", dropped, _split_heads(d_out, key.shape[2]))
        if bias is not None and not bias_rows:
            d_bias, d_bias_chunk = d_bias + d_bias_chunk, None
        if d_bias_chunk is not None:
            d_bias_chunk = jnp.moveaxis(d_bias_chunk, 2, 1)  # the scan stacks chunks of rows on axis 1
        return (d_key, d_value, d_bias), (d_query, d_bias_chunk)

    d_bias = None if inputs.bias is None or bias_rows else jnp.zeros(inputs.bias.shape, jnp.float32)
    carry = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32), d_bias)
    rows = (inputs.query, out, lse.swapaxes(1, 2), out_cotangent, lse_cotangent.swapaxes(1, 2))
    (d_key, d_value, d_bias), (d_query, d_bias_rows) = _scan_queries(chunk_gradients, carry, inputs, *rows)
    if bias_rows:
        d_bias = jnp.moveaxis(d_bias_rows, 1, 2)
    return AttentionGradients(
        query=d_query.astype(inputs.query.dtype),
        key=d_key.astype(inputs.key.dtype),
        value=d_value.astype(inputs.value.dtype),
        bias=None if inputs.bias is None else d_bias.astype(inputs.bias.dtype),
        sinks=sink_gradient(inputs, lse, row_terms(out, lse, out_cotangent, lse_cotangent)),
    )


def row_terms(out, lse, out_cotangent, lse_cotangent):
    """delta f32[B, N, T] = rowsum(dO * O) - dlse, zero in rows without a log-sum-exp."""
    highest = lax.Precision.HIGHEST  # of float32
    products = jnp.einsum(
        "bthd,bthd->bht", out_cotangent, out, precision=highest, preferred_element_type=jnp.float32
    )
    return jnp.where(jnp.isneginf(lse), 0.0, products - lse_cotangent)


def sink_gradient(inputs: AttentionInputs, lse, delta):
    """A sink's weight is exp(sink - lse) in every row; it has no value, so that its dP is zero."""
    if inputs.sinks is None:
        return None
    weights = jnp.exp(_f32(inputs.sinks)[:, None] - jnp.where(jnp.isneginf(lse), jnp.inf, lse))
    return -jnp.sum(weights * delta, axis=(0, 2)).astype(inputs.sinks.dtype)


def _scan_queries(body, carry, inputs: AttentionInputs, *row_arrays):
    """Runs body over chunks of queries; row_arrays are [B, T, ...], as are the outputs; pads T to whole
    chunks.
    """
    batch, num_queries, num_heads, _ = inputs.query.shape
    num_keys = inputs.key.shape[1]
    chunk = max(MIN_CHUNK, CHUNK_LOGITS // (batch * num_heads * num_keys))
    bias = inputs.bias
    first, *rest = row_arrays
    if chunk >= num_queries:
        return body(carry, (0, first, bias, *rest))
    num_chunks = math.ceil(num_queries / chunk)

    def to_chunks(x, axis):
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, num_chunks * chunk - num_queries)
        x = jnp.pad(x, padding).reshape(*x.shape[:axis], num_chunks, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    def from_chunks(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], num_chunks * chunk, *x.shape[3:])[:, :num_queries]

    bias_has_rows = bias is not None and bias.shape[2] > 1
    xs = (jnp.arange(num_chunks) * chunk, to_chunks(first, 1), to_chunks(bias, 2) if bias_has_rows else None)
    xs += tuple(to_chunks(x, 1) for x in rest)

    def step(carry, xs):
        start, first, bias_chunk, *rest = xs
        return body(carry, (start, first, bias_chunk if bias_has_rows else bias, *rest))

    carry, outputs = lax.scan(step, carry, xs)
    return carry, jax.tree.map(from_chunks, outputs)


def _logits(inputs: AttentionInputs, spec: AttentionSpec, query, bias, start):
    """Masked logits [B, K, G, chunk, S] of a chunk of queries, and the soft cap's slope there (None without a
    cap).
    """
    num_kv_heads = inputs.key.shape[2]
    query = _split_heads(_f32(query) * spec.scale, num_kv_heads)
    logits = _einsum("btkgh,bskh->bkgts", query, _f32(inputs.key))
    slope = None
    if spec.logits_soft_cap is not None:
        capped = jnp.tanh(logits / spec.logits_soft_cap)
        logits, slope = spec.logits_soft_cap * capped, 1 - capped * capped
    if bias is not None:
        grouped = (num_kv_heads, -1) if bias.shape[1] > 1 else (1, 1)
        bias = _f32(bias).reshape(bias.shape[0], *grouped, *bias.shape[2:])
        logits = jnp.where(bias < HIDDEN, -jnp.inf, logits + bias)
    if inputs.alibi_slopes is not None:
        slopes = _f32(inputs.alibi_slopes).reshape(-1, num_kv_heads, logits.shape[2], 1, 1)
        position, kv_index = _positions(inputs, spec, start, query.shape[1])
        logits -= slopes * jnp.abs(position - kv_index)[:, None, None]
    visible = _visible(inputs, spec, start, query.shape[1])
    if visible is not None:
        logits = jnp.where(visible, logits, -jnp.inf)
    return logits, slope


def _visible(inputs: AttentionInputs, spec: AttentionSpec, start, chunk: int):
    """bool[B|1, K|1, G|1, chunk, S]: which keys each query sees; None when all do."""
    num_queries, num_keys = inputs.query.shape[1], inputs.key.shape[1]
    q_index = (start + jnp.arange(chunk))[None, :, None]
    position, kv_index = _positions(inputs, spec, start, chunk)
    left, right = spec.reach
    conditions = []
    if left is not None:
        conditions.append(kv_index >= position - left)
    if right is not None:
        conditions.append(kv_index <= position + right)
    if inputs.q_lengths is not None:
        conditions.append(q_index < inputs.q_lengths[:, None, None])
    if inputs.kv_lengths is not None:
        conditions.append(kv_index < inputs.kv_lengths[:, None, None])
    if inputs.q_segment_ids is not None and inputs.kv_segment_ids is not None:
        padding = (0, max(0, -(-num_queries // chunk) * chunk - num_queries))
        q_ids = lax.dynamic_slice_in_dim(
            jnp.pad(inputs.q_segment_ids, ((0, 0), padding)), start, chunk, axis=1
        )
        conditions.append(q_ids[:, :, None] == inputs.kv_segment_ids[:, None, :])
    conditions = [condition[:, None, None] for condition in conditions]
    if inputs.block_mask is not None:
        elements = visible_elements(inputs.block_mask, start + jnp.arange(chunk), num_keys)
        grouped = (inputs.key.shape[2], -1) if elements.shape[1] > 1 else (1, 1)
        conditions.append(elements.reshape(elements.shape[0], *grouped, *elements.shape[2:]))
    if not conditions:
        return None
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible


def _positions(inputs: AttentionInputs, spec: AttentionSpec, start, chunk: int):
    """Where each query of a chunk stands, i32[B|1, chunk, 1], and the index of each key, i32[1, 1, S]."""
    num_queries, num_keys = inputs.query.shape[1], inputs.key.shape[1]
    position = (start + jnp.arange(chunk))[None, :, None]
    if spec.bottom_right:
        position += _column(inputs.kv_lengths, num_keys) - _column(inputs.q_lengths, num_queries)
    return position, jnp.arange(num_keys)[None, None, :]


def _column(lengths, default: int):
    return default if lengths is None else lengths[:, None, None]


def _exp_minus(logits, row):
    """exp(logits - row), zero in rows that see nothing (row = -inf)."""
    return jnp.exp(logits - jnp.where(jnp.isneginf(row), 0.0, row)[..., None])


def _zero_padding(inputs: AttentionInputs) -> AttentionInputs:
    """Zeros what lies beyond the lengths: it may be NaN, and 0 x NaN would leak into the sums."""
    return inputs._replace(
        query=zero_beyond(inputs.query, inputs.q_lengths),
        key=zero_beyond(inputs.key, inputs.kv_lengths),
        value=zero_beyond(inputs.value, inputs.kv_lengths),
    )


def zero_beyond(x, lengths):
    """Zeros rows of x [B, T, N, H] from lengths [B] on."""
    if lengths is None:
        return x
    return jnp.where(_inside(x, lengths)[..., None, None], x, 0)


def _inside(x, lengths):
    """bool[B, T] of x [B, T, ...]: which rows lie within lengths [B]."""
    return jnp.arange(x.shape[1]) < lengths[:, None]


def _dropout(inputs: AttentionInputs, spec: AttentionSpec, query, start):
    """0 or 1 / (1 - rate) for each weight [B, K, G, chunk, S]."""
    batch, chunk, num_heads, _ = query.shape
    num_keys, num_kv_heads = inputs.key.shape[1:3]
    assert inputs.dropout_seed is not None
    keep = keep_mask(
        inputs.dropout_seed,
        jnp.arange(batch)[:, None, None, None],
        jnp.arange(num_heads)[:, None, None],
        start + jnp.arange(chunk)[:, None],
        jnp.arange(num_keys),
        rate=spec.dropout_rate,
    )
    scaled = jnp.where(keep, 1 / (1 - spec.dropout_rate), 0.0)
    return scaled.reshape(batch, num_kv_heads, -1, chunk, num_keys)


def _mix(weights, value):
    """Sum over keys: [B, K, G, t, S] x [B, S, K, H] -> [B, t, N, H]."""
    mixed = _einsum("bkgts,bskh->btkgh", weights, value)
    return mixed.reshape(*mixed.shape[:2], -1, mixed.shape[-1])


def _einsum(subscripts, x, y):
    return jnp.einsum(subscripts, x, y, precision=lax.Precision.HIGHEST)


def _f32(x):
    return x.astype(jnp.float32)


def _split_heads(x, num_kv_heads: int):
    """[B, t, N, H] -> [B, t, K, G, H]."""
    return x.reshape(*x.shape[:2], num_kv_heads, -1, x.shape[-1])


def _to_groups(x, num_kv_heads: int):
    """[B, t, N] -> [B, K, G, t]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], num_kv_heads, -1), 1, -1)


def _from_groups(x):
    """[B, K, G, t] -> [B, t, N]."""
    return jnp.moveaxis(x, -1, 1).reshape(x.shape[0], x.shape[-1], -1)


def _sum_to(x, shape):
    """Sums over the axes along which an array of this shape was broadcast."""
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1 and x.shape[axis] != 1)
    return jnp.sum(x, axis=axes, keepdims=True)
