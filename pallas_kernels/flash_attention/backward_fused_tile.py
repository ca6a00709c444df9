"""What a computing warpgroup of the fused backward kernel does with one tile of queries."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import halves
from pallas_kernels.flash_attention.backward_fused_block import (
    HALF,
    PART,
    WARPGROUPS,
    Barriers,
    Block,
    Buffers,
    parts_of_dq,
    slot_of,
)
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.scores import Weights, logit_gradients, weigh
from pallas_kernels.mosaic import opaque, pl, plgpu, rem
from pallas_kernels.mosaic_inline import load_by_column


class Step(NamedTuple):
    """What a warpgroup needs to take one tile of queries."""

    plan: AttentionPlan
    block: Block
    warpgroup: Any
    d_q: Any
    buffers: Buffers
    barriers: Barriers
    role: int = 0  # the warpgroup, known beforehand, where it tells the shapes

    @property
    def part_of_dq(self) -> tuple[int, int]:
        """(rows, columns) of our part of dQ's tile."""
        return parts_of_dq(self.plan)[self.role]

    @property
    def d_q_staging(self):
        """From where our part leaves."""
        d_q = self.buffers.d_q
        return d_q[self.role] if isinstance(d_q, tuple) else d_q.at[self.warpgroup]


def take_tile(step: Step, sums, index, _, masked=False, is_first=False):
    """Adds a tile of queries to dK and dV, writes its dS, and multiplies dQ of the tile before it, of which
    the other warpgroup has long written its half of dS.
    """
    # Opaque: the first index may be a constant, of which many addresses would follow at once.
    step, index = step._replace(warpgroup=opaque(step.warpgroup)), opaque(index)
    plan, buffers, barriers = step.plan, step.buffers, step.barriers
    number = step.block.number(index)
    slot, parts = slot_of(plan, number), plan.fused.tile_q // PART
    plgpu.barrier_wait(barriers.loaded.at[slot])
    d_logits = []
    for part in range(parts):
        d_logits.append(_differentiate_logits(step, sums[1], index, part, masked))
        if part < parts - 1:
            plgpu.wgmma(sums[0], d_logits[part], buffers.q.at[slot, _part(part)])

    def add_dk():
        plgpu.wgmma(sums[0], d_logits[-1], buffers.q.at[slot, _part(parts - 1)])

    if is_first:
        add_dk()
        _publish(step, number, d_logits)
    else:
        plgpu.barrier_wait(barriers.d_logits_written.at[turn_of(number - 1)])

        def multiply(acc):
            _multiply_dq(step, acc, number - 1)
            add_dk()
            return plgpu.wgmma_accumulator_load(acc, wait_n=1)

        d_q = pl.run_scoped(multiply, plgpu.ACC(step.part_of_dq, jnp.float32))
        _wait_for_staging(step, number - 1)
        step.d_q_staging[...] = d_q
        _publish(step, number, d_logits)
        _add_dq(step, index - 1)
    plgpu.wgmma_wait(0)
    plgpu.barrier_arrive(barriers.consumed.at[slot])


def finish(step: Step, index, _):
    """What the last tile left open."""
    step, index = step._replace(warpgroup=opaque(step.warpgroup)), opaque(index)
    number = step.block.number(index)
    plgpu.barrier_wait(step.barriers.d_logits_written.at[turn_of(number)])

    def multiply(acc):
        _multiply_dq(step, acc, number)
        return acc[...]

    d_q = pl.run_scoped(multiply, plgpu.ACC(step.part_of_dq, jnp.float32))
    _wait_for_staging(step, number)
    step.d_q_staging[...] = d_q
    plgpu.commit_smem()
    _add_dq(step, index)


