"""fp32 reference of paged attention: the oracle, and the path where there is no kernel.

Keys are taken CHUNK tokens at a time with an online softmax, so that a wide block table costs nothing: the
loop ends at the longest row, and pages that no row's length covers are never read.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.kv_pages.pool import NULL_PAGE
from pallas_kernels.paged_attention.cascade_rows import group_rows, shared_rows
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec

CHUNK = 128  # tokens gathered at once
QUERY_BLOCK = 32  # ragged queries of one row that share a gather


def forward(inputs: PagedInputs, spec: PagedSpec) -> tuple[jax.Array, jax.Array]:
    """Attends every query token to its row's pages; returns out [tokens, N, H] and lse f32[tokens, N]."""
    inputs = inputs._replace(kv_lengths=jnp.minimum(inputs.kv_lengths, _capacity(inputs)))
    return (_decode if inputs.query_start is None else _ragged)(inputs, spec)


def cascade(
    inputs: PagedInputs, prefix_lengths: jax.Array, group_of_row: jax.Array, spec: PagedSpec
) -> tuple[jax.Array, jax.Array]:
    """Attends rows to their own pages and to those that groups of them share; returns out [R, N, H] and lse
    f32[R, N]. Sinks join the rows' own half.
    """
    grouped = group_rows(inputs, prefix_lengths, group_of_row)
    shared = shared_rows(inputs, prefix_lengths, grouped)
    out, lse = forward(shared, dataclasses.replace(spec, is_causal=False))
    column = jnp.arange(inputs.block_tables.shape[1]) + grouped.skipped[:, None]
    tables = jnp.take_along_axis(inputs.block_tables, column, axis=1, mode="clip")
    own = inputs._replace(block_tables=tables, kv_lengths=grouped.lengths)
    return merge(out[grouped.place], lse[grouped.place], *forward(own, spec))


def merge(
    out: Float[Array, "R N H"],
    lse: Float[Array, "R N"],
    other: Float[Array, "R N H"],
    other_lse: Float[Array, "R N"],
) -> tuple[Float[Array, "R N H"], Float[Array, "R N"]]:
    """Attention over the keys of two parts, from what it is over each: weights exp(lse_i - lse)."""
    total = jnp.logaddexp(lse, other_lse)
    shift = jnp.where(jnp.isneginf(total), 0, total)  # no key in either part
    weight, other_weight = (jnp.exp(part - shift)[..., None] for part in (lse, other_lse))
    merged = out.astype(jnp.float32) * weight + other.astype(jnp.float32) * other_weight
    return merged.astype(out.dtype), total


def _decode(inputs: PagedInputs, spec: PagedSpec) -> tuple[jax.Array, jax.Array]:
    """All rows side by side, one query each at the end of its row."""
    positions = inputs.kv_lengths - 1
    first_key = 0
    if spec.window_left is not None:  # of a row that has keys: an idle one would begin at 0 for all
        first_keys = jnp.maximum(positions - spec.window_left, 0)
        first_key = jnp.min(first_keys, where=inputs.kv_lengths > 0, initial=_capacity(inputs))
    length = _chunk_length(inputs)
    bounds = first_key // length, _ceil_div(jnp.max(inputs.kv_lengths), length)
    row = functools.partial(_attend_row, inputs, spec, bounds)
    tables = inputs.block_tables
    places = (inputs.k_pages, inputs.v_pages) if tables is None else tables
    out, lse = jax.vmap(row)(inputs.query[:, None], positions[:, None], places, inputs.kv_lengths)
    return out[:, 0], lse[:, 0]


