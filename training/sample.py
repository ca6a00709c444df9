"""A small generator for a look at a model in training: whole forward passes, no cache of keys and values."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxattn.attention import FlashAttention
from jaxattn.models import ModelConfig, cast, model_from_params
from training.config import TrainConfig


def make_generate(config: TrainConfig, model_config: ModelConfig) -> Callable[..., Array]:
    """Builds `generate(params, tokens i32[B, T], lengths i32[B], key) -> i32[B, T]`: it fills rows up to T.

    Row b keeps its first lengths[b] tokens; each further one is drawn from softmax(logits / temperature)
    among the top_k likeliest, or is the likeliest at temperature 0.
    """

    dtype = jnp.dtype(config.run.dtype)

    def generate(params: Any, tokens: Array, lengths: Array, key: Array) -> Array:
        model = model_from_params(model_config, cast(params, dtype))
        rows, positions = (
            jnp.arange(tokens.shape[0]),
            jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        )

        def write_token(place: Array, tokens: Array) -> Array:
            attention = FlashAttention(implementation=config.run.attention)
            hidden, _ = model(tokens, positions, attention)
            logits = model.logits(hidden[rows, place - 1])
            drawn = draw(
                logits, jax.random.fold_in(key, place), config.sample.temperature, config.sample.top_k
            )
            return tokens.at[:, place].set(jnp.where(place < lengths, tokens[:, place], drawn))

        return jax.lax.fori_loop(jnp.min(lengths), tokens.shape[1], write_token, tokens)

    return jax.jit(generate)


def draw(logits: Array, key: Array, temperature: float, top_k: int) -> Int[Array, "B"]:
    """One token a row from f32 logits [B, V]."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if 0 < top_k < logits.shape[-1]:
        lowest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.random.categorical(key, logits / temperature).astype(jnp.int32)


def write_samples(
    generate: Callable[..., Array],
    config: TrainConfig,
    params: Any,
    tokenizer: Any,
    step: int,
    max_positions: int,
) -> list[str]:
    """A text for each of config.sample.prompts, the prompt included; it ends at an end-of-text token."""
    eos = tokenizer.eos_token_id
    prompts = [[eos, *tokenizer.encode(text, add_special_tokens=False)] for text in config.sample.prompts]
    prompts = [prompt[-(max_positions - 1) :] for prompt in prompts]
    length = min(max_positions, max(map(len, prompts)) + config.sample.num_tokens)
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    key = jax.random.fold_in(jax.random.key(config.run.seed), step)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    rows = np.asarray(generate(params, tokens, lengths, key)).tolist()
    return [_text(tokenizer, row, prompt) for row, prompt in zip(rows, prompts, strict=True)]


def _text(tokenizer: Any, row: Sequence[int], prompt: Sequence[int]) -> str:
    body = list(row[1:] if prompt[0] == tokenizer.eos_token_id else row)
    written = len(prompt) - (len(row) - len(body))
    if tokenizer.eos_token_id in body[written:]:
        body = body[: body.index(tokenizer.eos_token_id, written)]
    return tokenizer.decode(body)
