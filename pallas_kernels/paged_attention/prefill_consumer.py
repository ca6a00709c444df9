"""The compute warpgroups of paged prefill: the online softmax over a unit's KV tiles.

Their accumulators leave few registers. So fields of a unit's record are read again where they are used, from
what the compiler cannot follow (opaque): else it would keep them, and what follows from a thread's place,
through the loop over units.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.tiles import KvTiles
from pallas_kernels.mosaic import (
    LOG2_E,
    broadcast_columns,
    broadcast_rows,
    load_columns,
    load_rows,
    opaque,
    pl,
    plgpu,
    register_zeros,
    row_full,
)
from pallas_kernels.mosaic_inline import fresh_iota, store_rows
from pallas_kernels.paged_attention.page_tiles import zero_invisible
from pallas_kernels.paged_attention.prefill_config import OCTET, WARPGROUP_ROWS
from pallas_kernels.paged_attention.prefill_plan import (
    Inputs,
    Outputs,
    PrefillPlan,
    Scratch,
    buffer_of,
    octet_at,
)
from pallas_kernels.paged_attention.prefill_units import Work, for_each_unit
from pallas_kernels.paged_attention.prefill_work import visible_keys

FLOOR = -1e30  # the running maximum before a key was seen: finite, so that no difference is NaN


class Unit(NamedTuple):
    """What a compute warpgroup needs to attend to any tile of a unit; a tile is known by its position among
    all that the program streams."""

    plan: PrefillPlan
    warpgroup: Any
    inputs: Inputs
    scratch: Scratch
    turn: Any  # of the program
    stop: Any  # the position beyond the last tile's

    @property
    def work(self) -> Work:
        return self.scratch.records.read(opaque(self.turn))

    @property
    def buffer(self) -> Any:
        return buffer_of(self.plan, opaque(self.turn), self.warpgroup)

    def slot(self, position):
        return lax.rem(position, jnp.int32(self.plan.slots))

    def first_key(self, position):
        return (self.work.tile_stop - (self.stop - position)) * self.plan.config.tile_kv

    @property
    def own_tiles(self) -> KvTiles:
        """The positions of the tiles that the warpgroup sees."""
        index = self.warpgroup if self.plan.has_own_ranges else 0
        own = self.scratch.records.read_range(opaque(self.turn), index)
        return KvTiles(*(self.stop - count for count in own))

    def given(self, per_row):
        """The part of what is given for each row of a tile, or None."""
        return None if per_row is None else per_row.at[self.work.kv_head, self.warpgroup]

    def release(self, turn):
        """Gives the loading warpgroup a turn's buffer, when the copies of its results have been read."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.scratch.query_empty.at[buffer_of(self.plan, turn, self.warpgroup)])


def attend_units(plan: PrefillPlan, warpgroup, inputs: Inputs, outputs: Outputs, scratch: Scratch):
    """A compute warpgroup: its rows of every unit of the program."""
    at = functools.partial(Unit, plan, warpgroup, inputs, scratch)

    def attend(turn, position):
        work = scratch.records.read(turn)
        unit = at(turn, position + work.num_tiles)
        store_unit(unit, attend_unit(unit, position), outputs)
        return unit.stop

    turns, _ = for_each_unit(scratch.records, attend, jnp.int32(0))
    if plan.query_buffers > 1:
        pl.when(turns > 0)(lambda: at(turns, None).release(turns - 1))
    plgpu.wait_smem_to_gmem(0)


