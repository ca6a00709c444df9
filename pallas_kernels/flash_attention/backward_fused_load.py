"""What the loading warpgroup of the fused backward kernel does."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.backward_fused_adds import Adds, NoAdds
from pallas_kernels.flash_attention.backward_fused_block import (
    HALF,
    WARPGROUPS,
    Barriers,
    Block,
    Buffers,
    brings_ids,
    item_arrivals,
    slot_of,
)
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.mosaic import pl, plgpu


class Loader(NamedTuple):
    """Loads items, each as soon as what has its place is no longer needed.

    first_number: which tile of queries, of all, was the first of the item before, whose last dQ is still to
    be added where that is done here.
    """

    plan: AttentionPlan
    sources: Any  # Operands of Q, K, V and dO; lse and delta
    buffers: Buffers
    barriers: Barriers
    adds: Adds | NoAdds

    def load_item(self, block: Block, item, is_later, first_number) -> None:
        """item: it, and how many tiles of queries came before. is_later: not the block's first."""
        start, _, _, stop = block.indices
        second, own_first = lax.min(start + 1, stop), block.number(start)
        # In the order in which the item before releases them.
        lax.fori_loop(start, second, functools.partial(self._load_tile, block, first_number), None)
        self._load_keys(block, is_later, first_number)
        self.buffers.item[0], self.buffers.item[1] = item
        plgpu.barrier_arrive(self.barriers.item_loaded)
        self.adds.pass_on(lax.max(own_first - 1, first_number), own_first)
        lax.fori_loop(second, stop, functools.partial(self._load_tile, block, own_first), None)

    def end(self, num_items: int | None, num_tiles, first_number) -> None:
        """Sees every arrival before the thread block ends, and says that it does: num_items is no item."""
        barriers, stages = self.barriers, self.plan.fused.stages

        def wait_consumed(number, _):
            adding = self.adds.begin(number - 1, first_number)
            plgpu.barrier_wait(barriers.consumed.at[slot_of(self.plan, number)])
            adding.copy()
            adding.end()

        lax.fori_loop(lax.max(0, num_tiles - stages), num_tiles, wait_consumed, None)
        plgpu.barrier_wait(barriers.v_free)
        adding = self.adds.begin(num_tiles - 1, first_number)
        plgpu.barrier_wait(barriers.k_free)
        adding.copy()
        adding.end()
        self.adds.pass_on(num_tiles - 1, num_tiles)
        if num_items is None:
            return
        self.buffers.item[0] = jnp.int32(num_items)
        arrive = lambda *_: plgpu.barrier_arrive(barriers.item_loaded)
        lax.fori_loop(0, item_arrivals(self.plan), arrive, None)

    def _load_tile(self, block: Block, first_number, index, _) -> None:
        """Loads an index's queries, output cotangents and statistics."""
        plan, buffers, barriers = self.plan, self.buffers, self.barriers
        q, _, _, d_out, lse2, delta = self.sources
        number = block.number(index)
        slot = slot_of(plan, number)
        loaded = barriers.loaded.at[slot]
        # Of the tile before the one that is consumed dQ is multiplied.
        adding = self.adds.begin(number - plan.fused.stages - 1, first_number)
        self.adds.announce(block, index)
        by_row, by_head = block.queries_at(plan, index)  # of a list it is read, which takes time
        pl.when(number >= plan.fused.stages)(lambda: plgpu.barrier_wait(barriers.consumed.at[slot]))
        adding.copy()
        self.adds.show(loaded)
        q.rows(*by_row)(buffers.q.at[slot], loaded)
        plgpu.copy_gmem_to_smem(lse2.at[by_head], buffers.lse(slot), loaded)
        d_out.rows(*by_row)(buffers.d_out.at[slot], loaded)
        plgpu.copy_gmem_to_smem(delta.at[by_head], buffers.delta(slot), loaded)
        if brings_ids(plan):
            ids = block.extras.q_segment_ids.at[block.batch, by_head[2]]
            plgpu.copy_gmem_to_smem(ids, buffers.ids.at[slot], loaded)
        adding.end()

    def _load_keys(self, block: Block, is_later, first_number) -> None:
        """Loads an item's values, keys and their segment ids."""
        buffers, barriers, own_first = self.buffers, self.barriers, block.number(block.indices.start)
        _, k, v, *_ = self.sources
        keys_and_values = (v, buffers.v, barriers.v_free, 2), (k, buffers.k, barriers.k_free, 1)
        for gmem, smem, free, age in keys_and_values:  # age: how many tiles ago that is whose dQ is there
            adding = self.adds.begin(own_first - age, first_number)
            if is_later is not False:
                pl.when(is_later)(functools.partial(plgpu.barrier_wait, free))
            adding.copy()

            def load_half(half, _, gmem=gmem, smem=smem):
                gmem.rows(*block.keys_at(half))(smem.at[half], barriers.item_loaded)

            lax.fori_loop(0, WARPGROUPS, load_half, None)
            adding.end()
        if brings_ids(self.plan):  # read as long as values are
            for half in range(WARPGROUPS):
                keys = pl.ds(block.first_key + half * HALF, HALF)
                ids = block.extras.kv_segment_ids.at[block.batch, keys]
                plgpu.copy_gmem_to_smem(ids, buffers.key_ids.at[half], barriers.item_loaded)
