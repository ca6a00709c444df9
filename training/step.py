"""The training step: one jitted function over the whole state, which is donated."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxattn.attention import FlashAttention
from jaxattn.models import ModelConfig, cast, create_model, model_from_params, model_params
from training.config import TrainConfig
from training.data.batches import Batch
from training.losses import LossSum, next_token_loss
from training.optimizer import OptimizerState, init_optimizer, learning_rate, optimizer_update

VOCAB_MULTIPLE = 64
MIN_PADDED_VOCAB = 4096  # below, the padding would cost more than it saves


class TrainState(NamedTuple):
    """All that a run carries from step to step; with the config it determines the rest of the run."""

    params: dict[str, Any]  # nested, of f32 arrays, as jaxattn.models.model_params gives: the masters
    optimizer: OptimizerState
    step: Int[Array, ""]  # i32, the next step, skipped ones counted


class StepMetrics(NamedTuple):
    """Of one step, left on the device: the host reads them after it has started the next."""

    loss: Float[Array, ""]  # nats a token
    gradient_norm: Float[Array, ""]  # before clipping
    learning_rate: Float[Array, ""]
    num_tokens: Int[Array, ""]  # that the loss counted
    is_skipped: Bool[Array, ""]
    num_skipped: Int[Array, ""]
    num_skipped_in_row: Int[Array, ""]


def init_train_state(config: TrainConfig, params: Any) -> TrainState:
    return TrainState(params, init_optimizer(config.optimizer, params), jnp.zeros((), jnp.int32))


def make_train_step(
    config: TrainConfig, model_config: ModelConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Builds `train_step(state, batch) -> (state, metrics)` for batches of config.run.batch_size rows.

    The masters are cast to the compute dtype once a step. The gradient is that of (sum of losses) / (number
    of tokens) over the whole batch, however many micro-batches it is cut into.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        weights = cast(state.params, jnp.dtype(config.run.dtype))
        dropout_key = jax.random.fold_in(jax.random.key(config.run.seed), state.step)
        loss_sum, gradients = batch_gradients(config, model_config, weights, batch, dropout_key)
        count = jnp.maximum(loss_sum.count, 1).astype(jnp.float32)
        gradients = jax.tree.map(lambda g: g.astype(jnp.float32) / count, gradients)
        rate = learning_rate(config.schedule, config.optimizer, config.run.num_steps, state.step)
        params, optimizer, info = optimizer_update(
            config.optimizer, rate, gradients, state.optimizer, state.params
        )
        metrics = StepMetrics(
            loss=loss_sum.total / count,
            gradient_norm=info.gradient_norm,
            learning_rate=rate,
            num_tokens=loss_sum.count,
            is_skipped=info.is_skipped,
            num_skipped=optimizer.num_skipped,
            num_skipped_in_row=optimizer.num_skipped_in_row,
        )
        return TrainState(params, optimizer, state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0)


def make_eval_step(config: TrainConfig, model_config: ModelConfig) -> Callable[[Any, Batch], LossSum]:
    """Builds `eval_step(params, batch) -> LossSum`: no dropout, the same compute dtype as training."""

    def eval_step(params: Any, batch: Batch) -> LossSum:
        return batch_loss(config, model_config, cast(params, jnp.dtype(config.run.dtype)), batch, None)

    return jax.jit(eval_step)


def batch_gradients(
    config: TrainConfig, model_config: ModelConfig, weights: Any, batch: Batch, dropout_key: Array
) -> tuple[LossSum, Any]:
    """Loss sum of a batch and its gradient with respect to `weights`, one micro-batch after the other."""

    def micro_gradients(batch: Batch, key: Array) -> tuple[LossSum, Any]:
        def loss(weights: Any) -> tuple[Array, LossSum]:
            loss_sum = batch_loss(config, model_config, weights, batch, key)
            return loss_sum.total, loss_sum

        gradients, loss_sum = jax.grad(loss, has_aux=True)(weights)
        return loss_sum, gradients

    micro_size = config.num_micro_sequences
    num_micro = config.run.batch_size // micro_size
    if num_micro == 1:
        return micro_gradients(batch, dropout_key)

    def add_micro_batch(sums: Any, micro: tuple[Batch, Array]) -> tuple[Any, None]:
        return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, micro_gradients(*micro)), None

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), weights)
    sums = (LossSum(jnp.zeros(()), jnp.zeros((), jnp.int32)), zeros)
    micro_batches = jax.tree.map(lambda x: x.reshape(num_micro, micro_size, *x.shape[1:]), batch)
    return jax.lax.scan(add_micro_batch, sums, (micro_batches, jax.random.split(dropout_key, num_micro)))[0]


def batch_loss(
    config: TrainConfig, model_config: ModelConfig, weights: Any, batch: Batch, dropout_key: Array | None
) -> LossSum:
    """Forward pass of one micro-batch and the sum of its losses."""
    vocab_size = model_config.vocab_size
    weights, model_config = pad_vocabulary(weights, model_config)
    model = model_from_params(model_config, weights)  # nnx.merge, traced away
    rate = model_config.dropout_rate if dropout_key is not None else 0.0
    attention = FlashAttention(
        segment_ids=batch.segment_ids, dropout_rate=rate, implementation=config.run.attention
    )
    hidden, _ = model(
        batch.tokens,
        batch.positions,
        attention,
        dropout_key=dropout_key if rate else None,
        remat=config.run.remat and dropout_key is not None,
    )

    def head(hidden: Array) -> Array:
        logits = model.logits(hidden)
        is_token = jnp.arange(logits.shape[-1]) < vocab_size
        return logits if vocab_size == logits.shape[-1] else jnp.where(is_token, logits, -jnp.inf)

    return next_token_loss(head, hidden, batch.targets, vocab_size, config.run.loss_chunk_tokens)


def pad_vocabulary(weights: Any, model_config: ModelConfig) -> tuple[Any, ModelConfig]:
    """Rows of zeros up to a multiple of 64 for a large vocabulary, and the config that goes with them.

    The tensor cores read GPT-2's odd 50257 columns far slower than 50304: on an H200 a step of GPT-2 small
    takes 139 ms instead of 166. The model itself keeps its size.
    """
    if model_config.vocab_size < MIN_PADDED_VOCAB or model_config.vocab_size % VOCAB_MULTIPLE == 0:
        return weights, model_config
    wide_size = -(-model_config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    wide_config = dataclasses.replace(model_config, vocab_size=wide_size)
    wide = model_params(nnx.eval_shape(lambda: create_model(wide_config)))
    return jax.tree.map(_pad_to, weights, wide), wide_config


def _pad_to(array: Array, wide: Any) -> Array:
    return jnp.pad(array, [(0, new - old) for old, new in zip(array.shape, wide.shape, strict=True)])