def attend_unit(unit: Unit, start):
    """Online softmax over the KV tiles that the queries see; only the ends of their range need a mask."""
    plan, scratch, turn = unit.plan, unit.scratch, unit.turn
    plgpu.barrier_wait(scratch.query_full.at[unit.buffer])
    pl.when(start < unit.stop)(lambda: plgpu.barrier_wait(scratch.k.full.at[unit.slot(start)]))
    own = unit.own_tiles
    attend = functools.partial(attend_tile, unit)
    masked = functools.partial(attend, masked=True)
    skip = functools.partial(skip_tile, unit)
    carry = (
        register_zeros((WARPGROUP_ROWS, plan.head_dim)),
        row_full(WARPGROUP_ROWS, FLOOR),
        row_full(WARPGROUP_ROWS, 0.0),
    )
    if plan.spec.window_left is not None:
        if plan.has_own_ranges:
            lax.fori_loop(start, own.start, skip, None)
        carry = lax.fori_loop(own.start, own.full_start, masked, carry)
    carry = lax.fori_loop(own.full_start, own.full_stop, attend, carry)
    if plan.query_buffers > 1:  # late enough not to wait for results, early enough for the next queries
        pl.when(turn > 0)(lambda: unit.release(turn - 1))
    own = unit.own_tiles
    carry = lax.fori_loop(own.full_stop, own.stop, masked, carry)
    if plan.has_own_ranges:
        lax.fori_loop(unit.own_tiles.stop, unit.stop, skip, None)
    return carry


def wait_next_keys(unit: Unit, position):
    """Whoever enters a tile has already waited for its keys."""
    slot = unit.slot(position + 1)
    pl.when(position + 1 < unit.stop)(lambda: plgpu.barrier_wait(unit.scratch.k.full.at[slot]))


def skip_tile(unit: Unit, position, _):
    """Releases a tile that other warpgroups use and this one does not."""
    scratch, slot = unit.scratch, unit.slot(position)
    plgpu.barrier_wait(scratch.v.full.at[slot])
    clean_values(unit, position)
    plgpu.barrier_arrive(scratch.k.empty.at[slot])
    wait_next_keys(unit, position)
    plgpu.barrier_arrive(scratch.v.empty.at[slot])


def attend_tile(unit: Unit, position, carry, masked=False):
    values, maximum, total = carry
    plan, scratch, slot = unit.plan, unit.scratch, unit.slot(position)
    waits_early = masked or plan.is_quantized  # before the accumulators are full
    if waits_early:
        plgpu.barrier_wait(scratch.v.full.at[slot])
    if masked:
        clean_values(unit, position)
    logits = multiply_keys(unit, slot)
    logits, scale, shift = bend(unit, position, logits)
    if masked:
        logits = jnp.where(sees(unit, position, logits.shape), logits, -jnp.inf)

    # The scale is applied where the maximum is subtracted: one fused multiply-add an element.
    new_maximum = jnp.maximum(maximum, logits.max(axis=1) * scale - shift)
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(logits * scale - broadcast_rows(new_maximum + shift, plan.config.tile_kv))
    values *= broadcast_rows(decay, plan.head_dim)
    total *= decay
    weights16 = round_weights(unit, slot, weights)
    if plan.head_dim <= 128:
        total += weights.sum(axis=1)
        values, total, new_maximum, weights16 = lax.optimization_barrier(
            (values, total, new_maximum, weights16)
        )
    if not waits_early:
        plgpu.barrier_wait(scratch.v.full.at[slot])
    # At 64 x 256 accumulators the sum would hold the weights' registers across the barrier.
    if plan.head_dim > 128:
        total += weights.sum(axis=1)

    def multiply_values(values_ref):
        plgpu.wgmma(values_ref, weights16, scratch.v.smem.at[slot])
        wait_next_keys(unit, position)

    values: Any = pl.run_state(multiply_values)(plgpu.ACC.init(values))
    plgpu.barrier_arrive(scratch.v.empty.at[slot])
    return values, new_maximum, total


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
        logits = jnp.tanh(logits * (spec.scale / spec.logits_soft_cap))
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
    head, first_token = octet_at(unit.plan, opaque(unit.warpgroup), lax.div(row, jnp.int32(OCTET)))
    return head, first_token + lax.rem(row, jnp.int32(OCTET))


