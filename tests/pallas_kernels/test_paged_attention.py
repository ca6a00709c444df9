"""paged_attention: the reference against an oracle, what must never leak, wrong calls."""

import dataclasses
import itertools
import math
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels import PAGE_SIZES, PagedConfig, contiguous_attention, device, paged_attention
from pallas_kernels.mosaic import SMEM_BYTES
from pallas_kernels.paged_attention import decode_plan, op
from pallas_kernels.paged_attention.contiguous import with_room
from pallas_kernels.paged_attention.decode_codes import BASE, split_query
from pallas_kernels.paged_attention.decode_plan import make_plan, shared_bytes
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec
from tests.pallas_kernels.paged_inputs import GARBAGE, cast, contiguous, make_case, oracle


def call(case, ragged=False, **arguments):
    arrays = [jnp.asarray(x) for x in case[:5]]
    query_start = jnp.asarray(case.query_start) if ragged else None
    arguments = {"layer": case.layer, "query_start": query_start, "return_lse": True} | arguments
    out, lse = paged_attention(*arrays, **arguments)
    return np.asarray(out, np.float64), np.asarray(lse, np.float64)


def assert_close(actual, expected, atol=2e-6):
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=atol, rtol=atol)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)])
def test_decode_equals_the_oracle(page_size, heads, kv_heads):
    width = 600 // page_size + 1
    lengths = [0, 1, page_size, width * page_size, 130]
    case = make_case(
        rows=5, heads=heads, kv_heads=kv_heads, page_size=page_size, width=width, lengths=lengths
    )
    assert_close(call(case, implementation="reference"), oracle(case))


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    seed=st.integers(0, 2**31),
    page_size=st.sampled_from((8, 16, 64)),
    group=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    window=st.sampled_from((None, 0, 5, 100)),
    soft_cap=st.sampled_from((None, 2.0)),
    data=st.data(),
)
def test_ragged_queries_equal_the_oracle(seed, page_size, group, kv_heads, window, soft_cap, data):
    lengths = data.draw(st.lists(st.integers(0, 300), min_size=1, max_size=4))
    queries = [data.draw(st.integers(0, min(length, 70))) for length in lengths]
    if not sum(queries):
        queries[0] = 1  # of a row that may be empty: the query then sees nothing
    case = make_case(
        seed,
        rows=len(lengths),
        heads=group * kv_heads,
        kv_heads=kv_heads,
        page_size=page_size,
        width=300 // page_size + 1,
        lengths=lengths,
        query_lengths=queries,
    )
    result = call(case, ragged=True, local_window_size=window, logits_soft_cap=soft_cap)
    assert_close(result, oracle(case, window, soft_cap), atol=5e-6)


def test_tokens_of_no_row_give_zeros():
    case = make_case(rows=2, lengths=[20, 9], query_lengths=[3, 2])
    padded = case._replace(query=np.pad(case.query, ((0, 4), (0, 0), (0, 0)), constant_values=np.nan))
    out, lse = call(padded, ragged=True)
    assert_close((out[:5], lse[:5]), oracle(case))
    assert (out[5:] == 0).all()
    assert (lse[5:] == -np.inf).all()


def test_window_leaves_the_first_pages_unread():
    """Out of the window a table may hold NULL_PAGE, which is full of NaN here."""
    case = make_case(rows=1, lengths=[48], page_size=8, width=6)
    expected = oracle(case, window_left=10)
    case.block_tables[0, :4] = 0
    assert_close(call(case, local_window_size=10), expected)


def test_rows_may_share_pages():
    case = make_case(rows=2, lengths=[24, 20], page_size=8, width=3)
    case.block_tables[1, :2] = case.block_tables[0, :2]
    assert_close(call(case), oracle(case))


def test_layer_may_be_traced_and_scale_given():
    case = make_case(layers=3)
    attend = jax.jit(lambda layer: call_arrays(case, layer=layer, scale=0.3))
    assert_close([np.asarray(attend(2))], [oracle(case, scale=0.3)[0]])


def call_arrays(case, **arguments):
    return paged_attention(*[jnp.asarray(x) for x in case[:5]], **arguments)


def test_quantized_pages_are_scaled():
    case = make_case(rows=2, lengths=[30, 11])
    rng = np.random.default_rng(1)
    shape = case.k_pages.shape
    codes = [rng.integers(-127, 128, shape).astype(np.int8) for _ in range(2)]
    scales = [rng.uniform(0.001, 0.02, shape[:4]).astype(np.float32) for _ in range(2)]
    exact = [code * scale[..., None] for code, scale in zip(codes, scales, strict=True)]
    result = call(
        case._replace(k_pages=codes[0], v_pages=codes[1]),
        k_scale=jnp.asarray(scales[0]),
        v_scale=jnp.asarray(scales[1]),
    )
    assert_close(result, oracle(case._replace(k_pages=exact[0], v_pages=exact[1])))


