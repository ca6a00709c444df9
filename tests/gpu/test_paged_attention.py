"""paged_attention's kernels on a Hopper GPU, against the fp32 reference."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PAGE_SIZES, PagedConfig, paged_attention
from tests.pallas_kernels.paged_inputs import cast, make_case

pytestmark = pytest.mark.gpu


@functools.partial(jax.jit, static_argnames=("implementation", "options"))
def attend(arrays, layer, implementation, options):
    return paged_attention(
        *arrays, layer=layer, return_lse=True, implementation=implementation, **dict(options)
    )


def check_on_gpu(case, dtype, **options):
    """The kernel with NaN wherever no row may look, against the fp32 reference, and for equal bits."""
    arrays = [jnp.asarray(x) for x in cast(case, dtype)[:5]]
    layer, items = jnp.int32(case.layer), tuple(options.items())
    out, lse = attend(arrays, layer, "sm90", items)
    again, _ = attend(arrays, layer, "sm90", items)
    expected, expected_lse = attend(arrays, layer, "reference", items)
    out, again, expected = (np.asarray(x, np.float32) for x in (out, again, expected))
    np.testing.assert_array_equal(out, again)
    scale = max(np.sqrt(np.mean(expected**2)), 1e-3)
    limit = {"bfloat16": 5e-3, "float16": 7e-4}[jnp.dtype(dtype).name]
    assert np.sqrt(np.mean((out - expected) ** 2)) / scale < limit
    np.testing.assert_allclose(lse, expected_lse, atol=2e-3)
    return out


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_decode_of_every_page_size_and_head_dim(page_size, head_dim, dtype):
    width = 5000 // page_size + 1
    case = make_case(
        page_size, rows=6, heads=8, kv_heads=2, head_dim=head_dim, page_size=page_size, width=width
    )
    check_on_gpu(case, dtype)


@pytest.mark.parametrize("group", [*range(1, 17)])
def test_decode_of_every_group(group):
    case = make_case(group, rows=5, heads=3 * group, kv_heads=3, head_dim=64, page_size=16, width=33)
    check_on_gpu(case, jnp.bfloat16)


@pytest.mark.parametrize("seed", range(int(os.environ.get("JAXATTN_GPU_CASES", 24))))
def test_decode_of_random_cases(seed):
    rng = np.random.default_rng(seed)
    page_size, kv_heads = int(rng.choice(PAGE_SIZES)), int(rng.integers(1, 9))
    head_dim = int(rng.choice([64, 128, 256]))
    rows, width = int(rng.integers(1, 40)), int(rng.integers(1, 1 + 4000 // page_size))
    case = make_case(
        seed,
        rows=rows,
        heads=kv_heads * int(rng.integers(1, 17)),
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        width=width,
    )
    options = {}
    if rng.random() < 0.4:
        options["local_window_size"] = int(rng.integers(0, 3000))
    if rng.random() < 0.3:
        options["logits_soft_cap"] = 5.0
    if rng.random() < 0.5:
        tile = int(rng.choice([64, 128])) if head_dim < 256 else 64
        options["config"] = PagedConfig(tile, tile * int(rng.integers(1, 20)), 2)
    check_on_gpu(case, jnp.bfloat16, **options)


def test_row_does_not_depend_on_the_others():
    case = make_case(rows=20, heads=8, kv_heads=2, head_dim=128, page_size=16, width=300)
    everything = check_on_gpu(case, jnp.bfloat16)
    others = case.kv_lengths.copy()
    others[np.arange(20) != 7] //= 3
    alone = check_on_gpu(case._replace(kv_lengths=others), jnp.bfloat16)
    np.testing.assert_array_equal(alone[7], everything[7])


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
