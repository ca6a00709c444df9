"""The two steps of serving on the device, prefill and decode: one jitted function each, the state donated.

A decode step is PagedAttention's in full: every running row gets a slot for its last token (`pages.append`),
shared pages are copied (`copy_pages`), the model writes and attends through the block tables, the next tokens
are sampled, and rows that end say so. The host sends nothing to a decode step and waits for nothing of it.
The host knows what the rows ask of the sampler, its `kind`: on a GPU a choice made at run time
(`lax.cond`) would keep the host waiting for the device, 0.5 to 1 ms a step of GPT-2 medium on an H200.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int32

from jaxattn.page_pool import PagedAttention, PagedBatch, PagePool, copy_pages, init_page_pool
from jaxattn.sampling import (
    MAX_LOGPROBS,
    NO_TOKEN,
    SampleOutput,
    SamplingArrays,
    TokenCounts,
    add_outputs,
    idle_rows,
    init_token_counts,
    sample,
    set_prompts,
    set_rows,
)
from serving import pages
from serving.pages import NO_ROW, PageState, init_page_state

NO_SLOT = -1  # keys and values with this slot are not written


class EngineState(NamedTuple):
    """All that the device knows of the running rows; every step takes it donated and returns the next."""

    pool: PagePool  # keys and values, [L, P, K, Z, H] each
    pages: PageState  # which row owns which page, and the rows' lengths in the pool
    sampling: SamplingArrays  # parameters of each row
    counts: TokenCounts  # tokens seen by each row, for penalties
    last_tokens: Int32[Array, "R"]  # sampled, not yet in the pool
    num_outputs: Int32[Array, "R"]  # tokens sampled so far
    max_outputs: Int32[Array, "R"]  # a row stops with this many
    active: Bool[Array, "R"]  # rows that go on


class PrefillBatch(NamedTuple):
    """New sequences for empty rows, padded to C rows of T tokens."""

    rows: Int32[Array | np.ndarray, "C"]  # NO_ROW pads
    tokens: Int32[Array | np.ndarray, "C T"]
    lengths: Int32[Array | np.ndarray, "C"]  # 0 pads
    max_outputs: Int32[Array | np.ndarray, "C"]
    sampling: SamplingArrays  # of C rows


class StepOutput(NamedTuple):
    """What the host may read of a step."""

    sampled: SampleOutput  # tokens i32[rows]: NO_TOKEN for a row that did not run
    page_usage: Int32[Array, "2"]  # pages allocated, tokens in them


class Steps(NamedTuple):
    """The jitted steps of one model, and its parameters as the flat tuple that dispatches fastest."""

    params: tuple[jax.Array, ...]
    prefill: Callable[..., tuple[EngineState, StepOutput]]  # (params, state, batch, kind=)
    decode: Callable[..., tuple[EngineState, StepOutput]]  # (params, state, num_rows=, kind=)
    release: Callable[..., EngineState]  # (state, rows_mask)


def init_engine_state(
    config: Any, *, num_rows: int, num_pages: int, page_size: int, pages_per_row: int, dtype: Any
) -> EngineState:
    """Idle rows and an empty pool for a model of this config."""
    return EngineState(
        pool=init_page_pool(config, num_pages, page_size, dtype),
        pages=init_page_state(num_rows, num_pages, pages_per_row),
        sampling=idle_rows(num_rows),
        counts=init_token_counts(num_rows, config.vocab_size),
        last_tokens=jnp.zeros(num_rows, jnp.int32),
        num_outputs=jnp.zeros(num_rows, jnp.int32),
        max_outputs=jnp.zeros(num_rows, jnp.int32),
        active=jnp.zeros(num_rows, jnp.bool_),
    )


def make_steps(model: nnx.Module) -> Steps:
    """The steps of a model; nothing is compiled before the first call of a shape."""
    graphdef, params = nnx.split(model)
    leaves, treedef = jax.tree.flatten(params)
    return Steps(tuple(leaves), *_jitted(graphdef, treedef))


@lru_cache(maxsize=8)
def _jitted(graphdef: Any, treedef: Any) -> tuple[Callable[..., Any], ...]:
    """Steps closed over a model's structure; engines of equal models share them, and what was compiled."""

    def with_model(step: Callable[..., Any], leaves: tuple[jax.Array, ...], *args: Any, **kwargs: Any) -> Any:
        return step(nnx.merge(graphdef, treedef.unflatten(leaves)), *args, **kwargs)

    return (
        jax.jit(partial(with_model, prefill), static_argnames="kind", donate_argnums=1),
        jax.jit(partial(with_model, decode), static_argnames=("num_rows", "kind"), donate_argnums=1),
        jax.jit(release, donate_argnums=0),
    )


