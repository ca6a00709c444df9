"""The gradient of a bias on Hopper: dS = P * (dP - delta), summed over the dimensions along which the bias
was broadcast.

Each thread block owns one tile of the sums and recomputes the tiles of dS that fall on it, in a fixed order:
nothing of size T x S is stored but the gradient of a bias of that size. Where the sums run over queries or
keys, those of each batch row and head are left to XLA, so that there are blocks enough. Of a block mask it
reads a map instead of lists: a block asks whether its own tiles are visited.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.block_tiles import (
    NOT_VISITED,
    BlockTiles,
    elements_by_kind,
    tile_kinds,
)
from pallas_kernels.flash_attention.extras import Extras, Footprint, prepare
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.scores import TilePlace, logit_gradients, weigh
from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.kv_tiles import kv_tiles
from pallas_kernels.mosaic import (
    broadcast_rows,
    div,
    make_kernel,
    pl,
    plgpu,
    register_zeros,
    rem,
    swizzled_smem,
)
from pallas_kernels.mosaic_copy import load_tile

TILE = 64  # queries, and keys: small, so that thread blocks share an SM and hide each other's loads


class Buffers(NamedTuple):
    """Shared memory of a thread block."""

    q: Any  # [64, H]
    k: Any
    v: Any  # [64, Hv]
    d_out: Any
    lse: Any  # f32[64]
    delta: Any
    sums: Any  # [64, 64], on their way out

    @classmethod
    def types(cls, plan: AttentionPlan, dtype) -> "Buffers":
        """dtype: of the sums."""
        by_query, by_value = (swizzled_smem((TILE, n), plan.dtype) for n in (plan.head_dim, plan.value_dim))
        vector = plgpu.SMEM((TILE,), jnp.float32)
        sums = swizzled_smem((TILE, TILE), dtype)
        return cls(by_query, by_query, by_value, by_value, vector, vector, sums)


class TileMap(NamedTuple):
    """A block mask, tile by tile."""

    kinds: Any  # i32[B|1, N|1, Tq, Ts], see tile_kinds
    elements: Any  # i8[2 + U, tile_q, tile_kv], of each kind

    @classmethod
    def of(cls, tiles: BlockTiles) -> "TileMap":
        return cls(tile_kinds(tiles, jnp.arange(tiles.num_kv.shape[2])), elements_by_kind(tiles))

    def find(self, place: TilePlace):
        """(whether a tile is visited, its elements)."""
        (batches, heads, *_), (_, tile_q, tile_kv) = self.kinds.shape, self.elements.shape
        row = place.batch if batches > 1 else 0, place.head if heads > 1 else 0
        kind = self.kinds[*row, div(place.first_query, tile_q), div(place.first_key, tile_kv)]
        first_row, first_column = rem(place.first_query, tile_q), rem(place.first_key, tile_kv)
        elements = self.elements.at[kind, pl.ds(first_row, TILE), pl.ds(first_column, TILE)]
        return kind != NOT_VISITED, elements


def launch(plan: AttentionPlan, inputs: AttentionInputs, query, key, value, out_grad, lse2, delta):
    """The gradient in the bias's shape and dtype, or in fp32 where the others are; arguments as theirs."""
    bias = inputs.bias
    assert bias is not None
    sums_tiles = bias.shape[2] == 1 or bias.shape[3] == 1
    num_tiles = [math.ceil(length / TILE) for length in (plan.num_queries, plan.num_keys)]
    sizes = (plan.batch, plan.num_heads, *num_tiles)
    kept = [size > 1 or (sums_tiles and axis < 2) for axis, size in enumerate(bias.shape)]
    grid = [size if keep else 1 for size, keep in zip(sizes, kept, strict=True)]
    dtype, out_dtype = (
        jnp.float32 if is_fp32 else bias.dtype for is_fp32 in (sums_tiles or plan.keeps_fp32, plan.keeps_fp32)
    )
    tile_map = None if inputs.block_mask is None else TileMap.of(inputs.block_mask)
    extras = prepare(plan, inputs._replace(block_mask=None), Footprint(TILE, TILE, 1))
    (out,) = make_kernel(
        functools.partial(_body, plan, sizes, kept),
        out_type=(jax.ShapeDtypeStruct((*grid[:2], grid[2] * TILE, grid[3] * TILE), dtype),),
        grid=(math.prod(grid),),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=(Buffers.types(plan, dtype), plgpu.Barrier(num_arrivals=6)),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="flash_attention_dbias",
    )(query, key, value, out_grad, lse2, delta, extras, tile_map)
    rows, columns = (n if keep else TILE for n, keep in zip(bias.shape[2:], kept[2:], strict=True))
    out = out[:, :, :rows, :columns]
    broadcast = tuple(axis for axis in range(4) if bias.shape[axis] == 1 and out.shape[axis] > 1)
    return jnp.sum(out, axis=broadcast, keepdims=True).astype(out_dtype)


