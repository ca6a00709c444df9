"""write_kv and copy_pages: against plain loops, without copies of the pool, wrong calls."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import copy_pages, paged_attention, write_kv
from tests.pallas_kernels.page_writes import copy_oracle, random_pool, random_tokens, write_oracle

POOL = (2, 7, 3, 8, 16)


@pytest.mark.parametrize("page_size", [8, 64])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_write_equals_the_oracle(page_size, dtype):
    shape = (2, 4, 3, page_size, 16)
    pools, (key, value, slots) = random_pool(shape, dtype), random_tokens(shape, 23, dtype)
    written = write_kv(*pools, key, value, slots, layer=1)
    for pages, tokens, actual in zip(pools, (key, value), written, strict=True):
        np.testing.assert_array_equal(actual, write_oracle(pages, tokens, slots, 1))


def test_slots_beyond_the_pool_and_negative_ones_are_not_written():
    pools, (key, value, _) = random_pool(POOL), random_tokens(POOL, 3)
    written = write_kv(*pools, key, value, np.asarray([-1, -(2**31), POOL[1] * POOL[3]]))
    for pages, actual in zip(pools, written, strict=True):
        np.testing.assert_array_equal(actual, pages)


def test_write_casts_to_the_pool():
    pools, (key, value, slots) = random_pool(POOL, dtype=jnp.bfloat16), random_tokens(POOL, 5)
    k_pages, _ = write_kv(*pools, key, value, slots)
    expected = write_oracle(pools[0], np.asarray(jnp.asarray(key, jnp.bfloat16)), slots, 0)
    np.testing.assert_array_equal(k_pages, expected)


def test_copy_equals_the_oracle_and_null_pairs_do_nothing():
    pools, src, dst = random_pool(POOL), np.asarray([2, 0, 5, 0]), np.asarray([3, 1, 4, 0])
    for pages, actual in zip(pools, copy_pages(*pools, src, dst), strict=True):
        np.testing.assert_array_equal(actual, copy_oracle(pages, src, dst))


def decode_step(k_pages, v_pages, hidden, slots, tables, lengths, src, dst):
    """Copy-on-write, then two layers that write their token and attend: K, V depend on the layer before."""
    k_pages, v_pages = copy_pages(k_pages, v_pages, src, dst)
    for layer in range(2):
        k_pages, v_pages = write_kv(k_pages, v_pages, hidden, 2 * hidden, slots, layer=layer)
        hidden = hidden + paged_attention(hidden, k_pages, v_pages, tables, lengths, layer=layer)
    return k_pages, v_pages, hidden


def test_a_step_never_copies_the_pool():
    """In fp32: XLA's CPU backend computes bf16 scatters in fp32, on a copy."""
    rows, shape = 4, (2, 200, 3, 16, 64)
    pages = jax.ShapeDtypeStruct(shape, jnp.float32)
    hidden = jax.ShapeDtypeStruct((rows, 3, 64), jnp.float32)
    integers = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)
    pairs = integers(4)
    specs = (pages, pages, hidden, integers(rows), integers(rows, 32), integers(rows), pairs, pairs)
    compiled = jax.jit(decode_step, donate_argnums=(0, 1)).lower(*specs).compile()
    memory, pool_bytes = compiled.memory_analysis(), np.prod(shape) * 4
    assert memory.alias_size_in_bytes >= 2 * pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / shape[0]
    dimensions = ",".join(map(str, shape))
    assert not re.search(rf"f32\[{dimensions}\]\S* copy\(", compiled.as_text())


WRONG = {
    "v_pages must have shape": {"v_pages": np.zeros((2, 7, 3, 8, 8), np.float32)},
    "k_pages must have one of the dtypes": {
        "k_pages": np.zeros(POOL, np.int8),
        "v_pages": np.zeros(POOL, np.int8),
    },
    "must be one of 8, 16": {"k_pages": np.zeros((2, 7, 3, 9, 16), np.float32)}
    | {"v_pages": np.zeros((2, 7, 3, 9, 16), np.float32)},
    "key must have shape": {"key": np.zeros((5, 2, 16), np.float32)},
    "value must have shape": {"value": np.zeros((4, 3, 16), np.float32)},
    "value must have one of the dtypes": {"value": np.zeros((5, 3, 16), np.int32)},
    "slots must have shape": {"slots": np.zeros(6, np.int32)},
    "slots must hold integers": {"slots": np.zeros(5, np.float32)},
    "layer must lie in 0..1, got -1": {"layer": -1},
    "implementation must be one of": {"implementation": "cuda"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_writes_are_named(message):
    pools, (key, value, slots) = random_pool(POOL), random_tokens(POOL, 5)
    arguments = {"k_pages": pools[0], "v_pages": pools[1], "key": key, "value": value, "slots": slots}
    with pytest.raises(ValueError, match=message):
        write_kv(**arguments | WRONG[message])


def test_wrong_copies_are_named():
    with pytest.raises(ValueError, match="dst_pages must have shape"):
        copy_pages(*random_pool(POOL), np.zeros(2, np.int32), np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="src_pages must hold integers"):
        copy_pages(*random_pool(POOL), np.zeros(2), np.zeros(2, np.int32))


def test_the_kernel_says_what_it_cannot_do():
    pools = random_pool((1, 2, 1, 8, 6))
    with pytest.raises(NotImplementedError, match="head dim"):
        copy_pages(*pools, np.zeros(1, np.int32), np.zeros(1, np.int32), implementation="sm90")
