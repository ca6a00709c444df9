import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from training.config import OptimizerConfig, ScheduleConfig
from training.optimizer import init_optimizer, learning_rate, optimizer_update


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("cosine", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 54: 0.55, 104: 0.1, 200: 0.1}),
        ("linear", {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 54: 0.55, 29: 0.775, 104: 0.1, 200: 0.1}),
        ("constant", {0: 0.25, 3: 1.0, 54: 1.0, 104: 1.0}),
    ],
)
def test_learning_rates(decay, expected):
    schedule = ScheduleConfig(warmup_steps=4, decay=decay, final_fraction=0.1)
    for step, share in expected.items():
        rate = learning_rate(schedule, OptimizerConfig(learning_rate=2.0), 105, step)
        np.testing.assert_allclose(rate, 2.0 * share, rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    schedule = ScheduleConfig(warmup_steps=0, decay="cosine", final_fraction=0.0)
    rates = [float(learning_rate(schedule, OptimizerConfig(learning_rate=1.0), 5, step)) for step in range(5)]
    np.testing.assert_allclose(rates, [1.0, 0.8535534, 0.5, 0.1464466, 0.0], atol=1e-6)


def random_params(seed: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(seed), 2)
    return {"kernel": jax.random.normal(keys[0], (4, 3)), "bias": jax.random.normal(keys[1], (3,))}


def test_updates_are_those_of_optax():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.3, clip_norm=2.0, beta1=0.8, beta2=0.9)
    mask = lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
    reference = optax.chain(
        optax.clip_by_global_norm(2.0), optax.adamw(0.1, 0.8, 0.9, weight_decay=0.3, mask=mask)
    )
    params = expected = random_params(0)
    state, reference_state = init_optimizer(config, params), reference.init(params)
    for step in range(1, 5):
        gradients = jax.tree.map(
            jnp.multiply, random_params(step), {"kernel": step, "bias": step}
        )  # below and above the clip
        params, state, info = optimizer_update(config, jnp.float32(0.1), gradients, state, params)
        updates, reference_state = reference.update(gradients, reference_state, expected)
        expected = optax.apply_updates(expected, updates)
        np.testing.assert_allclose(info.gradient_norm, optax.tree.norm(gradients), rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), params, expected)
    assert int(state.num_skipped) == 0


def test_only_matrices_decay():
    config = OptimizerConfig(weight_decay=0.5)
    params = random_params(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    after, *_ = optimizer_update(config, jnp.float32(0.1), zeros, init_optimizer(config, params), params)
    np.testing.assert_allclose(after["kernel"], params["kernel"] * 0.95, rtol=1e-6)
    np.testing.assert_array_equal(after["bias"], params["bias"])


def test_no_clipping_when_it_is_off():
    gradients = jax.tree.map(lambda g: 100 * g, random_params(1))
    moments = {}
    for clip in (None, 1.0):
        config = OptimizerConfig(clip_norm=clip)
        state = init_optimizer(config, random_params(0))
        _, state, info = optimizer_update(config, jnp.float32(0.1), gradients, state, random_params(0))
        moments[clip] = optax.tree.norm(state.adam.mu)
    np.testing.assert_allclose(moments[None], 0.1 * info.gradient_norm, rtol=1e-5)
    np.testing.assert_allclose(moments[1.0], 0.1, rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_bad_gradients_change_nothing_and_are_counted(bad):
    config = OptimizerConfig()
    params = random_params(0)
    good = random_params(1)
    wrong = {**good, "bias": good["bias"].at[1].set(bad)}
    params, state, _ = optimizer_update(
        config, jnp.float32(0.1), good, init_optimizer(config, params), params
    )
    before = (params, state.adam)
    for count in (1, 2):
        params, state, info = optimizer_update(config, jnp.float32(0.1), wrong, state, params)
        jax.tree.map(np.testing.assert_array_equal, (params, state.adam), before)
        assert bool(info.is_skipped)
        assert (int(state.num_skipped), int(state.num_skipped_in_row)) == (count, count)
    params, state, info = optimizer_update(config, jnp.float32(0.1), good, state, params)
    assert not bool(info.is_skipped)
    assert (int(state.num_skipped), int(state.num_skipped_in_row)) == (2, 0)
    assert not np.array_equal(params["bias"], before[0]["bias"])


def test_zero_gradients_are_not_bad():
    config = OptimizerConfig()
    params = random_params(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    after, _, info = optimizer_update(config, jnp.float32(0.1), zeros, init_optimizer(config, params), params)
    assert not bool(info.is_skipped)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(after))
