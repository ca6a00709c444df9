"""Paged decode for Hopper: one query token a row, K and V read from their pages at the speed of memory.

Decode reads every K and V once and multiplies it G times, so all that counts is that reads never stop.
Programs are persistent, one a multiprocessor. The work is cut into units (row, split, KV head); program p
takes the units p, p + programs, ... Two producer warpgroups, one for K and one for V, run ahead of the
consumer across the borders of units, one TMA copy a page; page ids come to shared memory a unit ahead,
because a load under full memory traffic takes microseconds. The consumer computes transposed, S^T = K Q^T and
O^T = V^T P^T: tokens fill the 64 rows of a wgmma, so that the G queries of a head pad to 8 columns instead of
64 rows.

Where a split starts depends on shapes alone: a row's result has the same bits whatever the other rows are.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import LOG2_E, pl, plgpu
from pallas_kernels.paged_attention.combine_sm90 import CombinePlan, combine_splits
from pallas_kernels.paged_attention.decode_plan import (
    BUFFERS,
    Inputs,
    Outputs,
    Plan,
    Scratch,
    Unit,
    for_each_unit,
    make_plan,
    scratch_types,
)
from pallas_kernels.paged_attention.decode_producer import produce
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec

K_PRODUCER, V_PRODUCER, CONSUMER = range(3)  # warpgroups
MASKED = -1e30  # a logit no token sees: -inf would make -inf - -inf = NaN


def forward(inputs: PagedInputs, spec: PagedSpec) -> tuple[jax.Array, jax.Array]:
    """Attends one query a row; returns out [R, N, H] and lse f32[R, N]."""
    plan = make_plan(inputs, spec)
    out, lse = launch(plan, inputs)
    if plan.num_splits == 1:
        lse = lse[:, 0, :, : plan.group].reshape(plan.num_rows, plan.num_heads)
        return out[:, 0], lse
    merge = CombinePlan(plan.num_splits, plan.config.split, plan.group, spec.window_left, plan.dtype)
    return combine_splits(merge, out, lse, inputs.kv_lengths.astype(jnp.int32))


def launch(plan: Plan, inputs: PagedInputs) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel; splits without a visible token stay unwritten, except where there is one split a
    row."""
    rows, splits, heads = plan.num_rows, plan.num_splits, plan.num_heads
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=[
            jax.ShapeDtypeStruct((rows, splits, heads, plan.head_dim), plan.out_dtype),
            jax.ShapeDtypeStruct((rows, splits, plan.num_kv_heads, plan.columns), jnp.float32),
        ],
        grid=(plan.num_programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=[scratch_types(plan)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    # Padded here, because a TMA copy into tiles takes rows by eights. XLA fuses this with the query's maker.
    query = inputs.query.reshape(rows, plan.num_kv_heads, plan.group, plan.head_dim)
    query = jnp.pad(query, ((0, 0), (0, 0), (0, plan.columns - plan.group), (0, 0)))
    return kernel(
        query,
        inputs.k_pages,
        inputs.v_pages,
        inputs.block_tables.astype(jnp.int32).reshape(-1),
        inputs.kv_lengths.astype(jnp.int32),
        inputs.layer[None],
    )


def _kernel(plan: Plan, *refs):
    inputs, outputs, scratch = Inputs(*refs[:6]), Outputs(*refs[6:8]), refs[8]
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == K_PRODUCER)
    def _():
        produce(plan, inputs, inputs.k_pages, scratch.k, scratch.k_ids, scratch.query)

    @pl.when(warpgroup == V_PRODUCER)
    def _():
        produce(plan, inputs, inputs.v_pages, scratch.v, scratch.v_ids, None)

    @pl.when(warpgroup == CONSUMER)
    def _():
        consume(plan, inputs, outputs, scratch)


class Softmax(NamedTuple):
    """The online softmax of one unit, transposed: a column a query."""

    maximum: jax.Array  # f32[columns], in units of log2
    total: jax.Array  # f32[tile, columns]: summed over tokens once, at the end
    values: jax.Array  # f32[H, columns]


def consume(plan: Plan, inputs: Inputs, outputs: Outputs, scratch: Scratch):
    """The consumer warpgroup: online softmax over a unit's tiles, then its result to global memory."""

    def visit(unit: Unit, _, carry):
        tiles, units = carry
        is_active = unit.num_tiles > 0
        must_store = is_active if plan.num_splits > 1 else True  # with one split nobody else writes the zeros

        @pl.when(must_store)
        def _():
            buffer = lax.rem(units, jnp.int32(BUFFERS))

            @pl.when(is_active)
            def _():
                plgpu.barrier_wait(scratch.query.full.at[buffer])

            query = scratch.query.smem.at[buffer]
            update = functools.partial(attend_tile, plan, scratch, query, unit, tiles)
            state = lax.fori_loop(0, unit.num_tiles, update, init_softmax(plan))

            @pl.when(is_active)
            def _():
                plgpu.barrier_arrive(scratch.query.empty.at[buffer])

            store_unit(plan, unit, state, outputs, scratch.out)

        return tiles + unit.num_tiles, units + is_active.astype(jnp.int32)

    for_each_unit(plan, inputs.lengths, visit, (jnp.int32(0), jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)


def store_transposed(ref, x):
    """ref[...] = x^T for a wgmma accumulator x."""
    ref.transpose((1, 0))[...] = plgpu.layout_cast(x.astype(ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)


def init_softmax(plan: Plan) -> Softmax:
    def full(rows, value):
        return plgpu.layout_cast(jnp.full((rows, plan.columns), value, jnp.float32), plgpu.Layout.WGMMA)

    maximum = jnp.full((plan.columns,), MASKED, jnp.float32)
    maximum = plgpu.layout_cast(maximum, plgpu.Layout.WGMMA.reduce(0))
    return Softmax(maximum, full(plan.config.tile, 0.0), full(plan.head_dim, 0.0))


def attend_tile(plan: Plan, scratch: Scratch, query, unit: Unit, tiles, index, state: Softmax) -> Softmax:
    tile = plan.config.tile
    slot = lax.rem(tiles + index, jnp.int32(plan.config.stages))
    start = unit.start + index * tile
    plgpu.barrier_wait(scratch.k.full.at[slot])

    def multiply_keys(logits_ref):
        plgpu.wgmma(logits_ref, scratch.k.smem.at[slot], query.transpose((1, 0)))
        return logits_ref[...]

    logits = pl.run_scoped(multiply_keys, plgpu.WGMMAAccumulatorRef((tile, plan.columns), jnp.float32))
    plgpu.barrier_arrive(scratch.k.empty.at[slot])
    scale = plan.spec.scale * LOG2_E
    if plan.spec.logits_soft_cap is not None:
        logits = jnp.tanh(logits * (plan.spec.scale / plan.spec.logits_soft_cap))
        scale = plan.spec.logits_soft_cap * LOG2_E
    logits = jnp.where(is_visible(unit, start, logits.shape), logits * scale, MASKED)

    maximum = jnp.maximum(state.maximum, logits.max(axis=0))
    decay = jnp.exp2(state.maximum - maximum)
    weights = jnp.exp2(logits - broadcast_columns(maximum, tile))
    total = state.total * broadcast_columns(decay, tile) + weights
    values = state.values * broadcast_columns(decay, plan.head_dim)
    store_transposed(scratch.weights, weights)

    plgpu.barrier_wait(scratch.v.full.at[slot])

    @pl.when((start < unit.first_visible) | (start + tile > unit.end))
    def _():
        zero_invisible(unit, start, scratch.v.smem.at[slot])

    plgpu.commit_smem()

    def multiply_values(values_ref):
        plgpu.wgmma(values_ref, scratch.v.smem.at[slot].transpose((1, 0)), scratch.weights.transpose((1, 0)))

    values: Any = pl.run_state(multiply_values)(plgpu.WGMMAAccumulatorRef.init(values))
    plgpu.barrier_arrive(scratch.v.empty.at[slot])
    return Softmax(maximum, total, values)


def is_visible(unit: Unit, start, shape):
    token = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA) + start
    return (token >= unit.first_visible) & (token < unit.end)


def zero_invisible(unit: Unit, start, v_smem):
    """Zeroes the values that no query sees: their weights are zero, but what lies there may be NaN."""
    block = (64, 64)  # a few registers a thread
    for first, column in itertools.product(*(range(0, size, 64) for size in v_smem.shape)):
        part = v_smem.at[pl.ds(first, 64), pl.ds(column, 64)]
        values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where(is_visible(unit, start + first, block), values, jnp.zeros_like(values))


def broadcast_columns(x, rows: int):
    """[columns] -> [rows, columns]."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def store_unit(plan: Plan, unit: Unit, state: Softmax, outputs: Outputs, out_smem):
    total = state.total.sum(axis=0)
    norm = jnp.where(total > 0, 1 / total, 0.0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the unit before may still be on its way
    store_transposed(out_smem, state.values * broadcast_columns(norm, plan.head_dim))
    plgpu.commit_smem()
    heads = pl.ds(unit.head * plan.group, plan.group)
    plgpu.copy_smem_to_gmem(out_smem.at[pl.ds(0, plan.group)], outputs.out.at[unit.row, unit.split, heads])
    lse = (state.maximum + jnp.log2(total)) * (1 / LOG2_E)
    outputs.lse[unit.row, unit.split, unit.head] = jnp.where(total > 0, lse, -jnp.inf)
