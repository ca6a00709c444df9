"""Small models, and static shapes that all engine tests share, so that each program compiles once."""

import jax
import pytest
from flax import nnx

from jaxattn.models import GPT2Config, LlamaConfig, create_model
from jaxattn.tokenizer import ByteTokenizer
from serving.engine import Engine

CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=257, num_layers=2, embed_dim=32, num_heads=4, max_positions=128, tie_embeddings=False
    ),
    "llama": LlamaConfig(
        vocab_size=257,
        num_layers=2,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=64,
        max_positions=128,
        tie_embeddings=False,
    ),
}
EOS = 256
MAX_MODEL_LEN = 64
MAX_NUM_SEQS = 4
PAGE_SIZE = 8
NUM_PAGES = 1024


@pytest.fixture(scope="session")
def models():
    """Random weights, larger than the initial ones, so that tokens depend on the whole context."""
    made = {name: create_model(config, seed=1) for name, config in CONFIGS.items()}
    return {name: sharpen(model) for name, model in made.items()}


def sharpen(model):
    graphdef, params = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, params))


@pytest.fixture
def make_engine(models):
    """Fresh engines of one shape; other options make other programs."""

    def make(name="llama", **options):
        shape = {"num_pages": NUM_PAGES, "max_num_seqs": MAX_NUM_SEQS, "page_size": PAGE_SIZE}
        options = {**shape, "max_model_len": MAX_MODEL_LEN, "eos_token_ids": [EOS], **options}
        return Engine(models[name], ByteTokenizer(), **options)

    return make
