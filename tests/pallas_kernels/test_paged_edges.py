"""Paged ops at the edges of their arguments: page ids and lengths out of range, layers, small integers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    PagedConfig,
    PrefillConfig,
    cascade_attention,
    contiguous_attention,
    flash_attention,
    paged_attention,
    write_kv,
)
from pallas_kernels.mosaic import SMEM_BYTES
from pallas_kernels.paged_attention import decode_plan, reference, sm90
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec
from tests.pallas_kernels.hopper import abstract_mesh
from tests.pallas_kernels.paged_inputs import contiguous, make_case, oracle

FEW_BITS = [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32]


def pools(layers=2, pages=9):
    keys = jax.random.split(jax.random.key(3))
    return [jax.random.normal(key, (layers, pages, 2, 16, 32)) for key in keys]


def attend(tables, lengths, **arguments):
    query = jax.random.normal(jax.random.key(5), (3, 4, 32))
    rows = jnp.asarray(tables), jnp.asarray(lengths)
    return np.asarray(paged_attention(query, *pools(), *rows, **arguments))


TABLES, LENGTHS = [[1, 2], [3, 4], [5, 6]], [20, 3, 32]


@pytest.mark.parametrize("ragged", [False, True])
def test_page_ids_are_clamped(ragged):
    arguments = {"query_start": jnp.array([0, 1, 2, 3])} if ragged else {}
    actual = attend([[-3, 2000], [3, 4], [-(2**31), 2**31 - 1]], LENGTHS, **arguments)
    expected = attend([[0, 8], [3, 4], [0, 8]], LENGTHS, **arguments)
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("options", [{}, {"local_window_size": 5}, {"is_causal": False}], ids=str)
def test_lengths_beyond_the_table_count_as_its_room(ragged, options):
    arguments = dict(options)
    if ragged:
        arguments["query_start"] = jnp.array([0, 1, 2, 3])
    actual = attend(TABLES, [100, 3, 33], **arguments)
    np.testing.assert_array_equal(actual, attend(TABLES, [32, 3, 32], **arguments))


@pytest.mark.parametrize("dtype", [np.int64, np.uint32])
def test_ids_and_lengths_beyond_32_bits_are_not_wrapped(dtype):
    far = 2**32 - 1 if dtype == np.uint32 else 2**32 + 3
    query = jax.random.normal(jax.random.key(5), (3, 4, 32))
    tables, lengths = np.asarray([[1, far], [3, 4], [5, 6]], dtype), np.asarray([20, far, 32], dtype)
    expected = attend([[1, 8], [3, 4], [5, 6]], [20, 32, 32])
    np.testing.assert_array_equal(paged_attention(query, *pools(), tables, lengths), expected)
    cache = jax.random.normal(jax.random.key(6), (3, 48, 2, 32))
    far_and_full = [contiguous_attention(query, cache, cache, x) for x in (lengths, np.array([20, 48, 32]))]
    np.testing.assert_array_equal(*far_and_full)
    far_and_full = [
        flash_attention(cache, cache, cache, kv_lengths=x) for x in (lengths, np.array([20, 48, 32]))
    ]
    np.testing.assert_array_equal(*far_and_full)


@pytest.mark.parametrize("room", [1, 127, 128, 129, 300, 384])
@pytest.mark.parametrize("window", [None, 140])
def test_caches_are_taken_a_chunk_at_a_time(room, window):
    """The last chunk of a room that holds no whole number of them lies over the one before."""
    lengths = [room, min(room, 130), 0, room - 1]
    case = make_case(rows=4, lengths=lengths, page_size=8, width=room // 8 + 1)
    slopes = np.linspace(0.01, 0.04, 4, dtype=np.float32)
    options = {"local_window_size": window, "alibi_slopes": slopes, "return_lse": True}
    caches = contiguous(case, room)
    result = contiguous_attention(case.query, *caches, case.kv_lengths, **options)
    for actual, expected in zip(result, oracle(case, window, slopes=slopes), strict=True):
        np.testing.assert_allclose(actual, expected, atol=5e-6, rtol=5e-6)


def test_caches_are_not_copied():
    spec = jax.ShapeDtypeStruct
    for room in (4096, 4100):
        cache = spec((2, room, 2, 64), jnp.float32)
        lowered = jax.jit(contiguous_attention).lower(
            spec((2, 4, 64), jnp.float32), cache, cache, spec((2,), jnp.int32)
        )
        memory = lowered.compile().memory_analysis()
        assert memory.temp_size_in_bytes < cache.size * cache.dtype.itemsize / 8


def test_lengths_beyond_a_cache_count_as_its_room():
    query, cache = jax.random.normal(jax.random.key(5), (2, 4, 16)), jnp.arange(1280.0).reshape(2, 20, 2, 16)
    outs = [contiguous_attention(query, cache / 1280, cache, jnp.array([x, 3])) for x in (20, 21, 500)]
    np.testing.assert_array_equal(outs[1], outs[0])
    np.testing.assert_array_equal(outs[2], outs[0])


@pytest.mark.parametrize("layer", [-1, 2, np.int64(-1), np.int32(2), np.array(-1), np.uint8(7)])
def test_a_known_layer_is_held_to_the_pool(layer):
    tokens = jnp.zeros((1, 2, 32))
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.1, got"):
        attend(TABLES, LENGTHS, layer=layer)
    with pytest.raises(ValueError, match=r"layer must lie in 0\.\.1, got"):
        write_kv(*pools(), tokens, tokens, jnp.array([16]), layer=layer)


@pytest.mark.parametrize("layer", [True, 1.0, np.array([1]), jnp.array([1]), jnp.float32(1), None, "a", ()])
def test_a_layer_is_one_integer(layer):
    tokens = jnp.zeros((1, 2, 32))
    with pytest.raises(ValueError, match=r"layer must be an integer scalar, got"):
        attend(TABLES, LENGTHS, layer=layer)
    with pytest.raises(ValueError, match=r"layer must be an integer scalar, got"):
        write_kv(*pools(), tokens, tokens, jnp.array([16]), layer=layer)


@pytest.mark.parametrize("layer", [1, np.int64(1), np.uint8(1), jnp.int32(1), jnp.array(1, jnp.uint8)])
def test_any_integer_may_name_a_layer(layer):
    np.testing.assert_array_equal(attend(TABLES, LENGTHS, layer=layer), attend(TABLES, LENGTHS, layer=1))


def test_an_idle_row_takes_no_window_from_the_others(monkeypatch):
    bounds, attend_row = [], reference._attend_row
    record = lambda *arguments: bounds.append(tuple(map(int, arguments[2]))) or attend_row(*arguments)
    monkeypatch.setattr(reference, "_attend_row", record)
    tables, query = jnp.ones((3, 80), jnp.int32), jnp.ones((3, 4, 32))
    for lengths in ([1280, 1000, 0], [0, 0, 0], [0, 5, 0]):
        inputs = PagedInputs(query, *pools(), tables, jnp.array(lengths), jnp.int32(0))
        reference.forward(inputs, PagedSpec(1.0, window_left=100))
    assert bounds[0] == (7, 10)  # chunks of 128 tokens
    assert bounds[1][0] >= bounds[1][1] == 0
    assert bounds[2] == (0, 1)


@pytest.mark.parametrize("dtype", FEW_BITS)
@pytest.mark.parametrize("queries", [None, [40, 1, 60]], ids=["decode", "ragged"])
def test_small_integers_serve_as_any_others(dtype, queries):
    """Lengths of up to 120, whose sums leave int8, and queries that begin before where their row would."""
    case = make_case(rows=3, lengths=[50, 120, 100], query_lengths=queries, page_size=8, width=15)
    slopes = np.linspace(0.1, 0.4, 4, dtype=np.float32)
    tables = np.clip(case.block_tables, 0, 100)
    start = None if queries is None else jnp.asarray(case.query_start, dtype)
    arrays = [jnp.asarray(x) for x in case[:3]]
    out = paged_attention(
        *arrays,
        jnp.asarray(tables, dtype),
        jnp.asarray(case.kv_lengths, dtype),
        query_start=start,
        layer=case.layer,
        local_window_size=60,
        alibi_slopes=slopes,
    )
    np.testing.assert_allclose(out, oracle(case, 60, slopes=slopes)[0], atol=5e-6)


@pytest.mark.parametrize("dtype", FEW_BITS)
def test_small_integers_serve_caches_and_cascades(dtype):
    tables, lengths = [[1, 2, 3], [1, 2, 4], [5, 6, 0]], [40, 35, 20]
    query = jax.random.normal(jax.random.key(5), (3, 4, 32))
    arrays = [jnp.asarray(x, dtype) for x in (tables, lengths, [32], [0, 0, 5])]
    expected = paged_attention(query, *pools(), jnp.asarray(tables), jnp.asarray(lengths))
    np.testing.assert_allclose(cascade_attention(query, *pools(), *arrays), expected, atol=2e-6)
    cache = jax.random.normal(jax.random.key(6), (3, 48, 2, 32))
    outs = [
        contiguous_attention(query, cache, cache, jnp.asarray(lengths, x), local_window_size=8)
        for x in (dtype, jnp.int32)
    ]
    np.testing.assert_array_equal(*outs)


# Rows, heads, KV heads, head dim, dtype of pages, and whether queries are ragged.
SERVED = [
    (4096, 8, 8, 64, jnp.bfloat16, False),
    *((1, 8, 2, head_dim, jnp.bfloat16, False) for head_dim in (72, 88)),
    (1, 8, 2, 80, jnp.int8, False),
    (1, 8, 2, 80, jnp.float16, True),
    (1, 16, 1, 256, jnp.bfloat16, True),
    (1, 64, 1, 64, jnp.bfloat16, False),
    (1, 8, 2, 224, jnp.int8, True),
    (1, 8, 2, 256, jnp.int8, False),
]
LEFT = [
    (1, 8, 2, 64, jnp.float32, False),
    (4097, 8, 2, 64, jnp.bfloat16, False),
    *((1, 8, 2, head_dim, jnp.bfloat16, False) for head_dim in (32, 48, 76)),
    *((1, 8, 2, head_dim, jnp.int8, False) for head_dim in (32, 72)),
    (1, 8, 2, 72, jnp.bfloat16, True),
    (1, 8, 2, 80, jnp.int8, True),
    (1, 65, 1, 64, jnp.bfloat16, False),
    (1, 17, 1, 64, jnp.bfloat16, True),
    (1, 8, 2, 256, jnp.int8, True),
]


@pytest.mark.parametrize(
    ("call", "is_served"), [*((x, True) for x in SERVED), *((x, False) for x in LEFT)], ids=str
)
def test_kernels_serve_what_the_docstring_lists(call, is_served):
    rows, heads, kv_heads, head_dim, dtype, is_ragged = call
    spec = jax.ShapeDtypeStruct
    query_dtype = dtype if jnp.issubdtype(dtype, jnp.floating) else jnp.bfloat16
    pages = spec((1, 9, kv_heads, 16, head_dim), dtype)
    rows_of = [spec((rows, 4), jnp.int32), spec((rows,), jnp.int32), spec((), jnp.int32)]
    inputs = PagedInputs(spec((rows, heads, head_dim), query_dtype), pages, pages, *rows_of)
    if is_ragged:
        inputs = inputs._replace(query_start=spec((rows + 1,), jnp.int32))
    assert (sm90.unsupported(inputs, PagedSpec(1.0)) is None) == is_served


@pytest.mark.parametrize("starts", [[0, 5, 40], [0, 7, 5], [5, 0, 10], [-3, 5, 10]])
def test_starts_of_rows_that_the_host_knows_lie_among_the_tokens(starts):
    with pytest.raises(ValueError, match=r"query_start must be ascending numbers in 0\.\.10, got"):
        attend_ragged(np.array(starts))


@pytest.mark.parametrize(
    ("starts", "meant"), [([0, 5, 40], [0, 5, 10]), ([-3, 5, 10], [0, 5, 10]), ([12, 13, 14], [10, 10, 10])]
)
def test_starts_beyond_the_tokens_are_their_end(starts, meant):
    np.testing.assert_array_equal(attend_ragged(jnp.array(starts)), attend_ragged(jnp.array(meant)))


def attend_ragged(query_start):
    """10 tokens, two rows of 16 keys each."""
    query = jax.random.normal(jax.random.key(0), (10, 2, 16))
    pages = jax.random.normal(jax.random.key(1), (1, 5, 2, 8, 16))
    tables, lengths = jnp.array([[1, 2], [3, 4]]), jnp.array([16, 16])
    return paged_attention(query, pages, pages, tables, lengths, query_start=query_start)


@pytest.mark.parametrize(
    ("name", "config"),
    [("config", PagedConfig(tile=256, stages=8)), ("prefill_config", PrefillConfig())],
)
def test_cuts_that_do_not_fit_shared_memory(name, config):
    """Named, with what they take: the compiler would know neither."""
    pages = jnp.zeros((1, 3, 2, 16, 256), jnp.bfloat16)
    query, tables = jnp.zeros((4, 4, 256), jnp.bfloat16), jnp.ones((2, 2), jnp.int32)
    call = functools.partial(paged_attention, query, pages, pages, tables, jnp.array([9, 9]))
    message = rf"^{name} must fit 232,448 bytes of shared memory, got P\w+\("
    with jax.sharding.use_abstract_mesh(abstract_mesh()), pytest.raises(ValueError, match=message):
        call(query_start=jnp.array([0, 2, 4]), implementation="sm90", **{name: config})


@pytest.mark.parametrize(("rows", "head_dim"), [(2048, 192), (1024, 192), (4096, 160)])
def test_the_default_fits_beside_what_a_cascade_takes(rows, head_dim):
    spec = jax.ShapeDtypeStruct
    pages = spec((1, 64, 8, 256, head_dim), jnp.bfloat16)
    query, numbers = spec((rows, 64, head_dim), jnp.bfloat16), spec((rows,), jnp.int32)
    tables, layer = spec((rows, 16), jnp.int32), spec((), jnp.int32)
    inputs = PagedInputs(query, pages, pages, tables, numbers, layer, skipped_pages=numbers)
    plan = decode_plan.make_plan(inputs, PagedSpec(1.0), decode_plan.Cut(tile_q=16, splits=2))
    assert decode_plan.shared_bytes(plan) <= SMEM_BYTES
