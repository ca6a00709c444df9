"""Where each sequence's keys and values live: block tables, reference counts, the stack of free pages.

Paging and copy-on-write follow PagedAttention (Kwon et al. 2023, sections 4.2 to 4.4), with the block
manager's state held in arrays on the device: a step allocates its own pages, and no host stands between
two tokens.

Every function is pure and jittable and takes the static keyword `page_size` (Z, tokens a page). Those that
return `ok` (bool[]) are all-or-nothing: where `ok` is False the returned state equals the one passed in.
Three facts hold after any sequence of calls: `ref_count[p]` is the number of block tables that show p plus
its pins; free and owned pages partition 1..P-1; nothing stands in a block table beyond its row's length.
Lists of rows are padded with NO_ROW, lists of pages with NULL_PAGE.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32

NULL_PAGE = 0  # never allocated: the padding of block tables
NO_ROW = 2**31 - 1  # out of range in any table, so that reads fill and writes drop


class PageState(NamedTuple):
    """The allocator's whole state, for R rows, P pages and block tables M pages wide."""

    ref_count: Int32[Array, "P"]  # owners of each page: appearances in block tables + pins
    pin_count: Int32[Array, "P"]  # owners outside the tables (cached prefixes)
    free_stack: Int32[Array, "P"]  # free page ids in [0:free_top)
    free_top: Int32[Array, ""]
    block_tables: Int32[Array, "R M"]  # page ids in the order of the tokens, then NULL_PAGE
    lengths: Int32[Array, "R"]  # tokens in each row; 0 is an empty row