def prefill(
    model: Any, state: EngineState, batch: PrefillBatch, *, kind: str
) -> tuple[EngineState, StepOutput]:
    """Writes whole prompts into fresh pages and samples the first token of each."""
    page_size = state.pool.page_size
    page_state, ok = pages.allocate(state.pages, batch.rows, batch.lengths, page_size=page_size)
    rows = jnp.where(ok, batch.rows, NO_ROW)
    lengths = jnp.where(rows == NO_ROW, 0, batch.lengths)
    block_tables = _rows_of(page_state.block_tables, rows)

    position = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1]), batch.tokens.shape)
    slots = (
        jnp.take_along_axis(block_tables, position // page_size, axis=1) * page_size + position % page_size
    )
    slots = jnp.where(position < lengths[:, None], slots, NO_SLOT)
    attention = PagedAttention(state.pool, PagedBatch(block_tables, lengths, slots))
    hidden, attention = model(batch.tokens, position, attention)
    last_position = jnp.maximum(lengths - 1, 0)
    logits = model.logits(jnp.take_along_axis(hidden, last_position[:, None, None], axis=1)[:, 0])

    counts = set_prompts(state.counts, rows, jnp.asarray(batch.tokens), lengths)
    num_outputs = jnp.zeros_like(lengths)
    sampled = sample(
        logits,
        batch.sampling,
        jax.tree.map(lambda x: _rows_of(x, rows), counts),
        positions=lengths,
        num_outputs=num_outputs,
        max_logprobs=MAX_LOGPROBS,
        kind=kind,
    )
    state = state._replace(
        pool=attention.pool,
        pages=page_state,
        counts=counts,
        sampling=set_rows(state.sampling, rows, batch.sampling),
        max_outputs=state.max_outputs.at[rows].set(batch.max_outputs, mode="drop"),
        num_outputs=state.num_outputs.at[rows].set(num_outputs, mode="drop"),
    )
    return _commit(state, rows, sampled)


def decode(model: Any, state: EngineState, *, num_rows: int, kind: str) -> tuple[EngineState, StepOutput]:
    """Adds one token to each active row; rows from `num_rows` on must be idle."""
    page_size = state.pool.page_size
    page_state, write_page, offset, copy_src, ok = pages.append(
        state.pages, state.active, page_size=page_size
    )
    runs = (state.active & ok)[:num_rows]
    write_page, offset, copy_src = write_page[:num_rows], offset[:num_rows], copy_src[:num_rows]
    lengths = jnp.where(runs, page_state.lengths[:num_rows], 0)

    pool = copy_pages(state.pool, copy_src, write_page)
    slots = jnp.where(runs, write_page * page_size + offset, NO_SLOT)
    attention = PagedAttention(pool, PagedBatch(page_state.block_tables[:num_rows], lengths, slots))
    positions = jnp.maximum(lengths - 1, 0)
    hidden, attention = model(state.last_tokens[:num_rows], positions, attention)

    sampled = sample(
        model.logits(hidden),
        jax.tree.map(lambda x: x[:num_rows], state.sampling),
        jax.tree.map(lambda x: x[:num_rows], state.counts),
        positions=lengths,
        num_outputs=state.num_outputs[:num_rows],
        max_logprobs=MAX_LOGPROBS,
        kind=kind,
    )
    rows = jnp.where(runs, jnp.arange(num_rows), NO_ROW)
    return _commit(state._replace(pool=attention.pool, pages=page_state), rows, sampled)


def release(state: EngineState, rows_mask: Bool[Array, "R"]) -> EngineState:
    """Empties rows: their pages fall free, and nothing of theirs costs the sampler time any longer."""
    num_rows = rows_mask.size
    rows = jnp.where(rows_mask, jnp.arange(num_rows), NO_ROW)
    return state._replace(
        pages=pages.free(state.pages, rows_mask, page_size=state.pool.page_size),
        sampling=set_rows(state.sampling, rows, idle_rows(num_rows)),
        active=state.active & ~rows_mask,
    )


def _commit(state: EngineState, rows: Array, sampled: SampleOutput) -> tuple[EngineState, StepOutput]:
    """Enters the sampled tokens into the state, and ends the rows whose last they are."""
    runs = rows != NO_ROW
    num_outputs = _rows_of(state.num_outputs, rows) + 1
    is_stop = (sampled.tokens[:, None] == _rows_of(state.sampling.stop_ids, rows)).any(axis=1)
    goes_on = ~is_stop & (num_outputs < _rows_of(state.max_outputs, rows))
    last_tokens = state.last_tokens.at[rows].set(sampled.tokens, mode="drop")
    has_new = jnp.zeros_like(state.active).at[rows].set(True, mode="drop")
    state = state._replace(
        counts=add_outputs(state.counts, last_tokens, has_new),
        last_tokens=last_tokens,
        num_outputs=state.num_outputs.at[rows].set(num_outputs, mode="drop"),
        active=state.active.at[rows].set(goes_on, mode="drop"),
    )
    allocated = state.pages.ref_count.size - 1 - state.pages.free_top
    sampled = sampled._replace(tokens=jnp.where(runs, sampled.tokens, NO_TOKEN))
    return state, StepOutput(sampled, jnp.stack([allocated, state.pages.lengths.sum()]))


def _rows_of(array: Array, rows: Array) -> Array:
    """The rows' entries of an array [R, ...]; zeros for NO_ROW."""
    return array.at[rows].get(mode="fill", fill_value=0)
