"""What becomes of a unit's softmax: the result of its row, or a part of it.

Parts are merged by a kernel after this one, or by the last unit of a row to end, as the partial tiles of
Stream-K (Osama et al., 2023, section 4): a unit writes its part and counts its arrival; who finds all others
there reads their parts, which are still in the L2 cache. Parts are merged in the order of the keys, whoever
does it: bits do not depend on which unit was last.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import LOG2_E, arrive, broadcast_columns, pl, plgpu, store_deinterleaved
from pallas_kernels.paged_attention.decode_plan import Inputs, Outputs, Plan, Scratch
from pallas_kernels.paged_attention.decode_tile import store_transposed
from pallas_kernels.paged_attention.parts import Parts, init_state, merge, shared_parts
from pallas_kernels.paged_attention.units import Unit, split_range

MERGED = 8 * 128  # values that a unit merges together: eight registers a thread


class Result(NamedTuple):
    """A softmax whose totals are summed over tokens."""

    maximum: jax.Array  # f32[columns], in units of log2
    total: jax.Array  # f32[columns]
    values: jax.Array  # f32[H, columns]


class Destination(NamedTuple):
    """Where the results of a unit go."""

    plan: Plan
    unit: Unit
    inputs: Inputs
    outputs: Outputs
    scratch: Scratch

    @property
    def heads(self) -> list:
        """The unit's query heads."""
        first = self.unit.head * self.plan.group
        return [first + i for i in range(self.plan.group)]

    def column(self, head):
        """The column of a query head among those of its unit."""
        return lax.rem(head, jnp.int32(self.plan.column_period))


def merge_results(plan: Plan, first: Result, second: Result) -> Result:
    maximum = jnp.maximum(first.maximum, second.maximum)
    decays = jnp.exp2(first.maximum - maximum), jnp.exp2(second.maximum - maximum)
    values = first.values * broadcast_columns(decays[0], plan.width)
    values += second.values * broadcast_columns(decays[1], plan.width)
    return Result(maximum, first.total * decays[0] + second.total * decays[1], values)


def store_unit(to: Destination, result: Result, sinks):
    """Stores the result of a unit, and those of its row if it is the one to merge them."""
    plan, scratch = to.plan, to.scratch
    if sinks is not None and not plan.is_combined:  # else the sink joins where the parts are combined
        result = _join_sinks(to, result, sinks)
    norm = jnp.where(result.total > 0, 1 / result.total, 0.0)
    lse = (result.maximum + jnp.log2(result.total)) * (1 / LOG2_E)
    lse = jnp.where(result.total > 0, lse, -jnp.inf)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the unit before may still be on its way
    store = store_deinterleaved if plan.is_quantized else store_transposed
    store(scratch.out, result.values * broadcast_columns(norm, plan.width))
    if not plan.merges_here:
        plgpu.commit_smem()
        _store_part(to, lse)
        return
    scratch.joined.lse[...] = lse
    plgpu.commit_smem()
    first, stop = split_range(plan, to.unit.length)
    count = jnp.maximum(stop - first, 1)

    @pl.when(count == 1)
    def _():
        _store_merged(to, _part_here(to))

    @pl.when(count > 1)
    def _():
        _store_part(to, lse)
        _arrive(to)

        @pl.when(scratch.joined.arrival[0] == count - 1)
        def _():
            _store_merged(to, _parts_of_row(to, first, count))


def _join_sinks(to: Destination, result: Result, sinks) -> Result:
    """A sink counts once: with the first part."""
    if to.plan.is_merged:
        is_first = to.unit.split == split_range(to.plan, to.unit.length)[0]
        sinks = lax.select(lax.broadcast(is_first, sinks.shape), sinks, jnp.full_like(sinks, -jnp.inf))
    maximum = jnp.maximum(result.maximum, sinks)
    decay = jnp.exp2(result.maximum - maximum)
    total = result.total * decay + jnp.exp2(sinks - maximum)
    return Result(maximum, total, result.values * broadcast_columns(decay, to.plan.width))


def _store_part(to: Destination, lse):
    """Starts the copies of what lies in shared memory."""
    place = to.unit.row, to.unit.split
    _copy_heads(to, to.outputs.part.at[place])
    to.outputs.part_lse[*place, to.unit.head] = lse


def _copy_heads(to: Destination, out):
    plan = to.plan
    first_head, source = to.heads[0], to.scratch.out
    first_column = to.column(first_head) if plan.shares_columns else 0
    if plan.width == plan.part_columns:
        source = source.at[pl.ds(first_column, plan.group)]
        plgpu.copy_smem_to_gmem(source, out.at[pl.ds(first_head, plan.group)])
        return
    for i, head in enumerate(to.heads):
        copy_head(plan, source.at[first_column + i], out.at[head])


def copy_head(plan: Plan, source, out):
    """Starts the copies of one head's values [width] to global memory [H]."""
    plgpu.copy_smem_to_gmem(source.at[pl.ds(0, plan.whole)], out.at[pl.ds(0, plan.whole)])
    if rest := plan.head_dim - plan.whole:
        source = source.at[pl.ds(plan.width - rest, rest)]
        plgpu.copy_smem_to_gmem(source, out.at[pl.ds(plan.whole, rest)])


def _arrive(to: Destination):
    plgpu.wait_smem_to_gmem(0)
    place = to.plan.first_arrival + to.unit.row * to.plan.num_kv_heads + to.unit.head
    arrive(to.inputs.counters.at[pl.ds(place, 1)], to.scratch.joined.arrival)


def _part_here(to: Destination) -> Parts:
    """The only part, which is still in shared memory."""

    def part(_, head):
        column = to.column(head)
        return to.scratch.joined.lse[column], to.scratch.out.at[column]

    return Parts(jnp.int32(1), 1, part)


def _parts_of_row(to: Destination, first, count) -> Parts:
    def part(index, head):
        place = to.unit.row, first + index
        return to.outputs.part_lse[*place, to.unit.head, to.column(head)], to.outputs.part.at[*place, head]

    return Parts(count, to.plan.num_splits, part)


def _store_merged(to: Destination, own: Parts):
    """Merges a row's parts, own and shared, and starts the copies of the result."""
    plan, outputs, staged = to.plan, to.outputs, to.scratch.joined.out
    parts = [own]
    if plan.cut is not None:
        parts.append(shared_parts(plan, plan.cut, to.unit.row, to.inputs.shared))
    together = max(1, MERGED // plan.width)
    for first in range(0, plan.group, together):
        heads = to.heads[first : first + together]
        states = [init_state(plan) for _ in heads]
        for each in parts:
            states = merge(plan, each, heads, states)
        for i, (head, state) in enumerate(zip(heads, states, strict=True)):
            staged[first + i] = state.normalized.astype(plan.query_dtype)
            outputs.lse[to.unit.row, head] = state.lse
    plgpu.commit_smem()
    for i, head in enumerate(to.heads):
        copy_head(plan, staged.at[i], outputs.out.at[to.unit.row, head])
