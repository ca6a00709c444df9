"""What happens to a tile of logits in registers: bias, slopes and soft cap, the mask, dropout. One set of
functions for all kernels: pure, of the tile's place and the extras.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.dropout import hash_row, survives
from pallas_kernels.flash_attention.extras import Extras
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.mosaic import (
    LOG2_E,
    broadcast_columns,
    broadcast_rows,
    load_rows,
    opaque,
    pl,
    plgpu,
    where,
)
from pallas_kernels.mosaic_inline import fresh_iota, hide_after, load_by_column

FAR = 1 << 30  # beyond any sequence


def load_matrix(ref):
    """A matrix in global memory, into registers as a wgmma accumulator lies."""
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


class TilePlace(NamedTuple):
    """Where a tile of logits lies: queries x keys, or keys x queries where a kernel owns keys."""

    batch: Any
    head: Any
    first_query: Any
    first_key: Any
    q_length: Any
    kv_length: Any
    shape: tuple[int, int]
    keys_first: bool = False
    hides_tail: bool = False  # keys past the end have no weight, even where a kernel owns them
    elements: Any = None  # int8 of this shape in global memory, where a block mask hides some
    ids: tuple[Any, Any] = (None, None)  # i32 in shared memory: the queries' and the keys' segment ids

    def queries(self):
        """The indices of its queries; by_query, or what they meet, tells their layout."""
        return self.first_query + lax.iota(jnp.int32, self.shape[1 if self.keys_first else 0])

    def keys(self):
        return self.first_key + lax.iota(jnp.int32, self.shape[0 if self.keys_first else 1])

    def by_query(self, x):
        """[queries] -> the tile's shape."""
        return broadcast_columns(x, self.shape[0]) if self.keys_first else broadcast_rows(x, self.shape[1])

    def by_key(self, x):
        return broadcast_rows(x, self.shape[1]) if self.keys_first else broadcast_columns(x, self.shape[0])

    def load_by_query(self, ref):
        """A vector of all queries, in global memory: those of this tile, in the tile's shape."""
        return self.by_query(self._load(ref, self.first_query, 1 if self.keys_first else 0))

    def load_by_key(self, ref):
        return self.by_key(self._load(ref, self.first_key, 0 if self.keys_first else 1))

    def load(self, ref):
        """This tile of a matrix in global memory, rows as the kernel owns them."""
        first_row, first_column = self.first_query, self.first_key
        if self.keys_first:
            first_row, first_column = first_column, first_row
        rows, columns = self.shape
        return load_matrix(ref.at[pl.ds(first_row, rows), pl.ds(first_column, columns)])

    def _load(self, ref, first, axis: int):
        ref = ref.at[pl.ds(first, self.shape[axis])]
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def bend(plan: AttentionPlan, extras: Extras, tile: TilePlace, logits):
    """(scores, scale, slope) from Q K^T: the logits in base 2 are scores * scale, exp2 being the hardware's
    exponential; slope is the soft cap's, None without one.
    """
    scale, slope = plan.scale * LOG2_E, None
    if plan.logits_soft_cap is not None:
        logits = jnp.tanh(logits * (plan.scale / plan.logits_soft_cap))
        slope, scale = 1 - logits * logits, plan.logits_soft_cap * LOG2_E
    if extras.bias is None and extras.alibi_slopes is None:
        return logits, scale, slope
    scores = logits * scale
    if extras.bias is not None:
        scores += _load_bias(extras.bias, tile) * LOG2_E
    if extras.alibi_slopes is not None:
        slopes = extras.alibi_slopes
        alibi = slopes[tile.batch if slopes.shape[0] > 1 else 0, tile.head] * LOG2_E
        position = tile.queries() + plan.offset(tile.q_length, tile.kv_length)
        # In fp32, exact up to 2^24: converted by rows and columns, not by elements.
        distance = tile.by_query(position.astype(jnp.float32)) - tile.by_key(tile.keys().astype(jnp.float32))
        scores -= jnp.abs(distance) * alibi
    return scores, 1.0, slope


def _load_bias(bias, tile: TilePlace):
    """The tile's bias in fp32, broadcast along dimensions of 1."""
    head = bias.at[tile.batch if bias.shape[0] > 1 else 0, tile.head if bias.shape[1] > 1 else 0]
    rows, columns = bias.shape[2:]
    if rows > 1 and columns > 1:
        return tile.load(head).astype(jnp.float32)
    if rows == columns == 1:
        return head[0, 0].astype(jnp.float32)
    vector = head.at[:, 0] if rows > 1 else head.at[0]
    by_query = (rows > 1) != tile.keys_first
    return (tile.load_by_query if by_query else tile.load_by_key)(vector).astype(jnp.float32)


