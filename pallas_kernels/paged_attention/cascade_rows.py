"""What rows that share leading pages are to the two halves of a cascade: the order of their groups, and what
is left of each row behind the pages that it shares.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.mosaic import rem
from pallas_kernels.paged_attention.spec import PagedInputs


class Grouped(NamedTuple):
    """Rows in the order of their groups; those of no group come last, beyond every group."""

    place: jax.Array  # i32[R]: each row's place in the order
    query_start: jax.Array  # i32[C + 1]: where groups start in it
    leaders: jax.Array  # i32[C]: a row of each group
    skipped: jax.Array  # i32[R]: pages that each row shares
    lengths: jax.Array  # i32[R]: tokens behind them


def shares_prefix(prefix, kv_length, page_size: int, capacity: int):
    """Whether a row shares its group's prefix: whole pages, all of which it has. Others are of no group."""
    return (prefix > 0) & (rem(prefix, page_size) == 0) & (prefix <= lax.min(kv_length, np.int32(capacity)))


def group_rows(inputs: PagedInputs, prefix_lengths: jax.Array, group_of_row: jax.Array) -> Grouped:
    """By comparing all with all: a sort of so few is slower."""
    num_groups, page_size = prefix_lengths.shape[0], inputs.k_pages.shape[3]
    capacity = inputs.block_tables.shape[1] * page_size
    row, group = jnp.arange(group_of_row.shape[0]), jnp.arange(num_groups)
    prefix = prefix_lengths.at[group_of_row].get(mode="clip")
    is_grouped = (group_of_row >= 0) & (group_of_row < num_groups)
    is_grouped &= shares_prefix(prefix, inputs.kv_lengths, page_size, capacity)
    prefix = jnp.where(is_grouped, prefix, 0)
    key = jnp.where(is_grouped, group_of_row, num_groups)
    is_before = (key < key[:, None]) | ((key == key[:, None]) & (row < row[:, None]))
    return Grouped(
        place=is_before.sum(1, dtype=jnp.int32),
        query_start=(key < jnp.arange(num_groups + 1)[:, None]).sum(1, dtype=jnp.int32),
        leaders=jnp.argmax(key == group[:, None], axis=1),
        skipped=prefix // page_size,
        lengths=jnp.maximum(jnp.minimum(inputs.kv_lengths, capacity) - prefix, 0),
    )


def shared_rows(inputs: PagedInputs, prefix_lengths: jax.Array, grouped: Grouped) -> PagedInputs:
    """The half that is shared: each group is a row of a ragged batch, whose queries are those of its rows."""
    order = jnp.argmax(grouped.place == jnp.arange(grouped.place.shape[0])[:, None], axis=1)
    return inputs._replace(
        query=inputs.query[order],
        block_tables=inputs.block_tables[grouped.leaders],
        kv_lengths=prefix_lengths,
        query_start=grouped.query_start,
        sinks=None,
    )
