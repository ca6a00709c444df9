"""The Hopper variant of paged_attention: which kernel takes which rows.

A row of one query is bound by memory and belongs to the decode kernel, which cuts its keys over the GPU; a
row of more is bound by arithmetic and belongs to the prefill kernel. A ragged batch is served by both, each
leaving out the other's rows; a single row, and rows that are not causal, as those of a shared prefix, by the
latter alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.paged_attention import (
    cascade_rows_sm90,
    decode_plan,
    decode_sm90,
    prefill_plan,
    prefill_sm90,
)
from pallas_kernels.paged_attention.cascade_rows import group_rows, shared_rows
from pallas_kernels.paged_attention.cascade_rows_sm90 import Listed, Rows
from pallas_kernels.paged_attention.combine_sm90 import Shared, combine_parts
from pallas_kernels.paged_attention.decode_plan import Cut
from pallas_kernels.paged_attention.plan import is_single
from pallas_kernels.paged_attention.prefill_list_sm90 import MAX_ROWS, list_items
from pallas_kernels.paged_attention.prefill_plan import PrefillPlan
from pallas_kernels.paged_attention.prefill_work import WorkList, plan_work
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec


def unsupported(inputs: PagedInputs, spec: PagedSpec) -> str | None:
    """Says why the kernels cannot serve a call, or None if they can."""
    reason = decode_plan.unsupported(inputs._replace(query_start=None), spec)
    if inputs.query_start is not None:
        reason = reason or prefill_plan.unsupported(inputs, spec)
    return reason


def forward(inputs: PagedInputs, spec: PagedSpec) -> tuple[jax.Array, jax.Array]:
    """Attends every query token; returns out [tokens, N, H] and lse f32[tokens, N]."""
    if inputs.query_start is None:
        return decode_sm90.forward(inputs, spec)
    plan = prefill_plan.make_plan(inputs, spec)
    work = list_work(plan, inputs)
    out, lse = prefill(plan, inputs, work)
    if plan.leaves_singles:
        out, row_lse = decode_sm90.forward(inputs, spec, others=out, counter=work.counters.decode)
        start, stop = inputs.query_start[:-1], inputs.query_start[1:]
        is_decode = is_single(start, stop, inputs.query.shape[0])
        # Rows that are not single aim beyond the end, each elsewhere, and are dropped.
        token = jnp.where(is_decode, start, lse.shape[0] + jnp.arange(is_decode.shape[0]))
        lse = lse.at[token].set(row_lse, mode="drop", unique_indices=True)
    return out, lse


def cascade(
    inputs: PagedInputs, prefix_lengths: jax.Array, group_of_row: jax.Array, spec: PagedSpec
) -> tuple[jax.Array, jax.Array]:
    """Attends rows to their own pages and to those that groups of them share; returns out [R, N, H] and lse
    f32[R, N]. Sinks join where the parts are merged.
    """
    whole = dataclasses.replace(spec, is_causal=False)
    shared = inputs._replace(kv_lengths=prefix_lengths, sinks=None)
    shared_plan = prefill_plan.make_plan(shared, whole, keeps_parts=True)
    if cascade_rows_sm90.serves(shared_plan, inputs):
        listed = cascade_rows_sm90.list_rows(shared_plan, inputs, prefix_lengths, group_of_row)
        shared = shared._replace(query=listed.query)
    else:
        listed, shared = _list_by_xla(shared_plan, inputs, prefix_lengths, group_of_row)
    rows, counters = listed.rows, listed.counters
    own = inputs._replace(skipped_pages=rows.skipped)
    plan = decode_plan.make_plan(own, spec, Cut(shared_plan.tile_q, shared_plan.config.splits))
    operands = decode_sm90.operands_of(plan, own._replace(kv_lengths=rows.lengths), counters.decode)
    parts = decode_sm90.launch(plan, operands)
    # In this order: rows' own pages, which are many, would drive the larger parts out of the L2 cache.
    parts, query = lax.optimization_barrier((parts, shared.query))
    shared = shared._replace(query=query)
    results = prefill_sm90.launch(shared_plan, shared, listed.items, counters.prefill)
    return combine_parts(plan, parts, operands, inputs.sinks, Shared(*results, *rows[2:]))


def _list_by_xla(
    plan: PrefillPlan, inputs: PagedInputs, prefix_lengths, group_of_row
) -> tuple[Listed, PagedInputs]:
    """What cascade_rows_sm90 lists, for more rows or groups than it takes, and the shared half."""
    grouped = group_rows(inputs, prefix_lengths, group_of_row)
    shared = shared_rows(inputs, prefix_lengths, grouped)
    work = plan_work(plan, grouped.query_start, prefix_lengths)
    of_row = (x[grouped.place] for x in (work.first_item, work.num_splits, work.place))
    rows = Rows(grouped.skipped, grouped.lengths, *of_row)
    return Listed(work.items, shared.query, rows, work.counters), shared


def list_work(plan: PrefillPlan, inputs: PagedInputs) -> WorkList:
    """What the prefill kernel does."""
    assert inputs.query_start is not None
    rows = inputs.query_start, inputs.kv_lengths
    return plan_work(plan, *rows, known=list_items(plan, *rows) if plan.num_rows <= MAX_ROWS else None)


def prefill(plan: PrefillPlan, inputs: PagedInputs, work: WorkList) -> tuple[jax.Array, jax.Array]:
    """The prefill kernel alone: out [tokens, N, H] and lse f32[tokens, N]; the results of rows of one query
    are undefined where the plan leaves them to decode."""
    start = inputs.query_start
    assert start is not None
    out, lse = prefill_sm90.launch(plan, inputs, work.items, work.counters.prefill)
    if plan.has_parts:
        out, lse = _merge_splits(plan, work, _by_head(plan, out), _by_head(plan, lse), inputs.sinks)
    elif plan.is_packed:
        lse = lse.reshape(plan.max_items, plan.num_kv_heads, -1)[work.first_item, :, work.place]
        lse = lse.swapaxes(1, 2).reshape(plan.num_tokens, plan.num_heads)
    else:
        lse = _by_head(plan, lse)[work.first_item, :, :, work.place].reshape(plan.num_tokens, plan.num_heads)
    if inputs.sinks is not None:  # tokens of no row have none
        token = jnp.arange(plan.num_tokens)
        is_ours = (token >= start[0]) & (token < start[-1])
        lse = jnp.where(is_ours[:, None], lse, -jnp.inf)
    return out, lse


def _by_head(plan: PrefillPlan, x: jax.Array) -> jax.Array:
    """[max_items, K, warpgroups, 64, ...] -> [max_items, K, G, tile_q, ...]."""
    rest = x.shape[4:]
    x = x.reshape(plan.max_items, plan.num_kv_heads, -1, *rest)[:, :, : plan.group * plan.tile_q]
    return x.reshape(plan.max_items, plan.num_kv_heads, plan.group, plan.tile_q, *rest)


def _merge_splits(plan: PrefillPlan, work: WorkList, out: jax.Array, lse: jax.Array, sinks: jax.Array | None):
    """Merges the parts of each token by their log-sum-exp: out [tokens, N, H] and lse f32[tokens, N].

    lse = log(sum_s exp(lse_s)),   out = sum_s exp(lse_s - lse) out_s

    A sink is one more lse_s, of an out_s that is zero.
    """
    split = jnp.arange(plan.config.splits)
    is_own = split < work.num_splits[:, None]
    item = work.first_item[:, None] + jnp.where(is_own, split, 0)
    place = work.place[:, None]
    parts = jnp.where(is_own[..., None, None], lse[item, :, :, place], -jnp.inf)  # tokens, splits, K, G
    sink = jnp.full((plan.num_heads,), -jnp.inf) if sinks is None else sinks.astype(jnp.float32)
    sink = sink.reshape(plan.num_kv_heads, plan.group)
    maximum = jnp.maximum(parts.max(axis=1), sink)
    shift = jnp.where(jnp.isneginf(maximum), 0, maximum)
    weights = jnp.exp(parts - shift[:, None])
    total = weights.sum(axis=1) + jnp.exp(sink - shift)
    # What no item wrote may be NaN.
    values = jnp.where(weights[..., None] != 0, out[item, :, :, place] * weights[..., None], 0).sum(axis=1)
    values /= jnp.where(total != 0, total, 1)[..., None]
    shape = plan.num_tokens, plan.num_heads
    lse = jnp.where(total != 0, maximum + jnp.log(total), -jnp.inf).reshape(shape)
    values = values.astype(plan.query_dtype).reshape(*shape, plan.width)
    return values[..., : plan.head_dim], lse
