"""What a launch of paged decode does: static facts, operands, shared memory."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.manual import unsupported_layout
from pallas_kernels.mosaic import SMEM_BYTES, buffer_bytes, plgpu, swizzled_smem
from pallas_kernels.mosaic_copy import OCTET
from pallas_kernels.mosaic_inline import REDUCTION_SIZE
from pallas_kernels.paged_attention.config import (
    COUNTED_ROWS,
    MAX_BOX,
    MAX_ROWS,
    MIN_ROOM,
    NUM_PROGRAMS,
    PagedConfig,
    block_columns,
    default_config,
    numbers_size,
)
from pallas_kernels.paged_attention.decode_memory import Merge, Queries, Scratch, Tickets, Tiles, Workspace
from pallas_kernels.paged_attention.plan import LaunchPlan, facts_of
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec

BUFFERS = 2  # of queries and of page ids: this unit's and the next one's
MAX_QUERIES = 16 * 256  # numbers in the queries of one KV head: beyond, accumulators spill
RESERVED_BYTES = 1024  # of shared memory, for barriers
CACHE_ROWS = 16  # tokens, of a copy of a cache's block of columns
MIN_TILE = 64  # tokens, the rows of a wgmma
NOT_OURS = -1  # the length of a row that another kernel attends


class Cut(NamedTuple):
    """How the prefill kernel cut the keys that rows share."""

    tile_q: int
    splits: int  # at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan(LaunchPlan):
    """The static facts of one launch."""

    config: PagedConfig
    page_size: int | None  # None: caches instead of pages
    capacity: int  # tokens that a row has room for
    cut: Cut | None = None  # of keys that rows share, attended elsewhere
    is_ragged: bool = False  # whether rows' queries lie among others, some of rows that are not ours
    num_tokens: int  # queries of all rows
    skips_pages: bool = False  # whether tables begin with pages that are attended elsewhere

    @property
    def num_programs(self) -> int:
        """Persistent programs, one a multiprocessor."""
        return min(NUM_PROGRAMS, self.num_rows * self.num_splits * self.num_kv_heads)

    @property
    def weights_dtype(self) -> Any:
        """Codes of either kind are exact in fp16, and soonest made."""
        return jnp.float16 if self.is_quantized else self.query_dtype

    @property
    def has_numbers(self) -> bool:
        """Whether a unit's queries come with numbers for each head."""
        return self.is_quantized or self.has_sinks or self.has_slopes

    @property
    def num_codes(self) -> int:
        """Of a number of the queries: one, itself; with quantized pages two, in rows apart."""
        return 1 + self.is_quantized

    @property
    def query_octets(self) -> int:
        """Of rows of wgmma's right operand, which are copied one by one."""
        return self.num_codes * self.columns // OCTET

    @property
    def num_splits(self) -> int:
        return -(-self.capacity // self.config.split)

    @property
    def is_merged(self) -> bool:
        """Whether a unit's result is one of several parts of a row's, merged in fp32. Batch-invariant: also
        where tables have room for one split, as the same row's are where there is room for more."""
        return self.num_splits > 1 or self.cut is not None or self.spec.batch_invariant

    @property
    def columns(self) -> int:
        """Of a unit: the heads of its group, and those that follow in memory, or zeros behind the last, which
        are computed and not used."""
        return padded_group(self.group)

    @property
    def table_width(self) -> int:
        assert self.page_size is not None
        return self.capacity // self.page_size

    @property
    def ends_within(self) -> bool:
        """Whether H ends within a block: copies then do, and what lies beyond is zero."""
        return self.head_dim % self.block != 0

    @property
    def block(self) -> int:
        """Columns of a block of K, V and queries in shared memory."""
        return block_columns(self.head_dim, jnp.dtype(self.page_dtype).itemsize)

    @property
    def num_blocks(self) -> int:
        return -(-self.head_dim // self.block)

    @property
    def copy_rows(self) -> int:
        """Tokens of one TMA copy: a page, or the part of it that one tile takes; of caches a tile, or a part
        whose blocks of columns are asked for soon after each other, as they lie in memory."""
        if self.page_size is None:
            return CACHE_ROWS if self.ends_within else self.config.tile
        return min(self.page_size, self.config.tile)

    @property
    def num_copies(self) -> int:
        return self.config.tile // self.copy_rows

    @property
    def ids_per_split(self) -> int:
        """Page ids that one unit copies: its own from a multiple of 4 on, in multiples of 32, as TMA aligns
        both."""
        assert self.page_size is not None
        return -(-(-(-self.config.split // self.page_size) + 3) // 32) * 32

    @property
    def numbers_size(self) -> int:
        """Of an array with a number for every row."""
        return numbers_size(self.num_rows)

    @property
    def num_boxes(self) -> int:
        """Copies of an array of numbers, which has one for every row; where queries start, one more."""
        return -(-(self.num_rows + self.is_ragged) // min(MAX_BOX, self.numbers_size))

    @property
    def has_uneven_rows(self) -> bool:
        """Whether rows have other numbers of units than one a KV head."""
        return self.num_splits > 1 or self.is_ragged

    @property
    def counts_units(self) -> bool:
        """Whether the units of every row are counted before the first is looked for."""
        return self.has_uneven_rows and self.num_rows <= COUNTED_ROWS

    @property
    def out_dtype(self) -> Any:
        return jnp.float32 if self.is_merged else self.query_dtype

    @property
    def out_columns(self) -> int:
        """Parts lie in whole rows of transposed values."""
        return self.width if self.is_merged else self.head_dim


def unsupported(inputs: PagedInputs, spec: PagedSpec) -> str | None:
    """Says why this kernel cannot serve a call, or None if it can."""
    return unsupported_shapes(inputs) or unsupported_layout(inputs)


def unsupported_shapes(inputs: PagedInputs) -> str | None:
    """The same of shapes and dtypes, which are all it reads."""
    head_dim, dtype, page_dtype = inputs.query.shape[-1], inputs.query.dtype, inputs.k_pages.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"query and pages must be bf16 or fp16, got {dtype} and {page_dtype}"
    step = 16 // jnp.dtype(page_dtype).itemsize  # TMA takes rows at multiples of 16 bytes
    if head_dim % step or not 64 <= head_dim <= 256:
        return f"the head dim must be a multiple of {step} in 64..256, got {head_dim}"
    num_kv_heads = inputs.k_pages.shape[2]
    queries = inputs.query.shape[1] // num_kv_heads * head_dim
    if queries > MAX_QUERIES:
        return f"the queries of a KV head must hold at most {MAX_QUERIES} numbers, got {queries}"
    if (num_rows := inputs.kv_lengths.shape[0]) > MAX_ROWS:
        return f"the numbers of at most {MAX_ROWS} rows are kept in shared memory, got {num_rows}"
    room = inputs.k_pages.shape[1]  # of a cache: TMA takes it in tiles, of 8 tokens as they lie in memory
    if inputs.block_tables is None and (room < MIN_ROOM or room % 8):
        return f"caches must have room for {MIN_ROOM} tokens or more, in multiples of 8, got {room}"
    return None


def padded_group(group: int) -> int:
    """Queries of a KV head, padded to what a wgmma takes as N."""
    return -(-group // OCTET) * OCTET


def make_plan(inputs: PagedInputs, spec: PagedSpec, cut: Cut | None = None) -> Plan:
    facts, page_size, capacity = facts_of(inputs, spec), None, inputs.k_pages.shape[1]
    is_ragged = inputs.query_start is not None
    if inputs.block_tables is not None:
        page_size = inputs.k_pages.shape[3]
        capacity = inputs.block_tables.shape[1] * page_size
    config = spec.config or default_config(
        facts["num_rows"],
        facts["num_kv_heads"],
        facts["head_dim"],
        padded_group(facts["num_heads"] // facts["num_kv_heads"]),
        capacity,
        inputs.k_pages.dtype.itemsize,
        page_size,
        is_ragged,
        spec.batch_invariant,
    )
    own = {"page_size": page_size, "capacity": capacity, "cut": cut, "is_ragged": is_ragged}
    own["num_tokens"] = inputs.query.shape[0]
    plan = Plan(**facts, config=config, **own, skips_pages=inputs.skipped_pages is not None)
    if spec.config is None:
        return _shrink(plan)
    if (needed := sum(_buffer_sizes(plan))) > SMEM_BYTES:
        raise ValueError(f"config must fit {SMEM_BYTES:,} bytes of shared memory, got {config}: {needed:,}")
    return plan


def _shrink(plan: Plan) -> Plan:
    """The plan with fewer stages, and then of a smaller tile, until it fits: default_config's estimate counts
    neither what is lost between buffers nor what a cascade takes.
    """
    while shared_bytes(plan) > SMEM_BYTES:
        config = plan.config
        if config.stages > 2:
            config = dataclasses.replace(config, stages=config.stages - config.consumers)
        elif config.tile > MIN_TILE:
            config = dataclasses.replace(config, tile=config.tile // 2)
        else:
            break
        plan = dataclasses.replace(plan, config=config)
    return plan


def shared_bytes(plan: Plan) -> int:
    """Shared memory that a launch takes."""
    return buffer_bytes(*_buffer_sizes(plan)) + RESERVED_BYTES


def _buffer_sizes(plan: Plan) -> list[int]:
    buffers = [x for x in jax.tree.leaves(scratch_types(plan)) if not isinstance(x, plgpu.Barrier)]
    return [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in buffers]


def scratch_types(plan: Plan) -> Scratch:
    config, columns, width = plan.config, plan.columns, plan.width
    # The swizzle of V, if wgmma reads both from shared memory.
    row = config.tile if plan.is_quantized else plan.block
    weights = swizzled_smem((config.consumers, columns, config.tile), plan.weights_dtype, row)
    reduction = plgpu.SMEM((config.consumers, REDUCTION_SIZE), jnp.float32)
    numbers = plgpu.SMEM((plan.numbers_size,), jnp.int32)
    return Scratch(
        k=_tiles(plan),
        v=_tiles(plan),
        queries=_queries(plan),
        lengths=numbers,
        starts=numbers if plan.is_ragged else None,
        skipped=numbers if plan.skips_pages else None,
        lengths_full=plgpu.Barrier(num_arrivals=plan.num_boxes * (1 + plan.is_ragged + plan.skips_pages)),
        counts=numbers if plan.counts_units else None,
        counted=plgpu.Barrier(),
        tickets=_tickets(plan) if config.dynamic else None,
        work=Workspace(weights, reduction),
        merge=_merge(plan) if config.consumers == 2 else None,
        out=plgpu.SMEM((columns, width), plan.out_dtype),
    )


def _tiles(plan: Plan) -> Tiles:
    config = plan.config
    has_ids = plan.page_size is not None
    ids_size = plan.ids_per_split if has_ids else 0
    return Tiles(
        pages=swizzled_smem((config.stages, plan.num_blocks, config.tile, plan.block), plan.page_dtype),
        scale=plgpu.SMEM((config.stages, config.tile), jnp.float32) if plan.is_quantized else None,
        full=plgpu.Barrier(
            num_barriers=config.stages, num_arrivals=plan.num_copies * (plan.num_blocks + plan.is_quantized)
        ),
        empty=plgpu.Barrier(num_barriers=config.stages),
        ids=plgpu.SMEM((BUFFERS, ids_size), jnp.int32) if has_ids else None,
        ids_full=plgpu.Barrier(num_barriers=BUFFERS, num_arrivals=-(-ids_size // MAX_BOX))
        if has_ids
        else None,
    )


def _queries(plan: Plan) -> Queries:
    per_head = plgpu.SMEM((BUFFERS, plan.columns), jnp.float32)
    dtype = plan.page_dtype if plan.is_quantized else plan.query_dtype
    num_arrivals = plan.query_octets * plan.num_blocks + plan.is_quantized + plan.has_sinks + plan.has_slopes
    return Queries(
        query=swizzled_smem((BUFFERS, plan.num_blocks, OCTET * plan.query_octets, plan.block), dtype),
        factor=per_head if plan.is_quantized else None,
        sinks=per_head if plan.has_sinks else None,
        slopes=per_head if plan.has_slopes else None,
        full=plgpu.Barrier(num_barriers=BUFFERS, num_arrivals=num_arrivals),
        empty=plgpu.Barrier(num_barriers=BUFFERS, num_arrivals=plan.config.consumers),
    )


def _tickets(plan: Plan) -> Tickets:
    empty = plgpu.Barrier(num_barriers=BUFFERS, num_arrivals=1 + plan.config.consumers)
    return Tickets(plgpu.SMEM((BUFFERS,), jnp.int32), plgpu.Barrier(num_barriers=BUFFERS), empty)


def _merge(plan: Plan) -> Merge:
    statistic = plgpu.SMEM((plan.columns,), jnp.float32)
    values = plgpu.SMEM((plan.columns, plan.width), jnp.float32)
    return Merge(values, statistic, statistic, plgpu.Barrier(), plgpu.Barrier())
