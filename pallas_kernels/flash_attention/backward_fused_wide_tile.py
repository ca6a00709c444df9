"""What the computing warpgroups of the fused backward kernel for wide heads do with one tile of queries."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.backward_fused_block import HALF, WARPGROUPS, Block, slot_of
from pallas_kernels.flash_attention.backward_fused_tile import rounded, turn_of
from pallas_kernels.flash_attention.extras import Extras
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.scores import Weights, logit_gradients, weigh
from pallas_kernels.mosaic import ceil_div, opaque, pl, plgpu, swizzled_smem
from pallas_kernels.mosaic_inline import load_by_column

K, V = 0, 1
COLUMNS = 64  # of dQ that a warpgroup multiplies at a time


class Buffers(NamedTuple):
    """Shared memory of a thread block."""

    keys: Any  # [2, 64, H]: keys, and values
    q: Any  # [stages, tile_q, H]
    d_out: Any  # [1, tile_q, H]
    lse: Any  # f32[stages, tile_q]
    delta: Any  # f32[tile_q]
    weights: Any  # [64, tile_q]: P^T, or what dS needs of it
    d_logits: Any  # [2 tiles in turn, 64, tile_q]: dS^T
    d_q: Any  # f32[2, tile_q, 64]: each warpgroup's part of dQ's tile

    @classmethod
    def types(cls, plan: AttentionPlan) -> "Buffers":
        stages, tile_q, head_dim, dtype = plan.fused.stages, plan.fused.tile_q, plan.head_dim, plan.dtype
        return cls(
            keys=swizzled_smem((2, HALF, head_dim), dtype),
            q=swizzled_smem((stages, tile_q, head_dim), dtype),
            d_out=swizzled_smem((1, tile_q, head_dim), dtype),
            lse=plgpu.SMEM((stages, tile_q), jnp.float32),
            delta=plgpu.SMEM((tile_q,), jnp.float32),
            weights=swizzled_smem((HALF, tile_q), dtype),
            d_logits=swizzled_smem((2, HALF, tile_q), dtype),
            d_q=swizzled_smem((WARPGROUPS, tile_q, COLUMNS), jnp.float32),
        )

    def own(self, which: int, columns: Any = slice(None)):
        """Keys or values. Addresses are computed where they are used, instead of once, in registers that live
        through the loops.
        """
        return self.keys.at[opaque(which), :, columns]

    def d_outs(self):
        return self.d_out.at[opaque(0)]


class Barriers(NamedTuple):
    """What the warpgroups wait for."""

    k_loaded: Any
    v_loaded: Any
    q_loaded: Any  # and lse
    q_consumed: Any
    d_out_loaded: Any  # and delta
    d_out_consumed: Any
    weights_written: Any
    d_logits_written: Any
    finished: Any

    @classmethod
    def types(cls, plan: AttentionPlan) -> "Barriers":
        by_slot = plgpu.Barrier(num_barriers=plan.fused.stages, num_arrivals=2)
        single, pair = plgpu.Barrier(num_arrivals=1), plgpu.Barrier(num_arrivals=2)
        return cls(single, single, by_slot, by_slot, pair, pair, single, single, pair)


class Step(NamedTuple):
    """What a warpgroup needs to take one tile of queries."""

    plan: AttentionPlan
    block: Block
    d_q: Any
    buffers: Buffers
    barriers: Barriers
    role: Any = 0  # 0: weights and dV, 1: their gradients and dK; an array where one code serves both


def take_weights(step: Step, sum_dv, index, _, masked=False, is_first=False):
    """Adds a tile of queries to dV and hands its weights on; multiplies our half of dQ of the tile before."""
    index = opaque(index)
    plan, buffers, barriers = step.plan, step.buffers, step.barriers
    slot, is_crowded = slot_of(plan, index), masked is not False or _has_more(plan, step.block.extras)

    def sum_weights(logits_acc, d_q_acc):
        place = step.block.place_at(plan, index, step.block.first_key, masked)
        lse2 = load_by_column(buffers.lse, (slot, 0), (HALF, plan.fused.tile_q))
        logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=0 if d_q_acc is None else 1)
        weights = weigh(plan, step.block.extras, place, logits, lse2, masked, rounds_slope=True)
        weights = rounded(plan, weights)
        # The other warpgroup has read those before: it has written their dS.
        buffers.weights[...] = _signed(plan, weights)
        plgpu.commit_smem()
        plgpu.barrier_arrive(barriers.weights_written)
        plgpu.barrier_arrive(barriers.q_consumed.at[slot])
        plgpu.barrier_wait(barriers.d_out_loaded)
        plgpu.wgmma(sum_dv, weights.kept, buffers.d_outs())
        _end_tile(step, index, d_q_acc, barriers.d_out_consumed)

    def take(logits_acc):
        plgpu.wgmma(logits_acc, buffers.own(K), buffers.q.at[slot].transpose((1, 0)))
        if not is_first:
            plgpu.barrier_wait(barriers.d_logits_written)
            for columns in _columns(step) if is_crowded else ():
                _add_columns(step, index - 1, columns)
        _beside_dq(step, index, is_first or is_crowded, lambda d_q_acc: sum_weights(logits_acc, d_q_acc))

    plgpu.barrier_wait(barriers.q_loaded.at[slot])
    pl.run_scoped(take, plgpu.ACC((HALF, plan.fused.tile_q), jnp.float32))


def take_gradients(step: Step, sum_dk, index, _, is_first=False):
    """Adds a tile of queries to dK and hands its dS on; multiplies our half of dQ of the tile before."""
    index = opaque(index)
    plan, buffers, barriers = step.plan, step.buffers, step.barriers
    slot = slot_of(plan, index)

    def sum_gradients(d_weights_acc, d_q_acc):
        delta = load_by_column(buffers.delta, (0,), (HALF, plan.fused.tile_q))
        d_weights = plgpu.wgmma_accumulator_load(d_weights_acc, wait_n=0 if d_q_acc is None else 1)
        plgpu.barrier_wait(barriers.weights_written)
        weights = _unsigned(plan, plgpu.load(buffers.weights, layout=plgpu.Layout.WGMMA))
        d_logits = logit_gradients(plan, weights, d_weights, delta).astype(plan.dtype)
        # The other warpgroup no longer reads those two tiles ago: it has written weights since.
        buffers.d_logits.at[turn_of(index)][...] = d_logits
        plgpu.commit_smem()
        plgpu.barrier_arrive(barriers.d_logits_written)
        plgpu.barrier_arrive(barriers.d_out_consumed)
        plgpu.barrier_wait(barriers.q_loaded.at[slot])
        plgpu.wgmma(sum_dk, d_logits, buffers.q.at[slot])
        _end_tile(step, index, d_q_acc, barriers.q_consumed.at[slot])

    def take(d_weights_acc):
        plgpu.wgmma(d_weights_acc, buffers.own(V), buffers.d_outs().transpose((1, 0)))
        _beside_dq(step, index, is_first, lambda d_q_acc: sum_gradients(d_weights_acc, d_q_acc))

    plgpu.barrier_wait(barriers.d_out_loaded)
    pl.run_scoped(take, plgpu.ACC((HALF, plan.fused.tile_q), jnp.float32))


def add_last_dq(step: Step, index, _):
    """Adds our half of dQ of the last tile, whose dS is written: the code is the same for both roles."""
    num_parts = ceil_div(step.plan.head_dim // COLUMNS - step.role, WARPGROUPS)
    add = lambda part, _: _add_columns(step, index, (step.role + part * WARPGROUPS) * COLUMNS)
    lax.fori_loop(0, num_parts, add, None)


def _add_columns(step: Step, index, columns):
    """Adds COLUMNS columns of dQ of a tile whose dS is written."""

    def multiply(acc):
        _multiply_dq(step, acc, index, columns)
        return acc[...]

    _add_dq(step, index, columns, pl.run_scoped(multiply, _dq_acc(step)))


def _has_more(plan: AttentionPlan, extras: Extras) -> bool:
    """Whether weights take the registers in which dQ would be multiplied meanwhile."""
    has_terms = extras.bias is not None or extras.alibi_slopes is not None
    return has_terms or plan.logits_soft_cap is not None or plan.dropout_rate > 0


def _beside_dq(step: Step, index, is_alone: bool, work):
    """Calls work(acc), acc being our first columns of dQ of the tile before, in which the tensor core works
    meanwhile; None where is_alone.
    """
    if is_alone:
        work(None)
        return

    def multiply(acc):
        _multiply_dq(step, acc, index - 1, _columns(step)[0])
        work(acc)

    pl.run_scoped(multiply, _dq_acc(step))


def _end_tile(step: Step, index, d_q_acc, consumed):
    """Adds dQ of the tile before, of which the first columns are multiplied, while our sum is, and releases
    what that has read.
    """
    if d_q_acc is None:
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(consumed)
        return
    first, *second = _columns(step)
    d_q = plgpu.wgmma_accumulator_load(d_q_acc, wait_n=1)

    def add_both(acc):
        _multiply_dq(step, acc, index - 1, second[0])
        _add_dq(step, index - 1, first, d_q)
        plgpu.wgmma_wait(1)
        plgpu.barrier_arrive(consumed)
        _add_dq(step, index - 1, second[0], acc[...])

    if second:
        pl.run_scoped(add_both, _dq_acc(step))
        return
    _add_dq(step, index - 1, first, d_q)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(consumed)


def _columns(step: Step) -> range:
    """First columns of the parts of dQ that are ours."""
    return range(step.role * COLUMNS, step.plan.head_dim, WARPGROUPS * COLUMNS)


def _multiply_dq(step: Step, acc, index, columns):
    """acc += dS K, for COLUMNS columns."""
    d_logits = step.buffers.d_logits.at[turn_of(index)]
    plgpu.wgmma(acc, d_logits.transpose((1, 0)), step.buffers.own(K, pl.ds(columns, COLUMNS)))


def _dq_acc(step: Step):
    return plgpu.ACC((step.plan.fused.tile_q, COLUMNS), jnp.float32)


def _add_dq(step: Step, index, columns, d_q):
    """Lets the copy engine add a part of dQ to the sums in global memory."""
    plan, block, staging = step.plan, step.block, step.buffers.d_q.at[opaque(step.role)]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    staging[...] = d_q
    plgpu.commit_smem()
    rows = pl.ds(block.row_at(plan, index), plan.fused.tile_q)
    target = step.d_q.at[block.batch, rows, block.head, pl.ds(columns, COLUMNS)]
    plgpu.copy_smem_to_gmem(staging, target, reduction_op="add")


def _signed(plan: AttentionPlan, weights: Weights):
    """What dS needs of the weights: they are not negative, but sent so where dropout took them."""
    if plan.dropout_rate == 0:
        return weights.slopes
    return jnp.where(weights.kept == 0, -weights.slopes, weights.slopes)


def _unsigned(plan: AttentionPlan, signed) -> Weights:
    slopes = signed.astype(jnp.float32)
    if plan.dropout_rate == 0:
        return Weights(slopes, slopes, slopes)
    return Weights(slopes, jnp.maximum(slopes, 0.0), jnp.abs(slopes))
