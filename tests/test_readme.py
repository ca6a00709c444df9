"""What README.md shows of the Python API runs, and computes what it says."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxattn

README = (Path(__file__).parent.parent / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def run(word: str, **names) -> dict:
    """The names that the one snippet with this word in it leaves behind."""
    (snippet,) = [snippet for snippet in SNIPPETS if word in snippet]
    exec(snippet, names)
    return names


@pytest.fixture
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (1, 256, heads, 16)) for key, heads in zip(keys, (4, 2, 2), strict=True)]


def test_all_snippets_are_python():
    assert len(SNIPPETS) == 5
    for snippet in SNIPPETS:
        compile(snippet, "README.md", "exec")


def test_attention(qkv):
    (q, k, v), ids = qkv, jnp.repeat(jnp.arange(4), 64)[None]
    done = run("BlockMask", query=q, key=k, value=v, q=q, k=k, v=v, ids=ids, T=256, nnx=nnx, rngs=nnx.Rngs(0))
    i, j = np.arange(256)[:, None], np.arange(256)
    visible = (j <= i) & ((i - j <= 512) | (j < 64))
    assert done["mask"].to_dense()[0, 0].tolist() == visible.tolist()
    expected = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(visible))
    np.testing.assert_allclose(done["out"], expected, atol=1e-5)
    assert done["layer"](jnp.ones((1, 3, 512)), decode=False).shape == (1, 3, 512)


def test_ring_attention(qkv):
    q, k, v = qkv
    done = run("ring_attention", jax=jax, functools=functools, jaxattn=jaxattn, q=q, k=k, v=v)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(done["out"], expected, atol=1e-5)


def test_pages(qkv):
    """Two rows, of 5 tokens each and then one more."""
    q, k, v = (x[0, :12] for x in qkv)
    block_tables = jnp.asarray([[3], [1]])
    pages = {"k_pages": jnp.zeros((1, 4, 2, 8, 16)), "v_pages": jnp.zeros((1, 4, 2, 8, 16))}
    page_ids, offsets = jnp.repeat(block_tables[:, 0], 6), jnp.tile(jnp.arange(6), 2)
    done = run(
        "write_kv",
        **pages,
        key=k,
        value=v,
        page_ids=page_ids,
        page_size=8,
        offsets=offsets,
        query=q[5::6],
        block_tables=block_tables,
        kv_lengths=jnp.asarray([6, 6]),
        jaxattn=jaxattn,
    )
    rows = [x.reshape(2, 6, *x.shape[1:]) for x in (q, k, v)]
    expected = jax.nn.dot_product_attention(rows[0][:, 5:], *rows[1:])[:, 0]
    np.testing.assert_allclose(done["out"], expected, atol=1e-5)
