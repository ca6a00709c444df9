"""Paged prefill for Hopper: ragged queries of many rows against K and V in their pages.

The forward pass of FlashAttention-3 (warp specialization, section 3.1), where a tile of queries is a work
item computed from the batch: (row, tokens, KV tiles). A tile holds tokens x query heads of one KV head, so
that a row of few tokens still fills the 64 rows of a wgmma, and each K and V tile serves the whole group.

Programs are persistent, one a multiprocessor, and draw units of work (item, KV head), heavy ones first. The
loading warpgroup runs ahead of the others over the borders of units: it draws a unit, and copies its record
to shared memory, while it loads the unit before; it issues one TMA copy a page, shared by its warps, the page
ids read from the block table. Nothing waits for the first loads of a unit, or for the last stores of another.

TMA moves eights of tokens, octets, each of which a tile holds once for every head of the group. Where that
fills no tile (seven heads have three octets each in the 24 of three warpgroups, and leave three idle) tiles
are packed: an octet's heads follow each other, then those of the next octet, and a tile begins wherever the
one before has ended. It costs a copy for each octet, and that results are found by head.

So tiles start at multiples of eight tokens of the batch, wherever rows start: tokens of other rows are
computed and dropped. A tile of its row's tokens alone leaves by TMA as it lies in swizzled memory, through
the buffer of its queries; any other goes from registers, row by row.

Quantized pages come as codes, and a warpgroup of their own widens them to bf16, which holds them exactly:
once for all compute warpgroups, whose wgmmas read both K and V from shared memory. The scale of a slot is a
factor of a column of the logits, that of its value a factor of a column of the weights.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import make_kernel, plgpu, specialize
from pallas_kernels.paged_attention.prefill_config import WARPGROUP_ROWS
from pallas_kernels.paged_attention.prefill_consumer import attend_units
from pallas_kernels.paged_attention.prefill_plan import (
    Inputs,
    Outputs,
    PrefillPlan,
    per_row,
    scratch_types,
)
from pallas_kernels.paged_attention.prefill_producer import load_units, widen_units
from pallas_kernels.paged_attention.spec import PagedInputs


def launch(plan: PrefillPlan, inputs: PagedInputs, items: jax.Array, counter: jax.Array) -> Outputs:
    """Runs the kernel on query [tokens, N, H] and a WorkList's items; tokens of no item stay unwritten."""
    config = plan.config
    unit_rows = (plan.max_items, plan.num_kv_heads, config.warpgroups, WARPGROUP_ROWS)
    out = jax.ShapeDtypeStruct((plan.num_tokens, plan.num_heads, plan.head_dim), plan.query_dtype)
    if plan.has_parts:
        out = jax.ShapeDtypeStruct((*unit_rows, plan.width), jnp.float32)
    leaves, operands = jax.tree.flatten(operands_of(plan, inputs, items, counter))
    kernel = make_kernel(
        functools.partial(_kernel, plan, operands),
        out_type=[out, jax.ShapeDtypeStruct(unit_rows, jnp.float32)],
        grid=(plan.num_programs,),
        grid_names=("program",),
        num_threads=config.warpgroups + 1 + plan.is_quantized,
        thread_name="warpgroup",
        scratch_types=[scratch_types(plan)],
        # Rows are reduced within four lanes, and need no shared memory.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="paged_prefill",
    )
    return Outputs(*kernel(*leaves))


def operands_of(plan: PrefillPlan, inputs: PagedInputs, items: jax.Array, counter: jax.Array) -> Inputs:
    return Inputs(
        query=inputs.query.astype(plan.dtype),
        k_pages=inputs.k_pages,
        v_pages=inputs.v_pages,
        tables=inputs.block_tables.astype(jnp.int32).reshape(-1),
        layer=inputs.layer[None],
        items=items.reshape(-1),
        k_scale=inputs.k_scale,
        v_scale=inputs.v_scale,
        sinks=per_row(plan, inputs.sinks) if plan.joins_sinks else None,
        slopes=per_row(plan, inputs.alibi_slopes),
        counter=jax.new_ref(counter) if plan.draws else None,
    )


def _kernel(plan: PrefillPlan, operands, *refs):
    *refs, out, lse, scratch = refs
    inputs, outputs = jax.tree.unflatten(operands, refs), Outputs(out, lse)
    warpgroup = lax.axis_index("warpgroup")
    specialize(
        plan.config.warpgroups,
        warpgroup,
        compute=lambda: attend_units(plan, warpgroup, inputs, outputs, scratch),
        load=lambda: load_units(plan, inputs, scratch),
        convert=(lambda: widen_units(plan, scratch)) if plan.is_quantized else None,
    )
