"""What paged prefill does with one KV tile: a compute warpgroup's stages, from Q K^T to P V.

Accumulators leave few registers. So fields of a unit's record are read again where they are used, from what
the compiler cannot follow (opaque): else it would keep them, and what follows from a thread's place, through
the loop over units.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_tiles import Steps
from pallas_kernels.mosaic import (
    LOG2_E,
    broadcast_columns,
    broadcast_rows,
    div,
    load_columns,
    load_rows,
    opaque,
    pl,
    plgpu,
    rem,
    where,
)
from pallas_kernels.mosaic_inline import fresh_iota
from pallas_kernels.paged_attention.page_tiles import zero_invisible
from pallas_kernels.paged_attention.prefill_config import OCTET, WARPGROUP_ROWS
from pallas_kernels.paged_attention.prefill_plan import Inputs, PrefillPlan, Scratch, buffer_of, octet_at
from pallas_kernels.paged_attention.prefill_units import Work
from pallas_kernels.paged_attention.prefill_work import visible_keys


class Unit(NamedTuple):
    """What a compute warpgroup needs to attend to any tile of a unit; a tile is known by its position among
    all that the program streams."""

    plan: PrefillPlan
    warpgroup: Any
    inputs: Inputs
    scratch: Scratch
    turn: Any  # of the program
    stop: Any  # the position beyond the last tile's

    def read(self, *names: str) -> Work:
        return self.scratch.records.read(opaque(self.turn), self.plan.num_kv_heads, *names)

    def field(self, name: str) -> Any:
        return getattr(self.read(name), name)

    @property
    def buffer(self) -> Any:
        # Where the softmax runs ahead a tile begins with matmuls, and this is known beforehand; elsewhere it
        # would take registers.
        turn = self.turn if self.plan.config.overlap else opaque(self.turn)
        return buffer_of(self.plan, turn, self.warpgroup)

    def slot(self, position):
        return rem(position, self.plan.slots)

    def first_key(self, position):
        return (self.field("tile_start") + (self.stop - 1 - position)) * self.plan.config.tile_kv

    @property
    def steps(self) -> Steps:
        """The positions of the tiles that the warpgroup sees."""
        index = self.warpgroup if self.plan.has_own_ranges else 0
        own = self.scratch.records.read_range(opaque(self.turn), index)
        return own.steps_before(self.stop)

    @property
    def first_head(self) -> Any:
        """Of a packed tile, or None."""
        return self.field("first_head") if self.plan.is_packed else None

    def given(self, per_row):
        """The part of what is given for each row of a tile, or None."""
        if per_row is None:
            return None
        rows = per_row.at[self.field("kv_head")]
        return (rows.at[self.first_head] if self.plan.is_packed else rows).at[self.warpgroup]

    def release_last(self):
        """Releases the turn before: late enough not to wait for its results, early enough for the next
        queries."""
        if self.plan.query_buffers > 1:
            pl.when(self.turn > 0)(lambda: self.release(self.turn - 1))

    def release(self, turn):
        """Gives the loading warpgroup a turn's buffer, when the copies of its results have been read."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.scratch.query_empty.at[buffer_of(self.plan, turn, self.warpgroup)])


def wait_keys(unit: Unit, position):
    """Waits for a tile's keys: as the tile begins, or, where tiles are attended in order, as the tile before
    ends (at its beginning the wait would cost registers: 48 to 60 bytes of spills at H = 256)."""
    plgpu.barrier_wait(unit.scratch.k.full.at[unit.slot(position)])


def wait_next_keys(unit: Unit, position):
    pl.when(position + 1 < unit.stop)(lambda: wait_keys(unit, position + 1))


def skip_tile(unit: Unit, position, _):
    """Releases a tile that other warpgroups use and this one does not."""
    scratch, slot, overlap = unit.scratch, unit.slot(position), unit.plan.config.overlap
    if overlap:
        wait_keys(unit, position)
    plgpu.barrier_arrive(scratch.k.empty.at[slot])
    plgpu.barrier_wait(scratch.v.full.at[slot])
    clean_values(unit, position)
    if not overlap:
        wait_next_keys(unit, position)
    plgpu.barrier_arrive(scratch.v.empty.at[slot])


