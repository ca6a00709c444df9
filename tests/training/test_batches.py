import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data import BatchLoader, DataError, evaluation_batches, prepare
from training.data.batches import NO_TARGET, NUM_ROUNDS, Batch, Rows, cut_rows, document_pieces, permute
from training.data.tokens import TokenFiles


def files_of(stream, eos=0) -> TokenFiles:
    stream = np.asarray(stream, np.uint16)
    return TokenFiles("test", {"train": stream, "validation": stream}, {"eos_token_id": eos})


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1))
def test_permute_is_a_permutation(size, seed):
    key = np.random.default_rng(seed).integers(0, 2**32, NUM_ROUNDS, dtype=np.uint32)
    result = permute(np.arange(size), size, key)
    assert sorted(result.tolist()) == list(range(size))


def test_permute_of_one_index_does_not_depend_on_the_others():
    key = np.arange(NUM_ROUNDS, dtype=np.uint32)
    whole = permute(np.arange(1000), 1000, key)
    assert [int(permute(np.array([i]), 1000, key)[0]) for i in range(50)] == whole[:50].tolist()


def test_permute_mixes():
    """Of a random permutation of n places about one stays; neighbours land far apart."""
    size = 10_000
    result = permute(np.arange(size), size, np.arange(7, 7 + NUM_ROUNDS, dtype=np.uint32))
    assert np.sum(result == np.arange(size)) < 10
    assert abs(np.mean(np.abs(np.diff(result))) - size / 3) < size / 30
    assert abs(np.corrcoef(result, np.arange(size))[0, 1]) < 0.05


def test_an_epoch_reads_every_window_once():
    length, batch_size = 8, 4
    loader = BatchLoader(
        files_of(np.arange(1, 1 + 8 * 41)),
        batch_size=batch_size,
        sequence_length=length,
        seed=3,
        documents="stream",
    )
    assert loader.num_windows == 40
    firsts = [int(row[0]) for step in range(20) for row in loader.batch(step).tokens]
    epochs = [firsts[:40], firsts[40:]]
    for epoch in epochs:
        starts = np.sort(epoch)
        assert np.array_equal(np.diff(starts), np.full(39, length))  # side by side, none twice
        assert starts[0] - 1 < length
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0][0] % length != epochs[1][0] % length  # this seed cuts the two epochs elsewhere


def test_a_batch_is_a_function_of_seed_and_step():
    make = lambda seed: BatchLoader(
        files_of(np.arange(5000) % 250), batch_size=4, sequence_length=16, seed=seed, documents="packed"
    )
    in_order = [make(1).batch(step) for step in range(10)]
    again = make(1)
    for step in (7, 2, 9):
        for a, b in zip(again.batch(step), in_order[step], strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.array_equal(make(2).batch(3).tokens, in_order[3].tokens)


def test_targets_are_the_next_tokens():
    loader = BatchLoader(
        files_of(np.arange(1000)), batch_size=4, sequence_length=16, seed=0, documents="stream"
    )
    for step in range(30):
        batch = loader.batch(step)
        np.testing.assert_array_equal(batch.targets, batch.tokens + 1)
        assert batch.segment_ids is None
        np.testing.assert_array_equal(batch.positions, np.tile(np.arange(16), (4, 1)))
        assert {array.dtype for array in batch[:3]} == {np.dtype(np.int32)}


def documents_in(row: np.ndarray, eos: int) -> tuple[list[int], list[int]]:
    """Positions and segment ids, one token after the other."""
    positions, segments, position, segment = [], [], -1, 1
    for index, token in enumerate(row):
        position += 1
        if token == eos and index > 0:
            position, segment = 0, segment + 1
        positions.append(position)
        segments.append(segment)
    return positions, segments


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=38, max_size=120))
def test_segments_and_positions_follow_the_documents(stream):
    starts = np.array([0, 5, 17])
    rows = Rows(starts, np.full(3, len(stream) - 1))
    batch = cut_rows(np.array(stream, np.uint16), rows, 20, 0, "packed")
    for row, start in enumerate(starts):
        tokens = stream[start : start + 20]
        positions, segments = documents_in(batch.tokens[row], 0)
        assert batch.tokens[row].tolist() == tokens
        assert batch.positions[row].tolist() == positions
        assert batch.segment_ids[row].tolist() == segments


