"""kv_pages' kernels on a Hopper GPU, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import copy_pages, gather_pages, paged_attention, scatter_pages, write_kv
from pallas_kernels.kv_pages.quantize import dequantize
from tests.pallas_kernels.page_writes import (
    CODES,
    copy_oracle,
    quantize_oracle,
    random_pool,
    random_tokens,
    scales_of,
    write_oracle,
)

pytestmark = pytest.mark.gpu

GPU_POOLS = [
    ((3, 40, 3, 8, 64), 77, jnp.bfloat16, jnp.bfloat16),
    ((2, 50, 2, 16, 128), 600, jnp.float16, jnp.float16),
    ((2, 9, 8, 256, 256), 1500, jnp.float32, jnp.float32),
    ((2, 30, 1, 64, 80), 200, jnp.bfloat16, jnp.bfloat16),
    ((2, 100, 1, 32, 80), 3000, jnp.bfloat16, jnp.bfloat16),
    ((1, 100, 12, 32, 64), 3000, jnp.bfloat16, jnp.bfloat16),
    ((2, 50, 8, 16, 128), 600, jnp.bfloat16, jnp.int8),
    ((2, 50, 8, 16, 128), 1, jnp.bfloat16, jnp.float8_e4m3fn),
    ((3, 40, 3, 8, 64), 77, jnp.bfloat16, jnp.int8),
    ((2, 40, 12, 8, 80), 300, jnp.float32, jnp.float8_e4m3fn),
    ((1, 30, 1, 64, 256), 1000, jnp.float16, jnp.int8),
    ((1, 9, 67, 16, 64), 33, jnp.bfloat16, jnp.int8),
]


def assert_written(actual, expected):
    """Equal, but for codes next to a tie: a GPU's division is off by a few units in the last place."""
    if actual.dtype.itemsize > 1:
        np.testing.assert_array_equal(actual, expected)
        return
    step = np.abs(actual.astype(np.float32) - expected.astype(np.float32))
    assert (step <= np.maximum(np.abs(expected.astype(np.float32)) / 8, 1)).all()
    assert np.mean(step > 0) < 2e-3


@pytest.mark.parametrize(("shape", "num_tokens", "token_dtype", "dtype"), GPU_POOLS)
def test_write_and_copy(shape, num_tokens, token_dtype, dtype):
    pools, (key, value, slots) = random_pool(shape, dtype), random_tokens(shape, num_tokens, token_dtype)
    slots[0] = abs(slots[0]) - (slots[0] < 0)
    key[0, 0], value[0] = 0, 1000 * value[0]
    layer, tokens = shape[0] - 1, (key, value)
    if jnp.dtype(dtype).name in CODES:
        codes, scales = zip(*(quantize_oracle(x, dtype) for x in tokens), strict=True)
        tokens = codes + scales
    options = scales_of(pools) | {"implementation": "sm90"}
    written = write_kv(*pools[:2], key, value, slots, layer=layer, **options)
    for pages, token, actual in zip(pools, tokens, written, strict=True):
        assert_written(np.asarray(actual), write_oracle(pages, token, slots, layer))
    src, dst = np.asarray([2, 0, 5, 0, 6, -3]), np.asarray([3, 1, 4, 0, 0, 2])
    for pages, actual in zip(pools, copy_pages(*pools[:2], src, dst, **options), strict=True):
        np.testing.assert_array_equal(np.asarray(actual), copy_oracle(pages, src[:4], dst[:4]))


