"""write_kv and the moves of pages: against plain loops, without copies of the pool, wrong calls."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import copy_pages, gather_pages, paged_attention, scatter_pages, write_kv
from pallas_kernels.kv_pages import write_sm90
from pallas_kernels.kv_pages.quantize import dequantize, quantize
from tests.pallas_kernels.page_writes import (
    copy_oracle,
    quantize_oracle,
    random_pool,
    random_tokens,
    scales_of,
    write_oracle,
)

POOL = (2, 7, 3, 8, 16)
QUANTIZED = [jnp.int8, jnp.float8_e4m3fn]


@pytest.mark.parametrize("page_size", [8, 64])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_write_equals_the_oracle(page_size, dtype):
    shape = (2, 4, 3, page_size, 16)
    pools, (key, value, slots) = random_pool(shape, dtype), random_tokens(shape, 23, dtype)
    written = write_kv(*pools, key, value, slots, layer=1)
    for pages, tokens, actual in zip(pools, (key, value), written, strict=True):
        np.testing.assert_array_equal(actual, write_oracle(pages, tokens, slots, 1))


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("token_dtype", [np.float32, jnp.bfloat16])
def test_quantized_write_equals_the_oracle(dtype, token_dtype):
    pools, (key, value, slots) = random_pool(POOL, dtype), random_tokens(POOL, 23, token_dtype)
    key[3, 1], value[4] = 0, 1000 * value[4]
    written = write_kv(*pools[:2], key, value, slots, layer=1, **scales_of(pools))
    codes, scales = zip(*(quantize_oracle(x, dtype) for x in (key, value)), strict=True)
    for pages, tokens, actual in zip(pools, codes + scales, written, strict=True):
        np.testing.assert_array_equal(actual, write_oracle(pages, tokens, slots, 1))


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_codes_do_not_depend_on_how_tokens_are_cut_into_writes(data):
    dtype, pools = data.draw(st.sampled_from(QUANTIZED)), random_pool(POOL, jnp.int8)
    pools = [np.zeros(x.shape, dtype) if x.dtype == np.int8 else x for x in pools]
    key, value, slots = random_tokens(POOL, 12, seed=data.draw(st.integers(0, 2**16)))
    at_once = write_kv(*pools[:2], key, value, slots, **scales_of(pools))
    cuts = data.draw(st.sampled_from([(6,), (4, 8), (1,)]))
    for part in np.split(data.draw(st.permutations(range(12))), cuts):
        part = np.asarray(part)
        pools = write_kv(*pools[:2], key[part], value[part], slots[part], **scales_of(pools))
    for actual, expected in zip(pools, at_once, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("magnitude", [1e-28, 1.0, 1e37])
def test_quantization_error_is_within_its_bound(dtype, magnitude):
    rng = np.random.default_rng(0)
    vectors = np.clip(rng.standard_normal((500, 64)) ** 3 * magnitude, -3e38, 3e38).astype(np.float32)
    read = np.asarray(dequantize(*quantize(jnp.asarray(vectors), dtype)), np.float64)
    largest = np.abs(vectors).max(axis=1, keepdims=True)
    bound = largest / 254 if dtype == jnp.int8 else np.maximum(np.abs(vectors) / 16, largest / (448 * 1024))
    error = np.abs(read - vectors)
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error / np.maximum(bound, 1e-37)).max() > 0.9  # the bound is no looser than it must be


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_zeros_stay_zeros_and_what_is_not_finite_stays_in_its_vector(dtype):
    vectors = np.ones((6, 16), np.float32)
    vectors[1], vectors[2] = 0, 1e-38
    vectors[3, 5], vectors[4, 0], vectors[5, 15] = np.nan, np.inf, -np.inf
    codes, scale = quantize(jnp.asarray(vectors), dtype)
    read = np.asarray(dequantize(codes, scale))
    np.testing.assert_allclose(read[0], 1, rtol=1e-6)
    np.testing.assert_array_equal(read[1:3], 0)
    assert np.isfinite(scale[:3]).all()
    assert np.isnan(read[3:]).all()


@pytest.mark.parametrize("dtype", [np.float32, *QUANTIZED])
def test_slots_of_no_page_are_not_written(dtype):
    """Below zero, beyond the pool, and in NULL_PAGE."""
    pools, (key, value, _) = random_pool(POOL, dtype), random_tokens(POOL, 5)
    slots = np.asarray([-1, -(2**31), POOL[1] * POOL[3], 0, POOL[3] - 1])
    written = write_kv(*pools[:2], key, value, slots, **scales_of(pools))
    for pages, actual in zip(pools, written, strict=True):
        np.testing.assert_array_equal(actual, pages)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint32])
def test_ids_beyond_32_bits_are_of_no_page(dtype):
    """Cast, they would come to 17, to 1 or to -1."""
    pools, (key, value, _) = random_pool(POOL), random_tokens(POOL, 2)
    far = 2**32 - 1 if dtype == np.uint32 else 2**32 + 1
    written = write_kv(*pools, key, value, np.asarray([far, far - 17], dtype))
    copied = copy_pages(*pools, np.asarray([far, 3], dtype), np.asarray([2, far], dtype))
    buffers = gather_pages(*pools, np.asarray([far, 5], dtype))
    scattered = scatter_pages(*pools, buffers, np.asarray([far, far - 1], dtype))
    for pages, buffer, *same in zip(pools, buffers, written, copied, scattered, strict=True):
        for actual in same:
            np.testing.assert_array_equal(actual, pages)
        np.testing.assert_array_equal(buffer, pages[:, [POOL[1] - 1, 5]])


def test_a_slot_of_64_bits_is_beyond_the_pool_under_x64_too():
    pools, (key, value, _) = random_pool(POOL), random_tokens(POOL, 2)
    with jax.enable_x64(True):
        slots = jnp.asarray([2**32 + 17, -(2**32) + 18])
        written = jax.jit(lambda slots: write_kv(*pools, key, value, slots))(slots)
    for pages, actual in zip(pools, written, strict=True):
        np.testing.assert_array_equal(actual, pages)


def test_write_casts_to_the_pool():
    pools, (key, value, slots) = random_pool(POOL, dtype=jnp.bfloat16), random_tokens(POOL, 5)
    k_pages, _ = write_kv(*pools, key, value, slots)
    expected = write_oracle(pools[0], np.asarray(jnp.asarray(key, jnp.bfloat16)), slots, 0)
    np.testing.assert_array_equal(k_pages, expected)


@pytest.mark.parametrize("dtype", [np.float32, *QUANTIZED])
def test_copy_equals_the_oracle_and_pairs_of_no_pages_do_nothing(dtype):
    pools = random_pool(POOL, dtype)
    src, dst = np.asarray([2, 0, 5, 0, 6, 7, -1]), np.asarray([3, 1, 4, 0, 0, 6, 6])
    copied = copy_pages(*pools[:2], src, dst, **scales_of(pools))
    for pages, actual in zip(pools, copied, strict=True):
        np.testing.assert_array_equal(np.asarray(actual), copy_oracle(pages, src[:4], dst[:4]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, *QUANTIZED])
def test_gathered_pages_come_back_to_other_places(dtype):
    pools, pages = random_pool(POOL, dtype), np.asarray([5, 2, 0, 3])
    buffers = gather_pages(*pools[:2], pages, **scales_of(pools))
    for pool, buffer in zip(pools, buffers, strict=True):
        np.testing.assert_array_equal(np.asarray(buffer), pool[:, pages])
    others = random_pool(POOL, dtype, seed=1)
    new_pages = np.asarray([1, 6, 0, 99])  # the last two nowhere
    scattered = scatter_pages(*others[:2], buffers, new_pages, **scales_of(others))
    for pool, other, actual in zip(pools, others, scattered, strict=True):
        expected = other.copy()
        expected[:, [1, 6]] = pool[:, [5, 2]]
        np.testing.assert_array_equal(np.asarray(actual), expected)


def decode_step(pools, hidden, slots, tables, lengths, src, dst):
    """Copy-on-write, then two layers that write their token and attend: K, V depend on the layer before."""
    pools = copy_pages(*pools[:2], src, dst, **scales_of(pools))
    for layer in range(2):
        pools = write_kv(*pools[:2], hidden, 2 * hidden, slots, layer=layer, **scales_of(pools))
        attended = paged_attention(hidden, *pools[:2], tables, lengths, layer=layer, **scales_of(pools))
        hidden = hidden + attended
    return pools, hidden


def swap_in(pools, buffers, pages):
    return scatter_pages(*pools[:2], buffers, pages, **scales_of(pools))


def assert_pool_is_never_copied(function, shape, dtype, specs):
    pages, scales = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:4], jnp.float32)
    pools = (pages, pages, scales, scales) if dtype == jnp.int8 else (pages, pages)
    compiled = jax.jit(function, donate_argnums=0).lower(pools, *specs).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.size * x.dtype.itemsize for x in pools)
    assert memory.temp_size_in_bytes < pages.size * pages.dtype.itemsize / shape[0]
    dimensions = ",".join(map(str, shape))
    assert not re.search(rf"\w+\[{dimensions}\]\S* copy\(", compiled.as_text())


INTEGERS = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_a_step_never_copies_the_pool(dtype):
    """Not in bf16: XLA's CPU backend computes bf16 scatters in fp32, on a copy."""
    rows, shape = 4, (2, 800, 3, 16, 64)
    hidden = jax.ShapeDtypeStruct((rows, 3, 64), jnp.float32)
    integers = INTEGERS(rows), INTEGERS(rows, 32), INTEGERS(rows), INTEGERS(4), INTEGERS(4)
    assert_pool_is_never_copied(decode_step, shape, dtype, (hidden, *integers))


