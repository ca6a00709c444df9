"""The compute warpgroups of paged prefill: the online softmax over a unit's KV tiles.

Their accumulators leave few registers: fields of the work record are read again where they are used.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.tiles import KvTiles
from pallas_kernels.mosaic import (
    LOG2_E,
    broadcast_columns,
    broadcast_rows,
    div,
    load_columns,
    load_rows,
    pl,
    plgpu,
    register_zeros,
    row_full,
    row_iota,
)
from pallas_kernels.paged_attention.page_tiles import zero_invisible
from pallas_kernels.paged_attention.prefill_config import OCTET, WARPGROUP_ROWS
from pallas_kernels.paged_attention.prefill_plan import (
    Inputs,
    Outputs,
    PrefillPlan,
    Scratch,
    Work,
    octet_at,
    visible_keys,
    visible_tiles,
)

FLOOR = -1e30  # the running maximum before a key was seen: finite, so that no difference is NaN


def attend_unit(plan: PrefillPlan, warpgroup, item, kv_head, inputs: Inputs, outputs: Outputs, scratch):
    """Online softmax over the KV tiles that the queries see; only the ends of their range need a mask."""
    plgpu.barrier_wait(scratch.work_full)
    work = scratch.read_work()
    num_tiles = work.tile_stop - work.tile_start
    slopes, sinks = (None if x is None else x.at[kv_head, warpgroup] for x in (inputs.slopes, inputs.sinks))

    @pl.when(num_tiles > 0)
    def _():
        plgpu.barrier_wait(scratch.query_full.at[warpgroup])
        plgpu.barrier_wait(scratch.k.full.at[0])

    own = KvTiles(*(tile - work.tile_start for tile in visible_tiles(plan, work, warpgroup)))
    attend = functools.partial(attend_tile, plan, warpgroup, scratch, slopes, num_tiles)
    masked = functools.partial(attend, masked=True)
    skip = functools.partial(skip_tile, plan, warpgroup, scratch, num_tiles)
    carry = (
        register_zeros((WARPGROUP_ROWS, plan.head_dim)),
        row_full(WARPGROUP_ROWS, FLOOR),
        row_full(WARPGROUP_ROWS, 0.0),
    )
    if plan.spec.window_left is not None:
        if plan.has_own_ranges:
            lax.fori_loop(0, own.start, skip, None)
        carry = lax.fori_loop(own.start, own.full_start, masked, carry)
    carry = lax.fori_loop(own.full_start, own.full_stop, attend, carry)
    carry = lax.fori_loop(own.full_stop, own.stop, masked, carry)
    if plan.has_own_ranges:
        lax.fori_loop(own.stop, num_tiles, skip, None)
    store_unit(plan, warpgroup, item, kv_head, carry, sinks, outputs, scratch)


def wait_next_keys(plan: PrefillPlan, scratch: Scratch, index, num_tiles):
    """Whoever enters a tile has already waited for its keys."""
    slot = lax.rem(index + 1, jnp.int32(plan.slots))
    pl.when(index + 1 < num_tiles)(lambda: plgpu.barrier_wait(scratch.k.full.at[slot]))


def skip_tile(plan: PrefillPlan, warpgroup, scratch: Scratch, num_tiles, index, _):
    """Releases a tile that other warpgroups use and this one does not."""
    slot = lax.rem(index, jnp.int32(plan.slots))
    plgpu.barrier_wait(scratch.v.full.at[slot])
    clean_values(plan, warpgroup, scratch, index, slot)
    plgpu.barrier_arrive(scratch.k.empty.at[slot])
    wait_next_keys(plan, scratch, index, num_tiles)
    plgpu.barrier_arrive(scratch.v.empty.at[slot])


def attend_tile(
    plan: PrefillPlan, warpgroup, scratch: Scratch, slopes, num_tiles, index, carry, masked=False
):
    values, maximum, total = carry
    slot = lax.rem(index, jnp.int32(plan.slots))
    waits_early = masked or plan.is_quantized  # before the accumulators are full
    if waits_early:
        plgpu.barrier_wait(scratch.v.full.at[slot])
    if masked:
        clean_values(plan, warpgroup, scratch, index, slot)
    logits = multiply_keys(plan, warpgroup, scratch, slot)
    logits, scale, shift = bend(plan, warpgroup, scratch, slopes, index, logits)
    if masked:
        visible = sees(plan, warpgroup, scratch.read_work(), index, logits.shape)
        logits = jnp.where(visible, logits, -jnp.inf)

    # The scale is applied where the maximum is subtracted: one fused multiply-add an element.
    new_maximum = jnp.maximum(maximum, logits.max(axis=1) * scale - shift)
    decay = jnp.exp2(maximum - new_maximum)
    weights = jnp.exp2(logits * scale - broadcast_rows(new_maximum + shift, plan.config.tile_kv))
    values *= broadcast_rows(decay, plan.head_dim)
    total *= decay
    weights16 = round_weights(plan, scratch, slot, weights)
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
        wait_next_keys(plan, scratch, index, num_tiles)

    values: Any = pl.run_state(multiply_values)(plgpu.ACC.init(values))
    plgpu.barrier_arrive(scratch.v.empty.at[slot])
    return values, new_maximum, total


def multiply_keys(plan: PrefillPlan, warpgroup, scratch: Scratch, slot):
    """Q K^T of one tile."""

    def multiply(logits_ref):
        plgpu.wgmma(logits_ref, scratch.rows[0].at[warpgroup], scratch.k.smem.at[slot].transpose((1, 0)))
        return logits_ref[...]

    logits = pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, plan.config.tile_kv), jnp.float32))
    if plan.is_quantized:
        logits *= broadcast_columns(load_columns(scratch.k.scale.at[slot]), WARPGROUP_ROWS)
    plgpu.barrier_arrive(scratch.k.empty.at[slot])
    return logits


def bend(plan: PrefillPlan, warpgroup, scratch: Scratch, slopes, index, logits):
    """(scores, scale, shift): the logits in base 2, exp2 being the hardware's exponential, are
    scores * scale - shift, where shift is of rows."""
    spec = plan.spec
    scale = spec.scale * LOG2_E
    if spec.logits_soft_cap is not None:
        logits = jnp.tanh(logits * (spec.scale / spec.logits_soft_cap))
        scale = spec.logits_soft_cap * LOG2_E
    if slopes is None:
        return logits, scale, 0.0
    work, (rows, columns) = scratch.read_work(), logits.shape
    # slope (position - key), where both count from the tile's first key: one multiply-add an element.
    position = positions(plan, warpgroup, work, rows) - (work.tile_start + index) * columns
    key = plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=plgpu.Layout.WGMMA.reduce(0))
    slopes = load_rows(slopes) * LOG2_E  # again in each tile: registers are dearer
    bias = broadcast_rows(slopes, columns) * broadcast_columns(key.astype(jnp.float32), rows)
    return logits * scale + bias, 1.0, slopes * position.astype(jnp.float32)


def round_weights(plan: PrefillPlan, scratch: Scratch, slot, weights):
    """What the values are multiplied by: the weights, with the values' scales."""
    if plan.is_quantized:
        weights *= broadcast_columns(load_columns(scratch.v.scale.at[slot]), WARPGROUP_ROWS)
    return weights.astype(plan.dtype)


