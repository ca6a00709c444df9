import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn.attention import FlashAttention
from jaxattn.models import GPT2Config, LlamaConfig, cast, create_model, model_from_params, model_params
from training import step as step_module
from training.config import TrainConfig
from training.data.batches import NO_TARGET, Batch, Rows, cut_rows
from training.step import batch_gradients, batch_loss, init_train_state, make_eval_step, make_train_step

VOCAB, EOS, LENGTH = 17, 0, 12
SIZES = {"vocab_size": VOCAB, "num_layers": 1, "embed_dim": 16, "num_heads": 2, "max_positions": LENGTH}
MODELS = {
    "gpt2": GPT2Config(**SIZES),
    "llama": LlamaConfig(**SIZES, num_kv_heads=1, mlp_dim=32),
}


def make_config(**run) -> TrainConfig:
    run = {"batch_size": 4, "num_steps": 10, **run}
    return TrainConfig.from_dict(
        {"run": run, "schedule": {"warmup_steps": 0}, "optimizer": {"clip_norm": None}}
    )


def make_params(model_config, seed=0):
    """Random everywhere, so that no bias hides at zero."""
    params = model_params(create_model(model_config, seed=seed))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def make_batch(seed=0, rows=4) -> Batch:
    """Packed documents; each row has another number of targets."""
    stream = np.random.default_rng(seed).integers(0, VOCAB, 200)
    places = Rows(np.arange(rows) * 15, np.full(rows, 199))
    batch = cut_rows(stream.astype(np.uint16), places, LENGTH, EOS, "packed")
    for row in range(rows):
        batch.targets[row, : 3 * row] = NO_TARGET
    return batch


def assert_trees_close(got, want, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


def test_updates_do_not_depend_on_micro_batches():
    """Rows have 12, 9, 6 and 3 targets: a mean of the micro-batches' means would give another update."""
    model_config, batch = MODELS["gpt2"], make_batch()
    after = {}
    for micro in (1, 2, 4):
        config = make_config(micro_batch_size=micro)
        state = init_train_state(config, make_params(model_config))
        state, metrics = make_train_step(config, model_config)(state, batch)
        assert int(metrics.num_tokens) == 12 + 9 + 6 + 3
        after[micro] = (state.optimizer.adam.mu, metrics.loss, metrics.gradient_norm)
    for micro in (1, 2):
        assert_trees_close(after[micro], after[4], rtol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_loss_is_that_of_each_document_alone(family):
    """Packed rows against the model run on every document by itself, added up token by token."""
    model_config, batch = MODELS[family], make_batch()
    params = make_params(model_config)

    @jax.jit
    def log_probs_of(tokens):
        model = model_from_params(model_config, params)
        hidden, _ = model(tokens[None], jnp.arange(LENGTH)[None], FlashAttention())
        return jax.nn.log_softmax(model.logits(hidden)[0])

    total, count = 0.0, 0
    for row in range(4):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            inside = batch.segment_ids[row] == segment
            tokens, targets = batch.tokens[row][inside], batch.targets[row][inside]
            log_probs = np.asarray(log_probs_of(np.pad(tokens, (0, LENGTH - len(tokens)))), np.float64)
            counts = targets != NO_TARGET
            total -= log_probs[np.arange(len(tokens)), targets * counts][counts].sum()
            count += counts.sum()
    assert batch.segment_ids.max() > 1
    loss = make_eval_step(make_config(), model_config)(params, batch)
    assert int(loss.count) == count
    np.testing.assert_allclose(loss.total, total, rtol=1e-5)


def test_nothing_crosses_the_border_of_a_document():
    """Changing one document leaves logits and gradients of the others exactly as they were."""
    model_config, config = MODELS["gpt2"], make_config()
    params = make_params(model_config)
    stream = np.array([EOS, 1, 2, 3, 4, EOS, 5, 6, 7, 8, 9, 10, 11], np.uint16)
    changed = stream.copy()
    changed[1:5] = [12, 13, 14, 15]
    second = np.arange(LENGTH) >= 5  # the second document

    def loss_of_second(params, stream, pack):
        rows = Rows(np.array([0]), np.array([LENGTH]))
        batch = cut_rows(stream, rows, LENGTH, EOS, "packed" if pack else "stream")
        batch = batch._replace(targets=np.where(second, batch.targets, NO_TARGET))
        return batch_loss(config, model_config, params, batch, None).total

    grad = jax.value_and_grad(loss_of_second)
    packed, packed_changed = grad(params, stream, True), grad(params, changed, True)
    jax.tree.map(np.testing.assert_array_equal, packed, packed_changed)
    assert float(grad(params, stream, False)[0]) != float(grad(params, changed, False)[0])
    tokens = packed[1]["token_embedding"]["table"]
    assert float(jnp.abs(tokens[8]).max()) > 0


def test_padding_the_vocabulary_changes_nothing_but_speed(monkeypatch):
    batch = make_batch()
    for tied in (True, False):
        model_config = dataclasses.replace(MODELS["llama"], tie_embeddings=tied)
        params = make_params(model_config)
        results = []
        for smallest in (4096, 1):
            monkeypatch.setattr(step_module, "MIN_PADDED_VOCAB", smallest)
            loss = lambda params: batch_loss(make_config(), model_config, params, batch, None).total  # noqa: B023
            lowered = jax.jit(jax.value_and_grad(loss)).lower(params)
            assert (f"x{step_module.VOCAB_MULTIPLE}xf32" in lowered.as_text()) == (smallest == 1)
            results.append(lowered.compile()(params))
        assert_trees_close(*results)


def test_masters_stay_float32_and_compute_is_bfloat16():
    model_config, batch = MODELS["gpt2"], make_batch()
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = make_config(dtype=dtype)
        state = init_train_state(config, make_params(model_config))
        lowered = make_train_step(config, model_config).lower(state, batch)
        assert ("bf16" in lowered.as_text()) == (dtype == "bfloat16")
        state, metrics = lowered.compile()(state, batch)
        leaves = jax.tree.leaves((state.params, state.optimizer.adam.mu, state.optimizer.adam.nu))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
        losses[dtype] = float(metrics.loss)
    assert losses["float32"] != losses["bfloat16"]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.02)


def test_steps_smaller_than_bfloat16_can_hold_are_not_lost():
    """At a rate of 1e-5 a bf16 weight near 0.1 would not move at all; the masters do, at that rate."""
    model_config, batch = MODELS["gpt2"], make_batch()
    config = make_config(dtype="bfloat16")
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-5, weight_decay=0.0)
    )
    before = make_params(model_config)
    state, _ = make_train_step(config, model_config)(
        init_train_state(config, make_params(model_config)), batch
    )
    moves = jax.tree.map(lambda a, b: jnp.abs(a - b), state.params, before)
    np.testing.assert_allclose(jnp.median(moves["blocks"]["0"]["mlp"]["up"]["kernel"]), 1e-5, rtol=0.02)


