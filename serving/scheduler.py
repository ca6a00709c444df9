"""Which requests run: first come, first served, as many as rows and pages allow.

Host policy only: the device knows the pages themselves. The count of free pages kept here is conservative: a
sequence reserves at its start every page it can ever own, so that an admitted sequence always runs to its end
and a full pool makes the queue wait instead of failing a step.
"""

import heapq
from collections import deque
from collections.abc import Iterable

from serving.buckets import Buckets, bucket_of, split_rows
from serving.pages import num_pages_of
from serving.request import Sequence


class Scheduler:
    """A queue, the rows of the batch state and a count of pages that no admitted sequence may need."""

    def __init__(self, *, num_rows: int, num_pages: int, page_size: int, buckets: Buckets):
        self.page_size = page_size
        self.buckets = buckets
        self.num_pages = num_pages - 1  # NULL_PAGE is never allocated
        self.free_pages = self.num_pages
        self.waiting: deque[Sequence] = deque()
        self.running: dict[int, Sequence] = {}  # by row
        self._free_rows = list(
            range(num_rows)
        )  # a heap: low rows first, so that small batches stay in small buckets

    def check_fits(self, num_prompt_tokens: int, max_tokens: int) -> None:
        """ValueError, with the numbers, for a sequence that could not run in an empty pool."""
        need = self._reservation(num_prompt_tokens, max_tokens)
        if need > self.num_pages:
            raise ValueError(
                f"{num_prompt_tokens} prompt tokens and up to {max_tokens} new ones need {need} pages of "
                f"{self.page_size} tokens; the pool has {self.num_pages}"
            )

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence that fits."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Moves the head of the queue into rows until rows, pages or the step's prompt tokens run out."""
        admitted = []
        tokens = 0
        while self.waiting and self._free_rows:
            sequence = self.waiting[0]
            need = self.reservation(sequence)
            tokens += self.prompt_bucket(sequence)
            if need > self.free_pages or (admitted and tokens > self.buckets.max_batch_tokens):
                break
            self.waiting.popleft()
            self.free_pages -= need
            sequence.row = heapq.heappop(self._free_rows)
            self.running[sequence.row] = sequence
            admitted.append(sequence)
        return admitted

    def release(self, sequence: Sequence) -> None:
        """Takes back the row and the reserved pages of a running sequence."""
        row = sequence.row
        assert row is not None
        del self.running[row]
        heapq.heappush(self._free_rows, row)
        self.free_pages += self.reservation(sequence)

    def discard(self, sequence: Sequence) -> None:
        """Takes a sequence that has not been admitted out of the queue."""
        self.waiting.remove(sequence)

    def reservation(self, sequence: Sequence) -> int:
        """Pages that a sequence may come to own."""
        return self._reservation(len(sequence.request.prompt_token_ids), sequence.max_tokens)

    def _reservation(self, num_prompt_tokens: int, max_tokens: int) -> int:
        """The last token is sampled but never written."""
        return num_pages_of(num_prompt_tokens + max_tokens - 1, self.page_size)

    def prompt_bucket(self, sequence: Sequence) -> int:
        return bucket_of(len(sequence.request.prompt_token_ids), self.buckets.prompt_lengths)

    def decode_rows(self) -> int:
        """The bucket that holds every running row."""
        return bucket_of(max(self.running) + 1, self.buckets.decode_rows)

    def plan_prefills(self, admitted: Iterable[Sequence]) -> list[tuple[int, int, list[Sequence]]]:
        """Groups sequences whose prompts share a length bucket: (rows, length, sequences) of each prefill."""
        by_length: dict[int, list[Sequence]] = {}
        for sequence in admitted:
            by_length.setdefault(self.prompt_bucket(sequence), []).append(sequence)
        plan = []
        for length, sequences in by_length.items():
            row_buckets = self.buckets.rows_of_prefill(length)
            for count in split_rows(len(sequences), row_buckets):
                plan.append((bucket_of(count, row_buckets), length, sequences[:count]))
                sequences = sequences[count:]
        return plan
