"""The list of work of paged prefill, computed from the batch, and what of the keys its units see."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_tiles import KvTiles
from pallas_kernels.mosaic import ceil_div, clip, div, rem, where
from pallas_kernels.paged_attention.plan import Counters
from pallas_kernels.paged_attention.prefill_config import MIN_SPLIT_TILES, OCTET, WARPGROUP_ROWS
from pallas_kernels.paged_attention.prefill_plan import PrefillPlan
from pallas_kernels.paged_attention.prefill_units import FIELDS, NO_WORK, Work

LATE_CACHED = 1024  # tokens of the rows that are taken together, which were there before
SINGLE = -2  # the weight of a row of one query


class WorkList(NamedTuple):
    """The units of a launch, and where each token's result lies."""

    items: jax.Array  # i32[max_items + 1, record size]: Records.fields of each; then NO_WORK
    first_item: jax.Array  # i32[tokens]: of each token's tile; its splits follow. Packed: i32[tokens, G]
    num_splits: jax.Array  # i32[tokens]; 0: no item holds the token
    place: jax.Array  # i32[tokens]: the token's place in its tile. Packed: i32[tokens, G], the row's
    counters: Counters


class Segments(NamedTuple):
    """Rows as the work list sees them, and two more: the tokens before the first row and after the last."""

    start: jax.Array
    stop: jax.Array
    kv_length: jax.Array
    first_tile: jax.Array  # where the first query tile begins, maybe before the first token of all: see Cuts
    num_tiles: jax.Array
    num_splits: jax.Array
    first_item: jax.Array


class Cuts(NamedTuple):
    """How a segment is cut into items."""

    first_tile: jax.Array  # token; octet x G + head where tiles are packed
    num_tiles: jax.Array
    num_splits: jax.Array
    weight: jax.Array  # heavy ones come first; below zero: no work, SINGLE for want of queries


def plan_work(
    plan: PrefillPlan, query_start, kv_lengths, known: tuple[jax.Array, Counters] | None = None
) -> WorkList:
    """Lists the query tiles of all rows but those that the decode kernel serves: long rows first, late tiles
    first.

    known: the items' records, and counters, where they are: the kernel's list, which takes its last rows
    together (PrefillPlan.late_items). Here that would take several launches more.

    Dense comparisons instead of a sort and searches: a few thousand of them are cheaper than the launches of
    their kernels. Later tiles of a causal row see more keys; rows stay together, for the L2 cache.
    """
    segments = _segments(plan, query_start, kv_lengths)
    token = jnp.arange(plan.num_tokens)
    is_own = (segments.start <= token[:, None]) & (token[:, None] < segments.stop)
    segment = _last(is_own)
    first_tile, num_tiles, num_splits, first_item = (field[segment] for field in segments[3:])
    items, counters = known or (_list_items(plan, segments), Counters.zeros())
    is_held = num_tiles > 0
    if plan.is_packed:
        first_tile, num_tiles, first_item = (x[:, None] for x in (first_tile, num_tiles, first_item))
        distance = (div(token, OCTET) * plan.group)[:, None] + jnp.arange(plan.group) - first_tile
        place = rem(distance, plan.tile_size) * OCTET + rem(token, OCTET)[:, None]
        first_item += num_tiles - 1 - div(distance, plan.tile_size)
    else:
        distance = token - first_tile
        place = rem(distance, plan.tile_q)
        first_item += (num_tiles - 1 - div(distance, plan.tile_q)) * num_splits
    return WorkList(items, first_item, where(is_held, num_splits, 0), place, counters)


def _list_items(plan: PrefillPlan, segments: Segments) -> jax.Array:
    num_items = segments.num_tiles * segments.num_splits
    item = jnp.arange(plan.max_items)[:, None]
    segment = _last((segments.first_item <= item) & (item < segments.first_item + num_items))
    own = Segments(*(field[segment] for field in segments))
    records = jnp.stack(item_records(plan, segment, own, item[:, 0]), axis=-1)
    return jnp.pad(records, ((0, 1), (0, 0)), constant_values=NO_WORK)


