"""What a request gives back, under vLLM's names."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Logprob(NamedTuple):
    """How probable one token was at its place."""

    logprob: float  # natural logarithm
    rank: int | None  # 1 is the most probable; None for a sampled token outside the ranks asked for
    decoded_token: str | None


@dataclass
class CompletionOutput:
    """One sample of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # sum over the tokens; None unless logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # for each token: the most probable ones and itself
    finish_reason: str | None = None  # "stop", "length", "abort", "error"; None while it runs
    stop_reason: int | str | None = (
        None  # the stop token or stop string that ended it; None for the model's own
    )

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Moments of a request, in seconds of `time.perf_counter`."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass
class RequestOutput:
    """A request and its samples so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
