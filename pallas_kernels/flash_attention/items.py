"""Which items the warpgroups of a forward thread block work on, in turn: dealt beforehand, or drawn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.extras import Extras
from pallas_kernels.flash_attention.forward_plan import ForwardPlan
from pallas_kernels.flash_attention.forward_work import Work, find_work, num_shown, show_work, shown_work
from pallas_kernels.mosaic import pl, plgpu, rem
from pallas_kernels.mosaic_inline import draw

SLOTS = 3  # of tickets: one is at work, and the loading warpgroup is an item or two ahead


class Tickets(NamedTuple):
    """A ring of drawn items. The loading warpgroup draws, finds where an item stands, for which it has time,
    and shows it to the others, who would wait for global memory between items.
    """

    index: Any  # i32[SLOTS]
    work: Any  # i32[SLOTS x num_shown]
    shown: Any
    seen: Any

    @classmethod
    def types(cls, plan: ForwardPlan) -> "Tickets":
        return cls(
            plgpu.SMEM((SLOTS,), jnp.int32),
            plgpu.SMEM((SLOTS * num_shown(plan),), jnp.int32),
            plgpu.Barrier(num_barriers=SLOTS),
            plgpu.Barrier(num_barriers=SLOTS, num_arrivals=plan.config.warpgroups),
        )


class Items(NamedTuple):
    """The items of a thread block, one a turn."""

    plan: ForwardPlan
    extras: Extras
    num_blocks: int
    table: Any  # i32[blocks, 1 + most items a block has]: dealt beforehand; or i32[1]: the next to be drawn
    tickets: Tickets | None  # where items are drawn

    def visit_loading(self, visit: Callable, carry):
        """Calls carry = visit(turn, work, carry) in the loading warpgroup; returns (turns, carry)."""
        if (tickets := self.tickets) is None:
            return self._visit_dealt(visit, carry)

        def step(state):
            turn, item, carry = state
            work = find_work(self.plan, item, self.extras)
            show_work(self.plan, work, self.extras, tickets.work, self._first_number(turn))
            plgpu.barrier_arrive(tickets.shown.at[_slot(turn)])
            carry = visit(turn, work, carry)
            return turn + 1, self._draw(tickets, turn + 1, item), carry

        first = jnp.int32(lax.axis_index("block"))
        tickets.index[0] = first
        turns, _, carry = lax.while_loop(self._is_item, step, (jnp.int32(0), first, carry))
        plgpu.barrier_arrive(tickets.shown.at[_slot(turns)])  # that there are no more

        def drain(turn, _):
            plgpu.barrier_wait(tickets.seen.at[_slot(turn)])

        lax.fori_loop(lax.max(turns + 1 - SLOTS, 0), turns, drain, None)
        return turns, carry

    def visit(self, warpgroup, visit: Callable, carry):
        """Calls carry = visit(turn, work, carry) in a computing warpgroup; returns (turns, carry)."""
        if (tickets := self.tickets) is None:
            return self._visit_dealt(visit, carry)

        def step(state):
            turn, _, carry = state
            carry = visit(turn, self._shown(tickets, turn, warpgroup), carry)
            plgpu.barrier_arrive(tickets.seen.at[_slot(turn)])
            return turn + 1, self._see(tickets, turn + 1), carry

        zero = jnp.int32(0)
        turns, _, carry = lax.while_loop(self._is_item, step, (zero, self._see(tickets, zero), carry))
        return turns, carry

    def again(self, turn, warpgroup) -> Work:
        """The item of a turn, of which the compiler does not know that it has been seen before: what follows
        from it would take registers in between."""
        turn = lax.optimization_barrier(turn)
        if self.tickets is not None:
            return self._shown(self.tickets, turn, warpgroup)
        return self._dealt(turn)

    def _dealt(self, turn) -> Work:
        return find_work(self.plan, self.table[lax.axis_index("block"), 1 + turn], self.extras)

    def _visit_dealt(self, visit: Callable, carry):
        turns = self.table[lax.axis_index("block"), 0]
        step = lambda turn, carry: visit(turn, self._dealt(turn), carry)
        return turns, lax.fori_loop(0, turns, step, carry)

    def _is_item(self, state):
        return state[1] < self.plan.order.num_blocks

    def _draw(self, tickets: Tickets, turn, item):
        """The item of a turn, after `item`."""
        slot = _slot(turn)

        @pl.when(turn >= SLOTS)
        def _():
            plgpu.barrier_wait(tickets.seen.at[slot])

        draw(self.table, tickets.index.at[pl.ds(slot, 1)], self.num_blocks, item)
        return tickets.index[slot]

    def _see(self, tickets: Tickets, turn):
        plgpu.barrier_wait(tickets.shown.at[_slot(turn)])
        return tickets.index[_slot(turn)]

    def _shown(self, tickets: Tickets, turn, warpgroup) -> Work:
        return shown_work(self.plan, warpgroup, tickets.work, self._first_number(turn))

    def _first_number(self, turn):
        return _slot(turn) * num_shown(self.plan)


def _slot(turn):
    return rem(turn, SLOTS)
