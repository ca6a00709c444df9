"""paged_attention: validation and the table of variants."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import checks
from pallas_kernels.device import is_hopper
from pallas_kernels.kv_pages import pool
from pallas_kernels.manual import jit_kernels
from pallas_kernels.paged_attention import reference, sm90
from pallas_kernels.paged_attention.config import PagedConfig
from pallas_kernels.paged_attention.prefill_config import PrefillConfig
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec
from pallas_kernels.variants import choose

MAX_HEAD_DIM = 256


class Variant(NamedTuple):
    """One way to compute the op. `unsupported` says why it cannot serve a call, or None if it can."""

    forward: Callable[[PagedInputs, PagedSpec], tuple[jax.Array, jax.Array]]
    unsupported: Callable[[PagedInputs, PagedSpec], str | None]
    is_available: Callable[[], bool]
    cascade: Callable[..., tuple[jax.Array, jax.Array]] | None = None  # rows' own pages and shared ones


VARIANTS = {
    "sm90": Variant(sm90.forward, sm90.unsupported, is_hopper, sm90.cascade),
    "reference": Variant(reference.forward, lambda inputs, spec: None, lambda: True, reference.cascade),
}


def paged_attention(
    query: Float[Array, "tokens N H"],
    k_pages: Num[Array, "L P K Z H"],
    v_pages: Num[Array, "L P K Z H"],
    block_tables: Int[Array, "R M"],
    kv_lengths: Int[Array, "R"],
    *,
    query_start: Int[Array, "R+1"] | None = None,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    is_causal: bool = True,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    k_scale: Float[Array, "L P K Z"] | None = None,
    v_scale: Float[Array, "L P K Z"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    config: PagedConfig | None = None,
    prefill_config: PrefillConfig | None = None,
    implementation: str | None = None,
) -> Float[Array, "tokens N H"] | tuple[Float[Array, "tokens N H"], Float[Array, "tokens N"]]:
    """Computes attention of ragged query tokens over keys and values that live in pages.

        out = softmax(mask(cap(scale Q K^T) - slope (position - j))) V,   cap(x) = c tanh(x / c)

    Token j of row r lies in page block_tables[r, j // Z] at offset j % Z. Query i of the row's t queries
    stands at position kv_length - t + i and sees the keys j <= position, and j >= position - left under a
    window; all keys of its row where is_causal is False. Queries that see no key, and tokens of no row, give
    zeros and a log-sum-exp of -inf (that of a query with a sink is the sink).

    Arguments:
        query: [tokens, N, H]; bf16, fp16 or f32. Without query_start tokens == R: one a row, a decode step.
        k_pages, v_pages: the page pool, every layer; query's dtype, or int8/fp8 with scales. Z: a power of
            two, 8 to 256. Free pages and slots beyond a length may hold anything, NaN too. Never copied.
        block_tables: page ids. Entries beyond a row's length are never read; others are clamped into 0..P-1.
        kv_lengths: tokens of each row, those of this step included; 0 for an empty row. More than M * Z count
            as M * Z.
        query_start: row r's queries are query[query_start[r]:query_start[r + 1]], in order of rows; numbers
            that do not ascend are of no rows, those beyond the tokens are the number of tokens.
        layer: which layer of the pool; may be traced, and is then taken to be one: of any other the result is
            undefined.
        scale: multiplies Q K^T; 1 / sqrt(H) by default.
        is_causal: False: every query sees every key of its row; takes no window.
        local_window_size: keys visible to the left of a query, or (left, right): attention is causal anyway.
        k_scale, v_scale: factor of each slot and head of quantized pages.
        sinks: a logit for each head that takes its share of every softmax and has no value; it counts in the
            log-sum-exp.
        alibi_slopes: a slope for each head: linear biases (Press et al., 2022), also where not causal.
        return_lse: also return the natural log-sum-exp of each query's logits, f32[tokens, N].
        batch_invariant: a row's result has the same bits whatever else is in the batch; see below.
        config, prefill_config: cuts of the kernels for rows of one query, and of more.
        implementation: a name of VARIANTS; by default the first that can serve the call.

    Bits. The same call gives the same bits. By default the numbers of rows and tokens and the width M of the
    tables choose the cuts: in calls of equal shapes a row of one query has the same bits whatever other rows
    hold; in calls of other shapes it may differ in the last ones. With batch_invariant the kernels cut by
    page size, heads, head dim and dtypes alone: a row's result has the same bits alone and among any others,
    in tables of any width. While is_causal, a row of one query then has the same bits with query_start and
    without; nothing is promised of the same query among several of its row. The cost: many rows are cut as
    finely as one, with parts of up to 4 R N H M Z / 512 bytes, results of short tables are merged too, and
    keys of few queries are not split. The reference leaves the order of sums to XLA.

    Served by the kernels, on a Hopper GPU: bf16 and fp16 queries of up to 4096 rows; head dims that are
    multiples of 8, of 16 in quantized pages, from 64 to 256; up to 4096 numbers in the queries of a KV head,
    N / K * H. With query_start: head dims that are multiples of 16, of 32 in quantized pages and there up to
    224; N / K up to 16, up to 8 with alibi_slopes or in quantized pages above H = 128; a scale above zero.
    The reference serves the rest (f32, H = 32, 48; with query_start 72, 88), and other devices, at the speed
    of XLA. It is made for serving: the kernels have no gradients.

    Inside shard_map over KV heads (query N, pools K) each device attends with its own heads: there is nothing
    to exchange. Outside, heads that lie along explicit mesh axes are left to the reference.

    Raises ValueError for wrong arguments, NotImplementedError where the implementation named cannot serve.
    From: Kwon et al., PagedAttention (2023), section 4.1; Dao et al., Flash-Decoding (2023).
    """
    pool.check_pool(k_pages, v_pages)
    index = pool.check_layer(layer, k_pages.shape[0])
    inputs = PagedInputs(
        query,
        k_pages,
        v_pages,
        block_tables,
        kv_lengths,
        index,
        query_start,
        k_scale,
        v_scale,
        sinks,
        alibi_slopes,
    )
    inputs = check_arrays(inputs)
    spec = make_spec(query, scale, local_window_size, logits_soft_cap, config, batch_invariant)
    check_config("prefill_config", prefill_config, PrefillConfig)
    if batch_invariant and prefill_config is not None and prefill_config.splits > 1:
        raise ValueError(f"prefill_config.splits must be 1 if batch_invariant, got {prefill_config.splits}")
    is_causal = checks.check_bool("is_causal", is_causal)
    if not is_causal and checks.normalize_window(local_window_size) != (None, None):
        raise ValueError(f"local_window_size must be None if is_causal is False, got {local_window_size!r}")
    spec = dataclasses.replace(spec, is_causal=is_causal, prefill_config=prefill_config)
    variant = choose("paged_attention", VARIANTS, implementation, inputs, spec)
    out, lse = _forward(variant, spec, inputs)
    return (out, lse) if return_lse else out


def make_spec(
    query: jax.Array, scale, local_window_size, logits_soft_cap, config, batch_invariant: bool = False
) -> PagedSpec:
    """The static part of a call, from arguments as a caller gives them."""
    left, _ = checks.normalize_window(local_window_size)
    check_config("config", config, PagedConfig)
    return PagedSpec(
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else checks.check_number("scale", scale),
        window_left=left,
        logits_soft_cap=checks.check_soft_cap(logits_soft_cap),
        config=config,
        batch_invariant=checks.check_bool("batch_invariant", batch_invariant),
    )


def check_config(name: str, config: Any, kind: type) -> None:
    if not isinstance(config, kind | None):
        raise ValueError(f"{name} must be a {kind.__name__} or None, got {config!r}")


def check_heads(inputs: PagedInputs, num_kv_heads: int, head_dim: int, letters: str) -> None:
    """Holds the query [letters] to the heads of the keys, and what is given for each head to the query's."""
    query = inputs.query
    checks.check_rank("query", query, letters)
    num_heads = query.shape[1]
    checks.check_shape("query", query, (query.shape[0], num_heads, head_dim), letters)
    checks.check_dtype("query", query, pool.FLOATS)
    checks.check_head_groups(num_heads, num_kv_heads)
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"the head dim of query must be at most {MAX_HEAD_DIM}, got {head_dim}")
    for name, array in (("sinks", inputs.sinks), ("alibi_slopes", inputs.alibi_slopes)):
        if array is not None:
            checks.check_shape(name, array, (num_heads,), "N")
            checks.check_dtype(name, array, pool.FLOATS)


