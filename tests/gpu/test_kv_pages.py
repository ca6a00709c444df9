"""kv_pages' kernels on a Hopper GPU, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import copy_pages, paged_attention, write_kv
from tests.pallas_kernels.page_writes import copy_oracle, random_pool, random_tokens, write_oracle

pytestmark = pytest.mark.gpu

GPU_POOLS = [
    ((3, 40, 3, 8, 64), 77, jnp.bfloat16),
    ((2, 50, 2, 16, 128), 600, jnp.float16),
    ((2, 9, 8, 256, 256), 1500, jnp.float32),
    ((2, 30, 1, 64, 80), 200, jnp.bfloat16),
    ((1, 100, 12, 32, 64), 3000, jnp.bfloat16),
]


@pytest.mark.parametrize(("shape", "num_tokens", "dtype"), GPU_POOLS)
def test_write_and_copy(shape, num_tokens, dtype):
    pools, (key, value, slots) = random_pool(shape, dtype), random_tokens(shape, num_tokens, dtype)
    layer = shape[0] - 1
    written = write_kv(*pools, key, value, slots, layer=layer, implementation="sm90")
    for pages, tokens, actual in zip(pools, (key, value), written, strict=True):
        np.testing.assert_array_equal(actual, write_oracle(pages, tokens, slots, layer))
    src, dst = np.asarray([2, 0, 5, 0]), np.asarray([3, 1, 4, 0])
    for pages, actual in zip(pools, copy_pages(*pools, src, dst, implementation="sm90"), strict=True):
        np.testing.assert_array_equal(actual, copy_oracle(pages, src, dst))


def test_far_end_of_a_pool_beyond_2_to_the_31_elements():
    shape = (2, 80_000, 8, 16, 128)  # 2.6e9 elements
    _, num_pages, num_kv_heads, page_size, head_dim = shape
    pages = np.arange(num_pages - 1, num_pages - 8, -1, dtype=np.int32)
    num_tokens = 100
    key, value = random_pool((num_tokens, num_kv_heads, head_dim), jnp.bfloat16)
    token = np.arange(num_tokens)
    slots = pages[token // page_size] * page_size + token % page_size
    pool = [jnp.zeros(shape, jnp.bfloat16) for _ in range(2)]
    write = jax.jit(lambda *a: write_kv(*a, layer=1, implementation="sm90"), donate_argnums=(0, 1))
    pool = write(*pool, key, value, slots)
    copy = jax.jit(lambda *a: copy_pages(*a, implementation="sm90"), donate_argnums=(0, 1))
    pool = copy(*pool, pages[:1], np.asarray([num_pages - 20]))
    for array, tokens in zip(pool, (key, value), strict=True):
        far = np.asarray(array[1, pages]).transpose(0, 2, 1, 3).reshape(-1, num_kv_heads, head_dim)
        np.testing.assert_array_equal(far[:num_tokens], tokens)
        np.testing.assert_array_equal(array[1, num_pages - 20], array[1, pages[0]])
        untouched = array[1, : num_pages - 20]
        assert not jnp.any(untouched)
        assert not jnp.any(array[0])
    query = random_pool((1, 4 * num_kv_heads, head_dim), jnp.bfloat16)[0]
    lengths = np.asarray([num_tokens], np.int32)
    out = paged_attention(query, *pool, pages[None], lengths, layer=1, implementation="sm90")
    near = [array[1:, pages] for array in pool]
    table = np.arange(len(pages), dtype=np.int32)[None]
    expected = paged_attention(query, *near, table, lengths, implementation="reference")
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=2e-2)
