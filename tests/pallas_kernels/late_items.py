"""The list of prefill's work with its last rows taken together, by a sort; its kernel counts instead."""

import jax.numpy as jnp

from pallas_kernels.paged_attention import prefill_work
from pallas_kernels.paged_attention.prefill_plan import PrefillPlan
from pallas_kernels.paged_attention.prefill_work import WorkList, base_of, cached_tokens, ends_late

FIRST = 1 << 30  # before the numbers of late items


def taken_together(plan: PrefillPlan, query_start, kv_lengths, known=None) -> WorkList:
    """As plan_work, which lists row after row."""
    assert known is None
    work = prefill_work.plan_work(plan, query_start, kv_lengths)
    if not plan.late_items:
        return work
    segments = prefill_work._segments(plan, query_start, kv_lengths)
    first, num_items = segments.first_item, segments.num_tiles * segments.num_splits
    cached = cached_tokens(plan, segments.start, segments.stop, segments.kv_length, num_items)
    cached_from = jnp.where(first >= first[:, None], cached, 0).sum(axis=1)
    num_seeing = jnp.where(segments.kv_length > 0, num_items, 0).sum()
    is_late = ends_late(plan, num_seeing - first - num_items, cached_from) & (num_items > 0)

    item = jnp.arange(plan.max_items)
    is_own = (first <= item[:, None]) & (item[:, None] < first + num_items)
    segment, is_item = is_own.argmax(axis=1), is_own.any(axis=1)
    number = base_of(plan, segments.kv_length)[segment] - (item - first[segment])
    number = jnp.where(is_item, jnp.where(is_late[segment], number, FIRST), -FIRST)
    order = jnp.lexsort((item, -number))
    return work._replace(items=jnp.concatenate([work.items[order], work.items[-1:]]))