def _body(plan: AttentionPlan, sizes, kept, *refs):
    *sources, extras, tile_map, out, buffers, loaded = refs
    block = lax.axis_index("block")
    num_steps = math.prod(size for size, keep in zip(sizes, kept, strict=True) if not keep)

    def step(index, sums):
        batch, head, q_tile, kv_tile = _locate(sizes, kept, block, index)
        q_length, kv_length = plan.lengths_of(batch, extras)
        lengths = q_length, kv_length
        place = TilePlace(batch, head, q_tile * TILE, kv_tile * TILE, *lengths, shape=(TILE, TILE))
        offset = plan.offset(*lengths)
        seen = kv_tiles(place.first_query, TILE, offset, *lengths, plan.reach, TILE)
        seen = extras.visits(seen, batch, head, place.first_query, TILE, TILE, 1)
        is_seen = (seen.start <= kv_tile) & (kv_tile < seen.stop)
        if tile_map is not None:
            is_visited, elements = tile_map.find(place)
            is_seen, place = is_seen & is_visited, place._replace(elements=elements)
        add = lambda _, sums: sums + _gradients(plan, extras, place, sources, buffers, loaded)
        return lax.fori_loop(0, is_seen.astype(jnp.int32), add, sums)

    sums = lax.fori_loop(0, num_steps, step, register_zeros((TILE, TILE)))
    buffers.sums[...] = sums.astype(buffers.sums.dtype)
    plgpu.commit_smem()
    batch, head, q_tile, kv_tile = _locate(sizes, kept, block, 0)
    target = out.at[batch, head, pl.ds(q_tile * TILE, TILE), pl.ds(kv_tile * TILE, TILE)]
    plgpu.copy_smem_to_gmem(buffers.sums, target)
    plgpu.wait_smem_to_gmem(0)


def _locate(sizes, kept, block, step):
    """(batch, head, query tile, key tile): dimensions that are kept from the block's index, others from the
    step's.
    """
    place, rest = [], {True: jnp.int32(block), False: jnp.int32(step)}
    for size, keep in zip(reversed(sizes), reversed(kept), strict=True):
        place.append(rem(rest[keep], size))
        rest[keep] = div(rest[keep], size)
    return reversed(place)


def _gradients(plan: AttentionPlan, extras: Extras, place: TilePlace, sources, buffers: Buffers, loaded):
    """dS of one tile."""
    q, k, v, d_out, lse2, delta = sources
    kv_head = div(place.head, plan.group)
    by_row = place.batch, place.first_query, place.head
    by_key = place.batch, place.first_key, kv_head
    by_head = place.batch, place.head, pl.ds(place.first_query, TILE)
    for source, target in ((q, buffers.q), (d_out, buffers.d_out)):
        load_tile(source, by_row, target, loaded)
    for source, target in ((k, buffers.k), (v, buffers.v)):
        load_tile(source, by_key, target, loaded)
    for source, target in ((lse2, buffers.lse), (delta, buffers.delta)):
        plgpu.copy_gmem_to_smem(source.at[by_head], target, loaded)
    plgpu.barrier_wait(loaded)
    lse2, delta = (
        broadcast_rows(plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1)), TILE)
        for ref in (buffers.lse, buffers.delta)
    )

    def multiply(logits_acc, d_weights_acc):
        plgpu.wgmma(logits_acc, buffers.q, buffers.k.transpose((1, 0)))
        plgpu.wgmma(d_weights_acc, buffers.d_out, buffers.v.transpose((1, 0)))
        logits = plgpu.wgmma_accumulator_load(logits_acc, wait_n=1)
        weights = weigh(plan, extras, place, logits, lse2, masked=True)
        weights = weights._replace(slopes=weights.values)  # the bias is added after the soft cap
        return logit_gradients(plan, weights, d_weights_acc[...], delta)

    acc_type = plgpu.ACC((TILE, TILE), jnp.float32)
    gradients = pl.run_scoped(multiply, acc_type, acc_type)
    plgpu.commit_smem()  # our reads come before the copies that replace what they read
    return gradients
