"""Token files -> batches, as a pure function of (seed, step): a resumed run needs only the step."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from training.data.tokens import DataError, TokenFiles

NO_TARGET = -1  # a position that the loss does not count


class Batch(NamedTuple):
    """What one step reads; rows are windows of the token stream."""

    tokens: Int[Any, "B T"]  # i32, as all: NumPy on the host, JAX inside a step
    targets: Int[Any, "B T"]  # the next token, or NO_TARGET
    positions: Int[Any, "B T"]  # restart at each document where documents are packed
    segment_ids: Int[Any, "B T"] | None  # from 1, one a document; None: the row is one text


class Rows(NamedTuple):
    """Which part of the stream each row of a batch reads."""

    starts: Int[np.ndarray, "B"]
    ends: Int[np.ndarray, "B"]  # the last place that may be a target


class BatchLoader:
    """Shuffled windows of the training split.

    An epoch visits each of its n windows once: sample g = step * B + row lies in epoch g // n at place g % n
    of a keyed permutation of 0..n-1. Where windows may begin anywhere, those of an epoch start at an offset
    of its own in [0, T), so that texts are cut elsewhere each time.
    """

    def __init__(
        self, files: TokenFiles, *, batch_size: int, sequence_length: int, seed: int, documents: str
    ):
        self.stream, self.eos_token_id = files.splits["train"], files.eos_token_id
        self.batch_size, self.sequence_length = batch_size, sequence_length
        self.seed, self.documents = seed, documents
        spare = len(self.stream) - 1
        needed = batch_size * sequence_length
        if spare < needed:
            raise DataError(
                f"{files.folder}: {len(self.stream):,} training tokens are too few for one batch of "
                f"{batch_size} x {sequence_length} = {needed:,}; lower run.batch_size or data.sequence_length"
            )
        self.pieces: Rows | None = None
        if documents == "separate":
            self.pieces = document_pieces(self.stream, sequence_length, self.eos_token_id)
            self.num_windows, self.num_offsets = len(self.pieces.starts), 1
        else:
            self.num_windows = max(1, (spare - sequence_length + 1) // sequence_length)
            self.num_offsets = min(sequence_length, spare - self.num_windows * sequence_length + 1)

    def batch(self, step: int) -> Batch:
        """The batch of a step, whatever was read before."""
        samples = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        epochs, places = np.divmod(samples, self.num_windows)
        windows, offsets = np.empty_like(samples), np.empty_like(samples)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            key = np.random.SeedSequence([self.seed, int(epoch)]).generate_state(NUM_ROUNDS + 1, np.uint32)
            windows[of_epoch] = permute(places[of_epoch], self.num_windows, key[:NUM_ROUNDS])
            offsets[of_epoch] = int(key[NUM_ROUNDS]) % self.num_offsets
        if self.pieces is not None:
            rows = Rows(self.pieces.starts[windows], self.pieces.ends[windows])
        else:
            starts = windows * self.sequence_length + offsets
            rows = Rows(starts, np.full_like(starts, len(self.stream) - 1))
        return cut_rows(self.stream, rows, self.sequence_length, self.eos_token_id, self.documents)


def evaluation_batches(
    files: TokenFiles, *, batch_size: int, sequence_length: int, documents: str, num_batches: int
) -> Iterator[Batch]:
    """The first batches of the validation split in order (0: all); what the last one lacks has NO_TARGET."""
    stream = files.splits["validation"]
    if documents == "separate":
        rows = document_pieces(stream, sequence_length, files.eos_token_id)
    else:
        starts = np.arange(0, max(1, len(stream) - 1), sequence_length, dtype=np.int64)
        rows = Rows(starts, np.full_like(starts, len(stream) - 1))
    for index in range(0, len(rows.starts), batch_size):
        if num_batches and index >= num_batches * batch_size:
            return
        starts, ends = (part[index : index + batch_size] for part in rows)
        missing = (0, batch_size - len(starts))
        some = Rows(np.pad(starts, missing), np.pad(ends, missing))  # place 0 is never a target
        yield cut_rows(stream, some, sequence_length, files.eos_token_id, documents)


def document_pieces(stream: np.ndarray, length: int, eos_token_id: int) -> Rows:
    """Every document in pieces of `length` tokens; the last piece of each may be shorter."""
    borders = np.flatnonzero(stream == eos_token_id)
    num_pieces = -(-np.diff(borders) // length)
    firsts = np.cumsum(num_pieces) - num_pieces
    inside = np.arange(num_pieces.sum()) - np.repeat(firsts, num_pieces)
    return Rows(np.repeat(borders[:-1], num_pieces) + inside * length, np.repeat(borders[1:], num_pieces))


def cut_rows(stream: np.ndarray, rows: Rows, length: int, eos_token_id: int, documents: str) -> Batch:
    """Rows of `length` tokens with their next tokens; places from a row's end on are EOS without a target."""
    places = np.arange(length, dtype=np.int32)
    indices = rows.starts[:, None] + np.arange(length + 1)
    is_target = indices[:, 1:] <= rows.ends[:, None]
    window = stream[np.minimum(indices, len(stream) - 1)].astype(np.int32)
    tokens = np.where(is_target, window[:, :-1], np.int32(eos_token_id))
    targets = np.where(is_target, window[:, 1:], np.int32(NO_TARGET))
    if documents != "packed":
        return Batch(tokens, targets, np.tile(places, (len(tokens), 1)), None)
    opens = tokens == eos_token_id
    opens[:, 0] = True
    document_start = np.maximum.accumulate(np.where(opens, places, 0), axis=1)
    return Batch(tokens, targets, places - document_start, np.cumsum(opens, axis=1, dtype=np.int32))


NUM_ROUNDS = 6


def permute(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """A keyed permutation of 0..size-1, applied to each index without storing it.

    A Feistel network permutes the next power of four; places outside the range are sent through again until
    they fall inside (cycle walking), which keeps it a bijection. Black and Rogaway, "Ciphers with arbitrary
    finite domains", 2002.
    """
    half_bits = max(1, -(-int(size - 1).bit_length() // 2))
    mask = np.uint64((1 << half_bits) - 1)
    result = np.asarray(index, np.uint64).copy()
    outside = np.ones(result.shape, bool)
    while outside.any():
        left, right = result[outside] >> np.uint64(half_bits), result[outside] & mask
        for round_key in key:
            left, right = right, left ^ (_mix(right ^ np.uint64(round_key) << np.uint64(32)) & mask)
        result[outside] = left << np.uint64(half_bits) | right
        outside = result >= size
    return result.astype(np.int64)


def _mix(value: np.ndarray) -> np.ndarray:
    """The finalizer of MurmurHash3: every bit of the input moves every bit of the output."""
    value = (value ^ value >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    value = (value ^ value >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return value ^ value >> np.uint64(33)