def attend_tile(unit: Unit, position, carry, masked=False):
    values, maximum, total = carry
    plan, slot = unit.plan, unit.slot(position)
    if plan.is_quantized:  # before the accumulators are full
        plgpu.barrier_wait(unit.scratch.v.full.at[slot])
    weights, decay, maximum = weigh(unit, position, multiply_keys(unit, slot), maximum, masked)
    values *= broadcast_rows(decay, plan.head_dim)
    total *= decay
    weights16 = round_weights(unit, slot, weights)
    if plan.head_dim <= 128:
        total += weights.sum(axis=1)
        values, total, maximum, weights16 = lax.optimization_barrier((values, total, maximum, weights16))
    if not plan.is_quantized:
        plgpu.barrier_wait(unit.scratch.v.full.at[slot])
    if masked:
        clean_values(unit, position)
    # At 64 x 256 accumulators the sum would hold the weights' registers across the barrier.
    if plan.head_dim > 128:
        total += weights.sum(axis=1)
    meanwhile = functools.partial(wait_next_keys, unit, position)
    return multiply_values(unit, position, weights16, values, meanwhile), maximum, total


def attend_first(unit: Unit, position, carry):
    """The weights of a tile that may need a mask, for attend_ahead or attend_behind of the next."""
    maximum, total, _ = carry
    slot = unit.slot(position)
    wait_keys(unit, position)
    weights, decay, maximum = weigh(unit, position, multiply_keys(unit, slot), maximum, masked=True)
    total, weights16 = total * decay + weights.sum(axis=1), weights.astype(unit.plan.dtype)
    maximum, total, weights16 = lax.optimization_barrier((maximum, total, weights16))
    plgpu.barrier_wait(unit.scratch.v.full.at[slot])
    clean_values(unit, position)
    return maximum, total, weights16


def attend_behind(unit: Unit, position, carry):
    """As attend_ahead, one after the other: what a mask needs in registers."""
    values, maximum, total, weights16 = carry
    values = multiply_values(unit, position - 1, weights16, values)
    before = maximum
    maximum, total, weights16 = attend_first(unit, position, (maximum, total, weights16))
    # Of the maximum alone: a tile's decay is what it raised it by.
    decay = lax.exp2(before - maximum)
    return values * broadcast_rows(decay, unit.plan.head_dim), maximum, total, weights16


def attend_ahead(unit: Unit, position, carry):
    """The softmax of a tile, while the tensor cores multiply the tile before with its values.

    What holds the assembler to that order: the wait for this tile's values, a loop that it moves no softmax
    across, and the rounding of the weights after the matmul that reads their predecessors' registers.
    """
    values, maximum, total, weights16 = carry
    plan, scratch = unit.plan, unit.scratch
    slot, before = unit.slot(position), unit.slot(position - 1)
    wait_keys(unit, position)

    def multiply(logits_ref, values_ref):
        values_ref[...] = values
        plgpu.wgmma(logits_ref, scratch.rows[0].at[unit.buffer], scratch.k.smem.at[slot].transpose((1, 0)))
        plgpu.wgmma(values_ref, weights16, scratch.v.smem.at[before])
        logits = plgpu.wgmma_accumulator_load(logits_ref, wait_n=1)
        plgpu.barrier_arrive(scratch.k.empty.at[slot])
        weights, decay, after = weigh(unit, position, logits, maximum, masked=False)
        after = after, total * decay + weights.sum(axis=1)
        weights, decay, after = lax.optimization_barrier((weights, decay, after))
        plgpu.barrier_wait(scratch.v.full.at[slot])
        return values_ref[...], weights, decay, after

    types = [plgpu.ACC((WARPGROUP_ROWS, x), jnp.float32) for x in (plan.config.tile_kv, plan.head_dim)]
    values, weights, decay, after = pl.run_scoped(multiply, *types)
    plgpu.barrier_arrive(scratch.v.empty.at[before])
    return values * broadcast_rows(decay, plan.head_dim), *after, weights.astype(plan.dtype)


def weigh(unit: Unit, position, logits, maximum, masked: bool):
    """(weights, decay, maximum): exponentials relative to the new maximum, and by how much what was summed
    before shrinks."""
    logits, scale, shift = bend(unit, position, logits)
    if masked:
        logits = where(sees(unit, position, logits.shape), logits, -jnp.inf)
    # The scale is applied where the maximum is subtracted: one fused multiply-add an element.
    new_maximum = lax.max(maximum, logits.max(axis=1) * scale - shift)
    weights = lax.exp2(logits * scale - broadcast_rows(new_maximum + shift, logits.shape[1]))
    return weights, lax.exp2(maximum - new_maximum), new_maximum