def positions(plan: PrefillPlan, warpgroup, work: Work, rows: int):
    """Where in its sequence each row's query stands."""
    row = row_iota(rows)
    _, first_token = octet_at(plan, warpgroup, lax.div(row, jnp.int32(OCTET)))
    return work.token + first_token + lax.rem(row, jnp.int32(OCTET)) + work.offset


def sees(plan: PrefillPlan, warpgroup, work: Work, index, shape):
    """bool[rows, keys] of a tile, laid out as a wgmma accumulator."""
    position = positions(plan, warpgroup, work, shape[0])
    key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
    key += (work.tile_start + index) * plan.config.tile_kv
    last = jnp.minimum(position if plan.spec.is_causal else position + 2**29, work.kv_length - 1)
    visible = key <= broadcast_rows(last, shape[1])
    if plan.spec.window_left is not None:
        visible &= key >= broadcast_rows(position - plan.spec.window_left, shape[1])
    return visible


def clean_values(plan: PrefillPlan, warpgroup, scratch: Scratch, index, slot):
    """Zeroes the values that no query sees; the warpgroups share the work, and wait for each other."""
    if plan.is_quantized:
        return  # done where codes were widened
    work, tile_kv = scratch.read_work(), plan.config.tile_kv
    start = (work.tile_start + index) * tile_kv
    first, stop = visible_keys(plan, work)

    @pl.when((start < first) | (start + tile_kv > stop))
    def _():
        share = warpgroup, plan.config.warpgroups
        zero_invisible(scratch.v.smem.at[slot], start, first, stop, share)
        plgpu.commit_smem()
        plgpu.barrier_arrive(scratch.zeroed)
        plgpu.barrier_wait(scratch.zeroed)


