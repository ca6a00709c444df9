"""Agreement with transformers on tiny random models of every shape (tests/golden/README.md)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxattn import load_model
from jaxattn.attention import FlashAttention
from jaxattn.weights import save_hf
from tests.jaxattn.paged import generate_greedily

TINY = sorted((Path(__file__).parents[1] / "golden" / "tiny").iterdir())
names = pytest.mark.parametrize("folder", TINY, ids=lambda folder: folder.name)


def test_every_golden_model_is_here():
    assert len(TINY) == 7


@names
def test_logits(folder):
    expected = load_file(folder / "expected.safetensors")
    model = load_model(folder).model
    tokens = jnp.asarray(expected["tokens"], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = jax.jit(lambda tokens, positions: model(tokens, positions, FlashAttention()))(
        tokens, positions
    )
    np.testing.assert_allclose(model.logits(hidden), expected["logits"], atol=1e-4)


@names
def test_round_trip_is_exact(folder, tmp_path):
    loaded = load_model(folder)
    save_hf(loaded.model, tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.dtype == after[name].dtype
        np.testing.assert_array_equal(array, after[name])
    assert load_model(tmp_path).model.config == loaded.model.config


@pytest.mark.parametrize("name", ["gpt2_tied", "llama_llama3_rope"])
def test_paged_generation_is_the_argmax_of_whole_forwards(name):
    folder = next(folder for folder in TINY if folder.name == name)
    model = load_model(folder).model
    prompts = [[5, 17, 3, 80, 41, 9, 2, 33, 71], [60], [8, 8, 90, 12]]
    generated = generate_greedily(model, prompts, 6, page_size=8, padded_length=10)
    forward = jax.jit(lambda tokens, positions: model(tokens, positions, FlashAttention())[0])
    for prompt, output in zip(prompts, generated, strict=True):
        whole = jnp.asarray([prompt + output])
        hidden = forward(whole, jnp.arange(whole.shape[1])[None])
        best = jnp.argmax(model.logits(hidden), axis=-1)[0]
        assert best[len(prompt) - 1 : -1].tolist() == output
