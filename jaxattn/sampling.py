"""How the next token is chosen: the parameters a user sets, their arrays, and one jitted `sample` for all
rows.

Names, defaults and order of application are vLLM's: logit bias and min_tokens, penalties, temperature,
min_p, top_k, top_p. To add a parameter: a field of SamplingParams with its check, a field of SamplingArrays,
its use in `sample`.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxattn.drawing import inverse_cdf, keep_from, top_k_threshold, top_p_threshold

__all__ = [
    "KINDS",
    "SampleOutput",
    "SamplingArrays",
    "SamplingParams",
    "TokenCounts",
    "add_outputs",
    "idle_rows",
    "init_token_counts",
    "kind_of",
    "row_of",
    "sample",
    "set_prompts",
    "set_rows",
]

MAX_LOGIT_BIAS = 300  # entries of logit_bias a request may have (OpenAI's limit)
MAX_STOP_TOKENS = 32  # end-of-sequence and stop ids a request may have while min_tokens forbids them
MAX_LOGPROBS = 20
MAX_SEED = 2**32 - 1
KINDS = ("greedy", "drawn", "any")  # drawn: by temperature and cuts; any: penalties, biases, logprobs too
NO_TOKEN = -1  # pads the id lists of SamplingArrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks for; checked when made, every field applied."""

    n: int = 1  # samples of the same prompt
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # the fewest tokens whose probabilities sum to top_p
    top_k: int = 0  # the k likeliest tokens; 0 or -1: all
    min_p: float = 0.0  # tokens at least min_p times as likely as the likeliest
    seed: int | None = None  # None: the engine draws one
    repetition_penalty: float = 1.0  # on tokens of prompt and output: logit / penalty if positive, else times
    presence_penalty: float = 0.0  # subtracted from logits of tokens in the output
    frequency_penalty: float = 0.0  # subtracted once for each time the token is in the output
    logit_bias: Mapping[int, float] | None = None  # added to logits; clipped to [-100, 100], as OpenAI does
    stop: str | Sequence[str] | None = None  # the text ends before the first of these
    stop_token_ids: Sequence[int] | None = None  # the output ends with the first of these
    ignore_eos: bool = False
    max_tokens: int = 16
    min_tokens: int = 0  # no end of sequence and no stop token before this many
    logprobs: int | None = None  # log-probabilities of the token and of this many likeliest ones

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        normal = {"stop": stop, "stop_token_ids": tuple(self.stop_token_ids or ())}
        for name, value in {**normal, "logit_bias": dict(self.logit_bias or {})}.items():
            object.__setattr__(self, name, value)
        self._check_counts()
        self._check_numbers()
        self._check_lists()

    def _check_counts(self) -> None:
        self._require_integer("n", 1)
        self._require_integer("top_k", -1)
        self._require_integer("max_tokens", 1)
        self._require_integer("min_tokens", 0, self.max_tokens)
        if self.seed is not None:
            self._require_integer("seed", 0, MAX_SEED)
        if self.logprobs is not None:
            self._require_integer("logprobs", 0, MAX_LOGPROBS)
        self._require("ignore_eos", isinstance(self.ignore_eos, bool), "True or False")

    def _check_numbers(self) -> None:
        self._require_number("temperature", lambda x: x >= 0, "a number of at least 0")
        self._require_number("top_p", lambda x: 0 < x <= 1, "in (0, 1]")
        self._require_number("min_p", lambda x: 0 <= x <= 1, "in [0, 1]")
        self._require_number("repetition_penalty", lambda x: x > 0, "a number greater than 0")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require_number(name, lambda x: -2 <= x <= 2, "in [-2, 2]")

    def _check_lists(self) -> None:
        stop, ids, bias = self.stop or (), self.stop_token_ids or (), self.logit_bias or {}
        self._require("stop", all(isinstance(s, str) and s for s in stop), "strings that are not empty")
        self._require("stop_token_ids", all(map(_is_token, ids)), "token ids of at least 0")
        self._require(
            "stop_token_ids", len(ids) <= MAX_STOP_TOKENS - 8, f"at most {MAX_STOP_TOKENS - 8} token ids"
        )
        self._require("logit_bias", all(map(_is_token, bias)), "a dict from token ids of at least 0")
        self._require("logit_bias", all(map(_is_number, bias.values())), "a dict to finite numbers")
        self._require("logit_bias", len(bias) <= MAX_LOGIT_BIAS, f"at most {MAX_LOGIT_BIAS} entries")

    def _require(self, name: str, holds: Any, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be {allowed}")

    def _require_integer(self, name: str, least: int, most: int | None = None) -> None:
        value = getattr(self, name)
        is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        allowed = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
        self._require(name, is_integer and least <= value and (most is None or value <= most), allowed)

    def _require_number(self, name: str, holds: Any, allowed: str) -> None:
        value = getattr(self, name)
        self._require(name, _is_number(value) and bool(holds(value)), allowed)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The parameters in a dict (a line of JSON); an unknown name is a ValueError. JSON's string keys of
        logit_bias become ids."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(fields.keys() - known):
            raise ValueError(f"sampling parameters {unknown}: unknown, must be among {sorted(known)}")
        fields = dict(fields)
        if isinstance(fields.get("logit_bias"), Mapping):
            fields["logit_bias"] = {_as_id(key): bias for key, bias in fields["logit_bias"].items()}
        return cls(**fields)


def _is_token(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(0 <= value < 2**31)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_number and bool(np.isfinite(value))


def _as_id(key: Any) -> Any:
    return int(key) if isinstance(key, str) and key.isdecimal() else key


class SamplingArrays(NamedTuple):
    """The parameters of every row, on the device."""

    temperature: Float[Array, "R"]  # 0: greedy
    top_p: Float[Array, "R"]
    top_k: Int[Array, "R"]  # at most 0: all
    min_p: Float[Array, "R"]
    repetition_penalty: Float[Array, "R"]
    presence_penalty: Float[Array, "R"]
    frequency_penalty: Float[Array, "R"]
    bias_ids: Int[Array, "R bias"]  # NO_TOKEN pads
    bias_values: Float[Array, "R bias"]
    min_tokens: Int[Array, "R"]
    stop_ids: Int[Array, "R stop"]  # forbidden before min_tokens; NO_TOKEN pads
    num_logprobs: Int[Array, "R"]  # -1: none wanted
    seed: UInt32[Array, "R"]
    sample_index: Int[Array, "R"]  # which of a request's n samples


def row_of(
    params: SamplingParams, *, seed: int, sample_index: int = 0, eos_token_ids: Iterable[int] = ()
) -> SamplingArrays:
    """One request's row as NumPy values without the leading R: for `set_rows`, or to stack.

    seed: params.seed, or what the engine drew where that is None.
    """
    stop_ids = [*(() if params.ignore_eos else eos_token_ids), *(params.stop_token_ids or ())]
    bias = params.logit_bias or {}
    values: dict[str, Any] = dict(  # noqa: C408
        temperature=np.float32(params.temperature),
        top_p=np.float32(params.top_p),
        top_k=np.int32(params.top_k),
        min_p=np.float32(params.min_p),
        repetition_penalty=np.float32(params.repetition_penalty),
        presence_penalty=np.float32(params.presence_penalty),
        frequency_penalty=np.float32(params.frequency_penalty),
        bias_ids=_padded("logit_bias", list(bias), MAX_LOGIT_BIAS, np.int32, NO_TOKEN),
        bias_values=_padded(
            "logit_bias", np.clip(list(bias.values()), -100, 100), MAX_LOGIT_BIAS, np.float32, 0
        ),
        min_tokens=np.int32(params.min_tokens),
        stop_ids=_padded("stop_token_ids", stop_ids, MAX_STOP_TOKENS, np.int32, NO_TOKEN),
        num_logprobs=np.int32(-1 if params.logprobs is None else params.logprobs),
        seed=np.uint32(seed),
        sample_index=np.int32(sample_index),
    )
    return SamplingArrays(**values)


def _padded(name: str, values: Any, size: int, dtype: Any, padding: float) -> np.ndarray:
    if len(values) > size:
        raise ValueError(f"{name}: {len(values)} ids with the end-of-sequence ids, must be at most {size}")
    return np.concatenate([np.asarray(values, dtype), np.full(size - len(values), padding, dtype)])


def idle_rows(num_rows: int) -> SamplingArrays:
    """Arrays of greedy rows: what rows without a request have."""
    idle = row_of(SamplingParams(temperature=0.0), seed=0)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_rows, *x.shape)), idle)


