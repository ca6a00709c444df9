"""Merges parts of decode's results in a kernel of its own: a thread block for each row and query head."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import div, plgpu
from pallas_kernels.paged_attention.decode_plan import Plan, Shared
from pallas_kernels.paged_attention.decode_results import copy_head
from pallas_kernels.paged_attention.parts import Parts, init_state, merge, shared_parts
from pallas_kernels.paged_attention.units import split_range


def combine_parts(
    plan: Plan,
    out: jax.Array,
    lse: jax.Array,
    lengths: jax.Array,
    sinks: jax.Array | None,
    shared: Shared | None = None,
):
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
    parts = [_own_parts(plan, row, out, lse, lengths)]
    if plan.cut is not None:
        parts.append(shared_parts(plan, plan.cut, row, Shared(*optional)))
    states = [init_state(plan, sink)]
    for each in parts:
        states = merge(plan, each, [head], states)
    (state,) = states
    staged[...] = state.normalized.astype(plan.query_dtype)
    plgpu.commit_smem()
    copy_head(plan, staged, merged.at[row, head])
    merged_lse[row, head] = state.lse
    plgpu.wait_smem_to_gmem(0)


def _own_parts(plan: Plan, row, out, lse, lengths) -> Parts:
    first, stop = split_range(plan, jnp.minimum(lengths[row], plan.capacity))

    def part(index, head):
        split = first + index
        kv_head, column = div(head, plan.group), lax.rem(head, jnp.int32(plan.column_period))
        return lse[row, split, kv_head, column], out.at[row, split, head]

    return Parts(stop - first, plan.num_splits, part)
