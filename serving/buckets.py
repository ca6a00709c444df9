"""The few static shapes that a step is compiled for.

XLA compiles one program a shape. Prompts are therefore padded to a length of a geometric series, and rows
to a few counts: a coarse series wastes work on padding, a fine one compiles more programs.
"""

from bisect import bisect_left
from typing import NamedTuple

SHORTEST_PROMPT_BUCKET = 32  # tokens; below this a prefill reads little more than the weights anyway


class Buckets(NamedTuple):
    """Static shapes; each tuple is ascending."""

    decode_rows: tuple[int, ...]  # rows of a decode step
    prompt_lengths: tuple[int, ...]  # T of a prefill
    prefill_rows: tuple[int, ...]  # rows of a prefill
    max_batch_tokens: int  # a prefill of more than one row has rows * T of at most this

    def rows_of_prefill(self, prompt_length: int) -> tuple[int, ...]:
        """The row counts that a prefill of this bucketed length may have; one row always may."""
        return tuple(
            rows for rows in self.prefill_rows if rows == 1 or rows * prompt_length <= self.max_batch_tokens
        )

    def prefill_shapes(self) -> list[tuple[int, int]]:
        """Every (rows, length) that a prefill may have."""
        return [(rows, length) for length in self.prompt_lengths for rows in self.rows_of_prefill(length)]


def make_buckets(max_rows: int, max_prompt_length: int, max_batch_tokens: int) -> Buckets:
    return Buckets(
        decode_rows=geometric(1, max_rows, factor=4),
        prompt_lengths=geometric(min(SHORTEST_PROMPT_BUCKET, max_prompt_length), max_prompt_length, factor=2),
        prefill_rows=geometric(1, max_rows, factor=4),
        max_batch_tokens=max_batch_tokens,
    )


def geometric(least: int, most: int, factor: int) -> tuple[int, ...]:
    """least, least * factor, ... up to `most`, which is always the last."""
    values = [least]
    while values[-1] < most:
        values.append(min(values[-1] * factor, most))
    return tuple(values)


def bucket_of(value: int, buckets: tuple[int, ...]) -> int:
    """The least bucket that holds `value`."""
    return buckets[bisect_left(buckets, value)]


def split_rows(num_rows: int, buckets: tuple[int, ...]) -> list[int]:
    """Counts of rows, each to be padded to its bucket, that sum to `num_rows`; less than half is padding."""
    counts = []
    while num_rows > 0:
        fitting = [bucket for bucket in buckets if bucket < 2 * num_rows]
        counts.append(min(num_rows, fitting[-1]))
        num_rows -= counts[-1]
    return counts
