import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.attention import FlashAttention
from jaxattn.models import GPT2Config, create_model, model_from_params, model_params
from jaxattn.tokenizer import ByteTokenizer
from training.config import SampleConfig, TrainConfig
from training.sample import draw, make_generate, write_samples

MODEL = GPT2Config(vocab_size=257, num_layers=1, embed_dim=16, num_heads=2, max_positions=32)
EOS = 256


def config_of(**sample) -> TrainConfig:
    return dataclasses.replace(TrainConfig(), sample=SampleConfig(**sample))


def params_of() -> dict:
    return jax.tree.map(lambda leaf: leaf * 20, model_params(create_model(MODEL, seed=0)))


def test_greedy_text_is_that_of_a_plain_loop():
    params = params_of()
    model = model_from_params(MODEL, params)
    config = config_of(prompts=("ab", "the cat"), temperature=0.0, num_tokens=6)
    prompts = [[EOS, *text.encode()] for text in config.sample.prompts]
    tokens = np.zeros((2, 14), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    got = make_generate(config, MODEL)(params, tokens, lengths, jax.random.key(0))

    @jax.jit
    def likeliest(ids):  # what follows a token cannot change it: the padding is harmless
        hidden, _ = model(ids[None], jnp.arange(14)[None], FlashAttention())
        return jnp.argmax(model.logits(hidden)[0], axis=-1)

    for row, prompt in zip(np.asarray(got).tolist(), prompts, strict=True):
        ids = list(prompt)
        while len(ids) < 14:
            ids.append(int(likeliest(np.pad(ids, (0, 14 - len(ids))))[len(ids) - 1]))
        assert row == ids


def test_draw_keeps_to_the_top_k_and_the_temperature():
    logits = jnp.tile(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), (4000, 1))
    assert set(draw(logits, jax.random.key(0), 0.0, 0).tolist()) == {0}
    every = np.bincount(draw(logits, jax.random.key(1), 1.0, 0), minlength=4) / 4000
    np.testing.assert_allclose(every, [0.4, 0.3, 0.2, 0.1], atol=0.03)
    top = np.bincount(draw(logits, jax.random.key(2), 1.0, 2), minlength=4) / 4000
    np.testing.assert_allclose(top, [4 / 7, 3 / 7, 0, 0], atol=0.03)
    cold = np.bincount(draw(logits, jax.random.key(3), 0.5, 0), minlength=4) / 4000
    np.testing.assert_allclose(cold, np.array([16, 9, 4, 1]) / 30, atol=0.03)


def samples_with(rows, config):
    generate = lambda params, tokens, lengths, key: np.array(rows)
    return write_samples(generate, config, None, ByteTokenizer(), 0, MODEL.max_positions)


def test_texts_end_at_the_end_of_text():
    config = config_of(prompts=("ab",), num_tokens=4)
    assert samples_with([[EOS, 97, 98, 99, EOS, 100, 101]], config) == ["abc"]
    assert samples_with([[EOS, 97, 98, 99, 100, 101, 102]], config) == ["abcdef"]
    assert samples_with([[EOS, 99, 100, EOS]], config_of(prompts=("",), num_tokens=3)) == ["cd"]


def test_long_prompts_keep_their_end():
    seen = {}

    def generate(params, tokens, lengths, key):
        seen.update(tokens=tokens.copy(), lengths=lengths)
        return tokens

    config = config_of(prompts=("x" * 100 + "yz",), num_tokens=10)
    text = write_samples(generate, config, None, ByteTokenizer(), 0, MODEL.max_positions)[0]
    assert seen["tokens"].shape == (1, 32)
    assert seen["lengths"].tolist() == [31]
    assert text.startswith("x" * 29 + "yz")
