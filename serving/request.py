"""A request and its sequences, as the host knows them: prompt, tokens so far, why they ended."""

import time
from dataclasses import dataclass, field

from jaxattn.sampling import SamplingArrays, SamplingParams, kind_of
from jaxattn.tokenizer import Detokenizer, Tokenizer
from serving.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput


@dataclass(eq=False)
class Request:
    """What the user asked for; its n samples run as n sequences."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    stream: bool = False  # report after every step, not only at the end
    metrics: RequestMetrics = field(default_factory=lambda: RequestMetrics(time.perf_counter()))
    sequences: list["Sequence"] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return all(sequence.finish_reason is not None for sequence in self.sequences)

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[sequence.output() for sequence in self.sequences],
            finished=self.is_finished,
            metrics=self.metrics,
        )


class Sequence:
    """One sample of a request. `append` takes its tokens one by one and sets `finish_reason` at the last."""

    def __init__(
        self,
        request: Request,
        sample_index: int,
        *,
        max_tokens: int,
        eos_token_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        sampling: SamplingArrays,
    ):
        params = request.params
        self.request = request
        self.sample_index = sample_index
        self.max_tokens = max_tokens  # new tokens at most
        self.sampling = sampling  # its row of parameters for the device
        self.kind = kind_of(params)  # what it needs of the sampler
        self.eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self.stop_token_ids = self.eos_token_ids | frozenset(params.stop_token_ids or ())
        self.row: int | None = None  # its place in the batch state, while it runs
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._tokenizer = tokenizer
        self._stop_strings: tuple[str, ...] = tuple(params.stop or ())
        self._held_back = (
            max(map(len, self._stop_strings), default=1) - 1
        )  # characters that may begin a stop string
        # Text is made token by token only where someone looks at it before the end.
        looked_at = request.stream or self._stop_strings
        self._detokenizer = Detokenizer(tokenizer) if tokenizer is not None and looked_at else None
        self._text = ""

    def append(self, token: int) -> None:
        """Takes the next token."""
        self.token_ids.append(token)
        if token in self.stop_token_ids:
            self.finish("stop", None if token in self.eos_token_ids else token)
            return
        if self._detokenizer is not None:
            self._append_text(self._detokenizer.push(token))
        if self.finish_reason is None and len(self.token_ids) >= self.max_tokens:
            self.finish("length")

    def append_logprobs(self, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        """Takes the log probability of the next token and of the most probable ones, in descending order."""
        entries = {t: Logprob(p, rank, self._token_text(t)) for rank, (t, p) in enumerate(top, 1)}
        entries.setdefault(token, Logprob(logprob, None, self._token_text(token)))
        assert self.logprobs is not None
        self.logprobs.append(entries)
        self.cumulative_logprob += logprob

    def finish(self, reason: str, stop_reason: int | str | None = None) -> None:
        """Ends the sequence and completes its text."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self._detokenizer is not None:
            if not isinstance(stop_reason, str):
                self._text += self._detokenizer.flush()
        elif self._tokenizer is not None:
            is_stop_token = reason == "stop"
            self._text = self._tokenizer.decode(self.token_ids[:-1] if is_stop_token else self.token_ids)

    def fail(self) -> None:
        """Ends the sequence after an error in handling it, with the text it has."""
        self.finish_reason = "error"

    def output(self) -> CompletionOutput:
        is_finished = self.finish_reason is not None
        text = self._text if is_finished else self._text[: max(0, len(self._text) - self._held_back)]
        return CompletionOutput(
            index=self.sample_index,
            text=text,
            token_ids=self.token_ids if is_finished else list(self.token_ids),
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _append_text(self, piece: str) -> None:
        """Adds text, and ends at the first stop string, which a piece may complete but not contain whole."""
        searched_from = max(0, len(self._text) - self._held_back)
        self._text += piece
        if len(self.token_ids) < self.request.params.min_tokens:
            return
        found = [(self._text.find(stop, searched_from), stop) for stop in self._stop_strings]
        found = [(position, stop) for position, stop in found if position >= 0]
        if found:
            position, stop = min(found)
            self._text = self._text[:position]
            self.finish("stop", stop)

    def _token_text(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.decode([token], skip_special_tokens=False)
