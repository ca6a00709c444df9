"""The offline interface: a batch of prompts in, their completions out, under vLLM's names."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from jaxattn.models import cast
from jaxattn.sampling import SamplingParams
from jaxattn.tokenizer import Tokenizer
from jaxattn.weights import GenerationDefaults, LoadedModel, load_model
from serving.engine import Engine
from serving.interrupts import uninterrupted
from serving.metrics import EngineMetrics
from serving.outputs import RequestOutput
from serving.pool_size import choose_pool_size

logger = logging.getLogger(__name__)

type Prompt = str | Sequence[int] | Mapping[str, Any]  # text, token ids, or a dict with either
type Message = Mapping[str, Any]  # {"role": ..., "content": ...}

DTYPES = {
    "float32": jnp.float32,
    "float": jnp.float32,
    "float16": jnp.float16,
    "half": jnp.float16,
    "bfloat16": jnp.bfloat16,
}
KV_CACHE_DTYPES = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}  # beside the model's own


class LLM:
    """A model, its tokenizer and a page pool, ready to generate.

    Arguments:
        model: a path that `jaxattn.load_model` reads, what it returned, or (nnx model, tokenizer).
        tokenizer: used instead of the model's.
        dtype: "auto" (bfloat16 on a GPU, float32 on a CPU), "float32", "float16" or "bfloat16".
        max_num_seqs: sequences that run together; the others wait.
        max_model_len: most tokens of a sequence, prompt and output. By default the model's context, or what
            the pool holds if that is less.
        page_size: tokens a page.
        num_pages: pages of the pool; by default from the free memory.
        gpu_memory_utilization: share of the GPU's memory for weights, pool and work together.
        max_num_batched_tokens: prompt tokens, padding included, that one step takes on.
        kv_cache_dtype: of keys and values in the pool: "auto" (the model's), or "int8" or "fp8": codes with a
            scale for each token and head, so that memory holds nearly twice the tokens.
        seed: of the seeds drawn for requests that set none.
    """

    def __init__(
        self,
        model: str | Path | LoadedModel | tuple[nnx.Module, Tokenizer | None],
        *,
        tokenizer: Tokenizer | None = None,
        dtype: str | Any = "auto",
        max_num_seqs: int = 256,
        max_model_len: int | None = None,
        page_size: int = 16,
        num_pages: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_num_batched_tokens: int = 8192,
        kv_cache_dtype: str = "auto",
        seed: int = 0,
    ):
        if not 0 < gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization={gpu_memory_utilization}: must be in (0, 1]")
        dtype = _resolve_dtype(dtype)
        if kv_cache_dtype not in ("auto", *KV_CACHE_DTYPES):
            raise ValueError(
                f"kv_cache_dtype={kv_cache_dtype!r}: must be 'auto' or one of {sorted(KV_CACHE_DTYPES)}"
            )
        pool_dtype = KV_CACHE_DTYPES.get(kv_cache_dtype, dtype)
        loaded = _load(model, dtype)
        config = loaded.model.config
        self.tokenizer = tokenizer if tokenizer is not None else loaded.tokenizer
        size = choose_pool_size(
            config,
            page_size=page_size,
            dtype=pool_dtype,
            max_num_seqs=max_num_seqs,
            max_model_len=config.max_positions if max_model_len is None else max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            gpu_memory_utilization=gpu_memory_utilization,
            num_pages=num_pages,
        )
        print(size.explanation, file=sys.stderr)
        if max_model_len is None:
            max_model_len = min(config.max_positions, (size.num_pages - 1) * page_size)
        self.engine = Engine(
            loaded.model,
            self.tokenizer,
            num_pages=size.num_pages,
            eos_token_ids=loaded.generation.eos_token_ids,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            page_size=page_size,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_dtype=pool_dtype,
            seed=seed,
        )
        self._num_requests = 0

    @property
    def metrics(self) -> EngineMetrics:
        """Counters since the LLM was made, or since `metrics.reset()`."""
        return self.engine.metrics

    def warm_up(self) -> None:
        """Compiles every program that any request may need, instead of each when it is first needed."""
        self.engine.warm_up()

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes every prompt; results in the order of the prompts.

        prompts: text, token ids, {"prompt": text} or {"prompt_token_ids": ids}, or a list of these.
        sampling_params: for all, or one for each prompt; SamplingParams() by default.

        Raises ValueError, before anything runs, for a prompt or parameters that cannot be served.
        """
        listed = [prompts] if _is_one_prompt(prompts) else list(prompts)
        return self._complete([self.encode(prompt) for prompt in listed], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation, or a list of them, in the form of the model's chat template."""
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if is_one else messages
        return self._complete([self.encode_chat(c) for c in conversations], sampling_params, use_tqdm)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[str, list[int]]:
        """A conversation as the text and the token ids that the model answers."""
        tokenizer = self._need_tokenizer("messages")
        text = tokenizer.apply_chat_template(messages)
        return text, tokenizer.encode(text, add_special_tokens=False)

    def encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        """Text (None where only ids were given) and token ids of a prompt."""
        if isinstance(prompt, Mapping):
            unknown = prompt.keys() - {"prompt", "prompt_token_ids"}
            if unknown or not prompt:
                raise ValueError(f"prompts: a dict with 'prompt' or 'prompt_token_ids', got {sorted(prompt)}")
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), list(prompt["prompt_token_ids"])
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self._need_tokenizer("prompts").encode(prompt)
        return None, [int(token) for token in prompt]

    def _need_tokenizer(self, argument: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(f"{argument}: text needs a tokenizer, this model has none; give token ids")
        return self.tokenizer

    def run(
        self, prompts: Sequence[tuple[str | None, list[int]]], params: Sequence[SamplingParams]
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Completes encoded prompts and yields (index, output) in the order in which they finish.

        Closing the generator, or an exception in it, takes what has not finished out of the engine.
        """
        index_of = {}
        try:
            for index, ((text, token_ids), request_params) in enumerate(zip(prompts, params, strict=True)):
                request_id = str(self._num_requests)
                self._num_requests += 1
                index_of[request_id] = index
                with uninterrupted():
                    self.engine.add_request(request_id, token_ids, request_params, prompt=text)
            while self.engine.has_unfinished():
                with uninterrupted():
                    outputs = self.engine.step()
                for output in outputs:
                    yield index_of.pop(output.request_id), output
        finally:
            with uninterrupted():
                for request_id in index_of:
                    self.engine.abort(request_id)

    def _complete(self, prompts: list[tuple[str | None, list[int]]], sampling_params: Any, use_tqdm: bool):
        """Checks everything, then runs it; outputs in the order of the prompts."""
        params = _one_for_each(sampling_params, len(prompts))
        for index, ((_, token_ids), request_params) in enumerate(zip(prompts, params, strict=True)):
            try:
                self.engine.check_request(token_ids, request_params)
            except ValueError as error:
                raise ValueError(f"prompts[{index}]: {error}") from None
        outputs = {}
        with progress_bar(len(prompts), disable=not use_tqdm) as bar:
            for index, output in self.run(prompts, params):
                outputs[index] = output
                advance(bar, self.metrics)
        return [outputs[index] for index in range(len(prompts))]


def progress_bar(total: int, *, done: int = 0, disable: bool = False) -> tqdm:
    return tqdm(total=total, initial=done, unit="request", desc="Generating", disable=disable)


def advance(bar: tqdm, metrics: EngineMetrics) -> None:
    """One more request on the bar, and the speed so far."""
    bar.set_postfix_str(f"{metrics.output_tokens_per_second:.0f} output tokens/s", refresh=False)
    bar.update()


def _is_one_prompt(prompts: Any) -> bool:
    if isinstance(prompts, (str, Mapping)):
        return True
    return len(prompts) > 0 and all(isinstance(entry, (int, np.integer)) for entry in prompts)


def _one_for_each(sampling_params: Any, num_prompts: int) -> list[SamplingParams]:
    if sampling_params is None:
        sampling_params = SamplingParams()
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    if len(sampling_params) != num_prompts:
        raise ValueError(
            f"sampling_params: {len(sampling_params)} for {num_prompts} prompts; give one, or one each"
        )
    return list(sampling_params)


def _load(model: Any, dtype: Any) -> LoadedModel:
    """Any of the forms a model comes in, with its parameters in `dtype`."""
    if isinstance(model, (str, Path)):
        return load_model(model, dtype=dtype)
    if not isinstance(model, LoadedModel):
        module, tokenizer = model
        eos = tokenizer.eos_token_id if tokenizer is not None else None
        model = LoadedModel(module, tokenizer, GenerationDefaults(() if eos is None else (eos,)))
    graphdef, params = nnx.split(model.model)
    return model._replace(model=nnx.merge(graphdef, cast(params, dtype)))


def _resolve_dtype(dtype: Any) -> Any:
    if not isinstance(dtype, str):
        return jnp.dtype(dtype)
    if dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be 'auto' or one of {sorted(DTYPES)}")
    return DTYPES[dtype]
