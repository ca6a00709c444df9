"""Merges the splits of paged decode by their log-sum-exp: a thread block for each row and query head."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import LOG2_E, ceil_div, plgpu

CHUNK = 16  # splits whose loads are in flight together
FLOOR = -1e30  # the maximum before any split: finite, so that no difference is NaN


@dataclasses.dataclass(frozen=True)
class CombinePlan:
    """The static facts of one launch."""

    num_splits: int
    split: int  # tokens
    group: int  # query heads a KV head
    window_left: int | None
    dtype: Any


def combine_splits(plan: CombinePlan, out: jax.Array, lse: jax.Array, lengths: jax.Array):
    """Merges out f32[R, splits, N, H] and lse f32[R, splits, K, columns] into out [R, N, H] and lse f32[R,
    N].

    lse = log(sum_s exp(lse_s)),   out = sum_s exp(lse_s - lse) out_s     over the splits with a visible token
    """
    num_rows, _, num_heads, head_dim = out.shape
    kernel = plgpu.kernel(
        functools.partial(_kernel, plan),
        out_type=[
            jax.ShapeDtypeStruct((num_rows, num_heads, head_dim), plan.dtype),
            jax.ShapeDtypeStruct((num_rows, num_heads), jnp.float32),
        ],
        grid=(num_heads, num_rows),
        grid_names=("head", "row"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(out, lse, lengths)


def _kernel(plan: CombinePlan, out, lse, lengths, merged, merged_lse):
    row, head = lax.axis_index("row"), lax.axis_index("head")
    kv_head, column = lax.div(head, jnp.int32(plan.group)), lax.rem(head, jnp.int32(plan.group))
    length = lengths[row]
    first = jnp.int32(0) if plan.window_left is None else jnp.maximum(length - 1 - plan.window_left, 0)
    first = lax.div(first, jnp.int32(plan.split))
    stop = jnp.minimum(ceil_div(length, plan.split), plan.num_splits)
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
    state = (jnp.float32(FLOOR), jnp.float32(0), zeros)
    maximum, total, values = lax.fori_loop(0, ceil_div(stop - first, chunk), step, state)
    merged[row, head] = (values * jnp.where(total > 0, 1 / total, 0.0)).astype(plan.dtype)
    merged_lse[row, head] = jnp.where(total > 0, maximum + jnp.log2(total) * (1 / LOG2_E), -jnp.inf)