def _differentiate_logits(step: Step, sum_dv, index, part: int, masked: bool):
    """dS^T of our keys and a part of the tile's queries, in 16 bits; adds to dV on the way."""
    plan, buffers, block = step.plan, step.buffers, step.block
    slot, rows = slot_of(plan, block.number(index)), _part(part)
    queries, d_outs = buffers.q.at[slot, rows], buffers.d_out.at[slot, rows]
    first_key = block.first_key + step.warpgroup * HALF
    ids = buffers.ids_at(slot, rows, step.warpgroup)
    place = block.place_at(plan, index, first_key, masked, part, ids)

    def differentiate(logits_acc, d_weights_acc):
        plgpu.wgmma(logits_acc, buffers.k.at[step.warpgroup], queries.transpose((1, 0)))
        plgpu.wgmma(d_weights_acc, buffers.v.at[step.warpgroup], d_outs.transpose((1, 0)))
        lse2 = load_by_column(buffers.statistics, (0, slot, part * PART), (HALF, PART))
        logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
        weights = weigh(plan, block.extras, place, logits, lse2, masked, rounds_slope=True)
        weights = rounded(plan, weights)
        plgpu.wgmma(sum_dv, weights.kept, d_outs)
        delta = load_by_column(buffers.statistics, (1, slot, part * PART), (HALF, PART))
        d_weights = plgpu.wgmma_accumulator_load(d_weights_acc, wait_n=1)
        weights = weights._replace(slopes=weights.slopes.astype(jnp.float32))
        return logit_gradients(plan, weights, d_weights, delta).astype(plan.dtype)

    acc_type = plgpu.ACC((HALF, PART), jnp.float32)
    return pl.run_scoped(differentiate, acc_type, acc_type)


def rounded(plan: AttentionPlan, weights: Weights) -> Weights:
    """In 16 bits: half the registers while dP is on its way."""
    kept = lax.optimization_barrier(weights.kept.astype(plan.dtype))
    if weights.slopes is weights.kept:
        return Weights(kept, kept, kept)
    return Weights(kept, kept, lax.optimization_barrier(weights.slopes.astype(plan.dtype)))


def _part(part: int):
    return pl.ds(part * PART, PART)


def turn_of(number):
    """Which of the two buffers of dS a tile of queries uses."""
    return rem(number, 2)


def _publish(step: Step, number, d_logits):
    """Shows dS of our keys to the other warpgroup."""
    turn = turn_of(number)
    for part, values in enumerate(d_logits):
        step.buffers.d_logits.at[turn, step.warpgroup, :, _part(part)][...] = values
    plgpu.commit_smem()
    plgpu.barrier_arrive(step.barriers.d_logits_written.at[turn])


def _multiply_dq(step: Step, acc, number):
    """acc += dS K, our part of the tile's rows or columns."""
    plan, buffers = step.plan, step.buffers
    turn = turn_of(number)
    num_rows, num_columns = step.part_of_dq
    rows = columns = slice(None)
    if num_rows < plan.fused.tile_q:
        rows = pl.ds(step.warpgroup * num_rows, num_rows)
    else:
        columns = pl.ds(step.warpgroup * HALF, num_columns)
    for half in range(WARPGROUPS):
        half = opaque(half)
        d_logits, keys = buffers.d_logits.at[turn, half, :, rows], buffers.k.at[half, :, columns]
        plgpu.wgmma(acc, d_logits.transpose((1, 0)), keys)


def _wait_for_staging(step: Step, number):
    """Until what left from there before a tile's dQ was read."""
    if step.plan.is_deterministic:
        pl.when(number > 0)(lambda: plgpu.barrier_wait(step.barriers.d_q_free))
    else:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _add_dq(step: Step, index):
    """Lets the copy engine add our part of dQ to the sums in global memory; in order Adds does."""
    plan, block = step.plan, step.block
    if plan.is_deterministic:
        return
    rows, columns = step.part_of_dq
    first_row, first_column = block.row_at(plan, index), 0
    if rows < plan.fused.tile_q:
        first_row += step.warpgroup * rows
    else:
        first_column = step.warpgroup * HALF
    target = step.d_q.at[block.batch, pl.ds(first_row, rows), block.head, pl.ds(first_column, columns)]
    plgpu.copy_smem_to_gmem(step.d_q_staging, target, reduction_op="add")


def store(step: Step, acc, scale: float, output):
    """Stores a sum over the queries, of our keys."""
    step = step._replace(warpgroup=opaque(step.warpgroup))
    plan, block, staging = step.plan, step.block, step.buffers.out.at[step.warpgroup]
    for half, total in enumerate(halves.split(plan, acc[...] * scale)):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = total
        plgpu.commit_smem()
        first_key = block.first_key + step.warpgroup * HALF
        halves.store(plan, staging, output, half, (block.batch, first_key, block.head))
