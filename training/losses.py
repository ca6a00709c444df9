"""Cross entropy of next tokens, without ever holding the logits of a whole batch.

At V = 50257 the fp32 logits of 64 x 1024 tokens are 13 GB, and their gradient as much again. The tokens go
through the head in chunks, and each chunk's gradient is taken at once, while its logits are there: nothing is
kept and nothing is computed twice.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from training.data.batches import NO_TARGET

LOGITS_BYTES = (
    4 << 30
)  # of one chunk, in fp32: 4 chunks of 64 x 1024 tokens at V = 50257, 3.5% faster than 25


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A loss in nats a token as bits a byte of text: comparable across tokenizers."""
    return loss / math.log(2) / bytes_per_token


class LossSum(NamedTuple):
    """A loss that can be added up over chunks, micro-batches and devices before it is divided once."""

    total: Float[Array, ""]  # f32, nats, summed over the tokens that count
    count: Int[Array, ""]  # i32, how many they are


def cross_entropy(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> LossSum:
    """Sum of -log softmax(logits)[target] over the targets that are not NO_TARGET, in fp32."""
    logits = logits.astype(jnp.float32)
    counts = targets != NO_TARGET
    target_logits = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
    return LossSum(jnp.sum(jnp.where(counts, losses, 0.0)), jnp.sum(counts, dtype=jnp.int32))


def next_token_loss(
    head: Callable[[Array], Array],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    vocab_size: int,
    chunk_tokens: int | None = None,
) -> LossSum:
    """`cross_entropy(head(hidden), targets)` in chunks of `chunk_tokens` (None: as fit in LOGITS_BYTES).

    Equal to the plain computation up to the order of summation, in value and in gradient, with respect to
    `hidden` and to everything that `head` closes over.
    """
    num_tokens = targets.size
    hidden, targets = hidden.reshape(num_tokens, -1), targets.reshape(num_tokens)
    limit = chunk_tokens or max(1, LOGITS_BYTES // (4 * vocab_size))
    if num_tokens <= limit:
        return cross_entropy(head(hidden), targets)
    num_chunks = -(-num_tokens // limit)
    chunk = -(-num_tokens // num_chunks)  # chunks of equal size: the least padding
    padding = num_chunks * chunk - num_tokens
    hidden = jnp.pad(hidden, ((0, padding), (0, 0))).reshape(num_chunks, chunk, -1)
    targets = jnp.pad(targets, (0, padding), constant_values=NO_TARGET).reshape(num_chunks, chunk)
    pure_head, parameters = jax.closure_convert(head, hidden[0])
    total: Any = _chunked_sum(pure_head, parameters, hidden, targets)
    return LossSum(total, jnp.sum(targets != NO_TARGET, dtype=jnp.int32))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_sum(head: Callable, parameters: list[Array], hidden: Array, targets: Array) -> Array:
    def add_chunk(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        return total + cross_entropy(head(chunk[0], *parameters), chunk[1]).total, None

    return jax.lax.scan(add_chunk, jnp.zeros((), jnp.float32), (hidden, targets))[0]


def _chunked_sum_forward(
    head: Callable, parameters: list[Array], hidden: Array, targets: Array
) -> tuple[Array, Any]:
    """The sum and, in the same pass, its gradients: the backward pass only scales them."""

    def add_chunk(carry: tuple[Array, list[Array]], chunk: tuple[Array, Array]) -> tuple[Any, Array]:
        def chunk_loss(parameters: list[Array], hidden: Array) -> Array:
            return cross_entropy(head(hidden, *parameters), chunk[1]).total

        loss, (d_parameters, d_hidden) = jax.value_and_grad(chunk_loss, argnums=(0, 1))(parameters, chunk[0])
        total, sums = carry
        return (
            total + loss,
            [s + d.astype(s.dtype) for s, d in zip(sums, d_parameters, strict=True)],
        ), d_hidden

    sums = [jnp.zeros(parameter.shape, jnp.float32) for parameter in parameters]
    carry = (jnp.zeros((), jnp.float32), sums)
    (total, sums), d_hidden = jax.lax.scan(add_chunk, carry, (hidden, targets))
    d_parameters = [s.astype(parameter.dtype) for s, parameter in zip(sums, parameters, strict=True)]
    return total, (d_parameters, d_hidden)


def _chunked_sum_backward(head: Callable, residuals: Any, d_total: Array) -> tuple[Any, Array, None]:
    d_parameters, d_hidden = jax.tree.map(lambda d: (d * d_total).astype(d.dtype), residuals)
    return d_parameters, d_hidden, None


_chunked_sum.defvjp(_chunked_sum_forward, _chunked_sum_backward)
