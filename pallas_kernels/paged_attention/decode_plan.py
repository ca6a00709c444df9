"""What a launch of paged decode does: static facts, operands, and how its work is cut into units."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import ceil_div, div, plgpu, swizzled_smem
from pallas_kernels.paged_attention.config import NUM_PROGRAMS, PagedConfig, default_config
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec

BUFFERS = 2  # of queries and of page ids: this unit's and the next one's
MAX_BOX = 256  # elements that one TMA copy takes along a dimension
MAX_QUERIES = 16 * 256  # numbers in the queries of one KV head: beyond, accumulators spill


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of one launch."""

    spec: PagedSpec
    config: PagedConfig
    dtype: Any
    num_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int
    table_width: int

    @property
    def num_programs(self) -> int:
        """Persistent programs, one a multiprocessor."""
        return min(NUM_PROGRAMS, self.num_units)

    @property
    def num_splits(self) -> int:
        return -(-self.table_width * self.page_size // self.config.split)

    @property
    def num_units(self) -> int:
        return self.num_rows * self.num_splits * self.num_kv_heads

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def columns(self) -> int:
        return padded_group(self.group)

    @property
    def copy_rows(self) -> int:
        """Tokens of one TMA copy: a page, or the part of it that one tile takes."""
        return min(self.page_size, self.config.tile)

    @property
    def num_copies(self) -> int:
        return self.config.tile // self.copy_rows

    @property
    def ids_per_split(self) -> int:
        """Page ids that one unit copies: its own from a multiple of 4 on, in multiples of 32, as TMA aligns
        both."""
        return -(-(-(-self.config.split // self.page_size) + 3) // 32) * 32

    @property
    def out_dtype(self) -> Any:
        """Splits are merged in fp32."""
        return self.dtype if self.num_splits == 1 else jnp.float32


def unsupported(inputs: PagedInputs, spec: PagedSpec) -> str | None:
    """Says why this kernel cannot serve a call, or None if it can."""
    head_dim, dtype = inputs.query.shape[-1], inputs.query.dtype
    if inputs.query_start is not None:
        return "query_start (more than one query a row) is not supported yet"
    if dtype not in (jnp.bfloat16, jnp.float16) or inputs.k_pages.dtype != dtype:
        return f"query and pages must be bf16 or fp16, got {dtype} and {inputs.k_pages.dtype}"
    if head_dim not in (64, 128, 256):
        return f"the head dim must be 64, 128 or 256, got {head_dim}"
    queries = inputs.query.shape[1] // inputs.k_pages.shape[2] * head_dim
    if queries > MAX_QUERIES:
        return f"the queries of a KV head must hold at most {MAX_QUERIES} numbers, got {queries}"
    return None


def padded_group(group: int) -> int:
    """Queries of a KV head, padded to what a wgmma takes as N."""
    return -(-group // 8) * 8


def make_plan(inputs: PagedInputs, spec: PagedSpec) -> Plan:
    num_rows, num_heads, head_dim = inputs.query.shape
    _, num_pages, num_kv_heads, page_size, _ = inputs.k_pages.shape
    columns, capacity = padded_group(num_heads // num_kv_heads), inputs.block_tables.shape[1] * page_size
    config = spec.config or default_config(num_rows, num_kv_heads, head_dim, columns, capacity)
    return Plan(
        spec=spec,
        config=config,
        dtype=inputs.query.dtype,
        num_rows=num_rows,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        num_pages=num_pages,
        table_width=inputs.block_tables.shape[1],
    )


class Unit(NamedTuple):
    """One piece of work: `num_tiles` tiles of a row from `start` on, for one KV head."""

    row: jax.Array
    split: jax.Array
    head: jax.Array
    start: jax.Array  # first token of the first tile
    first_visible: jax.Array  # tokens first_visible <= token < end count
    end: jax.Array
    num_tiles: jax.Array


class Inputs(NamedTuple):
    """Operands in global memory."""

    query: Any  # [R, K, columns, H]
    k_pages: Any  # [L, P, K, Z, H]
    v_pages: Any
    tables: Any  # [R * M]
    lengths: Any  # [R]
    layer: Any  # [1]


class Outputs(NamedTuple):
    """Results in global memory."""

    out: Any  # [R, splits, N, H]
    lse: Any  # f32[R, splits, K, columns]


class Ring(NamedTuple):
    """Shared-memory buffers filled by one warpgroup and emptied by another."""

    smem: Any
    full: Any
    empty: Any


class Scratch(NamedTuple):
    """Shared memory and barriers of a program."""

    k: Ring  # [stages, tile, H]
    v: Ring
    k_ids: Ring  # i32[BUFFERS, ids_per_split]; its producer is also its consumer
    v_ids: Ring
    query: Ring  # [BUFFERS, columns, H]
    weights: Any  # [columns, tile]
    out: Any  # [columns, H]


def scratch_types(plan: Plan) -> Scratch:
    tile, stages, columns, head_dim = plan.config.tile, plan.config.stages, plan.columns, plan.head_dim

    def pages() -> Ring:
        full = plgpu.Barrier(num_barriers=stages, num_arrivals=plan.num_copies)
        smem = swizzled_smem((stages, tile, head_dim), plan.dtype)
        return Ring(smem, full, plgpu.Barrier(num_barriers=stages))

    query = Ring(
        swizzled_smem((BUFFERS, columns, head_dim), plan.dtype),
        plgpu.Barrier(num_barriers=BUFFERS),
        plgpu.Barrier(num_barriers=BUFFERS),
    )
    ids_full = plgpu.Barrier(num_barriers=BUFFERS, num_arrivals=-(-plan.ids_per_split // MAX_BOX))
    ids = Ring(plgpu.SMEM((BUFFERS, plan.ids_per_split), jnp.int32), ids_full, None)
    return Scratch(
        k=pages(),
        v=pages(),
        k_ids=ids,
        v_ids=ids,
        query=query,
        weights=swizzled_smem((columns, tile), plan.dtype),
        out=plgpu.SMEM((columns, head_dim), plan.out_dtype),
    )


def for_each_unit(plan: Plan, lengths, visit, carry):
    """Calls carry = visit(unit, next_unit, carry) on this program's units that hold visible tokens, or on
    all.

    Lengths are loaded two units ahead: under full memory traffic a load takes microseconds.
    """
    program, stride = lax.axis_index("program"), plan.num_programs
    count = ceil_div(plan.num_units - program, stride)

    def load_length(index):
        last = jnp.minimum(program + index * stride, plan.num_units - 1)
        length = lengths[div(last, plan.num_splits * plan.num_kv_heads)]
        return jnp.minimum(length, plan.table_width * plan.page_size)

    def step(index, state):
        length, next_length, carry = state
        after_next = load_length(index + 2)
        unit = unit_at(plan, program + index * stride, length)
        next_unit = unit_at(plan, program + (index + 1) * stride, next_length)
        next_tiles = jnp.where(index + 1 < count, next_unit.num_tiles, 0)
        carry = visit(unit, next_unit._replace(num_tiles=next_tiles), carry)
        return next_length, after_next, carry

    state = (load_length(0), load_length(1), carry)
    return lax.fori_loop(0, count, step, state)[2]


def unit_at(plan: Plan, index, length) -> Unit:
    """What unit `index` covers of a row of this length."""
    chunk, head = div(index, plan.num_kv_heads), lax.rem(index, jnp.int32(plan.num_kv_heads))
    row, split = div(chunk, plan.num_splits), lax.rem(chunk, jnp.int32(plan.num_splits))
    first_visible = split * plan.config.split
    end = jnp.minimum(length, first_visible + plan.config.split)
    if plan.spec.window_left is not None:
        first_visible = jnp.maximum(first_visible, length - 1 - plan.spec.window_left)
    start = div(first_visible, plan.config.tile) * plan.config.tile
    num_tiles = ceil_div(jnp.maximum(end - start, 0), plan.config.tile)
    return Unit(row, split, head, start, first_visible, end, num_tiles)
