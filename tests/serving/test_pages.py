"""The page allocator against a plain Python oracle of token lists."""

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from serving import pages
from serving.pages import NO_ROW, NULL_PAGE, init_page_state
from tests.serving.oracle import Oracle, check_invariants

# (rows, pages, pages a row, page size): always short; with room; one page a token; one page a row
SHAPES = [(6, 9, 4, 4), (5, 40, 6, 3), (4, 11, 5, 1), (8, 12, 1, 8)]
NUM_LISTED = 3  # the static length of lists of rows; shorter lists are padded


def padded(values, fill, size=NUM_LISTED):
    return np.array([*values, *[fill] * (size - len(values))], np.int32)


class PageMachine(RuleBasedStateMachine):
    """One rule for each function of the allocator; draws are taken modulo what exists, and so shrink."""

    index = st.integers(0, 23)
    rows_drawn = st.lists(index, min_size=1, max_size=NUM_LISTED)
    lengths_drawn = st.lists(st.integers(0, 3) | st.integers(0, 13), min_size=NUM_LISTED, max_size=NUM_LISTED)
    mask_drawn = st.lists(st.booleans(), min_size=8, max_size=8)

    @initialize(shape=st.sampled_from(SHAPES))
    def start(self, shape):
        self.num_rows, self.num_pages, self.pages_per_row, self.page_size = shape
        self.oracle = Oracle(*shape)
        self.accept(init_page_state(*shape[:3]))

    def call(self, function, *args):
        return function(self.state, *args, page_size=self.page_size)

    def accept(self, state):
        """Takes the new state over, to the host: a few transfers here instead of one for each look at it."""
        self.state = jax.device_get(state)
        for field, init_field in zip(state, init_page_state(*self.shape), strict=True):
            assert (field.shape, field.dtype) == (init_field.shape, init_field.dtype)
        check_invariants(self.state, self.page_size)

    @property
    def shape(self):
        return self.num_rows, self.num_pages, self.pages_per_row

    def expect(self, ok, expected, new_state):
        assert bool(ok) == expected
        if not expected:
            jax.tree.map(np.testing.assert_array_equal, self.state, jax.device_get(new_state))

    def rows_of(self, drawn, prefers_empty=False):
        """Rows for the numbers drawn: mostly empty ones where an operation wants those."""
        rows = list(range(self.num_rows))
        empty = [row for row in rows if not self.oracle.rows[row]] if prefers_empty else []
        candidates = [*empty, *empty, *rows]
        return [candidates[value % len(candidates)] for value in drawn]

    def grow(self, function, is_allowed, rows, drawn_counts):
        counts = drawn_counts[: len(rows)]
        expected = is_allowed(self.state, rows, counts)
        state, ok = self.call(function, padded(rows, NO_ROW), padded(counts, 0))
        self.expect(ok, expected, state)
        self.accept(state)
        if expected:
            for row, count in zip(rows, counts, strict=True):
                self.oracle.extend(self.state, row, count)
        self.oracle.check_contents(self.state)

    @rule(rows=rows_drawn, lengths=lengths_drawn)
    def allocate(self, rows, lengths):
        self.grow(pages.allocate, self.oracle.can_allocate, self.rows_of(rows, prefers_empty=True), lengths)

    @rule(rows=rows_drawn, counts=lengths_drawn)
    def extend(self, rows, counts):
        self.grow(pages.extend, self.oracle.can_extend, self.rows_of(rows), counts)

    @rule(mask=mask_drawn)
    def append_to_some(self, mask):
        self.append(np.array(mask[: self.num_rows]))

    @rule()
    def append_to_all(self):
        self.append(np.array([0 < len(tokens) < self.oracle.capacity for tokens in self.oracle.rows]))

    def append(self, mask):
        active = np.flatnonzero(mask).tolist()
        expected = self.oracle.can_append(self.state, active)
        state, write_page, offset, copy_src, ok = self.call(pages.append, mask)
        self.expect(ok, expected, state)
        self.accept(state)
        write_page, offset, copy_src = map(np.asarray, (write_page, offset, copy_src))
        writes = mask & expected
        assert ((write_page != NULL_PAGE) == writes).all()
        assert (copy_src[~writes] == NULL_PAGE).all()
        if expected:
            self.oracle.append(self.state, active, write_page, offset, copy_src)
        self.oracle.check_contents(self.state)

    @rule(src=rows_drawn, dst=rows_drawn)
    def fork(self, src, dst):
        src, dst = self.rows_of(src), self.rows_of(dst, prefers_empty=True)
        src, dst = zip(*zip(src, dst, strict=False), strict=True)
        expected = len(set(dst)) == len(dst) and not any(self.oracle.rows[row] for row in dst)
        before = self.state
        state, ok = self.call(pages.fork, padded(src, NO_ROW), padded(dst, NO_ROW))
        self.expect(ok, expected, state)
        self.accept(state)
        if expected:
            tokens = [list(self.oracle.rows[row]) for row in src]
            for row, row_tokens in zip(dst, tokens, strict=True):
                self.oracle.rows[row] = row_tokens
            np.testing.assert_array_equal(self.state.block_tables[list(dst)], before.block_tables[list(src)])
            assert self.state.free_top == before.free_top
        self.oracle.check_contents(self.state)

    @rule(rows=rows_drawn, parents=st.lists(st.integers(-2, 7), min_size=NUM_LISTED, max_size=NUM_LISTED))
    def reorder(self, rows, parents):
        changes = dict(zip(self.rows_of(rows), parents, strict=False))
        parents = [changes.get(row, row) for row in range(self.num_rows)]
        parents = [NO_ROW if parent < 0 else parent % self.num_rows for parent in parents]
        self.accept(self.call(pages.reorder, np.array(parents, np.int32)))
        self.oracle.rows = [[] if parent == NO_ROW else list(self.oracle.rows[parent]) for parent in parents]
        self.oracle.check_contents(self.state)

    @rule(rows=rows_drawn)
    def free(self, rows):
        mask = np.isin(np.arange(self.num_rows), self.rows_of(rows))
        self.accept(self.call(pages.free, mask))
        self.oracle.rows = [[] if freed else row for freed, row in zip(mask, self.oracle.rows, strict=True)]
        self.oracle.check_contents(self.state)

    @rule(row=index, num_pages=st.integers(1, 6))
    def pin(self, row, num_pages):
        (row,) = self.rows_of([row])
        held = self.state.block_tables[row, :num_pages]
        self.accept(self.call(pages.pin, padded(held, NULL_PAGE, self.pages_per_row)))
        tokens = self.oracle.rows[row][: num_pages * self.page_size]
        if tokens:
            self.oracle.cached.append((held[held != NULL_PAGE].tolist(), tokens))
        self.oracle.check_contents(self.state)

    @precondition(lambda self: self.oracle.cached)
    @rule(entry=index)
    def unpin(self, entry):
        held, _ = self.oracle.cached.pop(entry % len(self.oracle.cached))
        self.accept(self.call(pages.unpin, padded(held, NULL_PAGE, self.pages_per_row)))
        self.oracle.check_contents(self.state)

    @precondition(lambda self: self.oracle.cached)
    @rule(row=index, entry=index, shorter=st.integers(0, 9))
    def attach(self, row, entry, shorter):
        (row,) = self.rows_of([row], prefers_empty=True)
        held, tokens = self.oracle.cached[entry % len(self.oracle.cached)]
        if self.oracle.rows[row]:
            return
        tokens = tokens[: len(tokens) - shorter % len(tokens)]
        pages_held = padded(held, NULL_PAGE, self.pages_per_row)
        self.accept(self.call(pages.attach, np.int32(row), pages_held, np.int32(len(tokens))))
        self.oracle.rows[row] = list(tokens)
        self.oracle.check_contents(self.state)

    @rule(drawn=st.lists(st.integers(0, 40), min_size=1, max_size=NUM_LISTED))
    def pin_and_unpin_what_cannot_be(self, drawn):
        """Free pages are not pinned, and pages without pins not unpinned."""
        free = [p % self.num_pages for p in drawn if self.state.ref_count[p % self.num_pages] == 0]
        unpinned = [p % self.num_pages for p in drawn if self.state.pin_count[p % self.num_pages] == 0]
        for function, listed in ((pages.pin, free), (pages.unpin, unpinned)):
            before = self.state
            self.accept(self.call(function, padded(listed, NULL_PAGE)))
            jax.tree.map(np.testing.assert_array_equal, before, self.state)