def set_rows(arrays: SamplingArrays, rows: Int[Array, "n"], values: SamplingArrays) -> SamplingArrays:
    """`arrays` with `values` (leaves [n, ...]) in the rows given; a row of R or more is dropped."""
    return jax.tree.map(lambda array, value: array.at[rows].set(value, mode="drop"), arrays, values)


class TokenCounts(NamedTuple):
    """What penalties look at."""

    in_prompt: Bool[Array, "R V"]
    outputs: Int[Array, "R V"]  # times each token is in the output


def init_token_counts(num_rows: int, vocab_size: int) -> TokenCounts:
    """Counts of empty rows: 5 R V bytes."""
    shape = (num_rows, vocab_size)
    return TokenCounts(jnp.zeros(shape, jnp.bool_), jnp.zeros(shape, jnp.int32))


def set_prompts(
    counts: TokenCounts, rows: Int[Array, "n"], prompts: Int[Array, "n T"], lengths: Int[Array, "n"]
) -> TokenCounts:
    """Counts in which the rows given start anew with their prompts; a row of R or more is dropped."""
    num_rows, vocab_size = counts.in_prompt.shape
    inside = jnp.arange(prompts.shape[1]) < lengths[:, None]
    fresh = jnp.zeros((prompts.shape[0], vocab_size), jnp.bool_)
    fresh = fresh.at[jnp.arange(prompts.shape[0])[:, None], jnp.where(inside, prompts, vocab_size)].set(
        True, mode="drop"
    )
    rows = jnp.where(rows < 0, num_rows, rows)  # a negative index would count from the end
    return TokenCounts(
        counts.in_prompt.at[rows].set(fresh, mode="drop"), counts.outputs.at[rows].set(0, mode="drop")
    )


