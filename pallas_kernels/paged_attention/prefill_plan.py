"""What a launch of paged prefill does: static facts, tiles, and the list of work computed from the batch."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash_attention.tiles import KvTiles
from pallas_kernels.kv_pages.pool import QUANTIZED
from pallas_kernels.mosaic import TMA_ALIGNMENT, ceil_div, div, plgpu, swizzled_smem
from pallas_kernels.paged_attention.plan import LaunchPlan, facts_of
from pallas_kernels.paged_attention.prefill_config import (
    MIN_SPLIT_TILES,
    OCTET,
    WARPGROUP_ROWS,
    PrefillConfig,
    default_config,
    max_tiles,
)
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec

MAX_QUANTIZED = 224  # head dim: at 256 the accumulators and the scales spill 12 to 20 bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillPlan(LaunchPlan):
    """The static facts of one launch."""

    config: PrefillConfig
    num_tokens: int  # a multiple of OCTET
    page_size: int
    table_width: int
    keeps_parts: bool = False  # whether results are merged with others, elsewhere

    @property
    def has_parts(self) -> bool:
        """Whether an item's result is one of several parts of its tokens', merged in fp32."""
        return self.keeps_parts or self.config.splits > 1

    @property
    def slots(self) -> int:
        """Tiles of K, and of V, that lie ready for wgmma; those of quantized pages are beside their codes."""
        if not self.is_quantized:
            return self.config.stages
        return 2 if self.head_dim <= 128 else 1

    @property
    def joins_sinks(self) -> bool:
        """Whether the kernel adds the sinks: those of parts join where these are merged."""
        return self.has_sinks and not self.has_parts

    @property
    def has_own_ranges(self) -> bool:
        """Whether the warpgroups of a tile hold different tokens, and so see different keys."""
        return self.group == 1 and self.config.warpgroups > 1

    @property
    def head_octets(self) -> int:
        """Octets of a tile's tokens: each is there once for every query head of the group."""
        return OCTET * self.config.warpgroups // self.group

    @property
    def tile_q(self) -> int:
        """Tokens of a query tile."""
        return self.head_octets * OCTET

    @property
    def pitch(self) -> int:
        """Elements from one row of results to the next, where each is copied alone, from where TMA copies may
        begin."""
        multiple = TMA_ALIGNMENT // jnp.dtype(self.query_dtype).itemsize
        return -(-self.head_dim // multiple) * multiple

    @property
    def run(self) -> int:
        """Octets that lie together both in a warpgroup's rows and in a head's tokens: one copy."""
        return math.gcd(WARPGROUP_ROWS // OCTET, self.head_octets)

    @property
    def copy_rows(self) -> int:
        """Tokens of one TMA copy of K or V: a page, or the part of it that one tile takes."""
        return min(self.page_size, self.config.tile_kv)

    @property
    def num_copies(self) -> int:
        return self.config.tile_kv // self.copy_rows

    @property
    def max_items(self) -> int:
        """Query tiles, times splits, that any division of the tokens into rows can need."""
        tiles = max_tiles(self.num_tokens, self.num_rows, self.tile_q)
        return tiles * self.config.splits


def unsupported(inputs: PagedInputs, spec: PagedSpec) -> str | None:
    """Says why this kernel cannot serve a call that the decode kernel can serve, or None if it can."""
    if spec.scale <= 0:
        return f"the scale must be positive, got {spec.scale}"
    if (group := inputs.query.shape[1] // inputs.k_pages.shape[2]) > 16:
        return f"at most 16 query heads may share a KV head, got {group}"
    if inputs.k_pages.dtype not in QUANTIZED:
        return None
    if (head_dim := inputs.query.shape[2]) > MAX_QUANTIZED:
        return f"the head dim of quantized pages must be at most {MAX_QUANTIZED}, got {head_dim}"
    if spec.prefill_config is not None and spec.prefill_config.warpgroups > 2:
        return f"quantized pages take at most two warpgroups, got {spec.prefill_config}"
    return None


def make_plan(inputs: PagedInputs, spec: PagedSpec, keeps_parts: bool = False) -> PrefillPlan:
    facts, num_tokens = facts_of(inputs, spec), inputs.query.shape[0]
    page_size, table_width = inputs.k_pages.shape[3], inputs.block_tables.shape[1]
    config = spec.prefill_config or default_config(
        num_tokens,
        facts["num_rows"],
        facts["num_heads"] // facts["num_kv_heads"],
        facts["num_kv_heads"],
        facts["head_dim"],
        crowded=spec.window_left is not None or spec.logits_soft_cap is not None,
        capacity=table_width * page_size,
        has_slopes=facts["has_slopes"],
        is_quantized=facts["page_dtype"] in QUANTIZED,
    )
    return PrefillPlan(
        **facts,
        config=config,
        num_tokens=num_tokens + -num_tokens % OCTET,
        page_size=page_size,
        table_width=table_width,
        keeps_parts=keeps_parts,
    )


def per_row(plan: PrefillPlan, x: jax.Array | None) -> jax.Array | None:
    """[N] -> f32[K, warpgroups, 64]: what is given for a head, for each row of a tile; rows of no head take
    the last head's."""
    if x is None:
        return None
    octets = np.arange(plan.config.warpgroups * WARPGROUP_ROWS // OCTET)
    head = np.repeat(np.minimum(octets // plan.head_octets, plan.group - 1), OCTET)
    by_head = x.astype(jnp.float32).reshape(plan.num_kv_heads, plan.group)
    return by_head[:, head].reshape(plan.num_kv_heads, plan.config.warpgroups, WARPGROUP_ROWS)


class Work(NamedTuple):
    """One item: a query tile of a row, and the KV tiles it takes. Tokens count over the whole batch."""

    row: Any  # of the block tables
    token: Any  # the tile's first token, a multiple of OCTET
    first: Any  # the row's tokens of the tile: first <= token < stop
    stop: Any
    offset: Any  # token t stands at position t + offset
    kv_length: Any
    tile_start: Any  # KV tiles [tile_start, tile_stop)
    tile_stop: Any


class WorkList(NamedTuple):
    """The items of a launch, and where each token's result lies."""

    items: jax.Array  # i32[max_items, fields of Work]; those from num_items on are no work
    num_items: jax.Array  # i32[1]
    first_item: jax.Array  # i32[tokens]: of each token's tile; its splits follow
    num_splits: jax.Array  # i32[tokens]; 0: no item holds the token
    place: jax.Array  # i32[tokens]: the token's place in its tile


class Segments(NamedTuple):
    """Rows as the work list sees them, and two more: the tokens before the first row and after the last."""

    start: jax.Array
    stop: jax.Array
    kv_length: jax.Array
    first_tile: jax.Array  # the token at which the first query tile begins
    num_tiles: jax.Array
    num_splits: jax.Array
    first_item: jax.Array


def plan_work(plan: PrefillPlan, query_start, kv_lengths, skip) -> WorkList:
    """Lists the query tiles of all rows but those to skip (bool[R]): long rows first, late tiles first.

    Dense comparisons instead of a sort and searches: a few thousand of them are cheaper than the launches of
    their kernels. Later tiles of a causal row see more keys; rows stay together, for the L2 cache.
    """
    segments = _segments(plan, query_start, kv_lengths, skip)
    num_items = segments.num_tiles * segments.num_splits
    item = jnp.arange(plan.max_items)[:, None]
    is_own = (segments.first_item <= item) & (item < segments.first_item + num_items)
    segment = jnp.argmax(is_own, axis=1)
    own = Segments(*(field[segment] for field in segments))
    index = item[:, 0] - own.first_item
    tile = own.num_tiles - 1 - index // own.num_splits
    items = _cut(plan, segment, own, own.first_tile + tile * plan.tile_q, index % own.num_splits)

    token = jnp.arange(plan.num_tokens)[:, None]
    segment = jnp.argmax((segments.start <= token) & (token < segments.stop), axis=1)
    own = Segments(*(field[segment] for field in segments))
    distance = token[:, 0] - own.first_tile
    tile = own.num_tiles - 1 - distance // plan.tile_q
    return WorkList(
        items=jnp.stack(items, axis=1),
        num_items=num_items.sum()[None],
        first_item=own.first_item + tile * own.num_splits,
        num_splits=jnp.where(own.num_tiles > 0, own.num_splits, 0),
        place=distance % plan.tile_q,
    )


def _segments(plan: PrefillPlan, query_start, kv_lengths, skip) -> Segments:
    # XLA fuses a pad with what reads it; a concatenation would be a kernel of its own.
    start = jnp.pad(query_start.astype(jnp.int32), (1, 0))
    stop = jnp.pad(query_start.astype(jnp.int32), (0, 1), constant_values=plan.num_tokens)
    kv_length = jnp.pad(jnp.minimum(kv_lengths.astype(jnp.int32), plan.table_width * plan.page_size), 1)
    is_work = (stop > start) & ~jnp.pad(skip, 1)
    first_tile = start // OCTET * OCTET
    num_tiles = jnp.where(is_work, -(-(stop - first_tile) // plan.tile_q), 0)
    kv_tiles = -(-kv_length // plan.config.tile_kv)
    num_splits = jnp.clip(-(-kv_tiles // MIN_SPLIT_TILES), 1, plan.config.splits)
    weight = jnp.where(is_work, kv_length, -1)
    order = jnp.arange(plan.num_rows + 2)
    earlier = (weight[None] > weight[:, None]) | (
        (weight[None] == weight[:, None]) & (order < order[:, None])
    )
    first_item = jnp.where(earlier, (num_tiles * num_splits)[None], 0).sum(1)
    return Segments(start, stop, kv_length, first_tile, num_tiles, num_splits, first_item)


def _cut(plan: PrefillPlan, segment, own: Segments, token, split) -> Work:
    """The items of these tiles: which KV tiles their visible keys, or one split's part of them, take."""
    first, stop = jnp.maximum(own.start, token), jnp.minimum(own.stop, token + plan.tile_q)
    offset, tile_kv = own.kv_length - own.stop, plan.config.tile_kv
    end = jnp.clip(stop + offset, 0, own.kv_length) if plan.spec.is_causal else own.kv_length
    begin = jnp.zeros_like(end)
    if plan.spec.window_left is not None:
        begin = jnp.maximum(first + offset - plan.spec.window_left, 0) // tile_kv
    end = jnp.maximum(-(-end // tile_kv), begin)
    size = -(-(end - begin) // own.num_splits)
    begin = jnp.minimum(begin + split * size, end)
    row = jnp.clip(segment - 1, 0, plan.num_rows - 1)
    return Work(row, token, first, stop, offset, own.kv_length, begin, jnp.minimum(begin + size, end))


def visible_tiles(plan: PrefillPlan, work: Work, warpgroup) -> KvTiles:
    """The KV tiles of an item that the tokens of a warpgroup see, and those of them that need no mask."""
    first, stop, tile_kv = work.first, work.stop, plan.config.tile_kv
    if plan.has_own_ranges:
        token = work.token + warpgroup * WARPGROUP_ROWS
        first, stop = jnp.maximum(first, token), jnp.minimum(stop, token + WARPGROUP_ROWS)
    last_position = stop - 1 + work.offset
    end = full_end = work.kv_length
    if plan.spec.is_causal:
        end = jnp.maximum(last_position + 1, 0)
        full_end = jnp.maximum(first + work.offset + 1, 0)
    start = full_start = jnp.int32(0)
    if plan.spec.window_left is not None:
        start = div(jnp.maximum(first + work.offset - plan.spec.window_left, 0), tile_kv)
        full_start = ceil_div(jnp.maximum(last_position - plan.spec.window_left, 0), tile_kv)
    end = jnp.where(first < stop, ceil_div(end, tile_kv), 0)
    everything = KvTiles(work.tile_start, work.tile_start, work.tile_stop, work.tile_stop)
    return KvTiles(start, full_start, div(full_end, tile_kv), end).clamp(everything)


def visible_keys(plan: PrefillPlan, work: Work):
    """The keys [first, stop) outside of which no query of an item sees any."""
    first = jnp.int32(0)
    if plan.spec.window_left is not None:
        first = work.first + work.offset - plan.spec.window_left
    return first, work.kv_length


def octet_at(plan: PrefillPlan, warpgroup, octet):
    """(head of the group, first token in the tile) of an octet of a warpgroup's rows."""
    index = warpgroup * (WARPGROUP_ROWS // OCTET) + octet
    return div(index, plan.head_octets), lax.rem(index, jnp.int32(plan.head_octets)) * OCTET


class Inputs(NamedTuple):
    """Operands in global memory; None where the plan has none."""

    query: Any  # [tokens, N, H]
    k_pages: Any  # [L, P, K, Z, H]
    v_pages: Any
    tables: Any  # [R * M]
    layer: Any  # [1]
    items: Any  # [max_items, fields of Work]
    num_items: Any  # [1]
    k_scale: Any  # f32[L, P, K, Z]
    v_scale: Any
    sinks: Any  # f32[K, warpgroups, 64]
    slopes: Any  # f32[K, warpgroups, 64]


class Outputs(NamedTuple):
    """Results in global memory."""

    out: Any  # [tokens, N, H]; of parts f32[max_items, K, warpgroups, 64, width]
    lse: Any  # f32[max_items, K, warpgroups, 64]


class Ring(NamedTuple):
    """Tiles in shared memory, filled by one warpgroup and emptied by others."""

    smem: Any  # [slots, tile_kv, H]
    scale: Any  # f32[slots, tile_kv], of quantized pages
    full: Any
    empty: Any


class Scratch(NamedTuple):
    """Shared memory and barriers of a program."""

    k: Ring  # what wgmma reads
    v: Ring
    k_codes: Ring | None  # of quantized pages: what copies fill, to be widened
    v_codes: Ring | None
    work: Any  # i32[fields of Work]
    work_full: Any
    rows: Any  # three views of [warpgroups, 64, H]: queries; results, swizzled; results, row by row, padded
    query_full: Any
    zeroed: Any  # the values that no query sees

    def read_work(self) -> Work:
        return Work(*(self.work[field] for field in range(len(Work._fields))))


def scratch_types(plan: PrefillPlan) -> Scratch:
    config = plan.config
    loaded = _ring(plan, config.stages, plan.page_dtype, plan.num_copies * (1 + plan.is_quantized))
    ready, codes = loaded, None
    if plan.is_quantized:
        ready, codes = (
            _ring(plan, plan.slots, plan.dtype, 1),
            loaded._replace(empty=plgpu.Barrier(num_barriers=config.stages)),
        )
    rows = (config.warpgroups, WARPGROUP_ROWS, plan.head_dim)
    by_row = (config.warpgroups, WARPGROUP_ROWS, plan.pitch)
    results = swizzled_smem(rows, plan.query_dtype), plgpu.SMEM(by_row, plan.query_dtype)
    return Scratch(
        k=ready,
        v=ready,
        k_codes=codes,
        v_codes=codes,
        work=plgpu.SMEM((len(Work._fields),), jnp.int32),
        work_full=plgpu.Barrier(),
        rows=plgpu.RefUnion(swizzled_smem(rows, plan.dtype), *results),
        query_full=plgpu.Barrier(
            num_barriers=config.warpgroups, num_arrivals=WARPGROUP_ROWS // OCTET // plan.run
        ),
        zeroed=plgpu.Barrier(num_arrivals=config.warpgroups),
    )


def _ring(plan: PrefillPlan, slots: int, dtype, num_arrivals: int) -> Ring:
    """A ring that is full after so many arrivals, and emptied by every compute warpgroup."""
    tile_kv = plan.config.tile_kv
    return Ring(
        smem=swizzled_smem((slots, tile_kv, plan.head_dim), dtype),
        scale=plgpu.SMEM((slots, tile_kv), jnp.float32) if plan.is_quantized else None,
        full=plgpu.Barrier(num_barriers=slots, num_arrivals=num_arrivals),
        empty=plgpu.Barrier(num_barriers=slots, num_arrivals=plan.config.warpgroups),
    )
