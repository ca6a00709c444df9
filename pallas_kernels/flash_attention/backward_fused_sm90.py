"""FlashAttention backward on Hopper in one kernel of 5 matmuls; the order of dQ's sums is not fixed.

A thread block owns a tile of keys and values, half of it each compute warpgroup, and streams the queries of a
head. dK and dV are summed in registers. dS of both halves meets in shared memory; each warpgroup multiplies
half of dQ's tile, which the copy engine adds to fp32 sums in global memory (FlashAttention-3, section 3.1;
FlashAttention-2, section 3.2). What the heads of a group give is summed after the kernel: a block that
streamed them all would leave too few blocks to fill the GPU evenly.

    S^T = K Q^T,  P = exp(S - lse),  dP^T = V dO^T,  dS = P * (dP - delta)
    dV = P^T dO,  dK = scale dS^T Q,  dQ += scale dS K
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import backward_fused_wide
from pallas_kernels.flash_attention.backward_fused_block import (
    HALF,
    WARPGROUPS,
    Barriers,
    Block,
    Buffers,
    block_keys,
    load,
    parts_of_dq,
    visit_queries,
)
from pallas_kernels.flash_attention.backward_fused_tile import Step, finish, take_tile
from pallas_kernels.flash_attention.extras import Footprint, prepare
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.flash_attention.tiles import TileOrder
from pallas_kernels.mosaic import call_in_place, pl, plgpu, register_zeros, specialize


def serves(plan: AttentionPlan, inputs: AttentionInputs) -> bool:
    """Whether the config asks for this kernel, and its tiles and registers suit the call."""
    fused = plan.config.fused
    head_dims = (32, 64) if fused and fused.tile_q == 128 else (96, 128, 192, 256)
    if fused is None or plan.head_dim != plan.value_dim or plan.head_dim not in head_dims:
        return False
    if inputs.block_mask is not None:
        tile_q, tile_kv = inputs.block_mask.tile
        if tile_q % fused.tile_q or tile_kv % block_keys(plan):
            return False
    return not _spills(plan, inputs)


def _spills(plan: AttentionPlan, inputs: AttentionInputs) -> bool:
    """Whether a call takes more registers than there are; beside, the bytes the assembler spilled."""
    has_slopes, has_dropout = inputs.alibi_slopes is not None, plan.dropout_rate > 0
    has_cap, has_bias = plan.logits_soft_cap is not None, inputs.bias is not None
    if plan.head_dim > 128:
        has = plan.has_segments, plan.has_block_mask, has_slopes, has_cap, has_bias, has_dropout
        return sum(has) > 2  # 8 to 28 with three, lengths and a window
    if plan.head_dim <= 64:
        return has_slopes and has_dropout  # 16
    has_ids = plan.has_segments or plan.has_block_mask
    is_whole = plan.reach == (None, None) and not (plan.has_q_lengths or plan.has_kv_lengths)
    if plan.has_segments and (plan.dtype == jnp.float16 or not is_whole):  # 28, 24, 48
        return True
    # 200 with dropout; with segment ids and slopes 20, with a bias of queries and a soft cap 48, and so on.
    return has_dropout or sum((has_ids, has_slopes, has_cap, has_bias)) > 1


def statistics_multiple(plan: AttentionPlan) -> int:
    """What T must be a multiple of in lse2 and delta."""
    return plan.fused.tile_q


def launch(plan: AttentionPlan, inputs: AttentionInputs, query, key, value, out_grad, lse2, delta):
    """dQ [B, T, N, H], dK [B, S, K, H], dV [B, S, K, Hv] in the inputs' dtype; arguments as the
    deterministic kernels have them, with lse2 and delta padded to statistics_multiple.
    """
    keys = block_keys(plan)
    extras = prepare(plan, inputs, Footprint(HALF, plan.fused.tile_q, keys // HALF, owns_queries=False))
    order = TileOrder.plan(
        num_tiles=math.ceil(plan.num_keys / keys),
        num_heads=plan.batch * plan.num_heads,
        heads_per_kv=1,
        kv_bytes=plan.num_queries * (plan.token_bytes + 4 * plan.head_dim),
        heavy_last=False,
    )
    of_heads = tuple(
        jax.ShapeDtypeStruct((*x.shape[:2], plan.num_heads, x.shape[3]), x.dtype) for x in (key, value)
    )
    body, scratch = _body, (Buffers.types(plan), Barriers.types(plan))
    if plan.head_dim > 128:
        body, scratch = backward_fused_wide.body, backward_fused_wide.scratch(plan)
    kernel = plgpu.kernel(
        functools.partial(body, plan, order),
        out_type=of_heads,
        grid=(order.num_blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        # Barriers around every store would cost a fifth of the causal speed; nothing is read back.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        kernel_name="flash_attention_backward",
    )

    call = lambda d_query: kernel(query, key, value, out_grad, lse2, delta, d_query, extras)
    d_query, d_key, d_value = call_in_place(call, jnp.zeros(query.shape, jnp.float32), of_heads)
    return (d_query * plan.scale).astype(plan.dtype), _of_groups(plan, d_key), _of_groups(plan, d_value)


def _of_groups(plan: AttentionPlan, x: jax.Array) -> jax.Array:
    """[B, S, N, H] -> [B, S, K, H], in fp32 between."""
    if plan.group == 1:
        return x
    by_group = x.reshape(*x.shape[:2], plan.num_kv_heads, plan.group, x.shape[3])
    return by_group.sum(axis=3, dtype=jnp.float32).astype(x.dtype)


def _body(plan: AttentionPlan, order: TileOrder, *refs):
    q, k, v, d_out, lse2, delta, d_q, extras, d_k, d_v, buffers, barriers = refs
    warpgroup = lax.axis_index("warpgroup")
    block = Block.locate(plan, order, lax.axis_index("block"), extras)
    step = Step(plan, block, warpgroup, d_q, buffers, barriers)
    specialize(
        WARPGROUPS,
        warpgroup,
        compute=lambda: _in_roles(step, functools.partial(_compute, d_k=d_k, d_v=d_v)),
        load=lambda: load(plan, block, (q, k, v, d_out, lse2, delta), buffers, barriers),
    )


def _in_roles(step: Step, compute) -> None:
    """Calls compute(step) in each warpgroup, in code of its own where the shapes of its work are its own."""
    if len({*parts_of_dq(step.plan)}) == 1:
        compute(step)
        return
    for role in range(WARPGROUPS):
        pl.when(step.warpgroup == role)(functools.partial(compute, step._replace(role=role)))


def _compute(step: Step, d_k, d_v):
    plan, block, warpgroup, _, buffers, barriers, _ = step
    plgpu.barrier_wait(barriers.k_loaded)
    plgpu.barrier_wait(barriers.v_loaded)
    zeros = tuple(plgpu.ACC.init(register_zeros((HALF, dim))) for dim in (plan.head_dim, plan.value_dim))
    sum_dk, sum_dv = pl.run_state(functools.partial(_attend, step))(zeros)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(barriers.finished)  # no one reads the keys any more
    plgpu.barrier_wait(barriers.finished)
    keys = pl.ds(block.first_key + warpgroup * HALF, HALF)
    staging = buffers.k.at[warpgroup], buffers.v.at[warpgroup]
    staging[0][...] = (sum_dk * plan.scale).astype(plan.dtype)
    staging[1][...] = (sum_dv * (1 / (1 - plan.dropout_rate))).astype(plan.dtype)
    plgpu.commit_smem()
    for smem, output in zip(staging, (d_k, d_v), strict=True):
        plgpu.copy_smem_to_gmem(smem, output.at[block.batch, keys, block.head])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _attend(step: Step, sums):
    take = functools.partial(take_tile, step, sums)
    visit_queries(step.plan, step.block, take, functools.partial(finish, step))
