"""Continuous batching: requests join and leave between any two steps; the device never waits for the host.

`Engine` is a thin mutable shell around the functional steps. A call of `step` launches the next work first
and only then reads what the call before launched, so that the device computes step i + 1 while the host looks
at the tokens of step i. A sequence that the host ends late (a stop string, an abort) has had one token too
many computed, which is dropped.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.sampling import KINDS, NO_TOKEN, SamplingArrays, SamplingParams, row_of
from jaxattn.tokenizer import Tokenizer
from serving.buckets import make_buckets
from serving.metrics import EngineMetrics
from serving.outputs import RequestOutput
from serving.pages import NO_ROW, num_pages_of
from serving.request import Request, Sequence
from serving.scheduler import Scheduler
from serving.step import PrefillBatch, StepOutput, init_engine_state, make_steps

logger = logging.getLogger(__name__)

# They serve greedy rows as well. Drawing takes a small part of a prefill's time; one more program for each of
# the many shapes of prefills would take seconds to compile.
PREFILL_KINDS = KINDS[1:]


class Launch(NamedTuple):
    """A step under way: what it will bring, and whose entries those are."""

    output: StepOutput
    sequences: list[tuple[int, Sequence]]  # (index into the output, sequence)


class Engine:
    """Serves requests: `add_request`, then `step` while `has_unfinished()`.

    Arguments:
        model: a flax.nnx module of jaxattn.models, its parameters in the dtype to compute in.
        tokenizer: for text, stop strings and streaming; None serves token ids only.
        eos_token_ids: each ends a sequence, unless its request ignores them.
        max_num_seqs: rows, the sequences that run together.
        max_model_len: most tokens of a sequence, prompt and output; the model's context by default.
        num_pages: pages of the pool, of `page_size` tokens each; page 0 is never allocated.
        max_num_batched_tokens: prompt tokens, padding included, that one step takes on.
        kv_cache_dtype: of the page pool, also int8 or float8_e4m3fn; by default the parameters'.
        seed: of the seeds drawn for requests that set none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer | None = None,
        *,
        num_pages: int,
        eos_token_ids: Iterable[int] = (),
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        page_size: int = 16,
        max_num_batched_tokens: int = 8192,
        kv_cache_dtype: Any = None,
        seed: int = 0,
    ):
        self.config: Any = model.config
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_model_len = self.config.max_positions if max_model_len is None else max_model_len
        _check_sizes(self.config, self.max_model_len, max_num_seqs, max_num_batched_tokens)
        self.steps = make_steps(model)
        self.state = init_engine_state(
            self.config,
            num_rows=max_num_seqs,
            num_pages=num_pages,
            page_size=page_size,
            pages_per_row=num_pages_of(self.max_model_len, page_size),
            dtype=_compute_dtype(self.steps.params) if kv_cache_dtype is None else kv_cache_dtype,
        )
        self.buckets = make_buckets(max_num_seqs, self.max_model_len, max_num_batched_tokens)
        self.scheduler = Scheduler(
            num_rows=max_num_seqs, num_pages=num_pages, page_size=page_size, buckets=self.buckets
        )
        self.metrics = EngineMetrics(num_pages - 1, page_size)
        self._requests: dict[str, Request] = {}
        self._in_flight: deque[list[Launch]] = deque()
        self._to_release: list[Sequence] = []
        self._num_launched = np.zeros(max_num_seqs, np.int64)  # tokens of each row computed or under way
        self._max_tokens = np.zeros(max_num_seqs, np.int64)  # 0 for an idle row
        self._kinds = np.zeros(max_num_seqs, np.int64)  # of sampling: indices into KINDS
        self._compiled: set[tuple[tuple[int, ...], str]] = set()
        self._seeds = np.random.default_rng(seed)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        stream: bool = False,
    ) -> None:
        """Queues a request; ValueError, before anything changes, if it can never be served."""
        if request_id in self._requests:
            raise ValueError(f"request_id={request_id!r}: an unfinished request has it")
        self.check_request(prompt_token_ids, params)
        request = Request(request_id, prompt, list(prompt_token_ids), params, stream)
        seed = int(self._seeds.integers(2**32)) if params.seed is None else params.seed
        for index in range(params.n):
            sequence = Sequence(
                request,
                index,
                max_tokens=self._max_new_tokens(prompt_token_ids, params),
                eos_token_ids=self.eos_token_ids,
                tokenizer=self.tokenizer,
                sampling=row_of(params, seed=seed, sample_index=index, eos_token_ids=self.eos_token_ids),
            )
            request.sequences.append(sequence)
            self.scheduler.add(sequence)
        self._requests[request_id] = request
        self.metrics.start()

    def check_request(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """ValueError, with the numbers, for a request that this engine can never serve."""
        num_tokens, vocab_size = len(prompt_token_ids), self.config.vocab_size
        if num_tokens == 0:
            raise ValueError("the prompt is empty; it must have at least one token")
        if num_tokens >= self.max_model_len:
            raise ValueError(
                f"the prompt has {num_tokens} tokens; at most {self.max_model_len - 1} are allowed, "
                f"since max_model_len={self.max_model_len} is for prompt and output together"
            )
        given = {
            "prompt_token_ids": prompt_token_ids,
            "stop_token_ids": params.stop_token_ids or (),
            "logit_bias": params.logit_bias or (),
        }
        for name, ids in given.items():
            for token in (min(ids), max(ids)) if ids else ():
                if not 0 <= token < vocab_size:
                    raise ValueError(f"{name} has {token}; the model's ids are from 0 to {vocab_size - 1}")
        if params.stop and self.tokenizer is None:
            raise ValueError(f"stop={params.stop!r} needs a tokenizer, this engine has none")
        self.scheduler.check_fits(num_tokens, self._max_new_tokens(prompt_token_ids, params))

    def _max_new_tokens(self, prompt_token_ids: list[int], params: SamplingParams) -> int:
        return min(params.max_tokens, self.max_model_len - len(prompt_token_ids))

    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def step(self) -> list[RequestOutput]:
        """Launches the next prefills and decode step, then reports on what the launch before brought.

        Returns the requests that finished, and those that stream and have new tokens.
        """
        launches = self._launch_prefills() + self._launch_decode()
        if launches:
            self._in_flight.append(launches)
        reports: dict[str, Request] = {}
        while len(self._in_flight) > bool(launches):
            for launch in self._in_flight.popleft():
                reports |= self._take(launch)
        outputs = [self._report(request) for request in reports.values()]
        self._release()
        return outputs

    def abort(self, request_id: str) -> RequestOutput | None:
        """Ends a request where it stands, with finish reason "abort"; None if it is not in the engine."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                if sequence.row is None:
                    self.scheduler.discard(sequence)
                else:
                    self._to_release.append(sequence)
                try:
                    sequence.finish("abort")
                except Exception:
                    _fail(sequence)
        output = self._report(request)
        self._release()
        return output

    def warm_up(self) -> None:
        """Compiles every shape that a step may have, so that no request waits for the compiler."""
        for num_rows, length in self.buckets.prefill_shapes():
            for kind in PREFILL_KINDS:
                self._run_prefill(num_rows, length, [], kind)
        for num_rows in self.buckets.decode_rows:
            for kind in KINDS:
                self._run_decode(num_rows, kind)
        self.state = self.steps.release(self.state, np.zeros(len(self._max_tokens), np.bool_))
        jax.block_until_ready(self.state)

    def num_free_pages(self) -> int:
        """Free pages by the device's count; waits for all work under way."""
        return int(self.state.pages.free_top)

    # --- launching ------------------------------------------------------------------------------------------

    def _release(self) -> None:
        """Empties the rows of sequences that have ended."""
        if self._to_release:
            rows_mask = np.zeros(len(self._max_tokens), np.bool_)
            for sequence in self._to_release:
                rows_mask[sequence.row] = True
                self.scheduler.release(sequence)
            self._to_release.clear()
            self._max_tokens[rows_mask] = 0
            self._kinds[rows_mask] = 0
            self.state = self.steps.release(self.state, rows_mask)
        if not self._requests:
            self._in_flight.clear()  # at most one step, whose tokens nobody wants
            self.metrics.stop()

    def _launch_prefills(self) -> list[Launch]:
        now = time.perf_counter()
        launches = []
        for num_rows, length, sequences in self.scheduler.plan_prefills(self.scheduler.admit()):
            for sequence in sequences:
                self._kinds[sequence.row] = KINDS.index(sequence.kind)
                self._num_launched[sequence.row] = 1
                self._max_tokens[sequence.row] = sequence.max_tokens
                metrics = sequence.request.metrics
                metrics.first_scheduled_time = metrics.first_scheduled_time or now
            kind = max((sequence.kind for sequence in sequences), key=KINDS.index)
            kind = kind if kind in PREFILL_KINDS else PREFILL_KINDS[0]
            output = self._run_prefill(num_rows, length, sequences, kind)
            self.metrics.num_prefills += 1
            self.metrics.num_prompt_tokens += sum(len(s.request.prompt_token_ids) for s in sequences)
            launches.append(Launch(output, list(enumerate(sequences))))
        return launches

    def _launch_decode(self) -> list[Launch]:
        """One token for every running row, unless all of them have their last one under way."""
        if not (self._num_launched < self._max_tokens).any():
            return []
        num_rows = self.scheduler.decode_rows()
        output = self._run_decode(num_rows, KINDS[self._kinds.max()])
        self._num_launched += 1
        self.metrics.num_decode_steps += 1
        return [Launch(output, list(self.scheduler.running.items()))]

    def _run_decode(self, num_rows: int, kind: str) -> StepOutput:
        return self._dispatch(self.steps.decode, shape=(num_rows,), num_rows=num_rows, kind=kind)

    def _run_prefill(self, num_rows: int, length: int, sequences: list[Sequence], kind: str) -> StepOutput:
        batch = PrefillBatch(
            rows=np.full(num_rows, NO_ROW, np.int32),
            tokens=np.zeros((num_rows, length), np.int32),
            lengths=np.zeros(num_rows, np.int32),
            max_outputs=np.zeros(num_rows, np.int32),
            sampling=_stack_rows([sequence.sampling for sequence in sequences], num_rows),
        )
        for index, sequence in enumerate(sequences):
            prompt = sequence.request.prompt_token_ids
            batch.rows[index] = sequence.row
            batch.tokens[index, : len(prompt)] = prompt
            batch.lengths[index] = len(prompt)
            batch.max_outputs[index] = sequence.max_tokens
        return self._dispatch(self.steps.prefill, batch, shape=(num_rows, length), kind=kind)

    def _dispatch(
        self, step: Callable[..., Any], *args: Any, shape: tuple[int, ...], kind: str, **static: int
    ) -> StepOutput:
        """Puts a step into the device's queue, and has its results sent as soon as they are there."""
        start = time.perf_counter()
        self.state, output = step(self.steps.params, self.state, *args, kind=kind, **static)
        if (shape, kind) not in self._compiled:
            # Such a call returns when its program is compiled; others return at once.
            self._compiled.add((shape, kind))
            if self._requests:
                self.metrics.compile_seconds += time.perf_counter() - start
        output.sampled.tokens.copy_to_host_async()
        output.page_usage.copy_to_host_async()
        return output

    # --- reading --------------------------------------------------------------------------------------------

    def _take(self, launch: Launch) -> dict[str, Request]:
        """Hands a step's tokens to their sequences; the requests to report on."""
        tokens = np.asarray(launch.output.sampled.tokens).tolist()
        logprobs = None
        if any(sequence.logprobs is not None for _, sequence in launch.sequences):
            logprobs = jax.device_get(launch.output.sampled)
        self.metrics.count_pages(*np.asarray(launch.output.page_usage).tolist())
        reports = {}
        for index, sequence in launch.sequences:
            if sequence.finish_reason is not None:
                continue  # the token of a sequence that ended while this step was under way
            try:
                self._append(sequence, tokens[index], index, logprobs)
            except Exception:
                _fail(sequence)
            request, has_ended = sequence.request, sequence.finish_reason is not None
            if has_ended:
                self._to_release.append(sequence)
            if request.stream or (has_ended and request.is_finished):
                reports[request.request_id] = request
        return reports

    def _append(self, sequence: Sequence, token: int, index: int, sampled: Any) -> None:
        if token == NO_TOKEN:
            raise RuntimeError(f"row {sequence.row} got no token: no free page was left for it")
        metrics = sequence.request.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = time.perf_counter()
        self.metrics.num_output_tokens += 1
        if sequence.logprobs is not None:
            wanted = sequence.request.params.logprobs
            top = zip(sampled.top_tokens[index, :wanted], sampled.top_logprobs[index, :wanted], strict=True)
            sequence.append_logprobs(
                token, float(sampled.logprobs[index]), [(int(t), float(p)) for t, p in top]
            )
        sequence.append(token)

    def _report(self, request: Request) -> RequestOutput:
        if request.is_finished:
            request.metrics.finished_time = time.perf_counter()
            del self._requests[request.request_id]
            self.metrics.num_finished += 1
            if request.metrics.time_to_first_token is not None:
                self.metrics.time_to_first_token_seconds.append(request.metrics.time_to_first_token)
        return request.output()


def _fail(sequence: Sequence) -> None:
    """An error in handling one sequence (in the tokenizer, say) ends that one, and the others go on."""
    logger.exception("request %s failed", sequence.request.request_id)
    sequence.fail()


def _check_sizes(config: Any, max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
    if not 2 <= max_model_len <= config.max_positions:
        raise ValueError(
            f"max_model_len={max_model_len}: must be from 2 to {config.max_positions}, the model's context"
        )
    for name, value in (("max_num_seqs", max_num_seqs), ("max_num_batched_tokens", max_num_batched_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")


def _compute_dtype(params: Iterable[jax.Array]) -> Any:
    return next(leaf.dtype for leaf in params if jnp.issubdtype(leaf.dtype, jnp.floating))


def _stack_rows(rows: list[SamplingArrays], num_rows: int) -> SamplingArrays:
    """Rows of sampling parameters as arrays [num_rows, ...], greedy ones after those given."""
    padding = row_of(SamplingParams(temperature=0.0), seed=0)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows, *[padding] * (num_rows - len(rows)))
