"""Where an item of the forward kernel stands: a block of queries of a head, and the KV tiles they see."""

from typing import Any, NamedTuple

from jax import lax

from pallas_kernels.flash_attention.extras import Extras
from pallas_kernels.flash_attention.forward_plan import FIRST, ForwardPlan
from pallas_kernels.kv_tiles import KvTiles, kv_tiles
from pallas_kernels.mosaic import where


class Work(NamedTuple):
    """An item."""

    batch: Any
    head: Any
    row_tile: Any
    q_length: Any
    kv_length: Any
    tiles: KvTiles  # those any warpgroup of the block sees; places in a list, with a block mask
    own: KvTiles | None = None  # of these, those that the rows of one warpgroup see, where they were shown


def find_work(plan: ForwardPlan, item, extras: Extras) -> Work:
    """The item of a number, from what the call brings in global memory."""
    order = plan.order if plan.draws_items else plan.order.by_tile
    tile, batch_head = order.locate(item)
    batch, head = plan.split_heads(batch_head, plan.num_heads)
    tile = extras.own_tile(batch, tile)
    q_length, kv_length = plan.lengths_of(batch, extras)
    # A mask known to be the same for every item would be kept in registers; hide_end's not on a diagonal.
    if plan.has_masked_end and not (plan.config.splits_rows and plan.reach[1] is not None):
        kv_length = lax.optimization_barrier(kv_length)
    count = plan.leading_rows // plan.config.tile_q
    place = batch, head, plan.first_row(tile, FIRST), q_length, kv_length
    return Work(batch, head, tile, q_length, kv_length, _tiles_of_rows(plan, extras, *place, count))


def own_tiles(plan: ForwardPlan, work: Work, warpgroup, extras: Extras) -> KvTiles:
    """Of the item's tiles, those that the rows of one warpgroup see."""
    if work.own is not None:
        return work.own
    first_row = plan.first_row(work.row_tile, warpgroup)
    place = work.batch, work.head, first_row, work.q_length, work.kv_length
    return _tiles_of_rows(plan, extras, *place, 1).clamp(work.tiles)


def _tiles_of_rows(
    plan: ForwardPlan, extras: Extras, batch, head, first_row, q_length, kv_length, count: int
) -> KvTiles:
    """What the rows of `count` warpgroups see."""
    tile_q, tile_kv = plan.config.tile_q, plan.config.tile_kv
    offset = plan.offset(q_length, kv_length)
    tiles = kv_tiles(first_row, count * tile_q, offset, q_length, kv_length, plan.reach, tile_kv)
    if plan.num_spare_rows and count == 1:
        tiles = tiles._replace(stop=where(first_row < 0, 0, tiles.stop))
    return extras.visits(tiles, batch, head, first_row, tile_q, tile_kv, count)


# --- as one warpgroup shows it to the others ---

NUM_PLACES = 5  # numbers of a Work before its tiles
NUM_BOUNDS = len(KvTiles._fields)


def num_shown(plan: ForwardPlan) -> int:
    """Numbers of an item that is shown: a list is the same for all rows of a block."""
    return NUM_PLACES + NUM_BOUNDS * (1 if plan.has_block_mask else 1 + plan.config.warpgroups)


def show_work(plan: ForwardPlan, work: Work, extras: Extras, numbers: Any, first) -> None:
    """Writes an item to i32[...] in shared memory, num_shown of them from `first` on."""
    shown = [*work[:NUM_PLACES], *work.tiles]
    if not plan.has_block_mask:
        for warpgroup in range(plan.config.warpgroups):
            shown += own_tiles(plan, work, warpgroup, extras)
    for place, number in enumerate(shown):
        numbers[first + place] = lax.convert_element_type(number, numbers.dtype)


def shown_work(plan: ForwardPlan, warpgroup, numbers: Any, first) -> Work:
    """The item that show_work wrote, for one warpgroup. What is known of all items is not read."""

    def bounds(place) -> KvTiles:
        return KvTiles(*(numbers[first + place + bound] for bound in range(NUM_BOUNDS)))

    batch, head, row_tile = (numbers[first + place] for place in range(3))
    q_length, kv_length = plan.lengths_of(batch, Extras())
    if plan.has_q_lengths:
        q_length = numbers[first + 3]
    if plan.has_kv_lengths:
        kv_length = numbers[first + 4]
    own = NUM_PLACES if plan.has_block_mask else NUM_PLACES + NUM_BOUNDS * (1 + warpgroup)
    return Work(batch, head, row_tile, q_length, kv_length, bounds(NUM_PLACES), bounds(own))
