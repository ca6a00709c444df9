"""cascade_attention: decode where rows share leading pages, each read once for all of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import checks
from pallas_kernels.kv_pages import pool
from pallas_kernels.paged_attention.config import PagedConfig
from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.paged_attention.prefill_config import PrefillConfig


def cascade_attention(
    query: Float[Array, "R N H"],
    k_pages: Num[Array, "L P K Z H"],
    v_pages: Num[Array, "L P K Z H"],
    block_tables: Int[Array, "R M"],
    kv_lengths: Int[Array, "R"],
    prefix_lengths: Int[Array, "C"],
    group_of_row: Int[Array, "R"],
    *,
    layer: int | Int[Array, ""] = 0,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    k_scale: Float[Array, "L P K Z"] | None = None,
    v_scale: Float[Array, "L P K Z"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    return_lse: bool = False,
    config: PagedConfig | None = None,
    prefill_config: PrefillConfig | None = None,
    implementation: str | None = None,
) -> Float[Array, "R N H"] | tuple[Float[Array, "R N H"], Float[Array, "R N"]]:
    """Computes paged_attention of one query a row, reading the pages that a group of rows shares once.

        out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2,   lse = log(exp(lse_1) + exp(lse_2))

    1: all queries of a group attend to the shared prefix, together, as one row of a ragged batch that is not
    causal. 2: each row attends to its own pages. Parallel sampling, beams and system prompts give such rows.

    Arguments:
        query, k_pages, v_pages, block_tables, kv_lengths: as those of paged_attention without query_start;
            tables and lengths count the shared pages.
        prefix_lengths: tokens that the rows of each group share, multiples of Z: all rows of group c have the
            same first prefix_lengths[c] / Z entries in block_tables, and longer kv_lengths. 0: nothing.
        group_of_row: each row's group 0..C-1, in any order; any other number: none.
        others: as those of paged_attention.

    All arrays may be traced: groups come and go without a new compilation. Raises what paged_attention does.
    From: Juravsky et al., Hydragen (2024), section 3; Ye et al., FlashInfer (2025), section 3.1.2.
    """
    pool.check_pool(k_pages, v_pages)
    checks.check_rank("query", query, "R N H")
    num_rows, num_groups, page_size = query.shape[0], prefix_lengths.shape[0], k_pages.shape[3]
    pool.check_indices("prefix_lengths", prefix_lengths, (num_groups,), "C")
    pool.check_indices("group_of_row", group_of_row, (num_rows,), "R")
    group_of_row = jnp.where(group_of_row < num_groups, group_of_row, -1)
    arguments = {"layer": layer, "scale": scale, "logits_soft_cap": logits_soft_cap, "return_lse": True}
    arguments |= {"k_scale": k_scale, "v_scale": v_scale, "config": config, "implementation": implementation}

    place, leaders, query_start = _sort_by_group(group_of_row, num_groups)
    shared, shared_lse = paged_attention(
        jnp.zeros_like(query).at[place].set(query, unique_indices=True),
        k_pages,
        v_pages,
        block_tables[leaders],
        prefix_lengths,
        query_start=query_start,
        is_causal=False,
        prefill_config=prefill_config,
        **arguments,
    )
    prefix = jnp.where(group_of_row < 0, 0, prefix_lengths[group_of_row])
    column = jnp.arange(block_tables.shape[1]) + prefix[:, None] // page_size
    own_tables = jnp.take_along_axis(block_tables, column, axis=1, mode="clip")
    own, own_lse = paged_attention(
        query, k_pages, v_pages, own_tables, jnp.maximum(kv_lengths - prefix, 0), sinks=sinks, **arguments
    )
    out, lse = merge(shared[place], shared_lse[place], own, own_lse)
    return (out, lse) if return_lse else out


def _sort_by_group(group_of_row: jax.Array, num_groups: int):
    """Each row's place in the order of groups i32[R], a row of each group i32[C], and where groups start.

    By comparing all with all: a sort of so few is slower. Rows of no group come last, beyond every group.
    """
    row, group = jnp.arange(group_of_row.shape[0]), jnp.arange(num_groups)
    key = jnp.where(group_of_row < 0, num_groups, group_of_row)
    is_before = (key < key[:, None]) | ((key == key[:, None]) & (row < row[:, None]))
    query_start = (key < jnp.arange(num_groups + 1)[:, None]).sum(1, dtype=jnp.int32)
    leaders = jnp.argmax(key == group[:, None], axis=1)
    return is_before.sum(1, dtype=jnp.int32), leaders, query_start


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
