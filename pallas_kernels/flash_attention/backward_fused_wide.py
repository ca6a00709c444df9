"""The fused backward kernel's thread block where heads are wide: 129 to 256 elements, and 64 keys a block.

The sums of dK and dV take half of the registers each, so the compute warpgroups part by matrices instead of
by keys. One computes weights and sums dV, the other their gradients and sums dK; each multiplies half of dQ's
columns, of the tile before, while it waits for logits or dP. Weights go from the one to the other in 16 bits,
dS to both through shared memory.
"""

import functools

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import halves
from pallas_kernels.flash_attention.backward_fused_block import (
    HALF,
    WARPGROUPS,
    Block,
    slot_of,
    visit_last,
    visit_queries,
)
from pallas_kernels.flash_attention.backward_fused_wide_tile import (
    Barriers,
    Buffers,
    K,
    Step,
    V,
    add_last_dq,
    take_gradients,
    take_weights,
)
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.tiles import TileOrder
from pallas_kernels.mosaic import opaque, pl, plgpu, register_zeros, specialize


def scratch(plan: AttentionPlan) -> tuple[Buffers, Barriers]:
    return Buffers.types(plan), Barriers.types(plan)


def body(plan: AttentionPlan, order: TileOrder, *refs):
    q, k, v, d_out, lse2, delta, extras, d_q, d_k, d_v, buffers, barriers = refs
    warpgroup = lax.axis_index("warpgroup")
    block = Block.locate(plan, order, extras, lax.axis_index("block"))
    step = Step(plan, block, d_q, buffers, barriers)

    def compute():
        for loaded in (barriers.k_loaded, barriers.v_loaded):
            plgpu.barrier_wait(loaded)
        total = lax.cond(warpgroup == 1, lambda: _sum_dk(step), lambda: _sum_dv(step))
        ours = step._replace(role=opaque(warpgroup))  # what follows from it is found after the loops
        visit_last(block.indices, functools.partial(add_last_dq, ours))
        _store(ours, total, (d_v, d_k))

    load = lambda: _load(step, (q, k, v, d_out, lse2, delta))
    specialize(WARPGROUPS, warpgroup, compute=compute, load=load)


def _sum_dv(step: Step):
    """dV of the block's keys; the last dS is written when it is done."""
    step = step._replace(role=0)

    def attend(sum_dv):
        visit_queries(step.plan, step.block.indices, functools.partial(take_weights, step, sum_dv))
        visit_last(step.block.indices, lambda *_: plgpu.barrier_wait(step.barriers.d_logits_written))

    return _sum(step.plan, attend)


def _sum_dk(step: Step):
    """dK of the block's keys, not yet scaled."""
    step = step._replace(role=1)
    start, _, _, stop = step.block.indices
    second = lax.min(start + 1, stop)

    def attend(sum_dk):  # what is masked has no weight, of which the other warpgroup takes care
        take = functools.partial(take_gradients, step, sum_dk)
        lax.fori_loop(start, second, functools.partial(take, is_first=True), None)
        lax.fori_loop(second, stop, take, None)

    return _sum(step.plan, attend)


def _sum(plan: AttentionPlan, attend):
    return pl.run_state(attend)(plgpu.ACC.init(register_zeros((HALF, plan.head_dim))))


def _store(step: Step, total, outputs):
    """Stores a warpgroup's sum over the queries, through the memory of the values or keys."""
    plan, block, _, buffers, barriers, role = step
    staging = buffers.keys.at[jnp.where(role == 0, V, K)]
    scale = jnp.where(role == 0, 1 / (1 - plan.dropout_rate), plan.scale)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.barrier_arrive(barriers.finished)  # no one reads the keys any more
    plgpu.barrier_wait(barriers.finished)
    for half, part in enumerate(halves.split(plan, total * scale)):
        staging[...] = part
        plgpu.commit_smem()
        place = block.batch, block.first_key, block.head
        for owner, output in enumerate(outputs):
            pl.when(role == owner)(functools.partial(halves.store, plan, staging, output, half, place))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _load(step: Step, sources):
    """What the loading warpgroup does."""
    plan, block, _, buffers, barriers, _ = step
    q, k, v, d_out, lse2, delta = sources
    stages, (start, _, _, stop) = plan.fused.stages, block.indices
    k.rows(*block.keys_at())(buffers.keys.at[K], barriers.k_loaded)
    v.rows(*block.keys_at())(buffers.keys.at[V], barriers.v_loaded)

    def wait_q(index, _=None):
        plgpu.barrier_wait(barriers.q_consumed.at[slot_of(plan, index)])

    def wait_d_out(index, _=None):
        plgpu.barrier_wait(barriers.d_out_consumed)

    def load_tile(index, _):
        slot = slot_of(plan, index)
        by_row, by_head = block.queries_at(plan, index)
        pl.when(index - start >= stages)(lambda: wait_q(index))
        q.rows(*by_row)(buffers.q.at[slot], barriers.q_loaded.at[slot])
        plgpu.copy_gmem_to_smem(lse2.at[by_head], buffers.lse.at[slot], barriers.q_loaded.at[slot])
        pl.when(index > start)(lambda: wait_d_out(index))
        d_out.rows(*by_row)(buffers.d_out.at[0], barriers.d_out_loaded)
        plgpu.copy_gmem_to_smem(delta.at[by_head], buffers.delta, barriers.d_out_loaded)

    lax.fori_loop(start, stop, load_tile, None)
    # Every arrival is seen before the block ends.
    lax.fori_loop(lax.max(start, stop - stages), stop, wait_q, None)
    lax.fori_loop(lax.max(start, stop - 1), stop, wait_d_out, None)