DOCUMENTS = [[1, 2, 3], [4], [], [5, 6, 7, 8, 9, 10, 11], [12, 13]]
STREAM = [0, *(token for document in DOCUMENTS for token in (*document, 0))]


def test_separate_rows_hold_one_document_each():
    rows = document_pieces(np.array(STREAM), 4, 0)
    batch = cut_rows(np.array(STREAM, np.uint16), rows, 4, 0, "separate")
    pairs = [
        list(zip(*pair, strict=True))
        for pair in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True)
    ]
    assert pairs == [
        [(0, 1), (1, 2), (2, 3), (3, 0)],
        [(0, 4), (4, 0), (0, NO_TARGET), (0, NO_TARGET)],
        [(0, 0), (0, NO_TARGET), (0, NO_TARGET), (0, NO_TARGET)],
        [(0, 5), (5, 6), (6, 7), (7, 8)],
        [(8, 9), (9, 10), (10, 11), (11, 0)],
        [(0, 12), (12, 13), (13, 0), (0, NO_TARGET)],
    ]
    assert batch.segment_ids is None
    assert batch.positions.tolist() == [[0, 1, 2, 3]] * 6


def test_an_epoch_of_separate_documents_reads_each_piece_once():
    loader = BatchLoader(files_of(STREAM), batch_size=2, sequence_length=4, seed=1, documents="separate")
    seen = [tuple(row) for step in range(6) for row in loader.batch(step).targets.tolist()]
    assert len(set(seen)) == 6
    assert sorted(seen[:6]) == sorted(seen[6:]) == sorted(set(seen))


@pytest.mark.parametrize("documents", ["packed", "separate", "stream"])
@pytest.mark.parametrize("length", [7, 10, 33])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_evaluation_predicts_each_token_once(documents, length, batch_size):
    stream = np.array([0, *range(1, 40), 0, *range(40, 60), 0, *range(60, 101), 0])
    batches = list(
        evaluation_batches(
            files_of(stream),
            batch_size=batch_size,
            sequence_length=length,
            documents=documents,
            num_batches=0,
        )
    )
    assert {batch.tokens.shape for batch in batches} == {(batch_size, length)}
    targets = np.concatenate([batch.targets.ravel() for batch in batches])
    assert targets[targets != NO_TARGET].tolist() == stream[1:].tolist()


def test_evaluation_stops_after_num_batches():
    how = {"batch_size": 2, "sequence_length": 10, "documents": "stream"}
    some = list(evaluation_batches(files_of(np.arange(100)), num_batches=3, **how))
    every = list(evaluation_batches(files_of(np.arange(100)), num_batches=0, **how))
    assert len(some) == 3
    for a, b in zip(some, every, strict=False):
        np.testing.assert_array_equal(a.tokens, b.tokens)


def test_too_few_tokens_for_a_batch_are_refused(text_folder, tmp_path):
    tokens = prepare(text_folder, tmp_path / "tokens", progress=False)
    num_tokens = len(tokens.splits["train"])
    with pytest.raises(DataError, match=rf"{num_tokens:,} training tokens are too few .* 64 x 1024 = 65,536"):
        BatchLoader(tokens, batch_size=64, sequence_length=1024, seed=0, documents="packed")


def test_the_smallest_stream_makes_a_batch():
    loader = BatchLoader(files_of(np.arange(9)), batch_size=1, sequence_length=8, seed=0, documents="stream")
    batch = loader.batch(5)
    assert isinstance(batch, Batch)
    assert batch.tokens.tolist() == [list(range(8))]
    assert batch.targets.tolist() == [list(range(1, 9))]
