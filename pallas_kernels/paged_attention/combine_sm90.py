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
import numpy as np
from jax import lax

from pallas_kernels.mosaic import LOG2_E, ceil_div, clip, div, pl, plgpu, rem, where
from pallas_kernels.mosaic_inline import THREADS
from pallas_kernels.paged_attention.decode_memory import Inputs, Outputs
from pallas_kernels.paged_attention.decode_plan import Plan
from pallas_kernels.paged_attention.plan import is_single
from pallas_kernels.paged_attention.prefill_config import WARPGROUP_ROWS
from pallas_kernels.paged_attention.units import split_range

CHUNK = 32  # parts whose loads are in flight together
FLOOR = -1e30  # the maximum before any part: finite, so that no difference is NaN


class Shared(NamedTuple):
    """Parts of shared keys: the prefill kernel's results, and where each row's lie.

    Row r: item first_item[r] and the num_splits[r] - 1 after it, row of the tile head x tile_q + place[r].
    """

    out: Any  # f32[max_items, K, warpgroups, 64, width]
    lse: Any  # f32[max_items, K, warpgroups, 64]
    first_item: Any  # i32[R]
    num_splits: Any
    place: Any


class Operands(NamedTuple):
    """Operands in global memory; None where the plan has none."""

    out: Any  # f32[R, splits, N, width]: the decode kernel's parts
    lse: Any  # f32[R, splits, K, columns]
    lengths: Any  # i32[R]
    starts: Any  # i32[R + 1]
    sinks: Any  # f32[N]
    shared: Shared | None
    among: Any  # [tokens, N, H]


