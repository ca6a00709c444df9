"""Counters of the engine: what was computed, how fast, and how well the pages were filled."""

import time
from dataclasses import dataclass, field


@dataclass
class EngineMetrics:
    """Sums since the engine was made, or since `reset`; times in seconds."""

    num_pages: int  # pages that can be allocated
    page_size: int
    num_decode_steps: int = 0
    num_prefills: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_finished: int = 0
    peak_pages: int = 0  # most pages allocated after any step
    allocated_slots: int = 0  # summed over the steps
    unused_slots: int = 0  # allocated but holding no token, summed over the steps
    time_to_first_token_seconds: list[float] = field(default_factory=list)
    busy_seconds: float = 0.0  # while any request was in the engine
    compile_seconds: float = 0.0  # of those, spent compiling programs for new shapes
    _busy_since: float | None = None

    def reset(self) -> None:
        self.__init__(self.num_pages, self.page_size)

    def start(self) -> None:
        """The clock runs from here, if it does not already."""
        if self._busy_since is None:
            self._busy_since = time.perf_counter()

    def stop(self) -> None:
        if self._busy_since is not None:
            self.busy_seconds += time.perf_counter() - self._busy_since
            self._busy_since = None

    def count_pages(self, num_pages: int, num_tokens: int) -> None:
        """Takes in the pages allocated after a step and the tokens in them."""
        self.peak_pages = max(self.peak_pages, num_pages)
        self.allocated_slots += num_pages * self.page_size
        self.unused_slots += num_pages * self.page_size - num_tokens

    @property
    def elapsed_seconds(self) -> float:
        """While any request was in the engine, without the time to compile."""
        running = 0.0 if self._busy_since is None else time.perf_counter() - self._busy_since
        return max(0.0, self.busy_seconds + running - self.compile_seconds)

    @property
    def output_tokens_per_second(self) -> float:
        return self.num_output_tokens / self.elapsed_seconds if self.elapsed_seconds else 0.0

    @property
    def waste_percent(self) -> float:
        """Share of the allocated slots that held no token, over all steps."""
        return 100 * self.unused_slots / self.allocated_slots if self.allocated_slots else 0.0

    @property
    def mean_time_to_first_token_seconds(self) -> float:
        times = self.time_to_first_token_seconds
        return sum(times) / len(times) if times else 0.0

    def summary(self) -> str:
        """One line with units."""
        return (
            f"{self.num_finished} requests, {self.num_prompt_tokens} prompt + {self.num_output_tokens} "
            f"output tokens in {self.elapsed_seconds:.1f} s (and {self.compile_seconds:.1f} s compiling): "
            f"{self.output_tokens_per_second:.1f} output tokens/s, "
            f"{self.num_prefills} prefills + {self.num_decode_steps} decode steps, "
            f"first token after {self.mean_time_to_first_token_seconds:.2f} s on average, "
            f"at most {self.peak_pages} of {self.num_pages} pages, "
            f"{self.waste_percent:.1f}% of their slots unused"
        )