def store_unit(plan: PrefillPlan, warpgroup, item, kv_head, carry, sinks, outputs: Outputs, scratch: Scratch):
    """A unit's results to global memory."""
    values, maximum, total = carry
    norm = 1.0
    if sinks is not None:  # one more logit, which has no value
        sinks = load_rows(sinks) * LOG2_E
        highest = jnp.maximum(maximum, sinks)
        norm = jnp.exp2(maximum - highest)
        maximum, total = highest, total * norm + jnp.exp2(sinks - highest)
    live = total > 0
    lse = jnp.where(live, (maximum + jnp.log2(total)) * (1 / LOG2_E), -jnp.inf)
    outputs.lse[item, kv_head, warpgroup] = lse
    values *= broadcast_rows(jnp.where(live, norm / total, 0.0), plan.head_dim)
    if plan.has_parts:
        rows = outputs.out.at[item, kv_head, warpgroup]
        for first, column in plan.blocks:
            rows[:, pl.ds(first, 64)] = values[:, column : column + 64]
        return
    values = values.astype(plan.query_dtype)
    work = scratch.read_work()
    is_whole = (work.first == work.token) & (work.stop == work.token + plan.tile_q)
    _, swizzled, plain = (view.at[warpgroup] for view in scratch.rows)

    @pl.when(is_whole)
    def _():
        swizzled[...] = values
        plgpu.commit_smem()
        store_runs(plan, warpgroup, kv_head, work, swizzled, outputs.out)

    @pl.when(jnp.logical_not(is_whole))
    def _():
        width = math.gcd(plan.head_dim, plan.pitch)  # of blocks that fit in the pitch too, as layouts must
        for column in range(0, plan.head_dim, width):
            plain[:, pl.ds(column, width)] = values[:, column : column + width]
        plgpu.commit_smem()
        store_rows(plan, warpgroup, kv_head, work, plain, outputs.out)

    plgpu.wait_smem_to_gmem(0)


def store_runs(plan: PrefillPlan, warpgroup, kv_head, work: Work, rows, out):
    """A tile that holds tokens of its row only: a copy a run of octets."""
    for octet in range(0, WARPGROUP_ROWS // OCTET, plan.run):
        head, token = octet_at(plan, warpgroup, octet)
        target = pl.ds(pl.multiple_of(work.token + token, OCTET), plan.run * OCTET)
        source = rows.at[pl.ds(octet * OCTET, plan.run * OCTET)]

        @pl.when(head < plan.group)
        def _(source=source, target=target, head=head):
            plgpu.copy_smem_to_gmem(source, out.at[target, kv_head * plan.group + head])


def store_rows(plan: PrefillPlan, warpgroup, kv_head, work: Work, rows, out):
    """A tile that shares its octets with other rows: a copy a token and head, of its own tokens only."""

    def store(row, _):
        head, token = octet_at(plan, warpgroup, div(row, OCTET))
        token += work.token + lax.rem(row, jnp.int32(OCTET))

        @pl.when((head < plan.group) & (token >= work.first) & (token < work.stop))
        def _():
            source = rows.at[pl.ds(row, 1), pl.ds(0, plan.head_dim)]
            plgpu.copy_smem_to_gmem(source, out.at[pl.ds(token, 1), kv_head * plan.group + head])

    lax.fori_loop(0, WARPGROUP_ROWS, store, None)
