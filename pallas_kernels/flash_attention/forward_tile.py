"""What the forward kernel does with one KV tile, a compute warpgroup's stages from Q K^T to P V, and with the
result of all.

The logits are multiplied, bent and masked (modify_logits), turned into weights under a running maximum
(softmax_update) and multiplied with the values (FlashAttention-2, algorithm 1).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import halves
from pallas_kernels.flash_attention.extras import Extras
from pallas_kernels.flash_attention.forward_plan import ForwardPlan
from pallas_kernels.flash_attention.forward_ring import KeyValueRing
from pallas_kernels.flash_attention.scores import TilePlace, bend, hide, hide_end, survivors
from pallas_kernels.mosaic import (
    LOG2_E,
    broadcast_rows,
    ceil_div,
    pl,
    plgpu,
    register_zeros,
    row_iota,
    where,
)
from pallas_kernels.mosaic_wgmma import WGMMA_DEPTH, queue_logits, queue_product

FLOOR = -1e30  # the running maximum before a key was seen: finite, so that no difference is NaN


class Rows(NamedTuple):
    """The tile_q rows of an item that a compute warpgroup attends with."""

    batch: Any
    head: Any
    first_row: Any
    q_length: Any
    kv_length: Any
    extras: Extras
    q_smem: Any  # [tile_q, H], or in blocks of columns
    ids: Any  # i32[tile_q] in shared memory: segment ids; or None
    position: Any  # of the item's first KV tile among all that the thread block streams


class Softmax(NamedTuple):
    """Running statistics of each row, in base 2."""

    max: jax.Array  # f32[tile_q]
    sum: jax.Array  # f32[tile_q]

    def add(self, weights) -> "Softmax":
        return self._replace(sum=self.sum + weights.sum(axis=1))


class Turn(NamedTuple):
    """Of two warpgroups, whose time on the tensor cores it is: one queues P V of a tile, Q K^T of the next,
    and the other does while the first one's softmax runs. An item ends with P V, and its first Q K^T takes no
    turn: between items it is the other's.
    """

    ours: Any  # barriers
    theirs: Any

    def wait(self):
        plgpu.barrier_wait(self.ours)

    def give(self):
        plgpu.barrier_arrive(self.theirs)

    def give_after_keys(self, step):
        """Once Q K^T of a step is queued."""
        pl.when(step > 0)(self.give)


class Tile(NamedTuple):
    """What a warpgroup needs to attend to any tile of an item."""

    plan: ForwardPlan
    ring: KeyValueRing
    rows: Rows
    last: Any  # the item's last KV tile
    turn: Turn | None

    def k_slot(self, step):
        return self.ring.k_slot(self.rows.position + step)

    def v_slot(self, step):
        return self.ring.v_slot(self.rows.position + step)

    def place(self, step, masked: bool | jax.Array) -> TilePlace:
        """Where the logits of a step lie."""
        rows, shape = self.rows, (self.plan.config.tile_q, self.plan.config.tile_kv)
        extras, row = rows.extras, (rows.batch, rows.head, rows.first_row)
        first_key = extras.tile_at(self.last - step, *row, shape[1]) * shape[1]
        elements = None if masked is False else extras.elements_at(self.last - step, *row, shape)
        ids = rows.ids, self.ring.ids_at(rows.position + step)
        return TilePlace(*row, first_key, rows.q_length, rows.kv_length, shape, elements=elements, ids=ids)


def skip_tile(ring: KeyValueRing, rows: Rows, turn, step, _):
    """Releases a tile that other warpgroups of the block use and this one does not."""
    k_slot, v_slot = ring.k_slot(rows.position + step), ring.v_slot(rows.position + step)
    plgpu.barrier_wait(ring.k_loaded.at[k_slot])
    plgpu.barrier_arrive(ring.k_consumed.at[k_slot])
    if turn is not None:
        turn.give_after_keys(step)
    plgpu.barrier_wait(ring.v_loaded.at[v_slot])
    if turn is not None:
        turn.wait()
    plgpu.barrier_arrive(ring.v_consumed.at[v_slot])


def attend_tile(tile: Tile, step, carry, masked=False):
    """One tile of the online softmax; the other warpgroups' matmuls run while this one has none."""
    acc, softmax = carry
    plan, slot = tile.plan, tile.v_slot(step)
    logits = multiply_keys(tile, step)
    logits, scale = modify_logits(tile, step, logits, masked)
    weights, decay, softmax = softmax_update(softmax, logits, scale)
    acc *= broadcast_rows(decay, plan.value_columns)
    weights16 = drop_weights(tile, step, weights).astype(plan.dtype)
    # At 64 x 256 accumulators the sum would hold the weights' registers across the barrier.
    if plan.value_dim <= 128:
        softmax = softmax.add(weights)
        acc, softmax, weights16 = lax.optimization_barrier((acc, softmax, weights16))
    plgpu.barrier_wait(tile.ring.v_loaded.at[slot])
    if tile.turn is not None:
        tile.turn.wait()
    if plan.value_dim > 128:
        softmax = softmax.add(weights)
    return multiply_values(tile, slot, weights16, acc), softmax


