"""AdamW: learning rate by step, global-norm clipping, and an update that a bad gradient cannot spoil."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from training.config import OptimizerConfig, ScheduleConfig


class OptimizerState(NamedTuple):
    """Moments as trees like the parameters', in fp32."""

    adam: optax.ScaleByAdamState
    num_skipped: Int[Array, ""]  # i32, steps with a NaN or infinite gradient
    num_skipped_in_row: Int[Array, ""]  # i32, of them the latest without a good one between


class UpdateInfo(NamedTuple):
    learning_rate: Float[Array, ""]
    gradient_norm: Float[Array, ""]  # before clipping
    is_skipped: Bool[Array, ""]


def learning_rate(
    schedule: ScheduleConfig, optimizer: OptimizerConfig, num_steps: int, step: Array | int
) -> Array:
    """f32[], rate of update `step` (from 0): linear to the peak in W steps, then decay until the last step.

    With p = (step - W) / (num_steps - 1 - W) in [0, 1] and end fraction e, the peak is multiplied by
    e + (1 - e) (1 + cos(pi p)) / 2 (cosine), by 1 - (1 - e) p (linear), or by 1 (constant).
    """
    warmup, end = schedule.warmup_steps, schedule.final_fraction
    step = jnp.asarray(step, jnp.float32)
    progress = jnp.clip((step - warmup) / max(1, num_steps - 1 - warmup), 0.0, 1.0)
    factors = {
        "cosine": end + (1 - end) * (1 + jnp.cos(jnp.pi * progress)) / 2,
        "linear": 1 - (1 - end) * progress,
        "constant": jnp.ones(()),
    }
    warm = jnp.minimum(1.0, (step + 1) / max(1, warmup))  # the first update already moves
    return optimizer.learning_rate * warm * factors[schedule.decay]


def init_optimizer(config: OptimizerConfig, params: Any) -> OptimizerState:
    adam = _scale_by_adam(config).init(params)
    assert isinstance(adam, optax.ScaleByAdamState)
    return OptimizerState(adam, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def optimizer_update(
    config: OptimizerConfig, rate: Array, gradients: Any, state: OptimizerState, params: Any
) -> tuple[Any, OptimizerState, UpdateInfo]:
    """One AdamW step (Loshchilov and Hutter, 2019) on clipped gradients; params f32.

    g is multiplied by min(1, clip_norm / |g|); p becomes p - rate (m / (sqrt(v) + eps) + decay p), decay only
    where p has two or more dimensions. If |g| is not finite, params and moments stay as they are and the step
    is counted.
    """
    gradients = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    norm = optax.tree.norm(gradients)
    is_good = jnp.isfinite(norm)
    if config.clip_norm is not None:
        scale = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-30))
        gradients = jax.tree.map(lambda g: g * scale, gradients)
    directions, adam = _scale_by_adam(config).update(gradients, state.adam)

    def update(param: Array, direction: Array) -> Array:
        decay = config.weight_decay if param.ndim >= 2 else 0.0
        return jnp.where(is_good, param - rate * (direction + decay * param), param)

    params = jax.tree.map(update, params, directions)
    adam = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), adam, state.adam)
    is_bad = jnp.int32(~is_good)
    state = OptimizerState(adam, state.num_skipped + is_bad, (state.num_skipped_in_row + 1) * is_bad)
    return params, state, UpdateInfo(rate, norm, ~is_good)


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