def test_write_to_a_part_of_a_pool():
    shape = (3, 40, 2, 16, 64)
    pools, (key, value, slots) = random_pool(shape, jnp.bfloat16), random_tokens(shape, 33, jnp.bfloat16)

    @jax.jit
    def write(k_pages, v_pages, *arrays):
        return write_kv(k_pages[1:], v_pages[1:], *arrays, layer=1, implementation="sm90")

    for pages, token, actual in zip(pools, (key, value), write(*pools, key, value, slots), strict=True):
        np.testing.assert_array_equal(np.asarray(actual), write_oracle(pages[1:], token, slots, 1))


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_what_is_not_finite_stays_in_its_vector(dtype):
    shape = (1, 4, 8, 16, 128)
    pools, (key, value, _) = random_pool(shape, dtype), random_tokens(shape, 9, jnp.bfloat16)
    key[2, 3, 5], key[4, 0, 0], key[7, 7, 127] = np.nan, np.inf, -np.inf
    value[5], value[6] = 0, 1e-38
    slots = np.arange(16, 25, dtype=np.int32)
    options = scales_of(pools) | {"implementation": "sm90"}
    k_pages, v_pages, k_scale, v_scale = write_kv(*pools[:2], key, value, slots, **options)
    k, v = (np.asarray(dequantize(*pool)[0, 1]) for pool in ((k_pages, k_scale), (v_pages, v_scale)))
    is_poisoned = np.zeros((8, 16), bool)
    is_poisoned[3, 2] = is_poisoned[0, 4] = is_poisoned[7, 7] = True
    np.testing.assert_array_equal(np.isnan(k[:, :9]).all(-1), is_poisoned[:, :9])
    assert np.isfinite(k[:, :9][~is_poisoned[:, :9]]).all()
    np.testing.assert_array_equal(v[:, 5:7], 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_pages_go_to_pinned_host_memory_and_back(dtype):
    pools = random_pool((3, 60, 4, 16, 128), dtype)
    options = scales_of(pools) | {"implementation": "sm90"}
    pages = np.asarray([7, 59, 0, 99, 20])
    buffers = jax.device_put(gather_pages(*pools[:2], pages, **options), jax.memory.Space.Host)
    assert all(buffer.sharding.memory_kind == "pinned_host" for buffer in buffers)
    for pool, buffer in zip(pools, buffers, strict=True):
        np.testing.assert_array_equal(np.asarray(buffer), pool[:, np.minimum(pages, 59)])
    others = random_pool((3, 60, 4, 16, 128), dtype, seed=1)
    options |= scales_of(others)
    back = jax.device_put(buffers, jax.memory.Space.Device)
    scattered = scatter_pages(*others[:2], back, np.asarray([3, 58, 0, 60, -1]), **options)
    for pool, other, actual in zip(pools, others, scattered, strict=True):
        expected = other.copy()
        expected[:, [3, 58]] = pool[:, [7, 59]]
        np.testing.assert_array_equal(np.asarray(actual), expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_far_end_of_a_pool_beyond_2_to_the_31_elements(dtype):
    shape = (2, 80_000, 8, 16, 128)  # 2.6e9 elements
    _, num_pages, num_kv_heads, page_size, head_dim = shape
    pages = np.arange(num_pages - 1, num_pages - 8, -1, dtype=np.int32)
    num_tokens, copy = 100, num_pages - 20
    key, value = random_pool((num_tokens, num_kv_heads, head_dim), jnp.bfloat16)
    token = np.arange(num_tokens)
    slots = pages[token // page_size] * page_size + token % page_size
    pools, tokens = [jnp.zeros(shape, dtype) for _ in range(2)], (key, value)
    if dtype == jnp.int8:
        pools += [jnp.zeros(shape[:4], jnp.float32) for _ in range(2)]
        codes, scales = zip(*(quantize_oracle(x, dtype) for x in tokens), strict=True)
        tokens = codes + scales

    def in_place(op, *arguments, **options):
        call = lambda pools: op(*pools[:2], *arguments, implementation="sm90", **scales_of(pools), **options)
        return jax.jit(call, donate_argnums=0)(pools)

    pools = list(in_place(write_kv, key, value, slots, layer=1))
    pools = list(in_place(copy_pages, pages[:1], np.asarray([copy])))
    gathered = gather_pages(*pools[:2], np.asarray([copy]), implementation="sm90", **scales_of(pools))
    pools = list(in_place(scatter_pages, gathered, np.asarray([copy - 1])))
    for array, wanted in zip(pools, tokens, strict=True):
        far = np.moveaxis(np.asarray(array[1, pages]), 2, 1).reshape(-1, *wanted.shape[1:])
        assert_written(far[:num_tokens], wanted)
        for page in (copy, copy - 1):
            np.testing.assert_array_equal(np.asarray(array[1, page]), np.asarray(array[1, pages[0]]))
        assert not jax.jit(lambda x: jnp.any(x[1, : copy - 1]) | jnp.any(x[0]))(array)
    query = random_pool((1, 4 * num_kv_heads, head_dim), jnp.bfloat16)[0]
    lengths = np.asarray([num_tokens], np.int32)
    attend = functools.partial(paged_attention, query)
    options = {"implementation": "sm90"} if dtype == jnp.bfloat16 else scales_of(pools)
    out = attend(*pools[:2], pages[None], lengths, layer=1, **options)
    near = [array[1:, pages] for array in pools]
    table = np.arange(len(pages), dtype=np.int32)[None]
    expected = attend(*near[:2], table, lengths, implementation="reference", **scales_of(near))
    np.testing.assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), atol=2e-2)