def head_arguments(case, seed=3):
    rng = np.random.default_rng(seed)
    num_heads = case.query.shape[1]
    return rng.standard_normal(num_heads).astype(np.float32), rng.uniform(0.01, 0.5, num_heads).astype(
        np.float32
    )


@pytest.mark.parametrize("magnitude", [1e-20, 3e-3, 1.0, 7e4])
def test_two_codes_hold_a_query(magnitude):
    query = np.random.default_rng(0).standard_normal((5, 4, 96)).astype(np.float32) * magnitude
    query[0, 0] = 0
    query = np.asarray(jnp.asarray(query, jnp.bfloat16), np.float32)
    largest = np.abs(query).max(-1, keepdims=True)
    for dtype, error in ((jnp.int8, 2**-16), (jnp.float8_e4m3fn, 2**-17)):
        high, low, factor = jax.jit(split_query, static_argnums=1)(query, dtype)
        assert high.dtype == low.dtype == dtype
        sums = BASE[jnp.dtype(dtype)] * np.asarray(high, np.float32) + np.asarray(low, np.float32)
        distance = np.abs(sums * np.asarray(factor)[..., None] - query)
        assert (distance <= largest * error * 1.01).all()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("which", ["sinks", "slopes", "both"])
def test_sinks_and_alibi_equal_the_oracle(ragged, which):
    queries = [3, 1, 17] if ragged else None
    case = make_case(rows=3, lengths=[40, 0, 180], page_size=8, width=24, query_lengths=queries)
    sinks, slopes = head_arguments(case)
    sinks, slopes = (None if which == "slopes" else sinks), (None if which == "sinks" else slopes)
    result = call(case, ragged, sinks=sinks, alibi_slopes=slopes, local_window_size=50)
    assert_close(result, oracle(case, 50, sinks=sinks, slopes=slopes), atol=5e-6)


@pytest.mark.parametrize("max_length", [100, 256, 300])
def test_contiguous_attention_equals_the_oracle(max_length):
    case = make_case(rows=4, lengths=[100, 0, 1, 77], page_size=8, width=13)
    sinks, slopes = head_arguments(case)
    caches = [jnp.asarray(cache) for cache in contiguous(case, max_length)]
    result = contiguous_attention(
        jnp.asarray(case.query),
        *caches,
        jnp.asarray(case.kv_lengths),
        local_window_size=60,
        logits_soft_cap=2.0,
        sinks=sinks,
        alibi_slopes=slopes,
        return_lse=True,
    )
    assert_close([np.asarray(x) for x in result], oracle(case, 60, 2.0, sinks=sinks, slopes=slopes), 5e-6)


@pytest.mark.parametrize(("room", "taken"), [(77, 128), (128, 128), (260, 264), (1024, 1024)])
def test_caches_of_any_room(room, taken):
    """The kernel takes whole octets, 128 tokens at least; what a row has room for stays what it was."""
    cache, lengths = jnp.ones((2, room, 2, 64), jnp.bfloat16), jnp.array([5, 2000])
    inputs = PagedInputs(jnp.ones((2, 4, 64), jnp.bfloat16), cache, cache, None, lengths, jnp.int32(0))
    padded = with_room(inputs)
    assert padded.k_pages.shape == padded.v_pages.shape == (2, taken, 2, 64)
    assert jnp.minimum(padded.kv_lengths, taken).tolist() == [5, room]
    assert (padded.k_pages[:, room:] == 0).all()
    assert with_room(inputs, PagedConfig(tile=256)).k_pages.shape[1] == max(256, taken)


def test_contiguous_attention_names_what_is_wrong():
    query, cache, lengths = jnp.zeros((2, 4, 16)), jnp.zeros((2, 32, 2, 16)), jnp.zeros(2, jnp.int32)
    for message, arguments in {
        "query must have one of the dtypes .*, got int32": (query.astype(int), cache, cache, lengths),
        "query must have one of the dtypes .*, got float64": (np.zeros((2, 4, 16)), cache, cache, lengths),
        "v_cache must have shape": (query, cache, cache[:, 1:], lengths),
        "k_cache must have one of the dtypes": (query, cache.astype(jnp.bfloat16), cache, lengths),
        r"query must have shape \[R N H\]": (query[:1], cache, cache, lengths),
        "kv_lengths must have shape": (query, cache, cache, lengths[:1]),
    }.items():
        with pytest.raises(ValueError, match=message):
            contiguous_attention(*arguments)