def test_frequent_tokens_get_their_whole_gradient():
    """4,000 equal gradients on one row of the table: a bf16 sum of them would stop growing at 256."""
    table = create_model(MODELS["gpt2"]).token_embedding
    graph, state = nnx.split(table)
    tokens = jnp.full((4000,), 3)

    def total(state):
        return jnp.sum(nnx.merge(graph, state)(tokens).astype(jnp.float32))

    gradient = jax.grad(total)(cast(state, jnp.bfloat16))["table"]
    np.testing.assert_allclose(gradient[3].astype(jnp.float32), 4000.0, rtol=0.005)


def test_remat_changes_nothing_but_memory():
    model_config, batch = MODELS["gpt2"], make_batch()
    gradients, has_remat = {}, {}
    for remat in (False, True):
        config, params = make_config(remat=remat), make_params(model_config)
        loss = lambda params, config=config: batch_gradients(
            config, model_config, params, batch, jax.random.key(0)
        )
        has_remat[remat] = "remat" in str(jax.make_jaxpr(loss)(params))
        gradients[remat] = jax.jit(loss)(params)
    assert has_remat == {False: False, True: True}
    assert_trees_close(gradients[True], gradients[False])


def test_the_state_is_donated():
    config, model_config = make_config(), MODELS["gpt2"]
    state = init_train_state(config, make_params(model_config))
    make_train_step(config, model_config)(state, make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_bad_parameters_are_counted_inside_the_step_and_not_spread():
    config, model_config, batch = make_config(), MODELS["gpt2"], make_batch()
    params = make_params(model_config)
    params["token_embedding"]["table"] = params["token_embedding"]["table"].at[3, 0].set(jnp.inf)
    before = jax.tree.map(np.array, params)
    state, step = init_train_state(config, params), make_train_step(config, model_config)
    for count in (1, 2, 3):
        state, metrics = step(state, batch)
        assert bool(metrics.is_skipped)
        assert int(metrics.num_skipped_in_row) == count == int(state.step)
    jax.tree.map(np.testing.assert_array_equal, state.params, before)


def test_dropout_follows_from_seed_and_step():
    model_config, batch = dataclasses.replace(MODELS["gpt2"], dropout_rate=0.3), make_batch()
    losses = {}
    for seed in (0, 1):
        config = make_config(seed=seed)
        step = make_train_step(config, model_config)
        for name, number in (("first", 1), ("again", 1), ("later", 2)):
            state = init_train_state(config, make_params(model_config))._replace(step=jnp.int32(number))
            losses[seed, name] = float(step(state, batch)[1].loss)
    assert losses[0, "first"] == losses[0, "again"]
    assert len(set(losses.values())) == 4


def test_evaluation_drops_nothing():
    batch, params = make_batch(), make_params(MODELS["gpt2"])
    configs = [dataclasses.replace(MODELS["gpt2"], dropout_rate=rate) for rate in (0.0, 0.3)]
    losses = [float(batch_loss(make_config(), config, params, batch, None).total) for config in configs]
    assert losses[0] == losses[1]


def test_a_run_compiles_its_step_once():
    config, model_config = make_config(), MODELS["gpt2"]
    state, step = init_train_state(config, make_params(model_config)), make_train_step(config, model_config)
    for seed in range(3):
        state, _ = step(state, make_batch(seed))
    assert step._cache_size() == 1
