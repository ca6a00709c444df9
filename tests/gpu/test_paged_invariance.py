"""batch_invariant=True on a Hopper GPU: a row has the same bits alone and in any batch."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import contiguous_attention
from pallas_kernels.kv_pages.pool import QUANTIZED
from tests.pallas_kernels.invariance_cases import assert_same_bits, attend, only
from tests.pallas_kernels.paged_inputs import Case, cast, contiguous, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("JAXATTN_TEST_GPU") != "1", reason="needs a Hopper GPU"),
]

ROWS = (2, 8, 16, 33)
PER_HEAD = {"sinks": np.linspace(-0.5, 2.0, 8, dtype=np.float32)}


def first_rows(case: Case, rows: int) -> Case:
    """The case's first rows, of one query each."""
    fewer = {name: getattr(case, name)[:rows] for name in ("query", "block_tables", "kv_lengths")}
    return case._replace(**fewer, query_start=case.query_start[: rows + 1])


def among(case: Case, rows: int, width: int) -> Case:
    """Row 0 and rows - 1 others, in tables of another width."""
    case = first_rows(case, rows)
    beyond = np.zeros((rows, max(width - case.block_tables.shape[1], 0)), np.int32)
    return case._replace(block_tables=np.concatenate([case.block_tables, beyond], axis=1)[:, :width])


@pytest.mark.parametrize("length", [40, 700, 9000])
@pytest.mark.parametrize("kv_heads", [2, 8])
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("pages", [None, *QUANTIZED])
@pytest.mark.parametrize(
    "options", [{}, {"local_window_size": 600, "logits_soft_cap": 5.0, **PER_HEAD}], ids=len
)
def test_decode_alone_and_among_others(length, kv_heads, head_dim, pages, options):
    """Tables from those that row 0 just fits into to ones of more than 32 splits; with query_start too."""
    lengths = [length, *np.random.default_rng(0).integers(0, length + 1, max(ROWS) - 1)]
    width = -(-length // 16)
    case = cast(
        make_case(
            rows=max(ROWS),
            heads=8,
            kv_heads=kv_heads,
            head_dim=head_dim,
            page_size=16,
            width=width,
            lengths=lengths,
            layers=1,
        ),
        jnp.bfloat16,
    )
    alone = attend(only(case, 0), pages=pages, **options)
    for columns in (width + 1, 2500):
        assert_same_bits(attend(only(case, 0, columns), pages=pages, **options), alone)
    for rows in ROWS:
        for columns in (width, 1024):
            if columns >= width:
                together = attend(among(case, rows, columns), pages=pages, **options)
                assert_same_bits([x[:1] for x in together], alone)
    assert_same_bits([x[:1] for x in attend(case, True, pages, **options)], alone)


@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (10, 2), (7, 1)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("pages", [None, *QUANTIZED])
def test_prompts_alone_and_among_others(heads, head_dim, pages):
    """Rows begin at any token; alone they are few enough that keys would be split."""
    if pages is not None and head_dim == 256:
        pytest.skip("the reference serves it")
    queries, lengths = [3, 150, 1, 0, 9, 2, 400], [900, 1000, 800, 5, 3000, 2, 400]
    case = cast(
        make_case(
            rows=len(queries),
            heads=heads[0],
            kv_heads=heads[1],
            head_dim=head_dim,
            page_size=16,
            width=200,
            lengths=lengths,
            query_lengths=queries,
            layers=1,
        ),
        jnp.bfloat16,
    )
    together = attend(case, True, pages)
    for row in np.flatnonzero(queries):
        first, stop = case.query_start[row : row + 2]
        expected = [x[first:stop] for x in together]
        assert_same_bits(attend(only(case, row), True, pages), expected)
        if queries[row] == 1:
            assert_same_bits(attend(only(case, row), False, pages), expected)


def test_caches_alone_and_among_others():
    case = cast(make_case(rows=33, heads=8, head_dim=128, page_size=16, width=200, layers=1), jnp.bfloat16)
    alone = None
    for rows, room in ((1, 3200), (1, 4096), (2, 3200), (16, 3200), (33, 8192)):
        few = first_rows(case, rows)
        arrays = [jnp.asarray(x) for x in (few.query, *contiguous(few, room), few.kv_lengths)]
        results = contiguous_attention(*arrays, batch_invariant=True, return_lse=True, implementation="sm90")
        results = [np.asarray(x)[:1] for x in results]
        alone = alone or results
        assert_same_bits(results, alone)