def test_a_row_does_not_depend_on_the_others():
    case = make_case(rows=4, lengths=[40, 17, 0, 33])
    everything, _ = call(case)
    for row in range(4):
        others = case.kv_lengths.copy()
        others[np.arange(4) != row] //= 2
        alone, _ = call(case._replace(kv_lengths=others))
        np.testing.assert_array_equal(alone[row], everything[row])


ARRAYS = ("query", "k_pages", "v_pages", "block_tables", "kv_lengths")
WRONG = {
    "query must have the dimensions": {"query": np.zeros((3, 4), np.float32)},
    r"query must have shape \[tokens N H\]": {"query": np.zeros((3, 4, 8), np.float32)},
    "without query_start query must have one token a row": {"query": np.zeros((2, 4, 16), np.float32)},
    "multiple of the KV heads": {"query": np.zeros((3, 3, 16), np.float32)},
    "query must have one of the dtypes": {"query": np.zeros((3, 4, 16), np.int32)},
    "k_pages must have one of the dtypes": {"query": np.zeros((3, 4, 16), jnp.bfloat16)},
    r"page size k_pages.shape\[3\] must be one of": {
        "k_pages": np.zeros((2, 5, 2, 12, 16), np.float32),
        "v_pages": np.zeros((2, 5, 2, 12, 16), np.float32),
    },
    "v_pages must have shape": {"v_pages": np.zeros((2, 5, 2, 8, 8), np.float32)},
    "block_tables must hold integers": {"block_tables": np.zeros((3, 6), np.float32)},
    "kv_lengths must have shape": {"kv_lengths": np.zeros(2, np.int32)},
}
WRONG_OPTIONS = {
    "query_start must be an array, got list": {"query_start": [0, 1, 2, 3]},
    "layer must lie in 0..1, got 2": {"layer": 2},
    "layer must be an integer scalar": {"layer": 0.5},
    "local_window_size must be": {"local_window_size": -1},
    "logits_soft_cap must be positive": {"logits_soft_cap": 0.0},
    "local_window_size must be None if is_causal is False, got 3": {
        "local_window_size": 3,
        "is_causal": False,
    },
    r"local_window_size must be None if is_causal is False, got \(None, 0\)": {
        "local_window_size": (None, 0),
        "is_causal": False,
    },
    "logits_soft_cap must be a finite number": {"logits_soft_cap": math.inf},
    "scale must be a finite number": {"scale": math.nan},
    "config must be a PagedConfig or None, got 'x'": {"config": "x"},
    "prefill_config must be a PrefillConfig or None": {"prefill_config": PagedConfig()},
    "query_start must have shape": {"query_start": jnp.zeros(3, jnp.int32)},
    "sinks must have shape": {"sinks": jnp.zeros(3)},
    "alibi_slopes must have one of the dtypes": {"alibi_slopes": jnp.zeros(4, jnp.int32)},
    "k_scale must be given for int8": {"k_scale": jnp.ones((2, 5, 2, 8))},
    "implementation must be one of": {"implementation": "triton"},
    r"implementation must be one of .*, got \['sm90'\]": {"implementation": ["sm90"]},
    "layer must be an integer scalar, got <object": {"layer": object()},
    "is_causal must be a bool.* got bool": {"is_causal": np.array(True)},
    "is_causal must be a bool.*, got bool": {"is_causal": jnp.array(True)},
    "is_causal must be a bool.* got 'no'": {"is_causal": "no"},
    "batch_invariant must be a bool.* got int": {"batch_invariant": np.array([1, 2])},
    "local_window_size must be .* got True": {"local_window_size": True},
    r"local_window_size must be .* got \(1, False\)": {"local_window_size": (1, False)},
    "local_window_size must be .* got 1.0": {"local_window_size": 1.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arrays_are_named(message):
    case = make_case()._replace(**WRONG[message])
    with pytest.raises(ValueError, match=message):
        call(case)


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("value", [5, [3, 4, 5], None])
def test_what_is_no_array_is_named(name, value):
    arrays = {name: jnp.asarray(x) for name, x in zip(ARRAYS, make_case(), strict=False)} | {name: value}
    with pytest.raises(ValueError, match=f"{name} must be an array, got {type(value).__name__}"):
        paged_attention(**arrays)


@pytest.mark.parametrize("number", [np.int64, np.uint8, np.int32])
def test_numbers_and_flags_may_be_numpys(number):
    case = make_case()
    expected, _ = call(case, local_window_size=5, is_causal=True)
    for window in (number(5), (number(5), None)):
        options = {"is_causal": np.bool_(True), "batch_invariant": np.bool_(False)}
        actual, _ = call(case, local_window_size=window, **options)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("message", WRONG_OPTIONS)
def test_wrong_options_are_named(message):
    with pytest.raises(ValueError, match=message):
        call(make_case(), **WRONG_OPTIONS[message])


def test_int8_pages_need_scales():
    pages = np.zeros((2, 5, 2, 8, 16), np.int8)
    with pytest.raises(ValueError, match="k_scale must be given"):
        call(make_case()._replace(k_pages=pages, v_pages=pages))


@pytest.mark.parametrize(
    ("reason", "shapes", "arguments"),
    [
        ("bf16 or fp16", {"head_dim": 64}, {}),
        ("head dim must be a multiple of 8 in 64..256", {"head_dim": 32, "dtype": jnp.bfloat16}, {}),
        ("multiple of 16 beside query_start", {"head_dim": 72, "dtype": jnp.bfloat16}, {"ragged": True}),
        ("scale must be positive", {"head_dim": 64, "dtype": jnp.bfloat16}, {"ragged": True, "scale": -1.0}),
        ("at most 4096 numbers", {"head_dim": 256, "heads": 34, "dtype": jnp.bfloat16}, {}),
    ],
)
def test_the_kernel_says_what_it_cannot_do(reason, shapes, arguments):
    dtype = shapes.pop("dtype", jnp.float32)
    with pytest.raises(NotImplementedError, match=reason):
        call(cast(make_case(**shapes), dtype), implementation="sm90", **arguments)


def test_config_holds_itself_to_what_the_kernel_can():
    for wrong in (
        {"tile": 48},
        {"split": 100},
        {"tile": 128, "split": 64},
        {"stages": 1},
        {"consumers": 3},
        {"stages": 3, "consumers": 2},
        {"stages": 100},
        {"stages": 2.0},
        {"split": "x"},
        {"dynamic": "x"},
        {"consumers": True},
    ):
        with pytest.raises(ValueError, match="must be"):
            PagedConfig(**wrong)


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 144, 160, 208, 240, 256])
def test_default_config_fits_shared_memory_and_cuts_long_rows(head_dim, dtype, is_ragged):
    spec = jax.ShapeDtypeStruct
    for rows, group, width in itertools.product((1, 5, 256, 1000, decode_plan.MAX_ROWS), (1, 8), (100, 4096)):
        query, pages = spec((rows, 2 * group, head_dim), jnp.bfloat16), spec((1, 9, 2, 8, head_dim), dtype)
        per_head = spec((2 * group,), jnp.float32)
        inputs = PagedInputs(
            query, pages, pages, spec((rows, width), jnp.int32), spec((rows,), jnp.int32), None
        )
        inputs = inputs._replace(sinks=per_head, alibi_slopes=per_head)
        plan = make_plan(inputs._replace(query_start=0 if is_ragged else None), PagedSpec(1.0))
        assert shared_bytes(plan) <= SMEM_BYTES
        assert 256 <= plan.config.split <= 8192


