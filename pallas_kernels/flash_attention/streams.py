"""What a thread block of a backward kernel holds, what it streams, and the loops over the streamed tiles."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.config import GradientConfig
from pallas_kernels.flash_attention.extras import Extras
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.tiles import TileOrder
from pallas_kernels.kv_tiles import NO_TILES, KvTiles
from pallas_kernels.mosaic import opaque, pl, plgpu, swizzled_smem


def _copy_vectors(vectors, targets, loaded) -> None:
    for source, target in zip(vectors, targets, strict=True):
        plgpu.copy_gmem_to_smem(source, target, loaded)


class Stream(NamedTuple):
    """Tiles on their way through shared memory: `stages` slots of two operands, and of two statistics of
    their rows.
    """

    first: Any  # [stages, tile, H]: keys, or queries
    second: Any  # [stages, tile, Hv]: values, or output cotangents
    lse: Any  # f32[stages, tile], with queries
    delta: Any
    ids: Any  # i32[stages, tile]: segment ids; or None
    loaded: Any
    consumed: Any

    @classmethod
    def types(cls, plan: AttentionPlan, config: GradientConfig, with_statistics: bool) -> "Stream":
        tiles = (config.stages, config.other)
        statistic = plgpu.SMEM(tiles, jnp.float32) if with_statistics else None
        ids = plgpu.SMEM(tiles, jnp.int32) if plan.has_segments else None
        arrivals = 2 + 2 * with_statistics + plan.has_segments
        loaded = plgpu.Barrier(num_barriers=config.stages, num_arrivals=arrivals)
        consumed = plgpu.Barrier(num_barriers=config.stages, num_arrivals=config.warpgroups)
        first, second = (swizzled_smem((*tiles, dim), plan.dtype) for dim in (plan.head_dim, plan.value_dim))
        return cls(first, second, statistic, statistic, ids, loaded, consumed)

    def load(self, slot, first, second, *vectors):
        """Starts the copies into a slot: of two operands' rows, and of statistics and segment ids, as far
        as there are such.
        """
        loaded = self.loaded.at[slot]
        first(self.first.at[slot], loaded)
        second(self.second.at[slot], loaded)
        targets = [ref.at[slot] for ref in (self.lse, self.delta, self.ids) if ref is not None]
        _copy_vectors(vectors, targets, loaded)

    def ids_at(self, slot):
        return None if self.ids is None else self.ids.at[slot]

    def wait_loaded(self, slot):
        plgpu.barrier_wait(self.loaded.at[slot])

    def release(self, slot):
        plgpu.barrier_arrive(self.consumed.at[slot])

    def wait_consumed(self, slot):
        plgpu.barrier_wait(self.consumed.at[slot])

    def skip(self, slot):
        """Releases a tile that other warpgroups use and this one does not."""
        self.wait_loaded(slot)
        self.release(slot)


class Owned(NamedTuple):
    """What each compute warpgroup holds for the whole kernel; its results leave through the same memory."""

    first: Any  # [warpgroups, own, H]: queries, or keys
    second: Any  # [warpgroups, own, Hv]: output cotangents, or values
    lse: Any  # f32[warpgroups, own], with queries
    delta: Any
    ids: Any  # i32[warpgroups, own]: segment ids; or None
    loaded: Any

    @classmethod
    def types(cls, plan: AttentionPlan, config: GradientConfig, with_statistics: bool) -> "Owned":
        rows = (config.warpgroups, config.own)
        statistic = plgpu.SMEM(rows, jnp.float32) if with_statistics else None
        first, second = (swizzled_smem((*rows, dim), plan.dtype) for dim in (plan.head_dim, plan.value_dim))
        ids = plgpu.SMEM(rows, jnp.int32) if plan.has_segments else None
        arrivals = 2 + 2 * with_statistics + plan.has_segments
        loaded = plgpu.Barrier(num_barriers=config.warpgroups, num_arrivals=arrivals)
        return cls(first, second, statistic, statistic, ids, loaded)

    def at(self, warpgroup) -> "Owned":
        return Owned(*(None if ref is None else ref.at[warpgroup] for ref in self))

    def load(self, first, second, *vectors):
        """Copies this warpgroup's rows in, as Stream.load does, and waits for them."""
        first(self.first, self.loaded)
        second(self.second, self.loaded)
        targets = [ref for ref in (self.lse, self.delta, self.ids) if ref is not None]
        _copy_vectors(vectors, targets, self.loaded)
        plgpu.barrier_wait(self.loaded)


class Block(NamedTuple):
    """Where a thread block, or one of its warpgroups, stands."""

    batch: Any
    head: Any  # of the owned rows: a query head in the dq kernel, a KV head in the dk,dv kernel
    first_row: Any
    q_length: Any
    kv_length: Any
    tiles: KvTiles  # of the streamed operands
    extras: Extras

    @classmethod
    def locate(
        cls, plan: AttentionPlan, order: TileOrder, extras: Extras, num_heads: int, num_rows: int
    ) -> "Block":
        """This thread block of those that own num_rows rows of a head each, before its tiles are known."""
        tile, batch_head = order.locate(lax.axis_index("block"))
        batch, head = plan.split_heads(batch_head, num_heads)
        tile = extras.own_tile(batch, tile)
        q_length, kv_length = plan.lengths_of(batch, extras)
        return cls(batch, head, tile * num_rows, q_length, kv_length, NO_TILES, extras)

    def ids_of(self, ids, first_row, num_rows: int) -> tuple[Any, ...]:
        """Segment ids of some rows: none where there are no segments."""
        return () if ids is None else (ids.at[self.batch, pl.ds(first_row, num_rows)],)


def opaque_place(warpgroup, owned: Owned, slot):
    """(warpgroup, its rows, slot) of one tile: descriptors of shared memory are computed where they are used,
    instead of once, in registers that live through the loop.
    """
    warpgroup = opaque(warpgroup)
    return warpgroup, owned.at(warpgroup), opaque(slot)


class Ends(NamedTuple):
    """The loops a launch needs: masked ones, and ones that skip what other warpgroups see."""

    masked_left: bool
    masked_right: bool
    idle_right: bool


def run_tiles(all_tiles: KvTiles, own: KvTiles, step, skip, carry, ends: Ends):
    """The warpgroup's loops over the block's tiles: only the ends of its own range need a mask."""
    own = own.clamp(all_tiles)
    masked = functools.partial(step, masked=True)
    if ends.masked_left:
        lax.fori_loop(all_tiles.start, own.start, skip, None)
        carry = lax.fori_loop(own.start, own.full_start, masked, carry)
    carry = lax.fori_loop(own.full_start, own.full_stop, step, carry)
    if ends.masked_right:
        carry = lax.fori_loop(own.full_stop, own.stop, masked, carry)
    if ends.masked_right or ends.idle_right:
        lax.fori_loop(own.stop, all_tiles.stop, skip, None)
    return carry
