"""Rows of tables.py for batch_invariant=True: a row's bits, alone and among others."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import paged_attention
from pallas_kernels.paged_attention import config, decode_plan
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.paged_cases import integers
from tests.pallas_kernels.paged_inputs import Case, cast, make_case, quantize
from tests.pallas_kernels.prefill_cases import listed_by_xla
from tests.pallas_kernels.tables import CompileCase


def only(case: Case, row: int, width: int | None = None) -> Case:
    """The batch of one row, in a table of another width."""
    start = case.query_start
    table = case.block_tables[row : row + 1]
    if width is not None:
        beyond = np.zeros((1, max(width - table.shape[1], 0)), table.dtype)
        table = np.concatenate([table, beyond], axis=1)[:, :width]
    return case._replace(
        query=case.query[start[row] : start[row + 1]],
        block_tables=table,
        kv_lengths=case.kv_lengths[row : row + 1],
        query_start=start[row : row + 2] - start[row],
    )


def attend(case: Case, ragged=False, pages=None, **options):
    """The kernels' output and log-sum-exp, batch-invariant."""
    arrays, named = list(case[:5]), {}
    if ragged:
        named["query_start"] = jnp.asarray(case.query_start)
    if pages is not None:
        arrays[1], arrays[2], named["k_scale"], named["v_scale"] = quantize(case, pages)
    arrays, named = jax.tree.map(jnp.asarray, (arrays, named))
    named |= {"layer": case.layer, "return_lse": True, "implementation": "sm90", **options}
    results = paged_attention(*arrays, batch_invariant=True, **named)
    return [np.asarray(x) for x in jax.block_until_ready(results)]


def assert_same_bits(actual, expected):
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(mine.view(np.uint8), theirs.view(np.uint8))


def exact_products():
    """NumPy's products of fp32 depend on where in a matrix a row stands; a tensor core's do not."""
    matmul = np.matmul

    def exact(left, right, dtype):
        return matmul(left.astype(np.float64), right.astype(np.float64)).astype(dtype)

    return mock.patch.object(np, "matmul", exact)


def check_rows_alone(lengths, queries=None, pages=None, widths=(None,), sinks=False, split=128, **shapes):
    """Rows among others against each alone, in narrower and wider tables. The cuts are the default's, but the
    splits, short enough for the interpreter."""
    case = cast(
        make_case(rows=len(lengths), lengths=lengths, query_lengths=queries, page_size=16, **shapes),
        jnp.bfloat16,
    )
    options = {"sinks": np.linspace(-0.5, 2.0, case.query.shape[1], dtype=np.float32)} if sinks else {}
    ragged = queries is not None
    short = mock.patch.object(config, "INVARIANT_SPLITS", (split, split))
    few = mock.patch.object(decode_plan, "NUM_PROGRAMS", 2)
    with short, few, exact_products(), listed_by_xla(), interpreted():
        together = attend(case, ragged, pages, **options)
        for row, (first, stop) in enumerate(zip(case.query_start[:-1], case.query_start[1:], strict=True)):
            expected = [x[first:stop] for x in together]
            for width in widths:
                if width is None or width * 16 >= lengths[row]:
                    alone = only(case, row, width)
                    assert_same_bits(attend(alone, ragged, pages, **options), expected)
            if stop - first == 1 and ragged:
                assert_same_bits(attend(only(case, row), False, pages, **options), expected)


INTERPRET = {
    "paged_attention:batch-invariant, over splits, sinks": functools.partial(
        check_rows_alone, [300, 17], widths=(2, 8, 40), width=19, heads=8, head_dim=64, sinks=True
    ),
    "paged_attention:batch-invariant, tables shorter than a tile of 256, int8": functools.partial(
        check_rows_alone, [20, 300], widths=(2,), width=19, head_dim=64, pages=jnp.int8, split=256
    ),
    "paged_attention:batch-invariant, prompts and a decode row": functools.partial(
        check_rows_alone, [20, 135], queries=[1, 11], width=10, head_dim=64
    ),
}


def mixed_case(rows=64, tokens=512, heads=32, kv_heads=8, head_dim=128, width=32):
    """Prompts and decodes in tables of one split, with sinks."""
    array, pool = jax.ShapeDtypeStruct, (2, 1024, kv_heads, 16, head_dim)

    def attend(query, k_pages, v_pages, tables, lengths, start, layer, sinks):
        named = {"query_start": start, "layer": layer, "sinks": sinks, "batch_invariant": True}
        return paged_attention(query, k_pages, v_pages, tables, lengths, implementation="sm90", **named)

    specs = (array((tokens, heads, head_dim), jnp.bfloat16), *(array(pool, jnp.bfloat16),) * 2)
    specs += (integers(rows, width), integers(rows), integers(rows + 1), integers())
    return CompileCase(attend, (*specs, array((heads,), jnp.float32)))


COMPILE = {"paged_attention:batch-invariant, a mixed batch, one split, sinks": mixed_case()}
