"""What the page allocator must do, in plain Python: a list of tokens for each row, and cells for them."""

from collections import Counter

import numpy as np

from serving.pages import NULL_PAGE, PageState


def check_invariants(state: PageState, page_size: int) -> None:
    """Everything that holds between any two calls of the allocator."""
    block_tables, lengths = np.asarray(state.block_tables), np.asarray(state.lengths)
    ref_count, pin_count = np.asarray(state.ref_count), np.asarray(state.pin_count)
    num_pages = ref_count.size
    widths = -(-lengths // page_size)
    column = np.arange(block_tables.shape[1])
    assert (lengths >= 0).all()
    assert (lengths <= block_tables.shape[1] * page_size).all()
    is_used = column < widths[:, None]
    assert (block_tables[~is_used] == NULL_PAGE).all(), "a page beyond a row's length"
    assert (block_tables[is_used] != NULL_PAGE).all(), "a hole inside a row"
    for table, width in zip(block_tables, widths, strict=True):
        assert len(set(table[:width])) == width, "a page twice in a row"

    owners = np.bincount(block_tables[is_used], minlength=num_pages) + pin_count
    assert (pin_count >= 0).all()
    np.testing.assert_array_equal(ref_count[1:], owners[1:], err_msg="ref_count is not tables + pins")
    free_pages = np.asarray(state.free_stack)[: int(state.free_top)]
    owned_pages = np.flatnonzero(owners[1:]) + 1
    assert sorted([*free_pages, *owned_pages]) == list(range(1, num_pages)), (
        "free and owned pages must partition 1..P-1"
    )


class Oracle:
    """Rows of tokens, cached prefixes, and a pool of token cells that only a page's one owner may write."""

    def __init__(self, num_rows: int, num_pages: int, pages_per_row: int, page_size: int):
        self.rows: list[list[int]] = [[] for _ in range(num_rows)]
        self.cached: list[tuple[list[int], list[int]]] = []  # (pages, the tokens that stand in them)
        self.pool = np.full((num_pages, page_size), -1)
        self.page_size = page_size
        self.capacity = pages_per_row * page_size
        self.num_tokens = 0

    def new_tokens(self, count: int) -> list[int]:
        """Tokens that no other row or moment has, so that a page in the wrong place shows."""
        self.num_tokens += count
        return list(range(self.num_tokens - count, self.num_tokens))

    def num_pages(self, length: int) -> int:
        return -(-length // self.page_size)

    def can_allocate(self, state: PageState, rows: list[int], lengths: list[int]) -> bool:
        return all(not self.rows[row] for row in rows) and self.can_extend(state, rows, lengths)

    def can_extend(self, state: PageState, rows: list[int], counts: list[int]) -> bool:
        need = 0
        for row, count in zip(rows, counts, strict=True):
            length = len(self.rows[row])
            if length + count > self.capacity or (count and self._ends_in_shared_page(state, row)):
                return False
            need += self.num_pages(length + count) - self.num_pages(length)
        return len(set(rows)) == len(rows) and need <= int(state.free_top)

    def can_append(self, state: PageState, active: list[int]) -> bool:
        if any(len(self.rows[row]) == self.capacity for row in active):
            return False
        need = sum(len(self.rows[row]) % self.page_size == 0 for row in active)
        writers = Counter(
            self._last_page(state, row) for row in active if self._ends_in_shared_page(state, row)
        )
        for page, count in writers.items():
            all_write = count == int(state.ref_count[page])
            need += count - all_write
        return need <= int(state.free_top)

    def extend(self, state: PageState, row: int, count: int) -> None:
        """Writes new tokens where the state says that the row's last `count` tokens are."""
        start = len(self.rows[row])
        self.rows[row] += self.new_tokens(count)
        for position in range(start, start + count):
            page = int(state.block_tables[row, position // self.page_size])
            self._write(state, page, position % self.page_size, self.rows[row][position])

    def append(self, state: PageState, active: list[int], write_page, offset, copy_src) -> None:
        """All copies, then all writes, as the step does."""
        is_copy = copy_src != NULL_PAGE
        assert len(set(write_page[active])) == len(active), "two rows write one page"
        self.pool[write_page[is_copy]] = self.pool[copy_src[is_copy]]
        for row in active:
            self.rows[row] += self.new_tokens(1)
            self._write(state, int(write_page[row]), int(offset[row]), self.rows[row][-1])

    def check_contents(self, state: PageState) -> None:
        """Every row and every cached prefix reads back its own tokens."""
        block_tables, lengths = np.asarray(state.block_tables), np.asarray(state.lengths)
        for row, tokens in enumerate(self.rows):
            assert lengths[row] == len(tokens)
            assert self._read(block_tables[row], len(tokens)) == tokens
        for pages, tokens in self.cached:
            assert self._read(np.array(pages, int), len(tokens)) == tokens

    def _read(self, pages: np.ndarray, length: int) -> list[int]:
        return self.pool[pages[: self.num_pages(length)]].ravel()[:length].tolist()

    def _write(self, state: PageState, page: int, offset: int, token: int) -> None:
        assert page != NULL_PAGE
        assert int(state.ref_count[page]) == 1, "only pages with one owner are ever written"
        self.pool[page, offset] = token

    def _last_page(self, state: PageState, row: int) -> int:
        return int(state.block_tables[row, len(self.rows[row]) // self.page_size])

    def _ends_in_shared_page(self, state: PageState, row: int) -> bool:
        return (
            len(self.rows[row]) % self.page_size > 0 and int(state.ref_count[self._last_page(state, row)]) > 1
        )
