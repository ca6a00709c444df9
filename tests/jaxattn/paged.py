"""The smallest loop that generates through the page pool: what tests compare with whole-sequence forwards."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxattn.page_pool import PagedAttention, PagedBatch, init_page_pool


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def step(
    graphdef: Any, params: Any, pool: Any, tokens: Any, positions: Any, batch: PagedBatch, last: Any
) -> Any:
    """Logits f32[R, V] of the last token of each row, and the pool with this step's K and V."""
    model = nnx.merge(graphdef, params)
    hidden, attention = model(tokens, positions, PagedAttention(pool, batch))
    if hidden.ndim == 3:
        hidden = hidden[jnp.arange(hidden.shape[0]), last]
    return model.logits(hidden), attention.pool


def generate_greedily(
    model: Any, prompts: list[list[int]], num_tokens: int, *, page_size: int = 16, padded_length: int
) -> list[list[int]]:
    """num_tokens greedy tokens for each prompt, all rows in one batch; pages are handed out back to front."""
    graphdef, params = nnx.split(model)
    num_rows, lengths = len(prompts), np.array([len(prompt) for prompt in prompts], np.int32)
    width = -(-(padded_length + num_tokens) // page_size)
    pool = init_page_pool(model.config, 1 + num_rows * width, page_size, jnp.float32)
    tables = np.arange(num_rows * width, 0, -1, dtype=np.int32).reshape(num_rows, width)

    def slots_of(positions: np.ndarray) -> np.ndarray:
        rows = np.arange(num_rows).reshape(-1, *[1] * (positions.ndim - 1))
        return tables[rows, positions // page_size] * page_size + positions % page_size

    tokens = np.zeros((num_rows, padded_length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    positions = np.broadcast_to(np.arange(padded_length, dtype=np.int32), tokens.shape)
    slots = np.where(positions < lengths[:, None], slots_of(positions), -1)
    batch = PagedBatch(tables, lengths, slots)
    logits, pool = step(graphdef, params, pool, tokens, positions, batch, lengths - 1)
    outputs = [np.argmax(logits, axis=-1).astype(np.int32)]
    while len(outputs) < num_tokens:
        batch = PagedBatch(tables, lengths + 1, slots_of(lengths))
        logits, pool = step(graphdef, params, pool, outputs[-1], lengths, batch, lengths)
        outputs.append(np.argmax(logits, axis=-1).astype(np.int32))
        lengths = lengths + 1
    return np.stack(outputs, axis=1).tolist()
