"""How the fused backward kernel's work is shared out: an item is a tile of keys and values of one head."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import num_multiprocessors
from pallas_kernels.flash_attention.backward_fused_block import block_keys
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.flash_attention.tiles import Schedule, TileOrder
from pallas_kernels.mosaic_inline import draw

ITEM_COST = 1  # of what an item costs beside its tiles of queries, in their time


def order_of(plan: AttentionPlan) -> TileOrder:
    return TileOrder.plan(
        num_tiles=math.ceil(plan.num_keys / block_keys(plan)),
        num_heads=plan.batch * plan.num_heads,
        section=1,
        is_uneven=plan.is_uneven,
        heavy_last=False,
    )


def is_persistent(plan: AttentionPlan, inputs: AttentionInputs) -> bool:
    """Whether a thread block has more than one item. It would spill registers at H = 128 where a call brings
    more than a causal mask.

    With a block mask it spills 24 bytes, 72 if causal, and pays all the same (T = 8,192, with the forward, on
    an H200: a quarter of all blocks 1.74 to 1.81 ms instead of 1.81 to 1.92, an eighth 0.99 instead of 1.04,
    a quarter of a causal mask's 2.42 instead of 2.45). With float32 it would spill 56.
    """
    busy = plan.has_segments or plan.has_kv_lengths or plan.has_q_lengths
    busy = busy or plan.logits_soft_cap is not None or plan.reach[0] is not None
    busy = busy or inputs.alibi_slopes is not None or inputs.bias is not None
    busy = busy or (plan.has_block_mask and plan.keeps_fp32)
    return plan.head_dim <= 96 or (plan.head_dim == 128 and not busy)


def draws_items(plan: AttentionPlan) -> bool:
    """Whether thread blocks draw their items: no one knows what each costs before the kernel runs."""
    return plan.has_unknown_ends


def schedule_of(plan: AttentionPlan) -> Schedule:
    """Which items each thread block has, where they are dealt."""
    order = order_of(plan)
    costs = tuple(ITEM_COST + _num_query_tiles(plan, tile) for tile in range(order.num_tiles))
    return Schedule(order, num_multiprocessors(), costs)


def _num_query_tiles(plan: AttentionPlan, key_tile: int) -> int:
    """How many tiles of queries see a tile of keys, where no lengths are given."""
    (left, right), keys = plan.reach, block_keys(plan)
    first = key_tile * keys - (plan.num_keys - plan.num_queries if plan.bottom_right else 0)
    start = 0 if right is None else max(first - right, 0)
    stop = plan.num_queries if left is None else min(first + keys + left, plan.num_queries)
    return max(0, math.ceil(stop / plan.fused.tile_q) - start // plan.fused.tile_q)


class Queue(NamedTuple):
    """The items of a thread block, for the warpgroup that loads; it tells the others."""

    order: TileOrder
    num_blocks: int
    table: Any  # of Schedule.dealt; or i32[1]: how many items were drawn; None: each block has one item
    drawn: Any  # i32[1] in shared memory, where items are drawn; or None

    @property
    def last(self) -> int | None:
        """What is no item; None where no one asks for a second."""
        return None if self.table is None else self.order.num_blocks

    def visit(self, visit: Callable, carry):
        """Calls carry = visit(item, is_later, carry) for each, is_later: not the first; returns the last."""
        block = jnp.int32(lax.axis_index("block"))
        if self.table is None:
            return visit(block, False, carry)
        if self.drawn is None:
            step = lambda turn, carry: visit(self.table[block, 1 + turn], turn != 0, carry)
            return lax.fori_loop(0, self.table[block, 0], step, carry)

        def draw_next(state):
            item, carry = state
            carry = visit(item, item >= self.num_blocks, carry)
            draw(self.table, self.drawn, self.num_blocks, item)
            return self.drawn[0], carry

        is_one = lambda state: state[0] < self.order.num_blocks
        return lax.while_loop(is_one, draw_next, (block, carry))[1]