def run_machine(num_sequences, num_operations):
    run_state_machine_as_test(
        PageMachine,
        settings=settings(
            max_examples=num_sequences,
            stateful_step_count=num_operations,
            deadline=None,
            database=None,
            derandomize=True,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_any_sequence_of_operations_agrees_with_the_oracle():
    run_machine(num_sequences=200, num_operations=50)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_long_sequence_of_operations_agrees_with_the_oracle():
    run_machine(num_sequences=1000, num_operations=100)


PAGE_SIZE = 4


def new_state(num_rows=4, num_pages=10, pages_per_row=3):
    return init_page_state(num_rows, num_pages, pages_per_row)


def call(function, state, *args):
    """Calls with integer lists as arrays, and checks the invariants of what comes back."""
    args = [np.array(arg) if not isinstance(arg, np.ndarray) else arg for arg in args]
    result = function(state, *args, page_size=PAGE_SIZE)
    check_invariants(result if isinstance(result, pages.PageState) else result[0], PAGE_SIZE)
    return result


def test_allocate_gives_each_row_just_the_pages_it_needs():
    state, ok = call(pages.allocate, new_state(), [2, 0, NO_ROW], [5, 4, 99])
    assert ok
    np.testing.assert_array_equal(state.block_tables, [[3, 0, 0], [0, 0, 0], [1, 2, 0], [0, 0, 0]])
    np.testing.assert_array_equal(state.lengths, [4, 0, 5, 0])
    assert state.free_top == 6


def test_rows_that_share_a_page_copy_it_and_the_last_one_keeps_it():
    state, _ = call(pages.allocate, new_state(), [0], [6])
    state, ok = call(pages.fork, state, [0, 0], [1, 2])
    assert ok
    assert state.free_top == 7
    state, write_page, offset, copy_src, ok = call(pages.append, state, [True, False, False, False])
    assert ok
    assert (write_page[0], offset[0], copy_src[0]) == (3, 2, 2)
    state, write_page, _, copy_src, ok = call(pages.append, state, [False, True, True, False])
    assert ok
    np.testing.assert_array_equal(write_page, [NULL_PAGE, 2, 4, NULL_PAGE])
    np.testing.assert_array_equal(copy_src, [NULL_PAGE, NULL_PAGE, 2, NULL_PAGE])


def test_free_frees_shared_pages_once():
    state, _ = call(pages.allocate, new_state(), [0], [12])
    state, _ = call(pages.fork, state, [0, 0], [1, 3])
    state = call(pages.free, state, [True, True, False, False])
    assert state.free_top == 6
    state = call(pages.free, state, [True, True, True, True])
    assert state.free_top == 9
    state = call(pages.free, state, [True, True, True, True])
    assert state.free_top == 9


def test_a_cached_prefix_outlives_its_row_and_starts_another():
    state, _ = call(pages.allocate, new_state(), [0], [8])
    state = call(pages.pin, state, [1, 2, NULL_PAGE])
    state = call(pages.free, state, [True, False, False, False])
    assert state.free_top == 7
    state = call(pages.attach, state, 3, [1, 2, NULL_PAGE], 8)
    state, ok = call(pages.extend, state, [3], [2])
    assert ok
    np.testing.assert_array_equal(state.block_tables[3], [1, 2, 3])
    state = call(pages.free, call(pages.unpin, state, [1, 2, NULL_PAGE]), [False, False, False, True])
    assert state.free_top == 9


def test_an_operation_that_does_not_fit_changes_nothing():
    state, ok = call(pages.allocate, new_state(), [0, 1], [12, 12])
    assert ok
    full, ok = call(pages.allocate, state, [2, 3], [8, 8])
    assert not ok
    jax.tree.map(np.testing.assert_array_equal, full, state)
    appended, write_page, _, _, ok = call(pages.append, state, [True, False, False, False])
    assert not ok
    assert (np.asarray(write_page) == NULL_PAGE).all()
    jax.tree.map(np.testing.assert_array_equal, appended, state)


def test_a_row_that_ends_in_a_shared_page_cannot_be_extended_but_may_be_named():
    state, _ = call(pages.allocate, new_state(), [0], [6])
    state, _ = call(pages.fork, state, [0], [1])
    refused, ok = call(pages.extend, state, [1, 2], [1, 4])
    assert not ok
    jax.tree.map(np.testing.assert_array_equal, refused, state)
    extended, ok = call(pages.extend, state, [1, 2], [0, 4])
    assert ok
    np.testing.assert_array_equal(extended.lengths, [6, 6, 4, 0])


def test_rows_never_shrink():
    state, _ = call(pages.allocate, new_state(), [0, 1], [6, 6])
    shrunk, ok = call(pages.extend, state, [0, 1], [-1, 4])
    assert not ok
    jax.tree.map(np.testing.assert_array_equal, shrunk, state)


def test_appending_runs_inside_a_scan():
    state, _ = call(pages.allocate, new_state(), [1, 2], [3, 1])
    active = np.array([False, True, True, False])

    @jax.jit
    def run(state):
        return jax.lax.scan(lambda s, _: (pages.append(s, active, page_size=4)[0], None), state, length=7)[0]

    state = run(state)
    check_invariants(state, PAGE_SIZE)
    np.testing.assert_array_equal(state.lengths, [0, 10, 8, 0])


@pytest.mark.parametrize(
    ("sizes", "name"), [((0, 4, 4), "num_rows"), ((1, 1, 4), "num_pages"), ((1, 4, 0), "pages_per_row")]
)
def test_sizes_that_hold_nothing_are_refused(sizes, name):
    with pytest.raises(ValueError, match=name):
        init_page_state(*sizes)
