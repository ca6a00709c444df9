"""Paged decode for Hopper: one query token a row, K and V read from their pages at the speed of memory.

Decode reads every K and V once and multiplies it G times, so all that counts is that reads never stop.
Programs are persistent, one a multiprocessor. The work is cut into units (row, split, KV head); program p
takes the units p, p + programs, ..., or draws them where config.dynamic. Two producer warpgroups, one for K
and one for V, run ahead of the consumers across the borders of units, one TMA copy a page; page ids come to
shared memory a unit ahead, because a load under full memory traffic takes microseconds. Consumers compute
transposed, S^T = K Q^T and O^T = V^T P^T: tokens fill the 64 rows of a wgmma, so that the G queries of a head
pad to 8 columns instead of 64 rows. Two consumers take a program's tiles in turn.

Quantized pages come as codes, and decode_codes multiplies them: the scale of a slot is a factor of a row of
S^T, that of its value a factor of a row of P^T.

Where a split starts depends on shapes alone: a row's result has the same bits whatever the other rows hold,
and with spec.batch_invariant however many they are.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import make_kernel, mutable, pl, plgpu
from pallas_kernels.paged_attention.combine_sm90 import combine_parts
from pallas_kernels.paged_attention.decode_codes import split_query
from pallas_kernels.paged_attention.decode_consumer import consume
from pallas_kernels.paged_attention.decode_memory import Inputs, Outputs
from pallas_kernels.paged_attention.decode_plan import Plan, make_plan, scratch_types
from pallas_kernels.paged_attention.decode_producer import fetch_numbers, produce
from pallas_kernels.paged_attention.plan import Counters
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec
from pallas_kernels.paged_attention.units import Schedule, see_rows

K_PRODUCER, V_PRODUCER, FIRST_CONSUMER = range(3)  # warpgroups
REGISTERS = {1: None, 2: (32, 224)}  # of producers and consumers; they share 65,536


def forward(
    inputs: PagedInputs,
    spec: PagedSpec,
    others: jax.Array | None = None,
    counter: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends one query a row; returns out [R, N, H] and lse f32[R, N].

    With query_start a row's query lies among others, and its result among theirs: `others` [tokens, N, H],
    written in place and returned as out. Rows of more queries, or of none, are left alone; their lse is
    undefined.
    """
    return attend(make_plan(inputs, spec), inputs, others, counter)


