"""Rows of tables.py for what is not finite where rows look: no kernel may hide it.

A row that sees NaN is NaN, as it is in the reference, and the others are what they were: a row of zeros would
let a run with a broken weight train on.
"""

import contextlib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import PagedConfig, PrefillConfig, flash_attention, paged_attention
from tests.pallas_kernels.flash_cases import random_inputs
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.paged_inputs import cast, make_case
from tests.pallas_kernels.tables import CompileCase


def compare(call, num_nan_rows, is_interpreted):
    """num_nan_rows: rows and heads that see NaN, at least, so that the test tells."""
    expected = jax.tree.map(lambda x: np.asarray(x, np.float32), call("reference"))
    with interpreted() if is_interpreted else contextlib.nullcontext():
        found = jax.tree.map(lambda x: np.asarray(x, np.float32), jax.block_until_ready(call("sm90")))
    assert num_nan_rows <= np.isnan(expected[1]).sum() < expected[1].size
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=0.03, rtol=0.03)  # NaN where NaN is expected


def check_flash(is_interpreted=True, **options):
    query, key, value = random_inputs([(1, 130, 2, 64), (1, 130, 1, 64), (1, 130, 1, 64)], jnp.bfloat16)
    query, key = query.at[0, 5, 1].set(jnp.nan), key.at[0, 120, 0, 3].set(jnp.nan)
    call = functools.partial(flash_attention, query, key, value, is_causal=True, return_lse=True, **options)
    compare(lambda implementation: call(implementation=implementation), 21, is_interpreted)


def check_paged(queries, lengths, is_interpreted=True, **options):
    """The first row's last query is NaN, and a key of the last row."""
    shapes = {"rows": 3, "head_dim": 64, "page_size": 16, "width": 10, "query_lengths": queries}
    case = cast(make_case(lengths=lengths, **shapes), jnp.bfloat16)
    query, k_pages = (jnp.asarray(x) for x in (case.query, case.k_pages))
    query = query.at[case.query_start[1] - 1, 2].set(jnp.nan)
    page = case.block_tables[2, lengths[2] // 2 // 16]
    k_pages = k_pages.at[case.layer, page, 1, lengths[2] // 2 % 16, 7].set(jnp.nan)
    arrays = query, k_pages, *(jnp.asarray(x) for x in (case.v_pages, case.block_tables, case.kv_lengths))
    start = None if queries is None else jnp.asarray(case.query_start)
    call = functools.partial(paged_attention, *arrays, query_start=start, layer=case.layer, return_lse=True)
    compare(lambda name: call(implementation=name, **options), 3, is_interpreted)


SMALL = PagedConfig(tile=64, split=64, stages=2)
CASES: dict[str, Callable[..., None]] = {
    "flash_attention:NaN in a query and a key": check_flash,
    "flash_attention:NaN, with sinks": functools.partial(check_flash, sinks=jnp.array([0.5, -0.5])),
    "paged_attention:NaN in a query and a key, decode": functools.partial(check_paged, None, [70, 30, 150]),
    "paged_attention:NaN in a query and a key, parts": functools.partial(
        check_paged, None, [70, 30, 150], config=SMALL
    ),
    "paged_attention:NaN in a query and a key, prompts": functools.partial(
        check_paged, [20, 3, 17], [40, 30, 150], prefill_config=PrefillConfig(1, 64, 2)
    ),
    "paged_attention:NaN in a query and a key, keys split": functools.partial(
        check_paged, [20, 3, 17], [40, 30, 150], prefill_config=PrefillConfig(1, 64, 2, splits=2)
    ),
}
INTERPRET = CASES
COMPILE: dict[str, CompileCase] = {}
