"""Merges parts of decode's results by their log-sum-exp: a thread block for each row and query head.

The parts are the splits of the row's own keys, and those of the keys that it shares with other rows, which
the prefill kernel attended for all of them together.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import LOG2_E, ceil_div, div, plgpu
from pallas_kernels.paged_attention.decode_consumer import copy_head
from pallas_kernels.paged_attention.decode_plan import Plan
from pallas_kernels.paged_attention.prefill_config import WARPGROUP_ROWS
from pallas_kernels.paged_attention.units import split_range

CHUNK = 16  # parts whose loads are in flight together
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
    tile_q: int = 0,
):
    """Merges out f32[R, splits, N, width] and lse f32[R, splits, K, columns], and shared parts, into out
    [R, N, H] and lse f32[R, N].

    lse = log(sum_s exp(lse_s)),   out = sum_s exp(lse_s - lse) out_s     over the parts with a visible token

    A sink joins here, so that it counts once: it is one more lse_s, of an out_s that is zero.
    """
    num_rows, _, num_heads, _ = out.shape
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan, tile_q, sinks is not None),
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


def _kernel(plan: Plan, tile_q: int, has_sinks: bool, out, lse, lengths, *refs):
    *optional, merged, merged_lse, staged = refs
    row, head = lax.axis_index("row"), lax.axis_index("head")
    state = _init(plan, optional.pop(0)[head] if has_sinks else None)
    state = _merge_own(plan, row, head, out, lse, lengths, state)
    if optional:
        state = _merge_shared(plan, tile_q, row, head, Shared(*optional), state)
    maximum, total, values = state
    staged[...] = (values * jnp.where(total > 0, 1 / total, 0.0)).astype(plan.query_dtype)
    plgpu.commit_smem()
    copy_head(plan, staged, merged.at[row, head])
    merged_lse[row, head] = jnp.where(total > 0, maximum + jnp.log2(total) * (1 / LOG2_E), -jnp.inf)
    plgpu.wait_smem_to_gmem(0)


def _init(plan: Plan, sink) -> State:
    zeros = plgpu.layout_cast(jnp.zeros((plan.width,), jnp.float32), plgpu.Layout.WGMMA.reduce(1))
    if sink is None:
        return State(jnp.float32(FLOOR), jnp.float32(0), zeros)
    return State(sink, jnp.float32(1), zeros)


def _merge_own(plan: Plan, row, head, out, lse, lengths, state: State) -> State:
    kv_head, column = div(head, plan.group), lax.rem(head, jnp.int32(plan.column_period))
    first, stop = split_range(plan, jnp.minimum(lengths[row], plan.capacity))

    def part(index):
        split = first + index
        return lse[row, split, kv_head, column], out.at[row, split, head]

    return _merge(stop - first, min(plan.num_splits, CHUNK), part, state)


def _merge_shared(plan: Plan, tile_q: int, row, head, shared: Shared, state: State) -> State:
    token = shared.token[row]
    kv_head, member = div(head, plan.group), lax.rem(head, jnp.int32(plan.group))
    place = member * tile_q + shared.place[token]
    warpgroup, place = div(place, WARPGROUP_ROWS), lax.rem(place, jnp.int32(WARPGROUP_ROWS))
    first = shared.first_item[token]

    def part(index):
        where = first + index, kv_head, warpgroup, place
        return shared.lse[where], shared.out.at[where]

    return _merge(shared.num_splits[token], CHUNK // 2, part, state)


def _merge(count, chunk: int, part, state: State) -> State:
    """Adds parts 0..count-1, `chunk` at a time; part(index): its log-sum-exp, and where its values are."""

    def step(index, state):
        indices = [index * chunk + i for i in range(chunk)]
        # Beyond the last part that was written it is read again, with no weight: what lies there may be NaN.
        parts = [part(jnp.minimum(i, count - 1)) for i in indices]
        layout = plgpu.Layout.WGMMA.reduce(1)
        loaded = [plgpu.load(ref, layout=layout, optimized=False) for _, ref in parts]
        maximum = functools.reduce(jnp.maximum, [log for log, _ in parts], state.maximum)
        decay = jnp.exp2((state.maximum - maximum) * LOG2_E)
        total, values = state.total * decay, state.values * decay
        for i, (log, _), each in zip(indices, parts, loaded, strict=True):
            weight = jnp.where(i < count, jnp.exp2((log - maximum) * LOG2_E), 0.0)
            total += weight
            values += each * weight
        return State(maximum, total, values)

    return lax.fori_loop(0, ceil_div(count, chunk), step, state)