def init_page_state(num_rows: int, num_pages: int, pages_per_row: int) -> PageState:
    """An empty pool of `num_pages` pages, NULL_PAGE among them; low page ids are handed out first."""
    for name, value, least in (
        ("num_rows", num_rows, 1),
        ("num_pages", num_pages, 2),
        ("pages_per_row", pages_per_row, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    return PageState(
        ref_count=jnp.zeros(num_pages, jnp.int32),
        pin_count=jnp.zeros(num_pages, jnp.int32),
        free_stack=jnp.arange(num_pages - 1, -1, -1, dtype=jnp.int32),
        free_top=jnp.array(num_pages - 1, jnp.int32),
        block_tables=jnp.full((num_rows, pages_per_row), NULL_PAGE, jnp.int32),
        lengths=jnp.zeros(num_rows, jnp.int32),
    )


@partial(jax.jit, static_argnames="page_size")
def allocate(
    state: PageState, rows: Int[Array, "C"], lengths: Int[Array, "C"], *, page_size: int
) -> tuple[PageState, Bool[Array, ""]]:
    """Gives each of the empty `rows` the pages for `lengths` tokens.

    `ok` is False when the free pages do not suffice, a length exceeds M*Z, or the rows are not empty and
    distinct.
    """
    is_empty = _read(state.lengths, rows, fill=0) == 0
    return _grow(state, rows, lengths, is_empty.all(), page_size)


@partial(jax.jit, static_argnames="page_size")
def extend(
    state: PageState, rows: Int[Array, "C"], counts: Int[Array, "C"], *, page_size: int
) -> tuple[PageState, Bool[Array, ""]]:
    """Lengthens each of the distinct `rows` by `counts` tokens (a chunk of a prompt).

    `ok` is False when the free pages do not suffice, a row would exceed M*Z, or a row ends inside a page that
    others own too: its new tokens would be written there. (`append` copies such a page.)
    """
    lengths = _read(state.lengths, rows, fill=0)
    last_page = _read(state.block_tables, rows, lengths // page_size, fill=NULL_PAGE)
    writes_shared = (lengths % page_size > 0) & (counts > 0) & (state.ref_count[last_page] > 1)
    return _grow(state, rows, counts, ~writes_shared.any(), page_size)


@partial(jax.jit, static_argnames="page_size")
def append(
    state: PageState, active: Bool[Array, "R"], *, page_size: int
) -> tuple[PageState, Int32[Array, "R"], Int32[Array, "R"], Int32[Array, "R"], Bool[Array, ""]]:
    """Lengthens every active row by one token; a page that others own too is copied first.

    Returns (state, write_page, offset, copy_src, ok): the row's token belongs at `offset` of `write_page`
    (NULL_PAGE for rows that do not write), once `copy_src` has been copied to `write_page` where `copy_src`
    is not NULL_PAGE. All copies come before all writes: of owners that all write at once the first keeps
    the page that the others copy.
    `ok` is False when the free pages do not suffice or an active row is M*Z tokens long.
    """
    num_rows, pages_per_row = state.block_tables.shape
    row = jnp.arange(num_rows)
    column, offset = jnp.divmod(state.lengths, page_size)
    last_page = _read(state.block_tables, row, column, fill=NULL_PAGE)

    starts_page = active & (offset == 0)
    shared_page = jnp.where(active & (offset > 0) & (state.ref_count[last_page] > 1), last_page, NULL_PAGE)
    keeps_page = _is_last_owner(state, shared_page)
    copies_page = (shared_page != NULL_PAGE) & ~keeps_page
    needs_page = starts_page | copies_page
    ok = (column < pages_per_row).all(where=active) & (needs_page.sum() <= state.free_top)

    active, needs_page, copies_page = active & ok, needs_page & ok, copies_page & ok
    state, new_page = _pop(state, needs_page)
    copy_src = jnp.where(copies_page, last_page, NULL_PAGE)
    writer = jnp.where(needs_page, row, NO_ROW)
    state = state._replace(
        # A copied page keeps at least one owner, so nothing falls free here.
        ref_count=state.ref_count.at[copy_src].add(-copies_page.astype(jnp.int32)),
        block_tables=state.block_tables.at[writer, column].set(new_page, mode="drop"),
        lengths=state.lengths + active,
    )
    write_page = jnp.where(active, jnp.where(needs_page, new_page, last_page), NULL_PAGE)
    return state, write_page, offset, copy_src, ok


@partial(jax.jit, static_argnames="page_size")
def fork(
    state: PageState, src_rows: Int[Array, "C"], dst_rows: Int[Array, "C"], *, page_size: int
) -> tuple[PageState, Bool[Array, ""]]:
    """Makes each of the empty `dst_rows` an owner of all pages of its source row; nothing is copied.

    `ok` is False when the destination rows are not empty and distinct.
    """
    is_empty = _read(state.lengths, dst_rows, fill=0) == 0
    ok = is_empty.all() & _are_distinct(dst_rows, state.lengths.size)
    dst_rows = jnp.where(ok, dst_rows, NO_ROW)
    src_rows = jnp.where(dst_rows == NO_ROW, NO_ROW, src_rows)
    tables, lengths = _gather_rows(state, src_rows, page_size)
    state = state._replace(
        ref_count=state.ref_count + _appearances(state, tables),
        block_tables=state.block_tables.at[dst_rows].set(tables, mode="drop"),
        lengths=state.lengths.at[dst_rows].set(lengths, mode="drop"),
    )
    return state, ok


@partial(jax.jit, static_argnames="page_size")
def reorder(state: PageState, parents: Int[Array, "R"], *, page_size: int) -> PageState:
    """Lets row r continue what row `parents[r]` was (beam search), or empties it where that is NO_ROW."""
    tables, lengths = _gather_rows(state, parents, page_size)
    change = _appearances(state, tables) - _appearances(state, state.block_tables)
    state = _with_ref_count(state, state.ref_count + change)
    return state._replace(block_tables=tables, lengths=lengths)


@partial(jax.jit, static_argnames="page_size")
def attach(
    state: PageState, row: Int[Array, ""], pages: Int[Array, "M"], length: Int[Array, ""], *, page_size: int
) -> PageState:
    """Starts the empty `row` on `length` tokens that stand in `pages`, which are pinned (a cached prefix)."""
    pages = _mask_beyond_length(pages, length, page_size)
    return state._replace(
        ref_count=state.ref_count + _appearances(state, pages),
        block_tables=state.block_tables.at[row].set(pages),
        lengths=state.lengths.at[row].set(length),
    )


@partial(jax.jit, static_argnames="page_size")
def pin(state: PageState, pages: Int[Array, "C"], *, page_size: int) -> PageState:
    """Adds an owner outside the tables to each of `pages`; they outlive their rows. Skips free pages."""
    del page_size  # pages are held whole
    is_owned = state.ref_count[pages] > 0
    pins = _appearances(state, jnp.where(is_owned, pages, NULL_PAGE))
    return state._replace(ref_count=state.ref_count + pins, pin_count=state.pin_count + pins)


@partial(jax.jit, static_argnames="page_size")
def unpin(state: PageState, pages: Int[Array, "C"], *, page_size: int) -> PageState:
    """Takes back one pin of each of `pages`, never more than it has; pages without owners fall free."""
    del page_size  # pages are held whole
    unpins = jnp.minimum(_appearances(state, pages), state.pin_count)
    state = _with_ref_count(state, state.ref_count - unpins)
    return state._replace(pin_count=state.pin_count - unpins)


@partial(jax.jit, static_argnames="page_size")
def free(state: PageState, rows_mask: Bool[Array, "R"], *, page_size: int) -> PageState:
    """Empties the rows of `rows_mask`; each page falls free once, when its last owner has left."""
    row = jnp.arange(state.lengths.size)
    return reorder(state, jnp.where(rows_mask, NO_ROW, row), page_size=page_size)


def num_pages_of(lengths, page_size: int):
    """Pages that `lengths` tokens occupy: ceil(lengths / Z), for integers and arrays alike."""
    return -(-lengths // page_size)


def _grow(state, rows, counts, allowed, page_size):
    """Adds `counts` tokens to `rows`, and the pages that they need, if `allowed` and possible."""
    num_rows, pages_per_row = state.block_tables.shape
    is_row = rows != NO_ROW
    counts = jnp.where(is_row, counts, 0)
    old_lengths = _read(state.lengths, rows, fill=0)
    new_lengths = old_lengths + counts
    column = jnp.arange(pages_per_row)
    needs_page = (num_pages_of(old_lengths, page_size)[:, None] <= column) & (
        column < num_pages_of(new_lengths, page_size)[:, None]
    )
    fits = (counts >= 0).all() & (new_lengths <= pages_per_row * page_size).all()
    enough = needs_page.sum() <= state.free_top
    ok = allowed & fits & enough & _are_distinct(rows, num_rows)

    needs_page, rows = needs_page & ok, jnp.where(ok, rows, NO_ROW)
    state, new_pages = _pop(state, needs_page)
    tables = jnp.where(needs_page, new_pages, _read(state.block_tables, rows, fill=NULL_PAGE))
    state = state._replace(
        block_tables=state.block_tables.at[rows].set(tables, mode="drop"),
        lengths=state.lengths.at[rows].set(new_lengths, mode="drop"),
    )
    return state, ok


def _pop(state, needs_page):
    """Takes one free page for each True of `needs_page`; the caller knows that there are enough."""
    rank = jnp.cumsum(needs_page).reshape(needs_page.shape)
    pages = jnp.where(needs_page, _read(state.free_stack, state.free_top - rank, fill=NULL_PAGE), NULL_PAGE)
    owners = needs_page.astype(jnp.int32)
    state = state._replace(
        ref_count=state.ref_count.at[pages].add(owners), free_top=state.free_top - owners.sum()
    )
    return state, pages


def _with_ref_count(state, ref_count):
    """Sets the reference counts and pushes the pages whose last owner has left, in the order of their ids."""
    num_pages = ref_count.size
    falls_free = (state.ref_count > 0) & (ref_count == 0)
    position = jnp.where(falls_free, state.free_top + jnp.cumsum(falls_free) - 1, num_pages)
    return state._replace(
        ref_count=ref_count,
        free_stack=state.free_stack.at[position].set(jnp.arange(num_pages, dtype=jnp.int32), mode="drop"),
        free_top=state.free_top + falls_free.sum(dtype=jnp.int32),
    )


def _is_last_owner(state, shared_page):
    """Whether row r may keep `shared_page[r]`: all its owners write it now, and r is the first of them."""
    num_rows, num_pages = shared_page.size, state.ref_count.size
    row = jnp.arange(num_rows)
    writers = _appearances(state, shared_page)
    first_writer = jnp.full(num_pages, num_rows).at[shared_page].min(row)
    all_write = writers[shared_page] == state.ref_count[shared_page]
    return (shared_page != NULL_PAGE) & all_write & (first_writer[shared_page] == row)


def _gather_rows(state, rows, page_size):
    """Block tables and lengths of `rows`; empty for NO_ROW."""
    lengths = _read(state.lengths, rows, fill=0)
    tables = _read(state.block_tables, rows, fill=NULL_PAGE)
    return _mask_beyond_length(tables, lengths, page_size), lengths


def _mask_beyond_length(pages, length, page_size):
    column = jnp.arange(pages.shape[-1])
    return jnp.where(column < num_pages_of(length, page_size)[..., None], pages, NULL_PAGE)


def _appearances(state, pages):
    """i32[P]: how often each page stands in `pages`, NULL_PAGE not counted."""
    counts = jnp.zeros_like(state.ref_count).at[pages].add(1)
    return counts.at[NULL_PAGE].set(0)


def _are_distinct(rows, num_rows):
    return (jnp.zeros(num_rows, jnp.int32).at[rows].add(1, mode="drop") <= 1).all()


def _read(array, *index, fill):
    return array.at[index].get(mode="fill", fill_value=fill)
