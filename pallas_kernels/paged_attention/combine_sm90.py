"""Merges the splits of paged decode by their log-sum-exp: a thread block for each row and query head."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import LOG2_E, ceil_div, div, plgpu
from pallas_kernels.paged_attention.decode_consumer import copy_head
from pallas_kernels.paged_attention.decode_plan import Plan
from pallas_kernels.paged_attention.units import split_range

CHUNK = 16  # splits whose loads are in flight together
FLOOR = -1e30  # the maximum before any split: finite, so that no difference is NaN


def combine_splits(plan: Plan, out: jax.Array, lse: jax.Array, lengths: jax.Array, sinks: jax.Array | None):
    """Merges out f32[R, splits, N, H] and lse f32[R, splits, K, columns] into out [R, N, H] and lse f32[R,
    N].

    lse = log(sum_s exp(lse_s)),   out = sum_s exp(lse_s - lse) out_s     over the splits with a visible token

    A sink joins here, so that it counts once: it is one more lse_s, of an out_s that is zero.
    """
    num_rows, _, num_heads, _ = out.shape
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
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
    )
    return kernel(out, lse, lengths, *(() if sinks is None else (sinks.astype(jnp.float32),)))


def _kernel(plan: Plan, out, lse, lengths, *refs):
    *sinks, merged, merged_lse, staged = refs
    row, head = lax.axis_index("row"), lax.axis_index("head")
    kv_head, column = div(head, plan.group), lax.rem(head, jnp.int32(plan.column_period))
    first, stop = split_range(plan, jnp.minimum(lengths[row], plan.capacity))
    layout = plgpu.Layout.WGMMA.reduce(1)
    chunk = min(plan.num_splits, CHUNK)

    def step(index, state):
        maximum, total, values = state
        splits = [first + index * chunk + i for i in range(chunk)]
        # Beyond the last split that was written it is read again, with no weight: what lies there may be NaN.
        safe = [jnp.minimum(split, stop - 1) for split in splits]
        logs = [lse[row, split, kv_head, column] for split in safe]
        parts = [plgpu.load(out.at[row, split, head], layout=layout, optimized=False) for split in safe]
        new_maximum = functools.reduce(jnp.maximum, logs, maximum)
        decay = jnp.exp2((maximum - new_maximum) * LOG2_E)
        total, values = total * decay, values * decay
        for split, log, part in zip(splits, logs, parts, strict=True):
            weight = jnp.where(split < stop, jnp.exp2((log - new_maximum) * LOG2_E), 0.0)
            total += weight
            values += part * weight
        return new_maximum, total, values

    zeros = plgpu.layout_cast(jnp.zeros((out.shape[-1],), jnp.float32), layout)
    sink = sinks[0][head] if sinks else None
    state = (jnp.float32(FLOOR), jnp.float32(0), zeros) if sink is None else (sink, jnp.float32(1), zeros)
    maximum, total, values = lax.fori_loop(0, ceil_div(stop - first, chunk), step, state)
    staged[...] = (values * jnp.where(total > 0, 1 / total, 0.0)).astype(plan.query_dtype)
    plgpu.commit_smem()
    copy_head(plan, staged, merged.at[row, head])
    merged_lse[row, head] = jnp.where(total > 0, maximum + jnp.log2(total) * (1 / LOG2_E), -jnp.inf)
    plgpu.wait_smem_to_gmem(0)