def _ragged(inputs: PagedInputs, spec: PagedSpec) -> tuple[jax.Array, jax.Array]:
    """Blocks of one row's queries, one after the other; tokens outside every row give zeros."""
    num_tokens, num_rows = inputs.query.shape[0], inputs.kv_lengths.shape[0]
    assert inputs.query_start is not None
    query_start = jnp.clip(inputs.query_start, 0, inputs.query.shape[0])
    start, stop = query_start[:-1], query_start[1:]
    block, length = min(QUERY_BLOCK, num_tokens), _chunk_length(inputs)
    first_block = jnp.cumulative_sum(_ceil_div(jnp.maximum(stop - start, 0), block), include_initial=True)
    query = jnp.pad(inputs.query, ((0, block), (0, 0), (0, 0)))

    def step(index, results):
        row = jnp.searchsorted(first_block, index, side="right") - 1
        offset = start[row] + (index - first_block[row]) * block
        token = offset + jnp.arange(block)
        kv_length = inputs.kv_lengths[row]
        position = kv_length - stop[row] + token
        last_key = kv_length
        if spec.is_causal:
            last_key = jnp.minimum(kv_length, jnp.max(jnp.where(token < stop[row], position, -1)) + 1)
        first_key = 0 if spec.window_left is None else jnp.maximum(position[0] - spec.window_left, 0)
        bounds = first_key // length, _ceil_div(last_key, length)
        rows = lax.dynamic_slice_in_dim(query, offset, block)
        new = _attend_row(inputs, spec, bounds, rows, position, inputs.block_tables[row], kv_length)
        return tuple(
            _put_block(old, x, offset, token < stop[row]) for old, x in zip(results, new, strict=True)
        )

    # Like the query, also in how it lies on a mesh of explicit axes: a loop's carry must stay of one type.
    out, lse = jnp.zeros_like(query), jnp.full_like(query[..., 0], -jnp.inf, jnp.float32)
    out, lse = lax.fori_loop(0, first_block[num_rows], step, (out, lse))
    return out[:num_tokens], lse[:num_tokens]


def _put_block(array: jax.Array, new: jax.Array, offset: jax.Array, is_ours: jax.Array) -> jax.Array:
    old = lax.dynamic_slice_in_dim(array, offset, new.shape[0])
    mask = is_ours.reshape(-1, *(1,) * (new.ndim - 1))
    return lax.dynamic_update_slice_in_dim(array, jnp.where(mask, new, old), offset, 0)


class _Softmax(NamedTuple):
    """Running maximum, sum and weighted values of an online softmax."""

    maximum: jax.Array  # f32[K, queries, G]
    total: jax.Array  # f32[K, queries, G]
    values: jax.Array  # f32[K, queries, G, H]