def visible(plan: AttentionPlan, extras: Extras, tile: TilePlace):
    """bool of the tile's shape: which keys each query sees.

    Queries past their length need no mask: their weights are zero, or never stored. Nor do keys where a
    kernel owns them and sums nothing over them.
    """
    left, right = plan.reach
    position = tile.queries() + plan.offset(tile.q_length, tile.kv_length)
    key = tile.by_key(tile.keys())
    last = None if right is None else position + right
    # With an element mask or segment ids alone the compiler finds no layout: broadcast rows tell it.
    needs_layout = tile.elements is not None or (plan.has_segments and plan.reach == (None, None))
    if not tile.keys_first or tile.hides_tail or needs_layout:
        # Opaque: added to the columns' indices, it would be kept in a register for each.
        far = opaque(FAR) if tile.keys_first else FAR
        last = jnp.minimum(position + far if last is None else last, tile.kv_length - 1)
    conditions = []
    if last is not None:
        conditions.append(key <= tile.by_query(last))
    if left is not None:
        conditions.append(key >= tile.by_query(position - left))
    if plan.has_segments:
        conditions.append(_same_segment(extras, tile))
    if tile.elements is not None:
        conditions.append(load_matrix(tile.elements).astype(jnp.int32) != 0)
    return functools.reduce(jnp.logical_and, conditions)


def _same_segment(extras: Extras, tile: TilePlace):
    if tile.ids[0] is None:
        q_ids, kv_ids = (ref.at[tile.batch] for ref in (extras.q_segment_ids, extras.kv_segment_ids))
        return tile.load_by_query(q_ids) == tile.load_by_key(kv_ids)
    rows, columns = reversed(tile.ids) if tile.keys_first else tile.ids
    same = broadcast_rows(load_rows(rows), tile.shape[1]) == load_by_column(columns, (0,), tile.shape)
    plgpu.commit_smem()  # read before others take its place
    return same


def hide(plan: AttentionPlan, extras: Extras, tile: TilePlace, x, value: float, masked: bool | jax.Array):
    """x, and `value` where a query does not see a key.

    masked: whether there are such; where it is an array, the mask is found only if it is true.
    """
    hidden = lambda x: where(visible(plan, extras, tile), x, value)
    if isinstance(masked, jax.Array):
        return lax.cond(masked, hidden, lambda x: x, x)
    return hidden(x) if masked else x


def hide_end(plan: AttentionPlan, tile: TilePlace, x, value: float):
    """As hide, where plan.sees_prefixes: in a way that takes few registers beside wide accumulators."""
    right = FAR if plan.reach[1] is None else plan.reach[1]
    first = tile.first_query + plan.offset(tile.q_length, tile.kv_length) - tile.first_key
    last = fresh_iota(tile.shape[0], 0) + (first + right)
    return hide_after(x, jnp.minimum(last, tile.kv_length - 1 - tile.first_key), value)


def survivors(plan: AttentionPlan, extras: Extras, tile: TilePlace):
    """bool of the tile's shape: which weights dropout leaves."""
    row = hash_row(extras.dropout_seed, tile.batch, tile.head, tile.queries())
    return survives(tile.by_query(row), tile.by_key(tile.keys()), plan.dropout_rate)


class Weights(NamedTuple):
    """What a tile's logits turn into; the same array where nothing sets them apart."""

    values: Any  # P = exp(S - lse)
    kept: Any  # without the weights that dropout takes: dV's factor
    slopes: Any  # through the soft cap: dS / (dP - delta)


def weigh(
    plan: AttentionPlan,
    extras: Extras,
    tile: TilePlace,
    logits,
    lse2,
    masked: bool | jax.Array,
    rounds_slope: bool = False,
) -> Weights:
    """P = exp(S - lse) from Q K^T; masked as in hide; rounds_slope: the soft cap's slope takes 16 bits beside
    the weights, to save registers.
    """
    logits, scale, slope = bend(plan, extras, tile, logits)
    if slope is not None and rounds_slope:
        slope = lax.optimization_barrier(slope.astype(plan.dtype)).astype(jnp.float32)
    weights = lax.exp2(logits * scale - lse2)
    if extras.bias is not None:  # of queries that see nothing, padding among them, it may be NaN
        weights = where(lse2 == jnp.inf, 0.0, weights)
    weights = hide(plan, extras, tile, weights, 0.0, masked)
    kept = weights
    if plan.dropout_rate > 0:
        kept = where(survivors(plan, extras, tile), weights, 0.0)
    return Weights(weights, kept, weights if slope is None else weights * slope)


def logit_gradients(plan: AttentionPlan, weights: Weights, d_weights, delta):
    """dS from dP, the gradient of the kept weights; both scaled in a float32 call."""
    scale = 2.0**-plan.d_weights_exponent / (1 - plan.dropout_rate)
    if plan.dropout_rate > 0:
        # Zero: dropped, or too small to count.
        d_weights = where(weights.kept == 0, 0.0, d_weights * scale)
    elif plan.keeps_fp32:
        d_weights = d_weights * scale
    return weights.slopes * (d_weights - delta)