# Rows that are taken together. Of each, tile by tile from the last one on, base - 0, base - 1, ...: the keys
# that tiles see, counted in tiles of queries. Items come in the order of these numbers, and of equal ones in
# that of their rows. So what comes before an item is counted row by row.


def base_of(plan: PrefillPlan, kv_length):
    size, group = (plan.tile_size * OCTET, plan.group) if plan.is_packed else (plan.tile_q, 1)
    return div(clip(kv_length, 0, plan.capacity) * group, size)


def cached_tokens(plan: PrefillPlan, start, stop, kv_length, num_items):
    """Of a segment that has items."""
    cached = lax.max(lax.min(kv_length, plan.capacity) - (stop - start), 0)
    return where(num_items > 0, cached, 0)


def ends_late(plan: PrefillPlan, num_after, cached_from):
    """Whether a segment is one of the last, which are taken together, given how many items that see keys come
    after its own, and the cached tokens of its own and of theirs: all tiles of a row see those, which have
    the less to gain from another order, and the more to lose in the L2 cache.
    """
    return (num_after < plan.late_items) & (cached_from <= LATE_CACHED)


def items_before(first_item, num_late, base, own_first_item, key):
    """How many of a segment's late items come before the item with this number, of the segment whose items
    begin with own_first_item."""
    return clip(base - key + (first_item < own_first_item).astype(jnp.int32), 0, num_late)


def place_in_list(segment, item, first_late, before):
    """Where an item comes in the list, given where late ones begin and how many of them come before it."""
    return where((segment >= 0) & (item >= first_late), first_late + before, item)


def _last(mask: jax.Array) -> jax.Array:
    """The last column of each row where mask is true, or -1: one reduction says both where and whether."""
    return jnp.where(mask, jnp.arange(mask.shape[1]), -1).max(axis=1)


def _segments(plan: PrefillPlan, query_start, kv_lengths) -> Segments:
    # XLA fuses a pad with what reads it; a concatenation would be a kernel of its own.
    query_start = jnp.clip(query_start.astype(jnp.int32), 0, plan.num_tokens)
    start = jnp.pad(query_start, (1, 0))
    stop = jnp.pad(query_start, (0, 1), constant_values=plan.num_tokens)
    kv_length = jnp.pad(kv_lengths.astype(jnp.int32), 1)
    order = jnp.arange(plan.num_rows + 2)
    is_row = (order > 0) & (order <= plan.num_rows)
    cuts = cut_segments(plan, start, stop, kv_length, is_row)
    weight, num_items = cuts.weight, cuts.num_tiles * cuts.num_splits
    is_earlier = comes_before(weight[None], order[None], weight[:, None], order[:, None])
    first_item = jnp.where(is_earlier, num_items[None], 0).sum(1)
    return Segments(start, stop, kv_length, *cuts[:3], first_item)


def cut_segments(plan: PrefillPlan, start, stop, kv_length, is_row) -> Cuts:
    """How segments are cut; those without work have no tiles, rows of one query among them where they are
    the decode kernel's."""
    fewest = where(is_row, lax.full_like(start, 2), 1) if plan.leaves_singles else 1
    is_work = stop - start >= fewest
    kv_length = lax.min(kv_length, plan.capacity)
    first_tile, step = div(start, OCTET) * OCTET, plan.run * OCTET
    size = stop - first_tile
    if plan.is_packed:
        first_tile, size, step = div(start, OCTET) * plan.group, ceil_div(size, OCTET) * plan.group, 1
    num_tiles = where(is_work, ceil_div(size, plan.tile_size), 0)
    if plan.has_spare_rows:
        spare = lax.max(num_tiles * plan.tile_size - size, 0)
        first_tile -= div(spare, step) * step
    kv_tiles = ceil_div(kv_length, plan.config.tile_kv)
    num_splits = clip(ceil_div(kv_tiles, MIN_SPLIT_TILES), 1, plan.config.splits)
    weight = where(is_work, kv_length, where(stop - start == 1, lax.full_like(start, SINGLE), -1))
    return Cuts(first_tile, num_tiles, num_splits, weight)