def attend_first(tile: Tile, step, carry, masked=False):
    """The weights of the first tile, for attend_ahead of the second or attend_last."""
    softmax, _ = carry
    slot = tile.v_slot(step)
    logits = multiply_keys(tile, step)
    logits, scale = modify_logits(tile, step, logits, masked)
    weights, _, softmax = softmax_update(softmax, logits, scale)
    plgpu.barrier_wait(tile.ring.v_loaded.at[slot])
    if tile.turn is not None:
        tile.turn.wait()
    return softmax.add(weights), drop_weights(tile, step, weights).astype(tile.plan.dtype)


def attend_ahead(tile: Tile, step, carry, masked=False):
    """The softmax of a tile, while the tensor cores multiply the tile before with its values.

    Two things hold the assembler to that order: the wait for this tile's values, a loop that it moves no
    softmax across, and the rounding of the weights after the matmul that reads their predecessors' registers.
    """
    acc, softmax, weights16 = carry
    plan, ring, turn = tile.plan, tile.ring, tile.turn
    k_slot, v_slot, before = tile.k_slot(step), tile.v_slot(step), tile.v_slot(step - 1)
    plgpu.barrier_wait(ring.k_loaded.at[k_slot])

    def multiply(logits_ref, acc_ref):
        acc_ref[...] = acc
        load_logits = queue_keys(tile, k_slot, logits_ref)
        if plan.splits_values:
            result = queue_product(acc, weights16, ring.v.at[before])
        else:
            plgpu.wgmma(acc_ref, weights16, ring.v.at[before])
            result = plgpu.wgmma_accumulator_load(acc_ref, wait_n=None)
        if turn is not None:
            turn.give()
        logits = load_logits(wait_n=1)
        plgpu.barrier_arrive(ring.k_consumed.at[k_slot])
        logits, scale = modify_logits(tile, step, logits, masked)
        weights, decay, after = softmax_update(softmax, logits, scale)
        after, weights = after.add(weights), drop_weights(tile, step, weights)
        weights, decay, after = lax.optimization_barrier((weights, decay, after))
        plgpu.barrier_wait(ring.v_loaded.at[v_slot])
        plgpu.wgmma_wait(0)
        return result, weights, decay, after

    acc, weights, decay, softmax = pl.run_scoped(
        multiply, _logits_type(plan), plgpu.ACC(acc.shape, acc.dtype)
    )
    plgpu.barrier_arrive(ring.v_consumed.at[before])
    if turn is not None:
        turn.wait()
    return acc * broadcast_rows(decay, plan.value_columns), softmax, weights.astype(plan.dtype)


def attend_behind(tile: Tile, step, carry, masked=False):
    """As attend_ahead, one after the other: what a mask needs in registers beside 64 x 256 accumulators."""
    acc, softmax, weights16 = carry
    acc = multiply_values(tile, tile.v_slot(step - 1), weights16, acc)
    before = softmax.max
    softmax, weights16 = attend_first(tile, step, (softmax, weights16), masked)
    # Of the maximum alone: a tile's decay is what it raised it by.
    decay = lax.exp2(before - softmax.max)
    return acc * broadcast_rows(decay, tile.plan.value_columns), softmax, weights16


def attend_last(tile: Tile, weights16, step, acc):
    """The last tile's values, after attend_first or attend_ahead of that tile."""
    return multiply_values(tile, tile.v_slot(step), weights16, acc)


def multiply_keys(tile: Tile, step):
    """Q K^T, f32[tile_q, tile_kv]."""
    slot = tile.k_slot(step)
    plgpu.barrier_wait(tile.ring.k_loaded.at[slot])

    def multiply(logits_ref):
        load_logits = queue_keys(tile, slot, logits_ref)
        if tile.turn is not None:
            tile.turn.give_after_keys(step)
        return load_logits(wait_n=0)

    logits = pl.run_scoped(multiply, _logits_type(tile.plan))
    plgpu.barrier_arrive(tile.ring.k_consumed.at[slot])
    return logits


def queue_keys(tile: Tile, slot, logits_ref):
    """Queues Q K^T of a slot; gives what loads it, when wait_n later products at most are in the queue."""
    queries, keys = tile.rows.q_smem, tile.ring.k.at[slot]
    if not tile.plan.splits_columns:
        plgpu.wgmma(logits_ref, queries, keys.transpose((1, 0)))
        return functools.partial(plgpu.wgmma_accumulator_load, logits_ref)
    logits = queue_logits(queries, keys, ceil_div(tile.plan.key_columns, WGMMA_DEPTH) * WGMMA_DEPTH)

    def load(wait_n):
        plgpu.wgmma_wait(wait_n)
        return logits

    return load