def check_arrays(inputs: PagedInputs) -> PagedInputs:
    """Holds arrays to each other; returns them with ids and lengths as i32."""
    query, k_pages = inputs.query, inputs.k_pages
    num_layers, num_pages, num_kv_heads, page_size, head_dim = k_pages.shape
    check_heads(inputs, num_kv_heads, head_dim, "tokens N H")
    num_tokens = query.shape[0]
    checks.check_rank("block_tables", inputs.block_tables, "R M")
    num_rows, width = inputs.block_tables.shape
    tables = pool.check_indices("block_tables", inputs.block_tables, (num_rows, width), "R M")
    lengths = pool.check_indices("kv_lengths", inputs.kv_lengths, (num_rows,), "R")
    start = inputs.query_start
    if start is not None:
        start = check_starts(pool.check_indices("query_start", start, (num_rows + 1,), "R + 1"), num_tokens)
    elif num_tokens != num_rows:
        raise ValueError(
            f"without query_start query must have one token a row, got {num_tokens} for {num_rows} rows"
        )
    is_quantized = k_pages.dtype in pool.QUANTIZED
    if not is_quantized:
        checks.check_dtype("k_pages", k_pages, (query.dtype,))
    for name, array in (("k_scale", inputs.k_scale), ("v_scale", inputs.v_scale)):
        if (array is not None) != is_quantized:
            raise ValueError(
                f"{name} must be given for int8 and fp8 pages and for no others, "
                f"got {'none' if array is None else 'one'} with {k_pages.dtype} pages"
            )
        if array is not None:
            checks.check_shape(name, array, (num_layers, num_pages, num_kv_heads, page_size), "L P K Z")
            checks.check_dtype(name, array, (jnp.float32,))
    return inputs._replace(block_tables=tables, kv_lengths=lengths, query_start=start)


def check_starts(query_start: Any, num_tokens: int) -> Any:
    """Holds starts, if the host knows them, to ascending places among the tokens."""
    if isinstance(query_start, np.ndarray):
        ends = np.concatenate([[0], query_start, [num_tokens]])
        if (np.diff(ends) < 0).any():
            allowed = f"ascending numbers in 0..{num_tokens}"
            raise ValueError(f"query_start must be {allowed}, got {query_start.tolist()}")
    return query_start


@jit_kernels(2)
def _forward(implementation: str, spec: PagedSpec, inputs: PagedInputs) -> tuple[jax.Array, jax.Array]:
    return VARIANTS[implementation].forward(inputs, spec)
