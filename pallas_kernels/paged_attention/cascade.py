"""cascade_attention: decode where rows share leading pages, each read once for all of them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from pallas_kernels import checks
from pallas_kernels.kv_pages import pool
from pallas_kernels.manual import jit_kernels
from pallas_kernels.paged_attention.config import PagedConfig
from pallas_kernels.paged_attention.op import VARIANTS, check_arrays, check_config, make_spec
from pallas_kernels.paged_attention.prefill_config import PrefillConfig
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec
from pallas_kernels.variants import choose


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
            same first prefix_lengths[c] / Z entries in block_tables. 0, or what is no multiple: nothing.
        group_of_row: each row's group 0..C-1, in any order; any other number: none. A row that is shorter
            than its group's prefix, as an empty one is, is of none.
        others: as those of paged_attention.

    All arrays may be traced: groups come and go without a new compilation. A row's last bits depend on its
    group. Raises what paged_attention does.
    From: Juravsky et al., Hydragen (2024), section 3; Ye et al., FlashInfer (2025), section 3.1.2.
    """
    pool.check_pool(k_pages, v_pages)
    index = pool.check_layer(layer, k_pages.shape[0])
    inputs = PagedInputs(query, k_pages, v_pages, block_tables, kv_lengths, index)
    inputs = inputs._replace(k_scale=k_scale, v_scale=v_scale, sinks=sinks)
    inputs = check_arrays(inputs)
    checks.check_rank("prefix_lengths", prefix_lengths, "C")
    num_rows, num_groups = query.shape[0], prefix_lengths.shape[0]
    prefixes = pool.check_indices("prefix_lengths", prefix_lengths, (num_groups,), "C")
    check_prefixes(prefix_lengths, k_pages.shape[3])
    group_of_row = pool.check_indices("group_of_row", group_of_row, (num_rows,), "R")
    check_config("prefill_config", prefill_config, PrefillConfig)
    spec = make_spec(query, scale, None, logits_soft_cap, config)
    spec = dataclasses.replace(spec, prefill_config=prefill_config)
    ragged = inputs._replace(query_start=jnp.zeros(num_rows + 1, jnp.int32))
    variant = choose("cascade_attention", VARIANTS, implementation, ragged, spec)
    out, lse = _cascade(variant, spec, inputs, prefixes, group_of_row)
    return (out, lse) if return_lse else out


def check_prefixes(prefix_lengths: Any, page_size: int) -> None:
    """Holds lengths of prefixes, if the host knows them, to whole pages; a device is not waited for."""
    if not isinstance(prefix_lengths, np.ndarray):
        return
    if ((prefix_lengths < 0) | (prefix_lengths % page_size != 0)).any():
        allowed = f"multiples of the page size {page_size}, >= 0"
        raise ValueError(f"prefix_lengths must be {allowed}, got {prefix_lengths.tolist()}")


@jit_kernels(2)
def _cascade(variant: str, spec: PagedSpec, inputs: PagedInputs, prefix_lengths, group_of_row):
    cascade = VARIANTS[variant].cascade
    assert cascade is not None
    return cascade(inputs, prefix_lengths, group_of_row, spec)