def _attend_row(inputs: PagedInputs, spec: PagedSpec, bounds, query, positions, place, kv_length):
    """Attends queries [T, N, H] of one row, at `positions` i32[T], to the chunks `bounds` of its pages, whose
    table `place` is, or of the caches that it is."""
    num_kv_heads, head_dim = inputs.k_pages.shape[2], inputs.k_pages.shape[-1]
    num_queries, num_heads, _ = query.shape
    groups = query.reshape(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    groups = groups.transpose(1, 0, 2, 3).astype(jnp.float32)  # K T G H

    def step(chunk, state: _Softmax) -> _Softmax:
        if inputs.block_tables is None:
            key, value, token = _slice_chunk(place, kv_length, chunk)
        else:
            key, value, token = _gather_chunk(inputs, place, kv_length, chunk)
        visible = token < kv_length
        if spec.is_causal:
            visible &= token <= positions[:, None]
        visible = jnp.broadcast_to(visible, (num_queries, token.shape[0]))
        if spec.window_left is not None:
            visible &= token >= positions[:, None] - spec.window_left
        value = jnp.where(visible.any(0)[:, None], value, 0)  # left of a window there may be NaN too
        logits = jnp.einsum("ktgh,kch->ktgc", groups, key, precision=lax.Precision.HIGHEST) * spec.scale
        if spec.logits_soft_cap is not None:
            logits = spec.logits_soft_cap * jnp.tanh(logits / spec.logits_soft_cap)
        if inputs.alibi_slopes is not None:
            slopes = inputs.alibi_slopes.astype(jnp.float32).reshape(num_kv_heads, 1, -1, 1)
            logits -= slopes * (positions[:, None] - token)[None, :, None]
        logits = jnp.where(visible[None, :, None], logits, -jnp.inf)
        return _softmax_update(state, logits, value)

    start = _init_softmax(inputs.sinks, groups)
    state = lax.fori_loop(bounds[0], bounds[1], step, start)
    out = state.values / jnp.where(state.total == 0, 1, state.total)[..., None]
    lse = state.maximum + jnp.log(state.total)  # no visible key: -inf + -inf
    lse = lse.transpose(1, 0, 2).reshape(num_queries, num_heads)
    return out.transpose(1, 0, 2, 3).reshape(query.shape).astype(query.dtype), lse


def _gather_chunk(inputs: PagedInputs, table: jax.Array, kv_length: jax.Array, chunk: jax.Array):
    """K and V f32[K, C, H] of one chunk of a row, zero beyond its length, and the tokens' indices i32[C]."""
    page_size = inputs.k_pages.shape[3]
    length = _chunk_length(inputs)
    token = chunk * length + jnp.arange(length)
    column = chunk * (length // page_size) + jnp.arange(length // page_size)
    page = jnp.where(column * page_size < kv_length, table.at[column].get(mode="clip"), NULL_PAGE)
    page = jnp.clip(page, 0, inputs.k_pages.shape[1] - 1)  # an index below zero would count from the end

    def gather(pages: jax.Array, scale: jax.Array | None) -> jax.Array:
        tokens = pages.at[inputs.layer, page].get(mode="clip").astype(jnp.float32)  # C/Z K Z H
        if scale is not None:
            tokens *= scale.at[inputs.layer, page].get(mode="clip")[..., None]
        tokens = tokens.transpose(1, 0, 2, 3).reshape(tokens.shape[1], length, tokens.shape[3])
        # A select, not a product: what lies beyond the length may be NaN.
        return jnp.where((token < kv_length)[:, None], tokens, 0)

    return gather(inputs.k_pages, inputs.k_scale), gather(inputs.v_pages, inputs.v_scale), token


def _slice_chunk(caches: tuple[jax.Array, jax.Array], kv_length: jax.Array, chunk: jax.Array):
    """What _gather_chunk returns, of a row's caches [S, K, H]. The last chunk may begin among tokens of the
    one before: their indices are then the row's length, which nobody sees.
    """
    room = caches[0].shape[0]
    length = min(CHUNK, room)
    first = jnp.minimum(chunk * length, room - length)
    token = first + jnp.arange(length)
    token = jnp.where(token < chunk * length, kv_length, token)

    def take(cache: jax.Array) -> jax.Array:
        tokens = lax.dynamic_slice_in_dim(cache, first, length).astype(jnp.float32)
        return jnp.where((token < kv_length)[:, None, None], tokens, 0).transpose(1, 0, 2)

    return *map(take, caches), token


def _init_softmax(sinks: jax.Array | None, groups: jax.Array) -> _Softmax:
    """Before any key of queries f32[K, T, G, H]: nothing, or the sink alone, whose weight has no value. Made
    like the queries, for the loop that carries it."""
    values = jnp.zeros_like(groups)
    nothing = values[..., 0]
    if sinks is None:
        return _Softmax(jnp.full_like(nothing, -jnp.inf), nothing, values)
    num_kv_heads, _, group, _ = groups.shape
    logits = sinks.astype(jnp.float32).reshape(num_kv_heads, 1, group)
    return _Softmax(nothing + logits, jnp.ones_like(nothing), values)


def _softmax_update(state: _Softmax, logits: jax.Array, value: jax.Array) -> _Softmax:
    maximum = jnp.maximum(state.maximum, logits.max(-1))
    shift = jnp.where(maximum == -jnp.inf, 0, maximum)  # nothing visible yet: exp(-inf), not exp(-inf + inf)
    weights = jnp.exp(logits - shift[..., None])
    decay = jnp.exp(state.maximum - shift)
    new = jnp.einsum("ktgc,kch->ktgh", weights, value, precision=lax.Precision.HIGHEST)
    total = state.total * decay + weights.sum(-1)
    return _Softmax(maximum, total, state.values * decay[..., None] + new)


def _chunk_length(inputs: PagedInputs) -> int:
    """Tokens gathered at once: of pages whole ones, so that the table is read once a page."""
    if inputs.block_tables is None:
        return min(CHUNK, _capacity(inputs))
    page_size = inputs.k_pages.shape[3]
    return _ceil_div(CHUNK, page_size) * page_size


def _capacity(inputs: PagedInputs) -> int:
    """Tokens that a row has room for."""
    if inputs.block_tables is None:
        return inputs.k_pages.shape[1]
    return inputs.block_tables.shape[1] * inputs.k_pages.shape[3]


def _ceil_div(x: Any, divisor: int) -> Any:
    return (x + divisor - 1) // divisor
