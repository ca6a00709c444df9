"""What a launch of paged decode finds in global memory, and what a program keeps in shared memory."""

from typing import Any, NamedTuple


class Inputs(NamedTuple):
    """Operands in global memory; None where the plan has none."""

    query: Any  # [R or tokens, N, H]; of quantized pages [R, 2, N, H]: both codes of each number
    query_factor: Any  # f32[R, K, columns], of codes
    starts: Any  # i32[R + 1]: of ragged rows, each one's query among all
    k_pages: Any  # [L, P, K, Z, H], or [R, S, K, H]
    v_pages: Any
    tables: Any  # [R * M]
    lengths: Any  # [R]
    skipped: Any  # i32[R]: pages at the start of each table
    layer: Any  # [1]
    k_scale: Any  # f32[L, P, K, Z]
    v_scale: Any
    sinks: Any  # f32[K, columns]
    slopes: Any  # f32[K, columns]
    counter: Any  # Counters.decode: units drawn; whether there are none
    out: Any  # [tokens, N, H]: others' results, to which ours are added


class Outputs(NamedTuple):
    """Results in global memory."""

    out: Any  # [R, N, H], or others' results [tokens, N, H], or parts f32[R, splits, N, width]
    lse: Any  # f32[R, splits, K, columns]


class Tiles(NamedTuple):
    """A ring of K or V tiles."""

    pages: Any  # [stages, blocks, tile, block]
    scale: Any  # f32[stages, tile], of quantized pages
    full: Any
    empty: Any
    ids: Any  # i32[BUFFERS, ids_per_split]: written by copies, read by the producer that started them
    ids_full: Any


class Tickets(NamedTuple):
    """A ring of indices of units, which the K producer draws for its program."""

    index: Any  # i32[BUFFERS]
    full: Any
    empty: Any


class Queries(NamedTuple):
    """A ring of a unit's queries and of what is given for each head."""

    query: Any  # [BUFFERS, blocks, codes * columns, block]
    factor: Any  # f32[BUFFERS, columns]
    sinks: Any  # f32[BUFFERS, columns]
    slopes: Any  # f32[BUFFERS, columns]
    full: Any
    empty: Any


class Workspace(NamedTuple):
    """What each consumer warpgroup needs for itself."""

    weights: Any  # [consumers, columns, tile]
    reduction: Any  # f32[consumers, REDUCTION_SIZE]


class Merge(NamedTuple):
    """What the second consumer hands to the first at the end of a unit."""

    values: Any  # f32[columns, width]
    maximum: Any  # f32[columns]
    total: Any  # f32[columns]
    full: Any
    empty: Any


class Scratch(NamedTuple):
    """Shared memory and barriers of a program."""

    k: Tiles
    v: Tiles
    queries: Queries
    lengths: Any  # i32[numbers_size]; NOT_OURS of a row that is left alone
    starts: Any  # i32[numbers_size], of ragged rows
    skipped: Any  # i32[numbers_size], where tables begin with others' pages
    lengths_full: Any
    counts: Any  # i32[numbers_size]: units of each row, where they are counted
    counted: Any
    tickets: Tickets | None
    work: Workspace
    merge: Merge | None
    out: Any  # [columns, width]
