"""What kernels say in Mosaic's own terms (mosaic_inline.py) in JAX's: the interpreter knows no other."""

import contextlib
import unittest.mock

import jax.numpy as jnp
from jax import lax

from pallas_kernels import mosaic, mosaic_copy
from pallas_kernels.flash_attention import (
    backward_dkv_sm90,
    backward_fused_adds,
    backward_fused_items,
    backward_fused_tile,
    backward_fused_wide_tile,
    forward_tile,
    items,
    operands,
    scores,
)
from pallas_kernels.mosaic import broadcast_columns, pl, plgpu
from pallas_kernels.mosaic_copy import OCTET
from pallas_kernels.mosaic_inline import deinterleave
from pallas_kernels.paged_attention import (
    cascade_rows_sm90,
    decode_codes,
    decode_consumer,
    decode_producer,
    decode_tile,
    prefill_consumer,
    prefill_list_sm90,
    prefill_producer,
    prefill_tile,
    prefill_units,
    units,
)


@contextlib.contextmanager
def plain_terms():
    """In JAX's terms, what kernels say in Mosaic's own."""
    places = {
        "reduce_rows": (_reduce_rows, decode_consumer, decode_tile),
        "store_deinterleaved": (_store_deinterleaved, decode_consumer),
        "load_codes_transposed": (_load_codes_transposed, decode_codes),
        "draw": (_draw, units, items, backward_fused_items, prefill_producer),
        "meet": (plgpu.commit_smem, backward_fused_adds, cascade_rows_sm90, prefill_list_sm90, prefill_units),
        "fresh_iota": (_iota, prefill_tile, scores),
        "hide_after": (_hide_after, scores),
        "queue_logits": (_queue_logits, forward_tile),
        "queue_product": (_queue_product, forward_tile),
        "load_by_column": (
            _load_by_column,
            *(backward_fused_tile, backward_fused_wide_tile, backward_dkv_sm90, scores),
        ),
        # An order of adds cannot be waited for where blocks come one after the other.
        "peek_turn": (lambda counters, place: jnp.int32(0), backward_fused_adds),
        "wait_turn": (lambda counters, place, turn, seen: None, backward_fused_adds),
        "pass_turn": (lambda counters, place: None, backward_fused_adds),
        "load_exactly": (_load_exactly, mosaic_copy),
        "store_exactly": (_store_exactly, mosaic_copy),
        "load_ended": (_load_ended, operands),
        "load_block": (_load_block, decode_producer, prefill_producer),
        "store_rows": (_store_rows, prefill_consumer),
        "load_numbers": (
            _load_numbers,
            backward_fused_adds,
            cascade_rows_sm90,
            decode_producer,
            prefill_list_sm90,
            prefill_units,
            units,
        ),
        "gather": (lambda ref, places: ref[...][places], cascade_rows_sm90, prefill_list_sm90, units),
        "store_records": (_store_records, prefill_list_sm90),
        "tell_transforms": (lambda buffers: None, mosaic),
        "broadcast": (lambda x, shape, dims, layout: lax.broadcast_in_dim(x, shape, dims), mosaic),
    }
    with contextlib.ExitStack() as stack:
        for name, (ours, *modules) in places.items():
            for module in modules:
                stack.enter_context(unittest.mock.patch.object(module, name, ours))
        yield


def _draw(counter, target, offset, previous):
    """Where every block is as fast as the others."""
    target[...] = jnp.full((1,), previous + offset, jnp.int32)


def _reduce_rows(kind, x, space):
    return x.max(axis=0) if kind == "max" else x.sum(axis=0)


def _load_codes_transposed(codes, first):
    block = codes[:, pl.ds(first, 64)].astype(jnp.float16).T
    return block.reshape(-1, 8, 2, block.shape[1]).swapaxes(1, 2).reshape(block.shape)


def _store_deinterleaved(ref, x):
    ref[...] = deinterleave(x).T.astype(ref.dtype)


def _iota(size, axis):
    return jnp.arange(size, dtype=jnp.int32)


def _hide_after(x, last, value):
    return jnp.where(jnp.arange(x.shape[1]) <= last[:, None], x, value)


def _queue_logits(a, b, depth):
    def multiply(acc):
        for block in range(0 if len(a.shape) == 2 else a.shape[0]):
            width = pl.ds(0, min(a.shape[-1], depth - block * a.shape[-1]))
            plgpu.wgmma(acc, a.at[block, :, width], b.at[block, :, width].transpose((1, 0)))
        if len(a.shape) == 2:
            plgpu.wgmma(acc, a.at[:, pl.ds(0, depth)], b.at[:, pl.ds(0, depth)].transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[-2], b.shape[-2]), jnp.float32))


