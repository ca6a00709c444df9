"""FlashAttention backward on Hopper, in two kernels that redo the logits: same inputs, same bits.

One kernel owns tiles of keys and values, streams the queries of every head of the group and sums dK and dV;
the other owns tiles of queries, streams keys and values and sums dQ (FlashAttention-2, section 3.1; together
7 matmuls, where one kernel that adds dQ into global memory takes 5). Nothing is stored but the results: the
logits are recomputed from the log-sum-exp of the forward pass.

    P = exp(S - lse),  dP = dO V^T,  dS = P * (dP - delta),  delta = rowsum(dO * O) - d lse
    dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K
"""

import functools
import math

from pallas_kernels.flash_attention import backward_dkv_sm90, backward_dq_sm90, halves
from pallas_kernels.flash_attention.extras import Footprint, prepare
from pallas_kernels.flash_attention.operands import backward_operands
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.flash_attention.streams import Owned, Stream
from pallas_kernels.flash_attention.tiles import TileOrder
from pallas_kernels.mosaic import (
    make_kernel,
    plgpu,
)


def statistics_multiple(plan: AttentionPlan) -> int:
    """What T must be a multiple of in lse2 and delta: vectors are copied without bounds, in whole tiles."""
    dq, dkv = plan.config.dq, plan.config.dkv
    return math.lcm(dq.own * dq.warpgroups, dkv.other)


def launch(plan: AttentionPlan, inputs: AttentionInputs, query, key, value, out_grad, lse2, delta):
    """dQ [B, T, N, H], dK [B, S, K, H], dV [B, S, K, Hv] in the arrays' dtype; plan.keeps_fp32: in fp32.

    query, key and value are those of the inputs, padded; lse2 f32[B, N, T] is the log-sum-exp in base 2, +inf
    for rows that see nothing; delta f32[B, N, T] as above; both padded to statistics_multiple.
    """
    arrays = (query, key, value, out_grad, lse2, delta)
    (d_query,) = _launch(plan, inputs, "dq", (query,), arrays)
    if plan.config.dkv_passes == 1:
        d_key, d_value = _launch(plan, inputs, "dkv", (key, value), arrays)
    else:  # both accumulators do not fit in registers
        (d_key,) = _launch(plan, inputs, "dk", (key,), arrays)
        (d_value,) = _launch(plan, inputs, "dv", (value,), arrays)
    return d_query, d_key, d_value


def _launch(plan: AttentionPlan, inputs: AttentionInputs, which: str, like, arrays):
    owns_queries = which == "dq"
    kernel = backward_dq_sm90 if owns_queries else backward_dkv_sm90
    config = plan.config.dq if owns_queries else plan.config.dkv
    num_rows = plan.num_queries if owns_queries else plan.num_keys
    *operands, lse2, delta = arrays
    operands = backward_operands(inputs, *operands)
    extras = prepare(plan, inputs, Footprint(config.own, config.other, config.warpgroups, owns_queries))
    num_heads = plan.num_heads if owns_queries else plan.num_kv_heads
    order = TileOrder.plan(
        num_tiles=math.ceil(num_rows / (config.own * config.warpgroups)),
        num_heads=plan.batch * num_heads,
        section=plan.group if owns_queries else 1,
        is_uneven=plan.is_uneven,
        heavy_last=owns_queries,
    )
    results = make_kernel(
        functools.partial(kernel.body, plan, order, which),
        out_type=tuple(halves.out_type(plan, x.shape) for x in like),
        grid=(order.num_blocks,),
        grid_names=("block",),
        num_threads=config.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(
            Owned.types(plan, config, with_statistics=owns_queries),
            Stream.types(plan, config, with_statistics=not owns_queries),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=f"flash_attention_{which}",
    )(*operands, lse2, delta, extras)
    return [halves.join(plan, x) for x in results]