def modify_logits(tile: Tile, step, logits, masked: bool | jax.Array):
    """(logits, scale): softmax sees logits * scale, in base 2; -inf where a row does not see a key."""
    place, extras = tile.place(step, masked), tile.rows.extras
    logits, scale, _ = bend(tile.plan, extras, place, logits)
    if extras.bias is not None and place.elements is not None:
        # The bias is added before the element mask is read: both would take registers.
        logits, step = lax.optimization_barrier((logits, step))
        place = tile.place(step, masked)
    if masked is True and tile.plan.config.splits_rows and tile.plan.sees_prefixes:
        return hide_end(tile.plan, place, logits, -jnp.inf), scale
    return hide(tile.plan, extras, place, logits, -jnp.inf, masked), scale


def drop_weights(tile: Tile, step, weights):
    """The weights that dropout leaves; what they are divided by is applied at the end."""
    if tile.plan.dropout_rate == 0:
        return weights
    return where(survivors(tile.plan, tile.rows.extras, tile.place(step, False)), weights, 0.0)


def softmax_update(softmax: Softmax, logits, scale: float):
    """(weights, decay, softmax): exp2(logits * scale - new maximum), by how much what was summed before
    shrinks, and the new statistics, their sum still without these weights.
    """
    # The scale is applied where the maximum is subtracted: one fused multiply-add an element.
    new_max = lax.max(softmax.max, logits.max(axis=1) * scale)
    decay = lax.exp2(softmax.max - new_max)
    weights = lax.exp2(logits * scale - broadcast_rows(new_max, logits.shape[1]))
    return weights, decay, Softmax(new_max, softmax.sum * decay)


def add_sink(sink, acc, softmax: Softmax):
    """One more logit, in base 2, that has no value."""
    new_max = jnp.maximum(softmax.max, sink)
    decay = lax.exp2(softmax.max - new_max)
    return acc * broadcast_rows(decay, acc.shape[1]), Softmax(
        new_max, softmax.sum * decay + lax.exp2(sink - new_max)
    )


def finish_rows(plan: ForwardPlan, rows: Rows, acc, softmax: Softmax, out_smem, lse_smem):
    """Divides by the sum of the weights; rows that saw nothing give 0 and -inf. Returns what is to follow the
    output in out_smem (halves.split).
    """
    if rows.extras.sinks is not None:
        acc, softmax = add_sink(rows.extras.sinks[rows.head] * LOG2_E, acc, softmax)
    live = softmax.sum != 0  # also where it is NaN, which is not to be hidden
    if plan.has_q_lengths:
        live = live & (rows.first_row + row_iota(plan.config.tile_q) < rows.q_length)
    norm = where(live, 1 / ((1 - plan.dropout_rate) * softmax.sum), 0.0)
    columns = plan.value_columns
    result = where(broadcast_rows(live, columns), acc * broadcast_rows(norm, columns), 0.0)
    # Selected before it is rounded: pairs of 16 bits would be taken apart.
    first, *rest = halves.split(plan, lax.optimization_barrier(result))
    stage_result(plan, out_smem, first)
    lse_smem[...] = where(live, (softmax.max + lax.log2(softmax.sum)) * (1 / LOG2_E), -jnp.inf)
    return rest


def stage_result(plan: ForwardPlan, out_smem, x):
    """Stores results into a tile, whose columns are stored whole: what leaves it ends with the output."""
    rows = x.shape[0]
    if missing := (0 if plan.keeps_fp32 else plan.value_dim - x.shape[1]):
        x = lax.concatenate([x, register_zeros((rows, missing)).astype(x.dtype)], 1)
    if not plan.in_column_blocks:
        out_smem[...] = x
        return
    width = out_smem.shape[-1]
    for block in range(out_smem.shape[0]):
        first = block * width
        out_smem[block] = lax.slice(x, (0, first), (rows, first + width))


def multiply_values(tile: Tile, slot, weights16, acc):
    """acc + P V."""
    values = tile.ring.v.at[slot]
    if tile.plan.splits_values:
        acc = queue_product(acc, weights16, values)
        plgpu.wgmma_wait(0)
    else:
        acc = pl.run_state(lambda ref: plgpu.wgmma(ref, weights16, values))(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(tile.ring.v_consumed.at[slot])
    return acc


def _logits_type(plan: ForwardPlan):
    return plgpu.ACC((plan.config.tile_q, plan.config.tile_kv), jnp.float32)
