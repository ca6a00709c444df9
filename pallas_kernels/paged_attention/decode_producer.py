"""The producer warpgroups of paged decode: pages, page ids and queries to shared memory, ahead of use."""

import functools

import jax.numpy as jnp
from jax import lax

from pallas_kernels.mosaic import div, pl, plgpu
from pallas_kernels.paged_attention.decode_plan import (
    BUFFERS,
    MAX_BOX,
    Inputs,
    Plan,
    Ring,
    Unit,
    for_each_unit,
)


def produce(plan: Plan, inputs: Inputs, pages, ring: Ring, ids: Ring, query: Ring | None):
    """A producer warpgroup: keeps every slot of the ring filled with the next tile's pages."""

    layer = inputs.layer[0]

    def visit(unit: Unit, next_unit: Unit, carry):
        tiles, units = carry
        is_active = unit.num_tiles > 0

        @pl.when(is_active & (units == 0))
        def _():
            fetch_ids(plan, inputs, unit, ids, units)

        next_units = units + is_active.astype(jnp.int32)

        @pl.when((next_unit.num_tiles > 0) & (next_units > 0))
        def _():
            fetch_ids(plan, inputs, next_unit, ids, next_units)

        @pl.when(is_active)
        def _():
            if query is not None:
                fetch_query(plan, inputs, unit, query, units)
            buffer = lax.rem(units, jnp.int32(BUFFERS))
            plgpu.barrier_wait(ids.full.at[buffer])
            source, unit_ids = pages.at[layer], ids.smem.at[buffer]
            copy_tile = functools.partial(fetch_tile, plan, source, ring, unit_ids, unit, tiles)
            lax.fori_loop(0, unit.num_tiles, copy_tile, None)
            plgpu.commit_smem()  # all ids are read before a copy overwrites them

        return tiles + unit.num_tiles, next_units

    tiles, units = for_each_unit(plan, inputs.lengths, visit, (jnp.int32(0), jnp.int32(0)))
    drain(ring.empty, plan.config.stages, tiles)
    if query is not None:
        drain(query.empty, BUFFERS, units)


def fetch_ids(plan: Plan, inputs: Inputs, unit: Unit, ids: Ring, units):
    """Starts the copy of a unit's part of its block table."""
    buffer = lax.rem(units, jnp.int32(BUFFERS))
    start = first_id(plan, unit)
    for box in range(0, plan.ids_per_split, MAX_BOX):
        size = min(MAX_BOX, plan.ids_per_split - box)
        plgpu.copy_gmem_to_smem(
            inputs.tables.at[pl.ds(start + box, size)],
            ids.smem.at[buffer, pl.ds(box, size)],
            ids.full.at[buffer],
        )


def first_id(plan: Plan, unit: Unit):
    """Where in the flat block tables a unit's copy begins: TMA copies start at a multiple of 16 bytes."""
    start = unit.row * plan.table_width + div(unit.split * plan.config.split, plan.page_size)
    return pl.multiple_of(div(start, 4) * 4, 4)


def fetch_query(plan: Plan, inputs: Inputs, unit: Unit, query: Ring, units):
    """Starts the copy of a KV head's queries."""
    buffer = lax.rem(units, jnp.int32(BUFFERS))

    @pl.when(units >= BUFFERS)
    def _():
        plgpu.barrier_wait(query.empty.at[buffer])

    plgpu.copy_gmem_to_smem(
        inputs.query.at[unit.row, unit.head], query.smem.at[buffer], query.full.at[buffer]
    )


def fetch_tile(plan: Plan, pages, ring: Ring, ids, unit: Unit, tiles, index, _):
    """Starts the copies of one tile's pages, one a page; beyond the last page the last one is taken again."""
    slot = lax.rem(tiles + index, jnp.int32(plan.config.stages))
    token = unit.start + index * plan.config.tile
    first_column = first_id(plan, unit) - unit.row * plan.table_width
    last_column = div(unit.end - 1, plan.page_size)
    # All ids first: between copies each load would be waited for, and copies start every 100 cycles or so.
    page_ids = []
    for copy in range(plan.num_copies):
        column = jnp.minimum(div(token + copy * plan.copy_rows, plan.page_size), last_column)
        page_ids.append(jnp.clip(ids[column - first_column], 0, plan.num_pages - 1))

    @pl.when(tiles + index >= plan.config.stages)
    def _():
        plgpu.barrier_wait(ring.empty.at[slot])

    for copy, page in enumerate(page_ids):
        source = pages.at[page, unit.head]
        if plan.page_size > plan.copy_rows:
            offset = lax.rem(token, jnp.int32(plan.page_size))
            source = source.at[pl.ds(pl.multiple_of(offset, plan.copy_rows), plan.copy_rows)]
        rows = pl.ds(copy * plan.copy_rows, plan.copy_rows)
        plgpu.copy_gmem_to_smem(source, ring.smem.at[slot, rows], ring.full.at[slot])


def drain(barriers, size: int, total):
    """Waits for the last arrivals, so that none is pending when the program ends."""

    def wait(index, _):
        plgpu.barrier_wait(barriers.at[lax.rem(index, jnp.int32(size))])

    lax.fori_loop(jnp.maximum(total - size, 0), total, wait, None)