def multiply_values(unit: Unit, position, weights16, values, meanwhile=lambda: None):
    """values + P V of one tile."""
    slot = unit.slot(position)

    def multiply(values_ref):
        plgpu.wgmma(values_ref, weights16, unit.scratch.v.smem.at[slot])
        meanwhile()

    values = pl.run_state(multiply)(plgpu.ACC.init(values))
    plgpu.barrier_arrive(unit.scratch.v.empty.at[slot])
    return values


def multiply_keys(unit: Unit, slot):
    """Q K^T of one tile."""
    plan, scratch = unit.plan, unit.scratch

    def multiply(logits_ref):
        queries = scratch.rows[0].at[unit.buffer]
        plgpu.wgmma(logits_ref, queries, scratch.k.smem.at[slot].transpose((1, 0)))
        return logits_ref[...]

    logits = pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, plan.config.tile_kv), jnp.float32))
    if plan.is_quantized:
        logits *= broadcast_columns(load_columns(scratch.k.scale.at[slot]), WARPGROUP_ROWS)
    plgpu.barrier_arrive(scratch.k.empty.at[slot])
    return logits


def bend(unit: Unit, position, logits):
    """(scores, scale, shift): the logits in base 2, exp2 being the hardware's exponential, are
    scores * scale - shift, where shift is of rows."""
    spec = unit.plan.spec
    scale = spec.scale * LOG2_E
    if spec.logits_soft_cap is not None:
        logits = lax.tanh(logits * (spec.scale / spec.logits_soft_cap))
        scale = spec.logits_soft_cap * LOG2_E
    if unit.inputs.slopes is None:
        return logits, scale, 0.0
    rows, columns = logits.shape
    # slope (position - key), where both count from the tile's first key: one multiply-add an element.
    distance = positions(unit) - unit.first_key(position)
    key = fresh_iota(columns, axis=1)
    slopes = load_rows(unit.given(unit.inputs.slopes)) * LOG2_E  # again in each tile: registers are dearer
    bias = broadcast_rows(slopes, columns) * broadcast_columns(key.astype(jnp.float32), rows)
    return logits * scale + bias, 1.0, slopes * distance.astype(jnp.float32)


def round_weights(unit: Unit, slot, weights):
    """What the values are multiplied by: the weights, with the values' scales."""
    if unit.plan.is_quantized:
        weights *= broadcast_columns(load_columns(unit.scratch.v.scale.at[slot]), WARPGROUP_ROWS)
    return weights.astype(unit.plan.dtype)


def place_of_rows(unit: Unit):
    """Each row's head of the group, and its token in the tile."""
    row = fresh_iota(WARPGROUP_ROWS, axis=0)
    head, first_token = octet_at(unit.plan, opaque(unit.warpgroup), div(row, OCTET), unit.first_head)
    return head, first_token + rem(row, OCTET)


def positions(unit: Unit):
    """Where in its sequence each row's query stands."""
    return unit.field("token") + unit.field("offset") + place_of_rows(unit)[1]


def sees(unit: Unit, position, shape):
    """bool[rows, keys] of a tile, laid out as a wgmma accumulator."""
    # Counted from the tile's first key: what is compared with columns is then of rows.
    spec, query, first_key = unit.plan.spec, positions(unit), unit.first_key(position)
    key = broadcast_columns(fresh_iota(shape[1], axis=1), shape[0])
    last = lax.min(query if spec.is_causal else query + 2**29, unit.field("kv_length") - 1)
    visible = key <= broadcast_rows(last - first_key, shape[1])
    if spec.window_left is not None:
        visible &= key >= broadcast_rows(query - spec.window_left - first_key, shape[1])
    return visible


def clean_values(unit: Unit, position):
    """Zeroes the values that no query sees; the warpgroups share the work, and wait for each other."""
    plan, scratch = unit.plan, unit.scratch
    if plan.is_quantized:
        return  # done where codes were widened
    start, tile_kv = unit.first_key(position), plan.config.tile_kv
    first, stop = visible_keys(plan, unit.read("first", "offset", "kv_length"))

    @pl.when((start < first) | (start + tile_kv > stop))
    def _():
        share = unit.warpgroup, plan.config.warpgroups
        zero_invisible(scratch.v.smem.at[unit.slot(position)], start, first, stop, share)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.zeroed)
        plgpu.barrier_wait(scratch.zeroed)
