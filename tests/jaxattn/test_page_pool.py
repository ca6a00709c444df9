"""PagedAttention: what goes through pages equals what goes over the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn import page_pool
from jaxattn.models import LlamaConfig
from jaxattn.page_pool import (
    PagedAttention,
    PagedBatch,
    PagePool,
    copy_pages,
    init_page_pool,
    page_bytes,
    swap_in,
    swap_out,
)

CONFIG = LlamaConfig(
    vocab_size=10, num_layers=2, embed_dim=32, num_heads=4, num_kv_heads=2, mlp_dim=8, max_positions=64
)
Z, R, T, N, K, H = 8, 3, 11, 4, 2, 8
TABLES = jnp.array([[3, 1], [5, 2], [6, 4]], jnp.int32)


def slots_of(positions):
    rows = jnp.arange(R).reshape(-1, *[1] * (positions.ndim - 1))
    return TABLES[rows, positions // Z] * Z + positions % Z


@pytest.fixture
def qkv():
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (R, T, heads, H)) for key, heads in zip(keys, (N, K, K), strict=True)]


def poisoned_pool():
    pool = init_page_pool(CONFIG, 7, Z, jnp.float32)
    return jax.tree.map(lambda pages: pages.at[:, 1:].set(jnp.nan), pool)  # free pages may hold anything


@pytest.mark.parametrize("layer", [0, 1])
def test_prefill_then_decode_equal_whole_sequence_attention(qkv, layer):
    q, k, v = qkv
    whole = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    lengths = jnp.array([9, 4, 1], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(T), (R, T))
    slots = jnp.where(positions < lengths[:, None], slots_of(positions), -1)
    attention = PagedAttention(poisoned_pool(), PagedBatch(TABLES, lengths, slots))
    y, attention = jax.jit(lambda a, *qkv: a(layer, *qkv))(attention, q, k, v)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(y[row, :length], whole[row, :length], atol=1e-6)
        assert (y[row, length:] == 0).all()
    for _ in range(2):
        at, rows = lengths, jnp.arange(R)
        lengths = lengths + 1
        batch = PagedBatch(TABLES, lengths, slots_of(at))
        attention = PagedAttention(attention.pool, batch)
        y, attention = attention(layer, q[rows, at], k[rows, at], v[rows, at])
        np.testing.assert_allclose(y, whole[rows, at], atol=1e-6)


def test_writes_only_the_slots_of_its_layer(qkv):
    _, k, v = (x[:, 0] for x in qkv)
    q = qkv[0][:, 0]
    pool = init_page_pool(CONFIG, 7, Z, jnp.float32)
    slots = jnp.array([3 * Z + 2, -1, 6 * Z], jnp.int32)
    batch = PagedBatch(TABLES, jnp.array([3, 0, 1], jnp.int32), slots)
    y, attention = PagedAttention(pool, batch)(1, q, k, v)
    expected = np.zeros((2, 7, K, Z, H), np.float32)
    expected[1, 3, :, 2], expected[1, 6, :, 0] = k[0], k[2]
    np.testing.assert_array_equal(attention.pool.k_pages, expected)
    assert (y[1] == 0).all()  # an idle row
    np.testing.assert_allclose(y[2], jnp.repeat(v[2], N // K, axis=0), atol=1e-6)  # it sees itself alone


def test_keys_and_values_are_rounded_to_the_pools_dtype(qkv):
    q, k, v = (x[:, 0].astype(jnp.bfloat16) for x in qkv)
    pool = init_page_pool(CONFIG, 7, Z, jnp.bfloat16)
    batch = PagedBatch(TABLES, jnp.ones(R, jnp.int32), slots_of(jnp.zeros(R, jnp.int32)))
    y, attention = PagedAttention(pool, batch)(0, q, k, v)
    assert y.dtype == attention.pool.k_pages.dtype == jnp.bfloat16


@pytest.mark.parametrize(("dtype", "tolerance"), [("int8", 0.02), ("float8_e4m3fn", 0.06)])
def test_decode_over_a_quantized_pool_stays_near_whole_sequence_attention(qkv, dtype, tolerance):
    q, k, v = qkv
    whole = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    pool, lengths, positions = init_page_pool(CONFIG, 7, Z, dtype), jnp.array([9, 4, 2]), jnp.arange(T)
    slots = jnp.where(positions < lengths[:, None] - 1, slots_of(jnp.broadcast_to(positions, (R, T))), -1)
    _, attention = PagedAttention(pool, PagedBatch(TABLES, lengths - 1, slots))(1, q, k, v)
    at, rows = lengths - 1, jnp.arange(R)
    attention = PagedAttention(attention.pool, PagedBatch(TABLES, lengths, slots_of(at)))
    y, attention = attention(1, q[rows, at], k[rows, at], v[rows, at])
    np.testing.assert_allclose(y, whole[rows, at], atol=tolerance)
    assert attention.pool.k_pages.dtype == dtype
    assert (attention.pool.k_scale[0] == 0).all()  # the other layer


def test_dropout_is_refused(qkv):
    pool = init_page_pool(CONFIG, 7, Z, jnp.float32)
    batch = PagedBatch(TABLES, jnp.ones(R, jnp.int32), jnp.zeros(R, jnp.int32))
    with pytest.raises(ValueError, match="dropout_key"):
        PagedAttention(pool, batch)(0, *(x[:, 0] for x in qkv), dropout_key=jax.random.key(0))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "int8", "float8_e4m3fn"])
def test_pool_sizes(dtype):
    pool = init_page_pool(CONFIG, 7, Z, dtype)
    assert (pool.num_pages, pool.page_size) == (7, Z)
    assert sum(array.nbytes for array in jax.tree.leaves(pool)) == 7 * page_bytes(CONFIG, Z, dtype)


def test_a_pool_needs_pages():
    with pytest.raises(ValueError, match="num_pages=0"):
        init_page_pool(CONFIG, 0, Z, jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["float8_e5m2", "foo", jnp.int32, jnp.float64, None])
def test_a_pool_is_of_a_dtype_that_the_ops_take(dtype):
    for make in (lambda: init_page_pool(CONFIG, 7, Z, dtype), lambda: page_bytes(CONFIG, Z, dtype)):
        with pytest.raises(ValueError, match=r"dtype=.* must be one of float32, bfloat16"):
            make()


@pytest.mark.parametrize("dtype", [jnp.float32, "int8"])
def test_swapped_out_pages_return_from_host_memory(dtype):
    pool, key = init_page_pool(CONFIG, 7, Z, dtype), jax.random.key(0)
    pool = jax.tree.map(lambda x: jax.random.normal(key, x.shape).astype(x.dtype), pool)
    buffers = jax.jit(swap_out)(pool, jnp.array([5, 2, 0]))
    assert all(x.sharding.memory_kind == "pinned_host" for x in jax.tree.leaves(buffers))
    empty = init_page_pool(CONFIG, 7, Z, dtype)
    back = jax.jit(swap_in)(empty, buffers, jnp.array([1, 6, 0]))
    for old, zeros, new in zip(*map(jax.tree.leaves, (pool, empty, back)), strict=True):
        np.testing.assert_array_equal(new, zeros.at[:, jnp.array([1, 6])].set(old[:, jnp.array([5, 2])]))


def test_copy_pages_copies_every_layer():
    pages = jax.random.normal(jax.random.key(0), (2, 7, K, Z, H))
    copied = copy_pages(PagePool(pages, 2 * pages), jnp.array([3, 0, 1]), jnp.array([5, 2, 4]))
    expected = pages.at[:, 5].set(pages[:, 3]).at[:, 4].set(pages[:, 1])
    np.testing.assert_array_equal(copied.k_pages, expected)
    np.testing.assert_array_equal(copied.v_pages, 2 * expected)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_decode_is_as_batch_invariant_as_asked_for(qkv, monkeypatch, batch_invariant):
    asked, attend = [], page_pool.paged_attention
    record = lambda *arrays, **options: asked.append(options["batch_invariant"]) or attend(*arrays, **options)
    monkeypatch.setattr(page_pool, "paged_attention", record)
    batch = PagedBatch(TABLES, jnp.ones(R, jnp.int32), slots_of(jnp.zeros(R, jnp.int32)))
    PagedAttention(poisoned_pool(), batch, batch_invariant=batch_invariant)(1, *(x[:, 0] for x in qkv))
    assert asked == [batch_invariant]
