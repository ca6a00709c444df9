"""paged_attention over ragged queries on a Hopper GPU, against the fp32 reference."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PAGE_SIZES, PrefillConfig, cascade_attention, paged_attention
from pallas_kernels.kv_pages.pool import QUANTIZED
from tests.pallas_kernels.cascade_cases import share
from tests.pallas_kernels.paged_inputs import cast, make_case, quantize

pytestmark = pytest.mark.gpu

CASES = int(os.environ.get("JAXATTN_GPU_CASES", 24))
PACKED = PrefillConfig(warpgroups=2, tile_kv=64, stages=3, packs=True)
RMS_ERROR = {"bfloat16": 5e-3, "float16": 7e-4}


@functools.partial(jax.jit, static_argnames=("implementation", "options"))
def attend(arrays, named, implementation, options):
    return paged_attention(*arrays, return_lse=True, implementation=implementation, **named, **dict(options))


def check_on_gpu(case, dtype, padding=0, pages=None, per_head=(), **options):
    """The kernels with NaN wherever no row may look, against the reference, and for equal bits.

    pages: the dtype of quantized ones. per_head: of sinks and alibi_slopes, those given.
    """
    case = cast(case._replace(query=np.pad(case.query, ((0, padding), (0, 0), (0, 0)))), dtype)
    arrays, named = list(case[:5]), {"query_start": case.query_start, "layer": np.int32(case.layer)}
    named |= {name: np.linspace(0.01, 2.0, case.query.shape[1], dtype=np.float32) for name in per_head}
    if pages is not None:
        arrays[1], arrays[2], named["k_scale"], named["v_scale"] = quantize(case, pages)
    call = functools.partial(attend, [jnp.asarray(x) for x in arrays], jax.tree.map(jnp.asarray, named))
    items = tuple(options.items())
    limit = 5e-3 if pages in QUANTIZED else RMS_ERROR[jnp.dtype(dtype).name]
    (out, lse), (again, _), (expected, expected_lse) = (
        [np.asarray(x, np.float32) for x in call(name, items)] for name in ("sm90", "sm90", "reference")
    )
    np.testing.assert_array_equal(out, again)
    scale = max(np.sqrt(np.mean(expected**2)), 1e-3)
    assert np.sqrt(np.mean((out - expected) ** 2)) / scale < limit
    is_rounded = pages in QUANTIZED and dtype == jnp.float16  # to bf16
    np.testing.assert_allclose(lse, expected_lse, atol=1e-2 if is_rounded else 2e-3, rtol=1e-5)
    return out


def draw_rows(rng, rows: int, tokens: int, capacity: int):
    """Lengths of keys and queries that add up to at most `tokens` queries: prompts, chunks, decode rows."""
    queries = np.zeros(rows, int)
    left = tokens
    for row in rng.permutation(rows):
        longest = max(2, min(left, tokens // 2))
        queries[row] = min(left, rng.choice([0, 1, rng.integers(2, 12), rng.integers(1, longest)]))
        left -= queries[row]
    lengths = np.minimum(capacity, queries + rng.integers(0, capacity, rows) * (rng.random(rows) < 0.7))
    return np.where(rng.random(rows) < 0.05, 0, lengths), queries


def mixed_batch(head_dim, page_size):
    return make_case(
        heads=8,
        head_dim=head_dim,
        rows=5,
        page_size=page_size,
        width=-(-900 // page_size),
        lengths=[400, 850, 0, 130, 700],
        query_lengths=[400, 1, 3, 57, 200],
    )


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_mixed_batch_of_every_page_size_and_head_dim(page_size, head_dim):
    dtype = jnp.float16 if page_size == 32 else jnp.bfloat16
    check_on_gpu(mixed_batch(head_dim, page_size), dtype, padding=5)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 160, 192, 224])
@pytest.mark.parametrize("pages", QUANTIZED)
def test_mixed_batch_of_quantized_pages(pages, head_dim, page_size):
    dtype = jnp.float16 if page_size == 32 else jnp.bfloat16
    check_on_gpu(mixed_batch(head_dim, page_size), dtype, padding=5, pages=pages)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 240, 256])
@pytest.mark.parametrize("per_head", [("sinks",), ("alibi_slopes",), ("sinks", "alibi_slopes")])
@pytest.mark.parametrize("options", [{}, {"local_window_size": 90, "logits_soft_cap": 4.0}], ids=str)
def test_mixed_batch_with_sinks_and_slopes(options, per_head, head_dim):
    check_on_gpu(mixed_batch(head_dim, 16), jnp.bfloat16, padding=5, per_head=per_head, **options)


@pytest.mark.parametrize("pages", [None, *QUANTIZED])
@pytest.mark.parametrize("is_causal", [True, False])
def test_few_tokens_of_few_rows_split_their_keys(is_causal, pages):
    case = make_case(
        rows=2, heads=8, head_dim=128, page_size=16, width=512, lengths=[8000, 3000], query_lengths=[9, 30]
    )
    everything = ("sinks", "alibi_slopes")
    check_on_gpu(case, jnp.bfloat16, pages=pages, per_head=everything, is_causal=is_causal)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("group", range(1, 17))
def test_every_group(group, head_dim):
    case = make_case(
        group,
        heads=2 * group,
        head_dim=head_dim,
        rows=4,
        page_size=16,
        width=25,
        lengths=[150, 390, 90, 301],
        query_lengths=[149, 90, 1, 17],
    )
    check_on_gpu(case, jnp.bfloat16)


@pytest.mark.parametrize(
    "options",
    [
        {"head_dim": 64},
        {"head_dim": 128, "heads": 8},
        {"head_dim": 64, "heads": 2, "local_window_size": 90},
        {"head_dim": 128, "heads": 14, "local_window_size": 33, "logits_soft_cap": 4.0},
        {"head_dim": 128, "heads": 10, "per_head": ("sinks",)},
        {"head_dim": 64, "heads": 14, "is_causal": False},
        {"head_dim": 64, "heads": 6, "per_head": ("sinks", "alibi_slopes"), "prefill_config": PACKED},
        {"head_dim": 96, "heads": 10, "prefill_config": dataclasses.replace(PACKED, overlap=True)},
        {"head_dim": 128, "heads": 14, "pages": jnp.int8},
        {"head_dim": 256, "local_window_size": 200, "logits_soft_cap": 4.0},
        {"head_dim": 128, "heads": 8, "is_causal": False},
        {"head_dim": 64, "heads": 2, "is_causal": False},
        {"head_dim": 96, "per_head": ("sinks", "alibi_slopes"), "local_window_size": 77},
        {"head_dim": 128, "heads": 8, "pages": jnp.int8, "per_head": ("sinks",)},
        {"head_dim": 64, "heads": 2, "pages": jnp.int8, "local_window_size": 33},
        {"head_dim": 128, "heads": 2, "pages": jnp.float8_e4m3fn, "per_head": ("alibi_slopes",)},
        {"head_dim": 192, "heads": 8, "pages": jnp.float8_e4m3fn, "logits_soft_cap": 4.0},
    ],
    ids=str,
)
def test_any_division_of_tokens_into_rows(options):
    """One compiled call, many batches."""
    options = dict(options)
    shapes = {name: options.pop(name) for name in ("head_dim", "heads") if name in options}
    rng = np.random.default_rng(0)
    rows, tokens, width, num_pages = 9, 400, 50, 300
    for seed in range(CASES):
        lengths, queries = draw_rows(rng, rows, tokens, width * 16)
        while (-(-lengths // 16)).sum() > num_pages - 3:
            lengths //= 2
        case = make_case(
            seed, rows=rows, page_size=16, width=width, lengths=lengths, query_lengths=queries, **shapes
        )
        missing = num_pages - case.k_pages.shape[1]
        k_pages, v_pages = (
            np.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)), constant_values=np.nan)
            for x in (case.k_pages, case.v_pages)
        )
        case = case._replace(k_pages=k_pages, v_pages=v_pages)
        check_on_gpu(case, jnp.bfloat16, padding=tokens - int(queries.sum()), **options)


def test_a_prompt_in_chunks_equals_the_prompt_at_once():
    case = make_case(rows=1, heads=8, head_dim=128, page_size=16, width=64, lengths=[1000], layers=1)
    query = np.random.default_rng(1).standard_normal((1000, 8, 128)).astype(np.float32)
    whole = check_on_gpu(case._replace(query=query, query_start=np.array([0, 1000])), jnp.bfloat16)
    for first, last in ((0, 389), (389, 1000)):
        chunk = case._replace(
            query=query[first:last],
            query_start=np.array([0, last - first]),
            kv_lengths=np.array([last], np.int32),
        )
        # Free slots are NaN: all that the chunk before has not written. Here they hold the future's keys.
        out = check_on_gpu(chunk, jnp.bfloat16)
        np.testing.assert_allclose(out, whole[first:last], atol=2e-2)


def test_row_does_not_depend_on_the_others():
    case = make_case(
        rows=4,
        heads=8,
        head_dim=128,
        page_size=16,
        width=40,
        lengths=[600, 500, 300, 640],
        query_lengths=[64, 100, 1, 70],
    )
    everything = check_on_gpu(case, jnp.bfloat16)
    others = case.kv_lengths - [200, 0, 100, 320]
    alone = check_on_gpu(case._replace(kv_lengths=others.astype(np.int32)), jnp.bfloat16)
    np.testing.assert_array_equal(alone[64:164], everything[64:164])


@pytest.mark.parametrize(("head_dim", "heads"), [(64, 2), (80, 4), (128, 8), (256, 4)])
def test_cascade_equals_paged_attention(head_dim, heads):
    rng = np.random.default_rng(0)
    groups = rng.integers(-1, 3, 20)
    lengths = rng.integers(1100, 1400, 20)
    case = make_case(
        rows=20, heads=heads, head_dim=head_dim, page_size=16, width=88, lengths=lengths, layers=1
    )
    case = cast(share(case, [1088, 16, 640], groups), jnp.bfloat16)
    case.kv_lengths[-4:] = 0, 7, 639, 640  # some shorter than their prefix
    arrays = [jnp.asarray(x) for x in case[:5]]
    prefixes = jnp.asarray([1088, 16, 640]), jnp.asarray(groups)
    out, lse = jax.jit(functools.partial(cascade_attention, return_lse=True, implementation="sm90"))(
        *arrays, *prefixes
    )
    expected, expected_lse = paged_attention(*arrays, return_lse=True, implementation="reference")
    out, expected = np.asarray(out, np.float32), np.asarray(expected, np.float32)
    assert np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2)) < RMS_ERROR["bfloat16"]
    np.testing.assert_allclose(lse, expected_lse, atol=2e-3)