def _queue_product(acc, a, ref):
    if len(ref.shape) == 2:
        own = ref.at[:, pl.ds(0, acc.shape[1])]
        return pl.run_state(lambda acc_ref: plgpu.wgmma(acc_ref, a, own))(plgpu.ACC.init(acc))
    width, parts = ref.shape[-1], []
    for first in range(0, acc.shape[1], width):
        own = min(width, acc.shape[1] - first)
        parts.append(_queue_product(acc[:, first : first + own], a, ref.at[first // width]))
    return jnp.concatenate(parts, axis=1)


def _load_by_column(ref, place, shape):
    *row, first = place
    return broadcast_columns(ref[*row, pl.ds(first, shape[1])], shape[0])


def _load_exactly(array, place, target, barrier):
    *batch, row, head = place
    rows, columns = target.shape[-2:]
    if len(target.shape) > 2:  # copies of all blocks are one arrival
        found = array[...].at[*batch, row + jnp.arange(rows), head].get(mode="fill", fill_value=0)
        for block in range(target.shape[0]):
            own = found[:, block * columns : (block + 1) * columns]
            target[block] = jnp.pad(own, ((0, 0), (0, columns - own.shape[1])))
        plgpu.barrier_arrive(barrier)
        return
    if missing := columns - array.shape[-1]:
        target[:, pl.ds(array.shape[-1], missing)] = jnp.zeros((rows, missing), target.dtype)
    own = target.at[:, pl.ds(0, array.shape[-1])]
    plgpu.copy_gmem_to_smem(array.at[*batch, pl.ds(row, rows), head], own, barrier)


def _load_ended(array, tail, place, length, target, barrier):
    *batch, first, head = place
    row = first + jnp.arange(target.shape[-2])
    whole, ended = (x[...].at[*batch, :, head].get() for x in (array, tail))
    found = whole.at[row].get(mode="fill", fill_value=0)
    in_tail = ended.at[row - length // OCTET * OCTET].get(mode="fill", fill_value=0)
    found = jnp.where((row < length // OCTET * OCTET)[:, None], found, 0)
    found = jnp.where(((row >= length // OCTET * OCTET) & (row < length))[:, None], in_tail, found)
    blocks, width = (1, target.shape[-1]) if len(target.shape) == 2 else (target.shape[0], target.shape[-1])
    found = jnp.pad(found, ((0, 0), (0, blocks * width - found.shape[1])))
    for block in range(blocks):
        part = target if len(target.shape) == 2 else target.at[block]
        part[...] = found[:, block * width : (block + 1) * width]
    plgpu.barrier_arrive(barrier)


def _load_block(array, place, column, target, barrier):
    rows, columns = target.shape
    own = min(columns, array.shape[-1] - column)
    if own < columns:
        target[:, pl.ds(own, columns - own)] = jnp.zeros((rows, columns - own), target.dtype)
    source = array.at[(*place, pl.ds(column, own))]
    plgpu.copy_gmem_to_smem(source, target.at[:, pl.ds(0, own)], barrier)


def _store_exactly(source, array, place, inside=False):
    *batch, row, head = place
    if len(source.shape) > 2:
        _, rows, width = source.shape
        for first in range(0, array.shape[-1], width):
            own = min(width, array.shape[-1] - first)
            target = array.at[*batch, pl.ds(row, rows), head, pl.ds(first, own)]
            plgpu.copy_smem_to_gmem(source.at[first // width, :, pl.ds(0, own)], target)
        return
    own = source.at[:, pl.ds(0, array.shape[-1])]
    plgpu.copy_smem_to_gmem(own, array.at[*batch, pl.ds(row, source.shape[0]), head])


def _load_numbers(ref, places):
    return [ref[place] for place in places]


def _store_records(ref, places, columns):
    size, records = len(columns), jnp.stack(columns, axis=1)

    def store(i, _):
        ref[pl.ds(places[i] * size, size)] = records[i]

    lax.fori_loop(0, len(places), store, None)


def _store_rows(ref, x, row):
    for i in range(x.shape[0]):

        @pl.when(row[i] >= 0)
        def _(i=i):
            place = jnp.unravel_index(row[i], ref.shape[:-1])
            ref[*place] = x[i].astype(ref.dtype)