def attend(
    plan: Plan, inputs: PagedInputs, others: jax.Array | None = None, counter: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The same of a plan that was made before."""
    among = None if others is None else mutable(others)
    operands = operands_of(plan, inputs, counter)
    if plan.is_merged:
        return combine_parts(plan, launch(plan, operands), operands, inputs.sinks, among=among)
    out, lse = launch(plan, operands._replace(out=among))
    return out, lse[:, 0, :, : plan.group].reshape(plan.num_rows, plan.num_heads)


def launch(plan: Plan, operands: Inputs) -> Outputs:
    """Runs the kernel; splits without a visible token stay unwritten, except where there is one split a
    row."""
    rows, splits, heads = plan.num_rows, plan.num_splits, plan.num_heads
    shape = (rows, splits, heads, plan.width) if plan.is_merged else (rows, heads, plan.head_dim)
    is_own = operands.out is None
    own = [jax.ShapeDtypeStruct(shape, plan.out_dtype)] if is_own else []
    lse = jax.ShapeDtypeStruct((rows, splits, plan.num_kv_heads, plan.columns), jnp.float32)
    leaves, tree = jax.tree.flatten(operands)
    kernel = make_kernel(
        functools.partial(_kernel, plan, tree),
        out_type=[*own, lse],
        grid=(plan.num_programs,),
        grid_names=("program",),
        num_threads=FIRST_CONSUMER + plan.config.consumers,
        thread_name="warpgroup",
        scratch_types=[scratch_types(plan)],
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="paged_decode",
    )
    *own, lse = kernel(*leaves)
    return Outputs(own[0] if own else operands.out[...], lse)


def operands_of(plan: Plan, inputs: PagedInputs, counter: jax.Array | None = None) -> Inputs:
    counter = Counters.zeros().decode if counter is None else counter
    tables, start, query = inputs.block_tables, inputs.query_start, inputs.query
    query, factor = _query_operands(plan, query, start)
    return Inputs(
        query=query,
        query_factor=factor,
        starts=None if start is None else start.astype(jnp.int32),
        k_pages=inputs.k_pages,
        v_pages=inputs.v_pages,
        tables=None if tables is None else tables.astype(jnp.int32).reshape(-1),
        lengths=inputs.kv_lengths.astype(jnp.int32),
        skipped=inputs.skipped_pages,
        layer=inputs.layer[None],
        k_scale=inputs.k_scale,
        v_scale=inputs.v_scale,
        sinks=_by_column(plan, inputs.sinks),
        slopes=_by_column(plan, inputs.alibi_slopes),
        counter=jax.new_ref(counter) if plan.config.dynamic or plan.is_ragged else None,
        out=None,
    )


def _query_operands(plan: Plan, query: jax.Array, start: jax.Array | None) -> tuple[jax.Array, Any]:
    """The query as it lies, or, where pages are quantized, its codes row by row and their factor."""
    if not plan.is_quantized:
        return query, None
    if start is not None:
        query = query.at[start[:-1]].get(mode="clip")
    *codes, factor = split_query(query, plan.page_dtype)
    return jnp.stack(codes, axis=1), _by_column(plan, factor)


def _by_column(plan: Plan, x: jax.Array | None) -> jax.Array | None:
    """[..., N] -> f32[..., K, columns], zero in columns that are not of the KV head."""
    if x is None:
        return None
    x = x.astype(jnp.float32).reshape(*x.shape[:-1], plan.num_kv_heads, plan.group)
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, plan.columns - plan.group)))


def _kernel(plan: Plan, operands, *refs):
    inputs = jax.tree.unflatten(operands, refs[: operands.num_leaves])
    # A batch of prompts alone: no block has to look through the rows.
    has_rows = inputs.counter[1] == 0 if plan.is_ragged else True
    pl.when(has_rows)(lambda: _decode(plan, inputs, *refs[operands.num_leaves :]))


def _decode(plan: Plan, inputs: Inputs, *refs):
    *own, lse, scratch = refs
    outputs = Outputs(own[0] if own else inputs.out, lse)
    warpgroup = lax.axis_index("warpgroup")
    registers: Any = REGISTERS[plan.config.consumers]

    @pl.when(warpgroup < FIRST_CONSUMER)
    def _():
        if registers:
            plgpu.set_max_registers(registers[0], action="decrease")

        @pl.when(warpgroup == K_PRODUCER)
        def _():
            fetch_numbers(plan, inputs, scratch)
            plgpu.barrier_wait(scratch.lengths_full)
            see_rows(plan, scratch)
            plgpu.barrier_arrive(scratch.counted)
            plgpu.barrier_wait(scratch.counted)  # its threads look at each other's counts
            schedule = Schedule.of(scratch, inputs.counter if plan.config.dynamic else None)
            produce(plan, inputs, inputs.k_pages, inputs.k_scale, scratch.k, schedule, scratch.queries)

        @pl.when(warpgroup == V_PRODUCER)
        def _():
            plgpu.barrier_wait(scratch.counted)
            produce(plan, inputs, inputs.v_pages, inputs.v_scale, scratch.v, Schedule.of(scratch), None)

    @pl.when(warpgroup >= FIRST_CONSUMER)
    def _():
        if registers:
            plgpu.set_max_registers(registers[1], action="increase")
        plgpu.barrier_wait(scratch.counted)
        consume(plan, warpgroup - FIRST_CONSUMER, outputs, scratch)
