"""paged_attention's kernels on a Hopper GPU, against the fp32 reference."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PAGE_SIZES, PagedConfig, contiguous_attention, paged_attention
from pallas_kernels.kv_pages.pool import QUANTIZED
from tests.pallas_kernels.paged_inputs import cast, contiguous, make_case, quantize
from tests.pallas_kernels.tolerance import LIMITS, assert_close

pytestmark = pytest.mark.gpu


@functools.partial(jax.jit, static_argnames=("op", "implementation", "options"))
def attend(op, arrays, named, implementation, options):
    return op(*arrays, return_lse=True, implementation=implementation, **named, **dict(options))


def arguments_of(case, dtype, pages=None, per_head=(), room=None):
    """The op, its arrays and its named arrays. pages: the dtype of quantized ones, or "contiguous"."""
    case, op = cast(case, dtype), paged_attention
    num_heads = case.query.shape[1]
    named = {name: jnp.linspace(0.01, 2.0, num_heads) for name in per_head}
    arrays = list(case[:5])
    if pages == "contiguous":
        room = room or max(128, -(-int(case.kv_lengths.max()) // 8) * 8)
        arrays, op = [case.query, *contiguous(case, room), case.kv_lengths], contiguous_attention
    else:
        named["layer"] = jnp.int32(case.layer)
        if pages is not None:
            quantized = quantize(case, pages)
            arrays[1:3] = quantized[:2]
            named |= {"k_scale": jnp.asarray(quantized.k_scale), "v_scale": jnp.asarray(quantized.v_scale)}
    return op, [jnp.asarray(x) for x in arrays], named


def check_on_gpu(case, dtype, pages=None, per_head=(), room=None, **options):
    """The kernel with NaN wherever no row may look, against the fp32 reference, and for equal bits.

    Codes are exact in what is multiplied, so that quantized pages have the error of their scaled values.
    """
    op, arrays, named = arguments_of(case, dtype, pages, per_head, room)
    items = tuple(options.items())
    out, lse = attend(op, arrays, named, "sm90", items)
    again, _ = attend(op, arrays, named, "sm90", items)
    expected, expected_lse = attend(op, arrays, named, "reference", items)
    out, again, expected = (np.asarray(x, np.float32) for x in (out, again, expected))
    np.testing.assert_array_equal(out, again)
    limit = LIMITS["bfloat16" if pages in QUANTIZED else jnp.dtype(dtype).name]
    assert_close("out", out, expected, limit)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-3)
    return out


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_decode_of_every_page_size_and_head_dim(page_size, head_dim, dtype):
    width = 5000 // page_size + 1
    case = make_case(
        page_size, rows=6, heads=8, kv_heads=2, head_dim=head_dim, page_size=page_size, width=width
    )
    check_on_gpu(case, dtype)


@pytest.mark.parametrize("head_dim", range(72, 256, 8))
def test_decode_of_head_dims_that_end_within_a_block(head_dim):
    kinds = [None, "contiguous"] if head_dim % 16 else [None, *QUANTIZED]
    page_size = 8 if head_dim % 32 < 16 else 64
    shapes = {"page_size": page_size, "width": 2000 // page_size}
    case = make_case(head_dim, rows=6, heads=8, kv_heads=2, head_dim=head_dim, **shapes)
    for pages in kinds:
        check_on_gpu(case, jnp.bfloat16, pages, local_window_size=1500)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("group", [*range(1, 17)])
def test_decode_of_every_group(group, head_dim):
    case = make_case(group, rows=5, heads=3 * group, kv_heads=3, head_dim=head_dim, page_size=16, width=33)
    check_on_gpu(case, jnp.bfloat16)


@pytest.mark.parametrize("seed", range(int(os.environ.get("JAXATTN_GPU_CASES", 24))))
def test_decode_of_random_cases(seed):
    rng = np.random.default_rng(seed)
    page_size, kv_heads = int(rng.choice(PAGE_SIZES)), int(rng.integers(1, 9))
    head_dim = int(
        rng.choice([64, 72, 80, 96, 112, 128, 160, 256] if seed % 2 == 0 else [64, 80, 96, 128, 256])
    )
    rows, width = int(rng.integers(1, 40)), int(rng.integers(1, 1 + 4000 // page_size))
    case = make_case(
        seed,
        rows=rows,
        heads=kv_heads * int(rng.integers(1, 9 if head_dim == 256 else 17)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        width=width,
    )
    options: dict = {"pages": [None, *QUANTIZED, "contiguous"][rng.integers(4)] if seed % 2 else None}
    options["per_head"] = tuple(name for name in ("sinks", "alibi_slopes") if rng.random() < 0.25)
    if rng.random() < 0.4:
        options["local_window_size"] = int(rng.integers(0, 3000))
    if rng.random() < 0.3:
        options["logits_soft_cap"] = 5.0
    if rng.random() < 0.5:
        consumers, dynamic = 1 + (options["pages"] in QUANTIZED), bool(rng.random() < 0.5)
        options["config"] = PagedConfig(64, 64 * int(rng.integers(1, 40)), 2, consumers, dynamic)
    check_on_gpu(case, jnp.bfloat16, **options)


@pytest.mark.parametrize("room", [77, 128, 200, 255, 1001])
def test_caches_of_any_room(room):
    case = make_case(rows=3, heads=8, kv_heads=2, head_dim=128, width=-(-room // 8), lengths=[room, 5, 0])
    check_on_gpu(case, jnp.bfloat16, "contiguous", room=room)


def test_row_does_not_depend_on_the_others():
    case = make_case(rows=20, heads=8, kv_heads=2, head_dim=128, page_size=16, width=300)
    everything = check_on_gpu(case, jnp.bfloat16)
    others = case.kv_lengths.copy()
    others[np.arange(20) != 7] //= 3
    alone = check_on_gpu(case._replace(kv_lengths=others), jnp.bfloat16)
    np.testing.assert_array_equal(alone[7], everything[7])


@pytest.mark.parametrize("pages", [None, *QUANTIZED])
def test_bits_do_not_depend_on_batch_mates(pages):
    """Other lengths, other pages and another schedule beside it: a row keeps its bits."""
    case = make_case(rows=20, heads=8, kv_heads=2, head_dim=128, page_size=16, width=300)
    others = case._replace(kv_lengths=np.where(np.arange(20) == 7, case.kv_lengths, case.kv_lengths // 5))
    results = []
    for each, dynamic in ((case, False), (case, True), (others, False), (others, True)):
        config = PagedConfig(128, 512, 2, 1 if pages is None else 2, dynamic)
        results.append(check_on_gpu(each, jnp.bfloat16, pages, config=config)[7])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_uneven_rows():
    lengths = [32768, 1, 0, 700, *range(1, 60)]
    case = make_case(
        rows=len(lengths),
        heads=8,
        kv_heads=2,
        head_dim=128,
        page_size=16,
        width=2048,
        lengths=lengths,
        layers=1,
    )
    check_on_gpu(case, jnp.bfloat16)