class Parts(NamedTuple):
    """Parts of one row and head. part(index), index < limit: its log-sum-exp, and where its values [width]
    are; beyond the count whatever can be read."""

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
    parts: Outputs,
    inputs: Inputs,
    sinks: jax.Array | None,
    shared: Shared | None = None,
    among: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Merges parts of the decode kernel, and shared ones, into out [R, N, H] and lse f32[R, N].

    A sink joins here, so that it counts once: it is one more lse_s, of an out_s that is zero. among: a
    reference to others' results [tokens, N, H], among which those of ragged rows go.
    """
    num_rows, num_heads = plan.num_rows, plan.num_heads
    operands = Operands(*parts, inputs.lengths, inputs.starts, sinks, shared, among)
    if sinks is not None:
        operands = operands._replace(sinks=sinks.astype(jnp.float32))
    out = jax.ShapeDtypeStruct((num_rows, num_heads, plan.head_dim), plan.query_dtype)
    lse = jax.ShapeDtypeStruct((num_rows, num_heads), jnp.float32)
    leaves, tree = jax.tree.flatten(operands)
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan, tree),
        out_type=[lse] if plan.is_ragged else [out, lse],
        grid=(num_heads, num_rows),
        grid_names=("head", "row"),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((plan.width,), plan.query_dtype)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="combine_parts",
    )
    *own, merged_lse = kernel(*leaves)
    return (own[0] if own else among[...]), merged_lse


def _kernel(plan: Plan, operands, *refs):
    inputs = jax.tree.unflatten(operands, refs[: operands.num_leaves])
    *own, merged_lse, staged = refs[operands.num_leaves :]
    row, head = lax.axis_index("row"), lax.axis_index("head")
    length = lax.max(inputs.lengths[row], 0)

    @pl.when(
        is_single(inputs.starts[row], inputs.starts[row + 1], plan.num_tokens) if plan.is_ragged else True
    )
    def _():
        maximum, total, values = _merge_all(plan, inputs, row, head, length)
        values = (values * where(total != 0, 1 / total, 0.0)).astype(plan.query_dtype)
        out = own[0].at[row, head] if own else inputs.among.at[inputs.starts[row], head]
        merged_lse[row, head] = where(total != 0, maximum + jnp.log2(total) * (1 / LOG2_E), -jnp.inf)
        if plan.width == plan.head_dim:
            out[...] = values
        else:
            staged[...] = values
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, plan.head_dim)], out)
            plgpu.wait_smem_to_gmem(0)


def _merge_all(plan: Plan, inputs: Operands, row, head, length) -> State:
    # All numbers before any part: one after the other they would be waited for.
    sink = None if inputs.sinks is None else inputs.sinks[head]
    parts = [_own_parts(plan, row, head, inputs, length)]
    if inputs.shared is not None:
        parts.append(_shared_parts(plan, row, head, inputs.shared))
    state = _init(plan, sink)
    for each in parts:
        state = _merge(each, _layout(plan), state)
    return state


def _own_parts(plan: Plan, row, head, inputs: Operands, length) -> Parts:
    kv_head, column = div(head, plan.group), rem(head, plan.group)
    first, stop = split_range(plan, lax.min(length, plan.capacity))
    last = lax.max(stop - first - 1, 0)

    def part(index):
        split = first + lax.min(index, last)
        return inputs.lse[row, split, kv_head, column], inputs.out.at[row, split, head]

    return Parts(stop - first, plan.num_splits, part)


def _shared_parts(plan: Plan, row, head, shared: Shared) -> Parts:
    cut = plan.cut
    assert cut is not None
    kv_head, member = div(head, plan.group), rem(head, plan.group)
    place = member * cut.tile_q + shared.place[row]
    warpgroup, place = div(place, WARPGROUP_ROWS), rem(place, WARPGROUP_ROWS)
    # A tile has room for as many items as it may have. So parts lie at fixed distances, and their addresses
    # take no registers (64 rows of 32 heads, up to 8 + 3 parts, an H200: 5.3 us instead of 7.0).
    first = clip(shared.first_item[row], 0, shared.lse.shape[0] - cut.splits)

    def part(index):
        index = index if cut.splits <= CHUNK else lax.min(index, cut.splits - 1)
        part = first + index, kv_head, warpgroup, place
        return shared.lse[part], shared.out.at[part]

    return Parts(shared.num_splits[row], cut.splits, part)


def _layout(plan: Plan) -> Any:
    """A number a thread, where there are so many; else some threads hold the same."""
    if plan.width % THREADS == 0:
        return plgpu.Layout.WG_STRIDED((plan.width,), vec_size=plan.width // THREADS)
    return plgpu.Layout.WGMMA.reduce(1)


def _init(plan: Plan, sink) -> State:
    """No part; a sink counts as one of zeros."""
    zeros = plgpu.layout_cast(jnp.zeros((plan.width,), jnp.float32), _layout(plan))
    if sink is None:
        return State(np.float32(FLOOR), np.float32(0), zeros)
    return State(sink, np.float32(1), zeros)


def _merge(parts: Parts, layout, state: State) -> State:
    """Adds the parts, CHUNK at a time, to those before."""
    chunk = min(parts.limit, CHUNK)
    if parts.limit == chunk:  # no loop: every load may start before any is waited for
        return _merge_chunk(parts, layout, range(chunk), state)

    def step(index, state):
        return _merge_chunk(parts, layout, [index * chunk + i for i in range(chunk)], state)

    return lax.fori_loop(0, ceil_div(parts.count, chunk), step, state)


def _merge_chunk(parts: Parts, layout, indices, state: State) -> State:
    # What is read beyond the count has no weight, and may be NaN.
    found = [parts.part(i) for i in indices]
    values = [plgpu.load(ref, layout=layout, optimized=False) for _, ref in found]
    logs = [where(i < parts.count, log, FLOOR) for i, (log, _) in zip(indices, found, strict=True)]
    maximum = functools.reduce(lax.max, logs, state.maximum)
    decay = lax.exp2((state.maximum - maximum) * LOG2_E)
    total, merged = state.total * decay, state.values * decay
    for i, log, each in zip(indices, logs, values, strict=True):
        weight = where(i < parts.count, lax.exp2((log - maximum) * LOG2_E), 0.0)
        total += weight
        merged += where(lax.broadcast(weight != 0, each.shape), each * weight, 0.0)
    return State(maximum, total, merged)
