"""Which items the warpgroups of a forward thread block work on, in turn: dealt beforehand, or drawn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import pl, plgpu, rem
from pallas_kernels.mosaic_inline import draw

SLOTS = 2  # of tickets: the loading warpgroup is an item ahead


class Tickets(NamedTuple):
    """A ring of drawn items: the loading warpgroup draws, and shows the others what it drew."""

    index: Any  # i32[SLOTS]
    shown: Any
    seen: Any

    @classmethod
    def types(cls, warpgroups: int) -> "Tickets":
        return cls(
            plgpu.SMEM((SLOTS,), jnp.int32),
            plgpu.Barrier(num_barriers=SLOTS),
            plgpu.Barrier(num_barriers=SLOTS, num_arrivals=warpgroups),
        )


class Items(NamedTuple):
    """The items of a thread block, one a turn."""

    num_items: int  # of all blocks
    num_blocks: int
    table: Any  # i32[blocks, 1 + most items a block has]: dealt beforehand; or i32[1]: the next to be drawn
    tickets: Tickets | None  # where items are drawn

    def visit_loading(self, visit: Callable, carry):
        """Calls carry = visit(turn, item, carry) in the loading warpgroup; returns (turns, carry)."""
        if self.tickets is None:
            return self._visit_dealt(visit, carry)
        turns, carry = self._visit_drawn(self._draw, visit, carry)

        seen = self.tickets.seen

        def drain(turn, _):
            plgpu.barrier_wait(seen.at[_slot(turn)])

        lax.fori_loop(lax.max(turns + 1 - SLOTS, 1), turns + 1, drain, None)
        return turns, carry

    def visit(self, visit: Callable, carry):
        """Calls carry = visit(turn, item, carry) in a computing warpgroup; returns (turns, carry)."""
        if self.tickets is None:
            return self._visit_dealt(visit, carry)
        return self._visit_drawn(self._see, visit, carry)

    def again(self, turn, item):
        """The item of a turn, of which the compiler does not know that it has been seen before: what follows
        from it would take registers in between."""
        if self.tickets is not None:
            return lax.optimization_barrier(item)
        return self._dealt(lax.optimization_barrier(turn))

    def _dealt(self, turn):
        return self.table[lax.axis_index("block"), 1 + turn]

    def _visit_dealt(self, visit: Callable, carry):
        turns = self.table[lax.axis_index("block"), 0]
        step = lambda turn, carry: visit(turn, self._dealt(turn), carry)
        return turns, lax.fori_loop(0, turns, step, carry)

    def _visit_drawn(self, following: Callable, visit: Callable, carry):
        """The first item is the block's own; following(turn, item): that of a turn, after `item`."""

        def step(state):
            turn, item, carry = state
            carry = visit(turn, item, carry)
            return turn + 1, following(turn + 1, item), carry

        first = jnp.int32(0), jnp.int32(lax.axis_index("block")), carry
        turns, _, carry = lax.while_loop(lambda state: state[1] < self.num_items, step, first)
        return turns, carry

    def _draw(self, turn, item):
        assert self.tickets is not None
        slot, (index, shown, seen) = _slot(turn), self.tickets

        @pl.when(turn > SLOTS)
        def _():
            plgpu.barrier_wait(seen.at[slot])

        draw(self.table, index.at[pl.ds(slot, 1)], self.num_blocks, item)
        plgpu.barrier_arrive(shown.at[slot])
        return index[slot]

    def _see(self, turn, _):
        assert self.tickets is not None
        slot, (index, shown, seen) = _slot(turn), self.tickets
        plgpu.barrier_wait(shown.at[slot])
        item = index[slot]
        plgpu.barrier_arrive(seen.at[slot])
        return item


def _slot(turn):
    return rem(turn, SLOTS)
