"""The models beside their golden logits: contracts, initialisation, dropout, dtype, errors."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn.attention import FlashAttention
from jaxattn.models import (
    MODELS,
    GPT2Config,
    LlamaConfig,
    RopeScaling,
    cast,
    config_from_dict,
    create_model,
    model_from_params,
    model_params,
)
from jaxattn.page_pool import PagedAttention, PagedBatch, init_page_pool
from pallas_kernels import device

SIZES = {"vocab_size": 50, "num_layers": 3, "embed_dim": 16, "num_heads": 4, "max_positions": 32}
CONFIGS = {
    "gpt2": GPT2Config(**SIZES),
    "gpt2_untied": GPT2Config(**SIZES, tie_embeddings=False, mlp_dim=24),
    "llama": LlamaConfig(**SIZES, num_kv_heads=2, mlp_dim=24),
    "llama_tied": LlamaConfig(
        **SIZES, num_kv_heads=1, mlp_dim=24, tie_embeddings=True, attention_bias=True, mlp_bias=True
    ),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
TOKENS = jax.random.randint(jax.random.key(0), (2, 9), 0, 50)
POSITIONS = jnp.broadcast_to(jnp.arange(9), (2, 9))


def forward(model, tokens=TOKENS, positions=POSITIONS, attention=None, **options):
    hidden, _ = model(tokens, positions, attention or FlashAttention(), **options)
    return hidden


@every_config
def test_shapes_dtypes_and_the_same_seed_the_same_model(config):
    model = create_model(config, seed=3)
    hidden = forward(model)
    assert hidden.shape == (2, 9, 16)
    logits = model.logits(hidden[:, -1])
    assert logits.shape == (2, 50)
    assert logits.dtype == jnp.float32
    assert (forward(create_model(config, seed=3)) == hidden).all()
    assert (forward(create_model(config, seed=4)) != hidden).any()


@every_config
def test_computes_in_the_dtype_of_its_parameters(config):
    model = create_model(config, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}
    hidden = forward(model)
    assert hidden.dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32
    graphdef, params = nnx.split(create_model(config))
    same = nnx.merge(graphdef, cast(params, jnp.bfloat16))
    assert (forward(same) == hidden).all()


@every_config
def test_no_token_sees_the_future_or_another_document(config):
    model = create_model(config)
    expected = forward(model)
    changed = forward(model, TOKENS.at[:, 5:].set(7))
    np.testing.assert_array_equal(changed[:, :5], expected[:, :5])
    assert (changed[:, 5:] != expected[:, 5:]).any()
    segments = jnp.where(POSITIONS < 4, 0, 1)
    positions = jnp.where(POSITIONS < 4, POSITIONS, POSITIONS - 4)
    packed = forward(model, TOKENS, positions, FlashAttention(segment_ids=segments))
    alone = forward(model, TOKENS[:, 4:], positions[:, 4:])
    np.testing.assert_allclose(packed[:, 4:], alone, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_block_is_lowered_once_for_all_layers(name):
    model = create_model(CONFIGS[name])
    module = jax.jit(lambda tokens: forward(model, tokens)).lower(TOKENS).as_text()
    blocks = re.findall(r"func\.func private @(_block\w*)\(", module)
    assert len(blocks) == 1
    assert module.count(f"call @{blocks[0]}(") == CONFIGS[name].num_layers


@every_config
def test_remat_gives_the_same_gradients(config):
    graphdef, params = nnx.split(create_model(config))

    def loss(params, remat):
        model = nnx.merge(graphdef, params)
        return jnp.square(model.logits(forward(model, remat=remat))).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for plain, again in zip(
        jax.tree.leaves(gradient(params, False)), jax.tree.leaves(gradient(params, True)), strict=True
    ):
        np.testing.assert_allclose(again, plain, atol=1e-6)
        assert jnp.abs(plain).sum() > 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dropout_acts_only_with_a_key_and_differs_between_layers(name):
    config = dataclasses.replace(CONFIGS[name], dropout_rate=0.2)
    model = create_model(config)
    plain = forward(model)
    dropped = forward(model, dropout_key=jax.random.key(1))
    assert (plain == forward(create_model(CONFIGS[name]))).all()
    assert (dropped == forward(model, dropout_key=jax.random.key(1))).all()
    assert (dropped != forward(model, dropout_key=jax.random.key(2))).any()
    keys_seen = []

    @jax.tree_util.register_static
    class Spy:
        def __call__(self, layer, q, k, v, *, dropout_key=None):
            jax.debug.callback(
                lambda data: keys_seen.append(tuple(np.ravel(data))), jax.random.key_data(dropout_key)
            )
            return q, self

    forward(model, attention=Spy(), dropout_key=jax.random.key(1)).block_until_ready()
    jax.effects_barrier()
    assert len(set(keys_seen)) == len(keys_seen) == config.num_layers


def test_initialisation_is_gpt2s():
    config = GPT2Config(vocab_size=400, num_layers=8, embed_dim=64, num_heads=4, max_positions=64)
    params = model_params(create_model(config))
    block = params["blocks"]["0"]
    for kernel in (
        block["attention"]["qkv"]["kernel"],
        block["mlp"]["up"]["kernel"],
        params["token_embedding"]["table"],
    ):
        assert abs(float(jnp.std(kernel)) - 0.02) < 0.001
    for kernel in (block["attention"]["out"]["kernel"], block["mlp"]["down"]["kernel"]):
        assert abs(float(jnp.std(kernel)) - 0.02 / 4) < 0.0003  # sqrt(2 * 8) = 4
    assert not block["attention"]["qkv"]["bias"].any()


@pytest.mark.parametrize(
    ("family", "preset", "count"),
    [
        ("gpt2", "small", 124_439_808),
        ("gpt2", "medium", 354_823_168),
        ("gpt2", "large", 774_030_080),
        ("gpt2", "xl", 1_557_611_200),
        ("llama", "smollm2-135m", 134_515_008),
        ("llama", "3-8b", 8_030_261_248),
    ],
)
def test_presets_have_the_published_sizes(family, preset, count):
    family = MODELS[family]
    abstract = nnx.eval_shape(lambda: family.module(family.presets[preset], rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(abstract))) == count


@every_config
def test_config_and_params_round_trip(config):
    assert config_from_dict(config.to_dict()) == config
    model = create_model(config)
    again = model_from_params(config, model_params(model))
    assert (forward(again) == forward(model)).all()


def test_config_with_rope_scaling_round_trips():
    config = LlamaConfig(**SIZES, num_kv_heads=2, rope_scaling=RopeScaling(kind="llama3", factor=8.0))
    assert config_from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({}, "model_type"),
        ({"model_type": "gpt2", "n_layer": 3}, "n_layer"),
        ({"model_type": "gpt2", "num_layers": 0}, "num_layers"),
        ({"model_type": "gpt2", "num_heads": 7}, "num_heads"),
        ({"model_type": "gpt2", "dropout_rate": 1.0}, "dropout_rate"),
        ({"model_type": "llama", "num_kv_heads": 5}, "num_kv_heads"),
        ({"model_type": "llama", "head_dim": 5}, "head_dim"),
        ({"model_type": "llama", "rope_scaling": {"kind": "yarn", "factor": 2.0}}, "rope_scaling"),
        ({"model_type": "llama", "rope_theta": 0.0}, "rope_theta"),
    ],
)
def test_wrong_configs_are_named(fields, named):
    with pytest.raises(ValueError, match=named):
        config_from_dict(fields)


def test_wrong_params_are_named():
    config = CONFIGS["llama"]
    params = model_params(create_model(config))
    with pytest.raises(ValueError, match=r"final_norm\.scale has shape"):
        model_from_params(config, params | {"final_norm": {"scale": jnp.ones(3)}})
    with pytest.raises(ValueError, match="missing"):
        model_from_params(config, {k: v for k, v in params.items() if k != "final_norm"})
    with pytest.raises(ValueError, match=r"not known.*extra"):
        model_from_params(config, params | {"extra": jnp.ones(3)})


def test_training_lowers_each_hopper_kernel_once(monkeypatch):
    """Models and kernels meet without a GPU: one forward, at most two backward kernels for eight layers."""
    monkeypatch.setattr(device, "is_abstract_gpu", lambda: True)
    config = dataclasses.replace(CONFIGS["gpt2"], num_layers=8, embed_dim=256)
    graphdef, params = nnx.split(create_model(config, dtype=jnp.bfloat16))

    def loss(params):
        model = nnx.merge(graphdef, params)
        return model.logits(forward(model, attention=FlashAttention(implementation="sm90"))).mean()

    assert num_kernels(jax.grad(loss), params) <= 3


def test_serving_lowers_each_hopper_kernel_once(monkeypatch):
    """Write, attend, and combine the splits."""
    monkeypatch.setattr(device, "is_abstract_gpu", lambda: True)
    config = dataclasses.replace(CONFIGS["llama"], num_layers=8, embed_dim=256, head_dim=64)
    graphdef, params = nnx.split(create_model(config, dtype=jnp.bfloat16))
    pool, ids = init_page_pool(config, 9, 16, jnp.bfloat16), jnp.zeros(4, jnp.int32)

    def decode(params, pool):
        attention = PagedAttention(pool, PagedBatch(jnp.zeros((4, 2), jnp.int32), ids, ids), "sm90")
        return nnx.merge(graphdef, params)(ids, ids, attention)

    assert num_kernels(decode, params, pool) <= 5


def num_kernels(step, *inputs):
    module = jax.jit(step).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r"custom_call @mosaic_gpu", module)
    assert kernels
    return len(kernels)
