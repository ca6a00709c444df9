"""Merges parts of decode's results by their log-sum-exp: a thread block for each row and query head.

    lse = log(sum_s exp(lse_s)),   out = sum_s exp(lse_s - lse) out_s     over the parts with a visible token

The parts are the splits of the row's own keys, and those of the keys that it shares with other rows, which
the prefill kernel attended for all of them together.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import LOG2_E, ceil_div, div, plgpu
from pallas_kernels.paged_attention.decode_consumer import copy_head
from pallas_kernels.paged_attention.decode_plan import Cut, Plan
from pallas_kernels.paged_attention.prefill_config import WARPGROUP_ROWS
from pallas_kernels.paged_attention.units import split_range

CHUNK = 16  # parts whose loads are in flight together
THREADS = 128  # of a thread block
FLOOR = -1e30  # the maximum before any part: finite, so that no difference is NaN


class Shared(NamedTuple):
    """Parts of shared keys: the prefill kernel's results, where each token's lie, and each row's token.

    Token t: item first_item[t] and the num_splits[t] - 1 after it, row of the tile head x tile_q + place[t].
    """

    out: Any  # f32[max_items, K, warpgroups, 64, width]
    lse: Any  # f32[max_items, K, warpgroups, 64]
    first_item: Any  # i32[tokens]
    num_splits: Any
    place: Any
    token: Any  # i32[R]


class Parts(NamedTuple):
    """Parts of one row and head. part(index): its log-sum-exp, and where its values [width] are."""

    count: Any
    limit: int  # of the count
    part: Callable[[Any], tuple[Any, Any]]


class State(NamedTuple):
    """The merged parts so far: values relative to exp(maximum)."""

    maximum: Any  # f32[], a log-sum-exp
    total: Any  # f32[]
    values: Any  # f32[width]


def combine_parts(
    plan: Plan,
    out: jax.Array,
    lse: jax.Array,
    lengths: jax.Array,
    sinks: jax.Array | None,
    shared: Shared | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Merges out f32[R, splits, N, width] and lse f32[R, splits, K, columns], and shared parts, into out
    [R, N, H] and lse f32[R, N].

    A sink joins here, so that it counts once: it is one more lse_s, of an out_s that is zero.
    """
    num_rows, _, num_heads, _ = out.shape
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan, sinks is not None),
        out_type=[
            jax.ShapeDtypeStruct((num_rows, num_heads, plan.head_dim), plan.query_dtype),
            jax.ShapeDtypeStruct((num_rows, num_heads), jnp.float32),
        ],
        grid=(num_heads, num_rows),
        grid_names=("head", "row"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((plan.width,), plan.query_dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="combine_parts",
    )
    operands = () if sinks is None else (sinks.astype(jnp.float32),)
    return kernel(out, lse, lengths, *operands, *(() if shared is None else shared))


def _kernel(plan: Plan, has_sinks: bool, out, lse, lengths, *refs):
    *optional, merged, merged_lse, staged = refs
    row, head = lax.axis_index("row"), lax.axis_index("head")
    sink = optional.pop(0)[head] if has_sinks else None
    # All numbers before any part: one after the other they would be waited for.
    parts = [_own_parts(plan, row, head, out, lse, lengths)]
    if plan.cut is not None:
        parts.append(_shared_parts(plan, plan.cut, row, head, Shared(*optional)))
    state = _init(plan, sink)
    for each in parts:
        state = _merge(each, _layout(plan), state)
    maximum, total, values = state
    staged[...] = (values * jnp.where(total > 0, 1 / total, 0.0)).astype(plan.query_dtype)
    plgpu.commit_smem()
    copy_head(plan, staged, merged.at[row, head])
    merged_lse[row, head] = jnp.where(total > 0, maximum + jnp.log2(total) * (1 / LOG2_E), -jnp.inf)
    plgpu.wait_smem_to_gmem(0)


def _own_parts(plan: Plan, row, head, out, lse, lengths) -> Parts:
    kv_head, column = div(head, plan.group), lax.rem(head, jnp.int32(plan.column_period))
    first, stop = split_range(plan, jnp.minimum(lengths[row], plan.capacity))

    def part(index):
        split = first + index
        return lse[row, split, kv_head, column], out.at[row, split, head]

    return Parts(stop - first, plan.num_splits, part)


def _shared_parts(plan: Plan, cut: Cut, row, head, shared: Shared) -> Parts:
    token = shared.token[row]
    kv_head, member = div(head, plan.group), lax.rem(head, jnp.int32(plan.group))
    place = member * cut.tile_q + shared.place[token]
    warpgroup, place = div(place, WARPGROUP_ROWS), lax.rem(place, jnp.int32(WARPGROUP_ROWS))
    first = shared.first_item[token]

    def part(index):
        where = first + index, kv_head, warpgroup, place
        return shared.lse[where], shared.out.at[where]

    return Parts(shared.num_splits[token], cut.splits, part)


def _layout(plan: Plan) -> Any:
    """A number a thread, where there are so many; else some threads hold the same."""
    if plan.width % THREADS == 0:
        return plgpu.Layout.WG_STRIDED((plan.width,), vec_size=plan.width // THREADS)
    return plgpu.Layout.WGMMA.reduce(1)


def _init(plan: Plan, sink) -> State:
    """No part; a sink counts as one of zeros."""
    zeros = plgpu.layout_cast(jnp.zeros((plan.width,), jnp.float32), _layout(plan))
    if sink is None:
        return State(jnp.float32(FLOOR), jnp.float32(0), zeros)
    return State(sink, jnp.float32(1), zeros)


def _merge(parts: Parts, layout, state: State) -> State:
    """Adds the parts, CHUNK at a time, to those before."""
    chunk = min(parts.limit, CHUNK)
    if parts.limit == chunk:  # no loop: every load may start before any is waited for
        return _merge_chunk(parts, layout, range(chunk), state)

    def step(index, state):
        return _merge_chunk(parts, layout, [index * chunk + i for i in range(chunk)], state)

    return lax.fori_loop(0, ceil_div(parts.count, chunk), step, state)


def _merge_chunk(parts: Parts, layout, indices, state: State) -> State:
    # Beyond the last part that was written it is read again, with no weight: what lies there may be NaN.
    last = jnp.maximum(parts.count - 1, 0)
    found = [parts.part(jnp.minimum(i, last)) for i in indices]
    values = [plgpu.load(ref, layout=layout, optimized=False) for _, ref in found]
    logs = [jnp.where(i < parts.count, log, FLOOR) for i, (log, _) in zip(indices, found, strict=True)]
    maximum = functools.reduce(jnp.maximum, logs, state.maximum)
    decay = jnp.exp2((state.maximum - maximum) * LOG2_E)
    total, merged = state.total * decay, state.values * decay
    for i, log, each in zip(indices, logs, values, strict=True):
        weight = jnp.where(i < parts.count, jnp.exp2((log - maximum) * LOG2_E), 0.0)
        total += weight
        merged += jnp.where(lax.broadcast(weight > 0, each.shape), each * weight, 0.0)
    return State(maximum, total, merged)