def test_swapping_in_never_copies_the_pool():
    shape = (2, 800, 3, 16, 64)
    buffer = jax.ShapeDtypeStruct((2, 5, 3, 16, 64), jnp.float32)
    assert_pool_is_never_copied(swap_in, shape, jnp.float32, ((buffer, buffer), INTEGERS(5)))


INT8_POOL = {"k_pages": np.zeros(POOL, np.int8), "v_pages": np.zeros(POOL, np.int8)}
SCALES = {"k_scale": np.zeros(POOL[:4], np.float32), "v_scale": np.zeros(POOL[:4], np.float32)}
WRONG = {
    "v_pages must have shape": {"v_pages": np.zeros((2, 7, 3, 8, 8), np.float32)},
    "k_pages must have one of the dtypes": {
        "k_pages": np.zeros(POOL, np.int32),
        "v_pages": np.zeros(POOL, np.int32),
    },
    "k_scale must be given for int8 and fp8 pages": INT8_POOL,
    "k_scale must be given .*, got one with float32": SCALES,
    "v_scale must have shape": INT8_POOL | SCALES | {"v_scale": np.zeros(POOL[:3], np.float32)},
    "k_scale must have one of the dtypes": INT8_POOL | SCALES | {"k_scale": np.zeros(POOL[:4], np.int32)},
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


def test_wrong_moves_are_named():
    pools, pages = random_pool(POOL), np.zeros(2, np.int32)
    with pytest.raises(ValueError, match="dst_pages must have shape"):
        copy_pages(*pools, pages, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="src_pages must hold integers"):
        copy_pages(*pools, np.zeros(2), pages)
    with pytest.raises(ValueError, match="pages must hold integers"):
        gather_pages(*pools, np.zeros(2))
    with pytest.raises(ValueError, match="buffers must hold 2 arrays"):
        scatter_pages(*pools, [pools[0][:, :2]], pages)
    with pytest.raises(ValueError, match="buffers must hold 2 arrays, as the pool does, got None"):
        scatter_pages(*pools, None, pages)
    with pytest.raises(ValueError, match=r"buffers\[1\] must have shape \[L C K Z H\] = \[2, 2, 3, 8, 16\]"):
        scatter_pages(*pools, [pools[0][:, :2], pools[1][:, :3]], pages)


def test_the_kernel_says_what_it_cannot_do():
    pools = random_pool((1, 2, 1, 8, 6))
    with pytest.raises(NotImplementedError, match="head dim"):
        copy_pages(*pools, np.zeros(1, np.int32), np.zeros(1, np.int32), implementation="sm90")


@pytest.mark.parametrize(
    ("reason", "dtype", "token_dtype", "shape"),
    [
        (None, jnp.float32, None, (4, 113, 256)),
        ("need 233480 bytes of shared memory", jnp.float32, None, (4, 114, 256)),
        ("need 262152 bytes of shared memory", jnp.bfloat16, None, (4, 256, 256)),
        ("need 262152 bytes of shared memory", jnp.bfloat16, jnp.float32, (4, 256, 256)),
        (None, jnp.int8, jnp.bfloat16, (4, 256, 256)),
        (None, jnp.int8, jnp.float32, (4, 128, 256)),
        ("need 248840 bytes of shared memory", jnp.int8, jnp.float32, (4, 192, 256)),
        (None, jnp.int8, jnp.bfloat16, (8 * 65535, 8, 128)),
        ("at most 524280 tokens of 8 KV heads, got 524281", jnp.int8, jnp.bfloat16, (524281, 8, 128)),
        (None, jnp.bfloat16, None, (524281, 8, 128)),
    ],
)
def test_the_kernel_says_which_keys_it_cannot_write(reason, dtype, token_dtype, shape):
    _, num_kv_heads, head_dim = shape
    pages = jax.ShapeDtypeStruct((1, 2, num_kv_heads, 8, head_dim), dtype)
    said = write_sm90.unsupported(pages, jax.ShapeDtypeStruct(shape, token_dtype or dtype))
    assert said is None if reason is None else reason in said
    assert write_sm90.unsupported(pages) is None  # pages are moved all the same
