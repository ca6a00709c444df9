"""Adds to dQ in a fixed order, which the loading warpgroup of the fused backward kernel does beside its
loads: a look at whose turn it is takes as long as half a tile's matmuls, and the others have no time.
"""

from typing import Any, NamedTuple

from jax import lax

from pallas_kernels.flash_attention.backward_fused_block import (
    HALF,
    Add,
    Barriers,
    Block,
    Buffers,
    add_order,
    add_place,
    block_keys,
    parts_of_dq,
)
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.mosaic import div, pl, plgpu, where
from pallas_kernels.mosaic_inline import load_numbers, meet
from pallas_kernels.mosaic_turns import pass_turn, peek_turn, wait_turn


class Adds(NamedTuple):
    """What the loading warpgroup needs for them. Tiles of queries are counted through all items."""

    plan: AttentionPlan
    d_q: Any  # f32[B, T, N, H]
    turns: Any  # i32[...] in global memory: how many have added to each tile
    buffers: Buffers
    barriers: Barriers

    def announce(self, block: Block, index) -> None:
        """Leaves for later which tile of queries an index is, and when it is our turn to add to it."""
        plan, numbers = self.plan, self.buffers.item
        order, place = add_order(plan), add_place(plan, block.number(index))
        own, head = div(block.first_key, block_keys(plan)), block.batch * plan.num_heads + block.head
        tile = order.query_tile(own, index)
        numbers[place + Add.QUERY_TILE] = tile
        numbers[place + Add.COUNTER] = head * order.num_query_tiles + tile
        numbers[place + Add.TURN] = order.num_before(own, tile)

    def show(self, loaded) -> None:
        """Arrives for what was announced, at the barrier of what is loaded with it."""
        plgpu.barrier_arrive(loaded)

    def begin(self, number, first) -> "Adding":
        """Begins to add dQ of a tile, if number >= first, the first of its item: passes the tile before on,
        whose add is long complete, and looks whose turn it is. (Who waited with a tile in hand would keep
        those behind waiting for two.)
        """
        pl.when(number > first)(lambda: self.pass_on(number - 1, number))
        is_one = number >= first
        (counter,) = self._at(lax.max(number, 0), Add.COUNTER)
        return Adding(self, number, is_one, peek_turn(self.turns, where(is_one, counter, 0)))

    def pass_on(self, first, stop) -> None:
        """Lets others add to the tiles first .. stop - 1, when our adds are complete."""
        plgpu.wait_smem_to_gmem(0)
        lax.fori_loop(first, stop, lambda i, _: pass_turn(self.turns, *self._at(i, Add.COUNTER)), None)
        meet()  # what was announced of those tiles may be overwritten

    def _copy(self, number, seen):
        plan, d_q = self.plan, self.buffers.d_q
        tile, counter, turn = self._at(number, Add.QUERY_TILE, Add.COUNTER, Add.TURN)
        wait_turn(self.turns, counter, turn, seen)
        batch, head = plan.split_heads(div(counter, add_order(plan).num_query_tiles), plan.num_heads)
        for role, (rows, columns) in enumerate(parts_of_dq(plan)):
            staging = d_q[role] if isinstance(d_q, tuple) else d_q.at[role]
            target = self.d_q.at[batch, pl.ds(tile * rows, rows), head, pl.ds(role * HALF, columns)]
            plgpu.copy_smem_to_gmem(staging, target, reduction_op="add")

    def _free(self):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.barriers.d_q_free)

    def _at(self, number, *what: Add):
        place = add_place(self.plan, number)
        return load_numbers(self.buffers.item, [place + x for x in what])


class Adding(NamedTuple):
    """An add that was begun; others may come between its steps."""

    adds: Adds
    number: Any
    is_one: Any  # else there is nothing to add
    seen: Any  # of peek_turn

    def copy(self) -> None:
        """Adds the tile's dQ, which is in shared memory, when it is its turn."""
        pl.when(self.is_one)(lambda: self.adds._copy(self.number, self.seen))

    def end(self) -> None:
        """Lets others use that memory."""
        pl.when(self.is_one)(self.adds._free)


class NoAdds:
    """In the place of Adds, and of Adding, where the computing warpgroups add: nothing is done."""

    def announce(self, block: Block, index) -> None: ...

    def show(self, loaded) -> None: ...

    def begin(self, number, first) -> "NoAdds":
        return self

    def pass_on(self, first, stop) -> None: ...

    def copy(self) -> None: ...

    def end(self) -> None: ...
