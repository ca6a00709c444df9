"""What a launch of paged prefill does: static facts, operands, shared memory."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.device import num_multiprocessors
from pallas_kernels.kv_pages.pool import QUANTIZED
from pallas_kernels.mosaic import SMEM_BYTES, div, plgpu, rem, swizzled_smem
from pallas_kernels.paged_attention.plan import LaunchPlan, facts_of
from pallas_kernels.paged_attention.prefill_config import (
    OCTET,
    WARPGROUP_ROWS,
    PrefillConfig,
    default_config,
    fewest_warpgroups,
    max_tiles,
)
from pallas_kernels.paged_attention.prefill_units import Records, record_size
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec

RESERVED_BYTES = 3072  # of shared memory, for records, barriers and what is lost to alignment
LATE_UNITS = 4  # a program: units of the rows that are taken together at the end
MAX_QUANTIZED = 224  # head dim: at 256 the accumulators and the scales spill 68 to 168 bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillPlan(LaunchPlan):
    """The static facts of one launch."""

    config: PrefillConfig
    num_tokens: int
    page_size: int
    table_width: int
    keeps_parts: bool = False  # whether results are merged with others, elsewhere
    multiprocessors: int = dataclasses.field(default_factory=num_multiprocessors)

    @property
    def dtype(self) -> Any:
        """What is multiplied: codes of either kind are exact in bf16."""
        return jnp.bfloat16 if self.is_quantized else self.query_dtype

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
    def num_ranges(self) -> int:
        """Ranges of keys in an item's record."""
        return self.config.warpgroups if self.has_own_ranges else 1

    @property
    def record_size(self) -> int:
        return record_size(self.num_ranges, self.is_packed)

    @property
    def is_packed(self) -> bool:
        """Whether tiles take their row's octets head by head, and begin at any: of whole tokens they would
        have rows of no head."""
        num_octets = self.config.warpgroups * WARPGROUP_ROWS // OCTET
        return self.config.packs and not self.has_parts and num_octets % self.group > 0

    @property
    def head_octets(self) -> int:
        """Octets of a tile's tokens: each is there once for every query head of the group."""
        return OCTET * self.config.warpgroups // self.group

    @property
    def tile_q(self) -> int:
        """Tokens of a query tile."""
        return self.head_octets * OCTET

    @property
    def run(self) -> int:
        """Octets that lie together both in a warpgroup's rows and in a head's tokens: one copy."""
        if self.is_packed:
            return 1
        return math.gcd(WARPGROUP_ROWS // OCTET, self.head_octets)

    @property
    def ends_within(self) -> bool:
        """Whether the tokens end within an octet: copies then do, and queries beyond them are zeros."""
        return self.num_tokens % OCTET > 0

    @property
    def query_run(self) -> int:
        """Octets of one copy of queries."""
        return 1 if self.ends_within else self.run

    @property
    def tile_size(self) -> int:
        """Of a query tile, in tokens; in octets, once for each head, where tiles are packed."""
        return self.config.warpgroups * WARPGROUP_ROWS // OCTET if self.is_packed else self.tile_q

    @property
    def has_spare_rows(self) -> bool:
        """Whether a tile that is not full begins before its row, in whole runs, instead of ending after it:
        where later queries see more keys, it had better be the first.
        """
        return self.spec.is_causal and self.spec.window_left is None

    @property
    def leaves_singles(self) -> bool:
        """Whether rows of one query are decode's: not where a row is alone with more than an octet of tokens,
        most likely a prompt, of which that launch would find nothing to do."""
        is_prompt = self.num_rows == 1 and self.num_tokens > OCTET
        return self.spec.is_causal and (not is_prompt or self.spec.batch_invariant)

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for."""
        return self.table_width * self.page_size

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
        size, group = (self.tile_size * OCTET, self.group) if self.is_packed else (self.tile_q, 1)
        tiles = max_tiles(self.num_tokens + -self.num_tokens % OCTET, self.num_rows, size, group)
        return tiles * self.config.splits

    @property
    def max_units(self) -> int:
        """Units of work: an item and a KV head."""
        return self.max_items * self.num_kv_heads

    @property
    def num_programs(self) -> int:
        """Persistent programs, one a multiprocessor."""
        return min(self.multiprocessors, self.max_units)

    @property
    def draws(self) -> bool:
        """Whether programs draw units, because there may be more than one for each."""
        return self.max_units > self.num_programs

    @property
    def late_items(self) -> int:
        """Items at the end of the list whose rows are taken together, tile by tile, heavy ones first; 0: row
        after row, where all tiles of a row see about as many keys.

        A program draws a unit before it has ended the one before. With few units each, and of a row the heavy
        ones first, some would end late: 1.22 times the mean time of all for Gemma-2B's heads and 4 rows of
        2,048 tokens, 1.20 for SmolLM2-135M's and 16 of 777; so 1.02 and 1.07 (simulated, where a unit is
        drawn as the one before begins).
        """
        if not (self.draws and self.has_spare_rows and self.config.splits == 1):
            return 0
        return -(-LATE_UNITS * self.num_programs // self.num_kv_heads)

    @property
    def query_buffers(self) -> int:
        """Two where shared memory holds them: a unit's queries are then loaded while those of the one before
        are used."""
        return 2 if self._bytes_of_tiles + 2 * self._bytes_of_rows <= SMEM_BYTES - RESERVED_BYTES else 1

    @property
    def tile_bytes(self) -> int:
        """Of K, V, and queries once: what a launch takes at least of shared memory."""
        return self._bytes_of_tiles + self._bytes_of_rows

    @property
    def _bytes_of_tiles(self) -> int:
        config, row = self.config, self.head_dim * jnp.dtype(self.page_dtype).itemsize
        size = 2 * config.stages * config.tile_kv * (row + 4 * self.is_quantized)
        if self.is_quantized:
            size += 2 * self.slots * config.tile_kv * (2 * self.head_dim + 4)
        return size

    @property
    def _bytes_of_rows(self) -> int:
        return 2 * self.config.warpgroups * WARPGROUP_ROWS * self.head_dim


def unsupported(inputs: PagedInputs, spec: PagedSpec) -> str | None:
    """Says why this kernel cannot serve a call that the decode kernel can serve, or None if it can."""
    if spec.scale <= 0:
        return f"the scale must be positive, got {spec.scale}"
    head_dim, config = inputs.query.shape[2], spec.prefill_config
    is_quantized = inputs.k_pages.dtype in QUANTIZED
    step = 32 if is_quantized else 16  # bytes, and elements, of the narrowest swizzle
    if head_dim % step:
        return f"the head dim must be a multiple of {step} beside query_start, got {head_dim}"
    warpgroups = fewest_warpgroups(head_dim, inputs.alibi_slopes is not None, is_quantized)
    most = OCTET * min(2, config.warpgroups if config else warpgroups)
    if (group := inputs.query.shape[1] // inputs.k_pages.shape[2]) > most:
        return f"at most {most} query heads may share a KV head in such tiles, got {group}"
    if not is_quantized:
        return None
    if head_dim > MAX_QUANTIZED:
        return f"the head dim of quantized pages must be at most {MAX_QUANTIZED}, got {head_dim}"
    if config is not None and (config.warpgroups > 2 or config.overlap):
        return f"quantized pages take at most two warpgroups, and no overlap, got {config}"
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
        batch_invariant=spec.batch_invariant,
    )
    plan = PrefillPlan(
        **facts,
        config=config,
        num_tokens=num_tokens,
        page_size=page_size,
        table_width=table_width,
        keeps_parts=keeps_parts,
    )
    if spec.prefill_config is not None and plan.tile_bytes > SMEM_BYTES:
        raise ValueError(
            f"prefill_config must fit {SMEM_BYTES:,} bytes of shared memory, "
            f"got {config}: {plan.tile_bytes:,}"
        )
    return plan


def per_row(plan: PrefillPlan, x: jax.Array | None) -> jax.Array | None:
    """[N] -> f32[K, warpgroups, 64]: what is given for a head, for each row of a tile; rows of no head take
    the last head's. Where tiles are packed, f32[K, G, warpgroups, 64]: by the first head of a tile."""
    if x is None:
        return None
    octets = np.arange(plan.config.warpgroups * WARPGROUP_ROWS // OCTET)
    if plan.is_packed:
        head = (np.arange(plan.group)[:, None] + octets) % plan.group
    else:
        head = np.minimum(octets // plan.head_octets, plan.group - 1)
    by_head = x.astype(jnp.float32).reshape(plan.num_kv_heads, plan.group)
    rows = by_head[:, np.repeat(head, OCTET, axis=-1)]
    return rows.reshape(plan.num_kv_heads, *head.shape[:-1], plan.config.warpgroups, WARPGROUP_ROWS)


def buffer_of(plan: PrefillPlan, turn, warpgroup):
    """Which buffer of rows holds the queries of a turn, and then its results."""
    stage = rem(turn, plan.query_buffers) if plan.query_buffers > 1 else 0
    return stage * plan.config.warpgroups + warpgroup


def octet_at(plan: PrefillPlan, warpgroup, octet, first_head=None):
    """(head of the group, first token in the tile) of an octet of a warpgroup's rows; first_head: of a packed
    tile."""
    index = warpgroup * (WARPGROUP_ROWS // OCTET) + octet
    if plan.is_packed:
        return rem(index + first_head, plan.group), div(index + first_head, plan.group) * OCTET
    return div(index, plan.head_octets), rem(index, plan.head_octets) * OCTET


class Inputs(NamedTuple):
    """Operands in global memory; None where the plan has none."""

    query: Any  # [tokens, N, H]
    k_pages: Any  # [L, P, K, Z, H]
    v_pages: Any
    tables: Any  # [R * M]
    layer: Any  # [1]
    items: Any  # i32[(max_items + 1) * record size]
    k_scale: Any  # f32[L, P, K, Z]
    v_scale: Any
    sinks: Any  # per_row: f32[K, warpgroups, 64]
    slopes: Any
    counter: Any  # Counters.prefill: units drawn


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
    records: Records
    rows: Any  # two views of [buffers x warpgroups, 64, H]: queries; results
    query_full: Any  # one a buffer
    query_empty: Any  # its queries were used, and the results that took their place were stored
    zeroed: Any  # the values that no query sees


def scratch_types(plan: PrefillPlan) -> Scratch:
    config = plan.config
    loaded = _ring(plan, config.stages, plan.page_dtype, plan.num_copies * (1 + plan.is_quantized))
    ready, codes = loaded, None
    if plan.is_quantized:
        ready, codes = (
            _ring(plan, plan.slots, plan.dtype, 1),
            loaded._replace(empty=plgpu.Barrier(num_barriers=config.stages)),
        )
    num_buffers = plan.query_buffers * config.warpgroups
    rows = (num_buffers, WARPGROUP_ROWS, plan.head_dim)
    copies = WARPGROUP_ROWS // OCTET // plan.query_run
    return Scratch(
        k=ready,
        v=ready,
        k_codes=codes,
        v_codes=codes,
        records=Records.types(config.warpgroups + 1 + plan.is_quantized, plan.record_size),
        rows=plgpu.RefUnion(*(swizzled_smem(rows, dtype) for dtype in (plan.dtype, plan.query_dtype))),
        query_full=plgpu.Barrier(num_barriers=num_buffers, num_arrivals=copies),
        query_empty=plgpu.Barrier(num_barriers=num_buffers),
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