def comes_before(weight, order, other_weight, other_order):
    """Whether a segment's items come before another one's."""
    return (weight > other_weight) | ((weight == other_weight) & (order < other_order))


def item_records(plan: PrefillPlan, segment, own: Segments, item) -> list[jax.Array]:
    """The numbers of items' records, of each a vector, given their segments; -1: no item."""
    index = lax.max(item - own.first_item, 0)
    tile = own.num_tiles - 1 - lax.div(index, own.num_splits)
    first = own.first_tile + tile * plan.tile_size
    items = _cut(plan, segment, own, first, lax.rem(index, own.num_splits))._replace(item=item)
    ranges = [_visible_tiles(plan, items, index) for index in range(plan.num_ranges)]
    counts = [tile - items.tile_start for tiles in ranges for tile in tiles]
    row = where(segment < 0, NO_WORK, items.row)
    padding = [items.first_head if plan.is_packed else row] * (plan.record_size - FIELDS - len(counts))
    return [row, *items[1:FIELDS], *counts, *padding]


def _tokens_of(plan: PrefillPlan, first):
    """(first token, tokens, first head) of tiles."""
    if not plan.is_packed:
        return first, plan.tile_q, None
    # Shifted by a whole tile of octets: tiles may begin before the first token.
    octet = div(first + plan.tile_size * plan.group, plan.group) - plan.tile_size
    first_head = first - octet * plan.group
    return octet * OCTET, ceil_div(first_head + plan.tile_size, plan.group) * OCTET, first_head


def _cut(plan: PrefillPlan, segment, own: Segments, first, split) -> Work:
    """The items of these tiles: which KV tiles their visible keys, or one split's part of them, take."""
    kv_length = lax.min(own.kv_length, plan.capacity)
    token, num_tokens, first_head = _tokens_of(plan, first)
    first, stop = lax.max(own.start, token), lax.min(own.stop, token + num_tokens)
    offset, tile_kv = kv_length - own.stop, plan.config.tile_kv
    end = clip(stop + offset, 0, kv_length) if plan.spec.is_causal else kv_length
    begin = jnp.zeros_like(end)
    if plan.spec.window_left is not None:
        begin = div(lax.max(first + offset - plan.spec.window_left, 0), tile_kv)
    end = lax.max(ceil_div(end, tile_kv), begin)
    size = lax.div(end - begin + own.num_splits - 1, own.num_splits)
    begin = lax.min(begin + split * size, end)
    row = clip(segment - 1, 0, plan.num_rows - 1)
    tile_stop = lax.min(begin + size, end)
    return Work(row, token, first, stop, offset, kv_length, begin, tile_stop, None, None, first_head)


def _visible_tiles(plan: PrefillPlan, work: Work, warpgroup: int) -> KvTiles:
    """The KV tiles of items that the tokens of a warpgroup see, and those of them that need no mask."""
    first, stop, tile_kv = work.first, work.stop, plan.config.tile_kv
    if plan.has_own_ranges:
        token = work.token + warpgroup * WARPGROUP_ROWS
        first, stop = lax.max(first, token), lax.min(stop, token + WARPGROUP_ROWS)
    last_position = stop - 1 + work.offset
    end = full_end = work.kv_length
    if plan.spec.is_causal:
        end = lax.max(last_position + 1, 0)
        full_end = lax.max(first + work.offset + 1, 0)
    start = full_start = jnp.zeros_like(work.tile_start)
    if plan.spec.window_left is not None:
        start = div(lax.max(first + work.offset - plan.spec.window_left, 0), tile_kv)
        full_start = ceil_div(lax.max(last_position - plan.spec.window_left, 0), tile_kv)
    end = where(first < stop, ceil_div(end, tile_kv), 0)
    everything = KvTiles(work.tile_start, work.tile_start, work.tile_stop, work.tile_stop)
    return KvTiles(start, full_start, div(full_end, tile_kv), end).clamp(everything)


def visible_keys(plan: PrefillPlan, work: Work):
    """The keys [first, stop) outside of which no query of a unit sees any."""
    first = 0
    if plan.spec.window_left is not None:
        first = work.first + work.offset - plan.spec.window_left
    return first, work.kv_length
