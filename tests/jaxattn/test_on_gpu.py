"""On a Hopper GPU: the kernels are chosen, fallbacks agree with them, and models still match transformers."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxattn import load_model
from jaxattn.attention import FlashAttention, dot_product_attention
from pallas_kernels.variants import announce

pytestmark = pytest.mark.gpu
TINY = sorted((Path(__file__).parents[1] / "golden" / "tiny").iterdir())


def inputs(seed=0, shape=(2, 256, 256, 8, 2, 64)):
    batch, t, s, n, k, h = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = ((batch, t, n, h), (batch, s, k, h), (batch, s, k, h))
    return [jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, sizes, strict=True)]


LENGTHS = {
    "query_seq_lengths": jnp.array([200, 256], jnp.int32),
    "key_value_seq_lengths": jnp.array([17, 256], jnp.int32),
}
SEGMENTS = jnp.repeat(jnp.arange(8, dtype=jnp.int32), 32)[None].repeat(2, axis=0)
CALLS = {
    "causal": ({"is_causal": True}, "sm90"),
    "lengths": (LENGTHS, "sm90"),
    "window": ({"is_causal": True, "local_window_size": (31, 0)}, "sm90"),
    "mask": ({"mask": jnp.eye(256, dtype=bool)[None, None].at[0, 0, 3].set(False)}, "xla"),
    "segments": ({"query_segment_ids": SEGMENTS, "key_value_segment_ids": SEGMENTS}, None),
    "bias": ({"bias": jnp.ones((1, 8, 256, 256), jnp.bfloat16).cumsum(axis=-1) / 64}, None),
    "dropout": ({"dropout_rate": 0.3, "dropout_key": jax.random.key(4)}, None),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_choice_agrees_with_the_reference(name, caplog):
    options, chosen = CALLS[name]
    announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="jaxattn"):
        actual = dot_product_attention(*inputs(), **options)
    expected = dot_product_attention(*inputs(), **options, implementation="reference")
    difference = np.abs(np.asarray(actual, np.float32) - np.asarray(expected, np.float32))
    assert difference.max() < 0.03
    if chosen is not None:
        assert f"computed by '{chosen}'" in caplog.text


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"is_causal": True, "local_window_size": (31, 0)}, LENGTHS]
)
def test_cudnn_agrees_with_the_reference(options):
    actual = dot_product_attention(*inputs(), **options, implementation="cudnn")
    expected = dot_product_attention(*inputs(), **options, implementation="reference")
    difference = np.abs(np.asarray(actual, np.float32) - np.asarray(expected, np.float32))
    assert difference.max() < 0.03


@pytest.mark.parametrize("folder", TINY, ids=lambda folder: folder.name)
def test_golden_logits(folder):
    expected = load_file(folder / "expected.safetensors")
    model = load_model(folder).model
    tokens = jnp.asarray(expected["tokens"], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    with jax.default_matmul_precision("highest"):
        hidden, _ = model(tokens, positions, FlashAttention())
        logits = model.logits(hidden)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
