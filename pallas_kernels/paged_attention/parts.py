"""Parts of a query's result, merged by their log-sum-exp.

    lse = log(sum_s exp(lse_s)),   out = sum_s exp(lse_s - lse) out_s     over the parts with a visible token

The parts are the splits of a row's own keys, and those of the keys that it shares with other rows, which the
prefill kernel attended for all of them together. Who merges them is one warpgroup: of a kernel of its own
(combine_sm90.py), or of the decode kernel (decode_results.py).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import LOG2_E, ceil_div, div, plgpu
from pallas_kernels.paged_attention.decode_plan import Cut, Plan, Shared
from pallas_kernels.paged_attention.prefill_config import WARPGROUP_ROWS

IN_FLIGHT = 16 * 128  # values that are loaded together, of all heads and parts: 16 registers a thread
CHUNK = 16  # at most so many parts of a head
THREADS = 128  # of a warpgroup
FLOOR = -1e30  # the maximum before any part: finite, so that no difference is NaN


class Parts(NamedTuple):
    """Parts of a row's heads. part(index, head): its log-sum-exp, and where its values [width] are."""

    count: Any
    limit: int  # of the count
    part: Callable[[Any, Any], tuple[Any, Any]]


class State(NamedTuple):
    """The merged parts so far of one head: values relative to exp(maximum)."""

    maximum: Any  # f32[], a log-sum-exp
    total: Any  # f32[]
    values: Any  # f32[width]

    @property
    def normalized(self) -> jax.Array:
        return self.values * jnp.where(self.total > 0, 1 / self.total, 0.0)

    @property
    def lse(self) -> jax.Array:
        return jnp.where(self.total > 0, self.maximum + jnp.log2(self.total) * (1 / LOG2_E), -jnp.inf)


def init_state(plan: Plan, sink: Any | None = None) -> State:
    """No part; a sink counts as one of zeros."""
    zeros = plgpu.layout_cast(jnp.zeros((plan.width,), jnp.float32), values_layout(plan))
    if sink is None:
        return State(jnp.float32(FLOOR), jnp.float32(0), zeros)
    return State(sink, jnp.float32(1), zeros)


def values_layout(plan: Plan) -> Any:
    """A number a thread, where there are so many; else some threads hold the same."""
    if plan.width % THREADS == 0:
        return plgpu.Layout.WG_STRIDED((plan.width,), vec_size=plan.width // THREADS)
    return plgpu.Layout.WGMMA.reduce(1)


def shared_parts(plan: Plan, cut: Cut, row: Any, shared: Shared) -> Parts:
    """The parts of a row's shared keys."""
    token = shared.token[row]
    first, row_place = shared.first_item[token], shared.place[token]

    def part(index, head):
        kv_head, member = div(head, plan.group), lax.rem(head, jnp.int32(plan.group))
        place = member * cut.tile_q + row_place
        warpgroup, place = div(place, WARPGROUP_ROWS), lax.rem(place, jnp.int32(WARPGROUP_ROWS))
        where = first + index, kv_head, warpgroup, place
        return shared.lse[where], shared.out.at[where]

    return Parts(shared.num_splits[token], cut.splits, part)


def merge(plan: Plan, parts: Parts, heads: Sequence[Any], states: Sequence[State]) -> list[State]:
    """Adds the parts of these heads to their states, some at a time."""
    chunk = min(parts.limit, CHUNK, max(1, IN_FLIGHT // (len(heads) * plan.width)))
    if parts.limit == chunk:  # no loop: every load may start before any is waited for
        return _merge_chunk(plan, parts, range(chunk), heads, states)

    def step(index, states):
        return _merge_chunk(plan, parts, [index * chunk + i for i in range(chunk)], heads, states)

    return lax.fori_loop(0, ceil_div(parts.count, chunk), step, list(states))


def _merge_chunk(plan: Plan, parts: Parts, indices, heads, states) -> list[State]:
    # Beyond the last part that was written it is read again, with no weight: what lies there may be NaN.
    last = jnp.maximum(parts.count - 1, 0)
    found = [[parts.part(jnp.minimum(i, last), head) for i in indices] for head in heads]
    load = functools.partial(plgpu.load, layout=values_layout(plan), optimized=False)
    values = [[load(ref) for _, ref in of_head] for of_head in found]
    is_part = [i < parts.count for i in indices]
    merged = []
    for state, of_head, loaded in zip(states, found, values, strict=True):
        logs = [jnp.where(own, log, FLOOR) for own, (log, _) in zip(is_part, of_head, strict=True)]
        merged.append(_merge_values(state, is_part, logs, loaded))
    return merged


def _merge_values(state: State, is_part, logs, values) -> State:
    maximum = functools.reduce(jnp.maximum, logs, state.maximum)
    decay = jnp.exp2((state.maximum - maximum) * LOG2_E)
    total, merged = state.total * decay, state.values * decay
    for own, log, each in zip(is_part, logs, values, strict=True):
        weight = jnp.where(own, jnp.exp2((log - maximum) * LOG2_E), 0.0)
        total += weight
        merged += jnp.where(lax.broadcast(weight > 0, each.shape), each * weight, 0.0)
    return State(maximum, total, merged)