def add_outputs(counts: TokenCounts, tokens: Int[Array, "R"], active: Bool[Array, "R"]) -> TokenCounts:
    """Counts one more output token of each active row."""
    rows = jnp.arange(tokens.shape[0])
    return counts._replace(outputs=counts.outputs.at[rows, tokens].add(active.astype(jnp.int32)))


class SampleOutput(NamedTuple):
    """One token a row. Log-probabilities are those of the model's own distribution, before any parameter."""

    tokens: Int[Array, "R"]
    logprobs: Float[Array, "R"]  # of the token; 0 when no row wants them
    top_tokens: Int[Array, "R max_logprobs"]
    top_logprobs: Float[Array, "R max_logprobs"]


def kind_of(params: SamplingParams) -> str:
    """What a request's rows need of `sample`: the first of KINDS that serves them."""
    defaults = SamplingParams()
    adjusting = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "min_tokens")
    if any(getattr(params, name) != getattr(defaults, name) for name in (*adjusting, "logprobs")):
        return "any"
    return "drawn" if params.temperature > 0 else "greedy"


@functools.partial(jax.jit, static_argnames=("max_logprobs", "kind"))
def sample(
    logits: Float[Array, "R V"],
    arrays: SamplingArrays,
    counts: TokenCounts | None,
    positions: Int[Array, "R"],
    num_outputs: Int[Array, "R"],
    *,
    max_logprobs: int = 0,
    kind: str = "any",
) -> SampleOutput:
    """Chooses the next token of every row; a row's answer depends on nothing but that row.

        token ~ softmax(adjusted logits / temperature), restricted by min_p, then top_k, then top_p

    Random numbers come from fold_in(fold_in(key(seed), sample_index), position): a seeded request draws the
    same in any batch, any row and after preemption. Work that no row asks for is skipped at run time: with
    every temperature 0 and no penalties the cost is one argmax.

    Arguments:
        logits: float32, as the model returns them.
        counts: for penalties; None counts as nothing seen.
        positions: of the token being chosen. num_outputs: tokens of the output so far, for min_tokens.
        max_logprobs: width of top_tokens and top_logprobs; static.
        kind: one of KINDS, static: the largest of the rows' kinds where the caller knows them. "any" finds
            out at run time, for which the host waits for a GPU; the others never wait.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: must be one of {KINDS}")
    is_sampled = arrays.temperature > 0

    def choose(logits: jax.Array) -> jax.Array:
        drawn = _draw(logits, arrays, positions, may_skip=kind == "any")
        return jnp.where(is_sampled, drawn, _argmax(logits))

    def adjust_and_choose(logits: jax.Array) -> jax.Array:
        adjusted = _adjust(logits, arrays, counts, num_outputs)
        return lax.cond(is_sampled.any(), choose, _argmax, adjusted)

    if kind != "any":
        tokens = choose(logits) if kind == "drawn" else _argmax(logits)
        return SampleOutput(tokens, *_no_logprobs(logits.shape[0], max_logprobs))
    # Three branches that only read the logits: a chain of conditionals would copy 4 R V bytes at each.
    branch = jnp.where(_needs_adjusting(arrays, num_outputs).any(), 2, is_sampled.any().astype(jnp.int32))
    tokens = lax.switch(branch, [_argmax, choose, adjust_and_choose], logits)
    return SampleOutput(tokens, *_logprobs(logits, tokens, arrays.num_logprobs, max_logprobs))


def _argmax(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _needs_adjusting(arrays: SamplingArrays, num_outputs: jax.Array) -> jax.Array:
    """bool[R]: rows whose logits any parameter but temperature and the cuts changes."""
    has_penalty = (arrays.presence_penalty != 0) | (arrays.frequency_penalty != 0)
    has_penalty |= arrays.repetition_penalty != 1
    return has_penalty | (arrays.bias_ids >= 0).any(axis=-1) | (num_outputs < arrays.min_tokens)


def _adjust(
    logits: jax.Array, arrays: SamplingArrays, counts: TokenCounts | None, num_outputs: jax.Array
) -> jax.Array:
    """Logits after min_tokens, bias and penalties, in vLLM's order."""
    num_rows, vocab_size = logits.shape
    rows = jnp.arange(num_rows)[:, None]
    is_short = (num_outputs < arrays.min_tokens)[:, None]
    # an id of V is dropped; -1 would mean the last token
    forbidden = jnp.where(is_short & (arrays.stop_ids >= 0), arrays.stop_ids, vocab_size)
    biased = jnp.where(arrays.bias_ids >= 0, arrays.bias_ids, vocab_size)
    logits = logits.at[rows, forbidden].set(-jnp.inf, mode="drop")
    logits = logits.at[rows, biased].add(arrays.bias_values, mode="drop")
    return logits if counts is None else _penalise(logits, arrays, counts)