def positions(unit: Unit):
    """Where in its sequence each row's query stands."""
    return unit.work.token + unit.work.offset + place_of_rows(unit)[1]


def sees(unit: Unit, position, shape):
    """bool[rows, keys] of a tile, laid out as a wgmma accumulator."""
    # Counted from the tile's first key: what is compared with columns is then of rows.
    spec, query, first_key = unit.plan.spec, positions(unit), unit.first_key(position)
    key = broadcast_columns(fresh_iota(shape[1], axis=1), shape[0])
    last = jnp.minimum(query if spec.is_causal else query + 2**29, unit.work.kv_length - 1)
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
    first, stop = visible_keys(plan, unit.work)

    @pl.when((start < first) | (start + tile_kv > stop))
    def _():
        share = unit.warpgroup, plan.config.warpgroups
        zero_invisible(scratch.v.smem.at[unit.slot(position)], start, first, stop, share)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.zeroed)
        plgpu.barrier_wait(scratch.zeroed)


def store_unit(unit: Unit, carry, outputs: Outputs):
    """A unit's results to global memory; those of tokens leave through the buffer of their queries."""
    plan = unit.plan
    values, maximum, total = carry
    norm = 1.0
    if unit.inputs.sinks is not None:  # one more logit, which has no value
        sinks = load_rows(unit.given(unit.inputs.sinks)) * LOG2_E
        highest = jnp.maximum(maximum, sinks)
        norm = jnp.exp2(maximum - highest)
        maximum, total = highest, total * norm + jnp.exp2(sinks - highest)
    live = total > 0
    lse = jnp.where(live, (maximum + jnp.log2(total)) * (1 / LOG2_E), -jnp.inf)
    place = unit.work.item, unit.work.kv_head, opaque(unit.warpgroup)
    outputs.lse[place] = lse
    values *= broadcast_rows(jnp.where(live, norm / total, 0.0), plan.head_dim)
    if plan.has_parts:
        rows = outputs.out.at[place]
        for first, column in plan.blocks:
            rows[:, pl.ds(first, 64)] = values[:, column : column + 64]
    else:
        store_tokens(unit, values.astype(plan.query_dtype), outputs.out)
    if plan.query_buffers == 1:
        unit.release(unit.turn)


def store_tokens(unit: Unit, values, out):
    """A tile whose rows of results are whole runs leaves as it lies in swizzled memory, any other goes from
    registers, without the tokens that it shares its octets with."""
    plan, work = unit.plan, unit.work
    ends_run = lambda token: lax.rem(token - work.token, jnp.int32(plan.run * OCTET)) == 0
    is_whole = ends_run(work.first) & ends_run(work.stop)

    @pl.when(is_whole)
    def _():
        rows = unit.scratch.rows[1].at[unit.buffer]
        rows[...] = values
        plgpu.commit_smem()
        store_runs(unit, rows, out)

    @pl.when(jnp.logical_not(is_whole))
    def _():
        head, token = place_of_rows(unit)
        token += work.token
        is_ours = (head < plan.group) & (token >= work.first) & (token < work.stop)
        row = token * plan.num_heads + work.kv_head * plan.group + head
        store_rows(out, values, jnp.where(is_ours, row, -1))


def store_runs(unit: Unit, rows, out):
    """A copy a run of octets, of those that hold the row's tokens."""
    plan, work = unit.plan, unit.work
    for octet in range(0, WARPGROUP_ROWS // OCTET, plan.run):
        head, token = octet_at(plan, opaque(unit.warpgroup), octet)
        token += work.token
        target = pl.ds(pl.multiple_of(token, OCTET), plan.run * OCTET)
        source = rows.at[pl.ds(octet * OCTET, plan.run * OCTET)]

        @pl.when((head < plan.group) & (token >= work.first) & (token < work.stop))
        def _(source=source, target=target, head=head):
            plgpu.copy_smem_to_gmem(source, out.at[target, work.kv_head * plan.group + head])