def test_two_consumers_reduce_in_memory_of_their_own(monkeypatch):
    """jnp's reductions across warps pass through one place in shared memory, whichever warpgroup asks: on an
    H200 quantized decode gave other bits from run to run."""
    monkeypatch.setattr(device, "is_abstract_gpu", lambda: True)
    spec = jax.ShapeDtypeStruct
    pages, scales = spec((1, 40, 2, 16, 128), jnp.int8), spec((1, 40, 2, 16), jnp.float32)
    arrays = spec((4, 8, 128), jnp.bfloat16), pages, pages, spec((4, 32), jnp.int32), spec((4,), jnp.int32)

    def attend(arrays, scales):
        config = PagedConfig(tile=64, split=512, stages=4, consumers=2)
        named = dict(zip(("k_scale", "v_scale"), scales, strict=True))
        return paged_attention(*arrays, implementation="sm90", config=config, **named)

    jaxpr = str(jax.make_jaxpr(attend)(arrays, (scales, scales)))
    assert "wgmma" in jaxpr
    assert not re.search(r"reduce_(max|sum)\[[^\]]*axes=\(0,\)", jaxpr)


def test_reference_serves_a_gpu_that_has_no_kernel(monkeypatch):
    """Without a Hopper GPU the op takes the next variant; with one named, it says why that cannot serve."""
    monkeypatch.setitem(op.VARIANTS, "sm90", op.VARIANTS["sm90"]._replace(is_available=lambda: True))
    case = make_case()  # f32: the kernel refuses it
    assert_close(call(case), oracle(case))


def test_helpers_poison_what_no_row_may_read():
    case = make_case(rows=2, lengths=[9, 0], page_size=8, width=3)
    assert (case.block_tables[0, 2:] == GARBAGE).all()
    assert np.isnan(case.k_pages[:, 0]).all()
    last = case.block_tables[0, 1]
    assert np.isnan(case.v_pages[:, last, :, 1:]).all()
    assert not np.isnan(case.v_pages[:, last, :, 0]).any()
    assert dataclasses.is_dataclass(PagedConfig())