def _penalise(logits: jax.Array, arrays: SamplingArrays, counts: TokenCounts) -> jax.Array:
    """Repetition (Keskar et al. 2019) over prompt and output, then frequency and presence over the output."""
    penalty = arrays.repetition_penalty[:, None]
    is_seen = counts.in_prompt | (counts.outputs > 0)
    repeated = jnp.where(logits > 0, logits / penalty, logits * penalty)
    logits = jnp.where(is_seen, repeated, logits)
    logits -= arrays.frequency_penalty[:, None] * counts.outputs
    return logits - arrays.presence_penalty[:, None] * (counts.outputs > 0)


def _draw(logits: jax.Array, arrays: SamplingArrays, positions: jax.Array, *, may_skip: bool) -> jax.Array:
    """A token of each row from its restricted distribution; rows of temperature 0 give what they give."""
    temperature = jnp.where(arrays.temperature > 0, arrays.temperature, 1.0)[:, None]
    scaled = logits / temperature
    weights = jnp.exp(scaled - scaled.max(axis=-1, keepdims=True))  # in [0, 1], the likeliest at 1
    weights = jnp.where(weights >= arrays.min_p[:, None], weights, 0.0)
    weights = keep_from(weights, top_k_threshold(weights, arrays.top_k, may_skip=may_skip))
    weights = keep_from(weights, top_p_threshold(weights, arrays.top_p, may_skip=may_skip))
    return inverse_cdf(weights, _uniforms(arrays, positions))


def _uniforms(arrays: SamplingArrays, positions: jax.Array) -> jax.Array:
    """Two uniform numbers in [0, 1) for each row, f32[R, 2]."""

    def of_row(seed: jax.Array, sample_index: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), sample_index)
        return jax.random.uniform(jax.random.fold_in(key, position), (2,))

    return jax.vmap(of_row)(arrays.seed, arrays.sample_index, positions)


def _logprobs(
    logits: jax.Array, tokens: jax.Array, num_logprobs: jax.Array, max_logprobs: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def compute() -> tuple[jax.Array, jax.Array, jax.Array]:
        total = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0] - total
        top, top_tokens = lax.top_k(logits, max_logprobs)
        return chosen, top_tokens.astype(jnp.int32), top - total[:, None]

    skip = functools.partial(_no_logprobs, logits.shape[0], max_logprobs)
    return lax.cond((num_logprobs >= 0).any(), compute, skip)


def _no_logprobs(num_rows: int, max_logprobs: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape = (num_rows, max_logprobs)
    return jnp.zeros(num_rows), jnp.zeros(shape, jnp.int32), jnp.zeros(shape)
