"""Rows of tables.py for paged_attention over ragged queries."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import PrefillConfig, paged_attention
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.paged_cases import RMS_ERROR, compare, integers
from tests.pallas_kernels.paged_inputs import cast, make_case
from tests.pallas_kernels.tables import CompileCase

SMALL = PrefillConfig(warpgroups=1, tile_kv=64, stages=2)
PAIR = PrefillConfig(warpgroups=2, tile_kv=64, stages=2)


def check_prefill(dtype=jnp.bfloat16, config=SMALL, call=None, **shapes):
    """The interpreted kernels against the reference; free pages and tails are NaN, tables end in garbage."""
    case = cast(make_case(head_dim=shapes.pop("head_dim", 64), **shapes), dtype)
    arguments = dict(
        query_start=jnp.asarray(case.query_start), layer=case.layer, return_lse=True, **(call or {})
    )
    arrays = [jnp.asarray(x) for x in case[:5]]
    expected, expected_lse = paged_attention(*arrays, implementation="reference", **arguments)
    with interpreted():
        out, lse = jax.block_until_ready(
            paged_attention(*arrays, implementation="sm90", prefill_config=config, **arguments)
        )
    compare(out, expected, RMS_ERROR[jnp.dtype(dtype).name])
    np.testing.assert_allclose(lse, expected_lse, atol=2e-3)


# Rows, page size, table width, and lengths of each row's keys and queries.
PREFILL_CASES: dict[str, dict[str, Any]] = {
    "a prompt, a decode row, an empty row, a chunk behind a prefix": {
        "rows": 4,
        "page_size": 16,
        "width": 9,
        "lengths": [40, 70, 0, 130],
        "query_lengths": [40, 1, 3, 9],
    },
    "group 1, two warpgroups with tokens of their own, fp16": {
        "rows": 2,
        "heads": 2,
        "kv_heads": 2,
        "page_size": 8,
        "width": 20,
        "lengths": [150, 40],
        "query_lengths": [145, 20],
        "dtype": jnp.float16,
        "config": PAIR,
    },
    "group 4 over two warpgroups, whole tiles": {
        "rows": 1,
        "heads": 4,
        "kv_heads": 1,
        "page_size": 64,
        "width": 2,
        "lengths": [128],
        "query_lengths": [64],
        "config": PAIR,
    },
    "group 3, page size 128 over two tiles, all keys visible": {
        "rows": 2,
        "heads": 3,
        "kv_heads": 1,
        "page_size": 128,
        "width": 1,
        "lengths": [100, 128],
        "query_lengths": [10, 18],
        "call": {"is_causal": False},
    },
    "keys split in two": {
        "rows": 2,
        "page_size": 16,
        "width": 33,
        "lengths": [520, 70],
        "query_lengths": [5, 3],
        "config": PrefillConfig(warpgroups=1, tile_kv=64, stages=2, splits=2),
    },
    "head dim 128, window and soft cap": {
        "rows": 1,
        "head_dim": 128,
        "page_size": 32,
        "width": 6,
        "lengths": [180],
        "query_lengths": [35],
        "call": {"local_window_size": 70, "logits_soft_cap": 3.0},
    },
}

INTERPRET = {
    f"paged_attention:prefill {name}": functools.partial(check_prefill, **case)
    for name, case in PREFILL_CASES.items()
}


def prefill_case(
    tokens=2048, rows=16, heads=32, kv_heads=8, head_dim=128, page_size=16, dtype=jnp.bfloat16, **arguments
):
    """A mixed batch over two layers of 1024 pages, with a traced layer, as the default config cuts it."""
    pages = jax.ShapeDtypeStruct((2, 1024, kv_heads, page_size, head_dim), dtype)
    query = jax.ShapeDtypeStruct((tokens, heads, head_dim), dtype)

    def attend(query, k_pages, v_pages, tables, lengths, query_start, layer):
        batch = {"query_start": query_start, "layer": layer, "return_lse": True}
        return paged_attention(
            query, k_pages, v_pages, tables, lengths, implementation="sm90", **batch, **arguments
        )

    lengths = integers(rows, 8192 // page_size), integers(rows), integers(rows + 1)
    # The log-sum-exp by tile, the parts of split keys, and what decode's splits need.
    return CompileCase(attend, (query, pages, pages, *lengths, integers()), max_temp_bytes=80 * 2**20)


COMPILE = {
    f"paged_attention:prefill {name}": prefill_case(**arguments)
    for name, arguments in {
        "Llama-3-8B": {},
        "page size 8, fp16": {"page_size": 8, "dtype": jnp.float16},
        "GPT-2 medium, page size 256": {"heads": 16, "kv_heads": 16, "head_dim": 64, "page_size": 256},
        "few tokens of few rows, keys split": {"tokens": 64, "rows": 4},
        "H=256, few tokens": {"tokens": 8, "rows": 1, "heads": 8, "kv_heads": 4, "head_dim": 256},
        "H=256, group 2": {"heads": 8, "kv_heads": 4, "head_dim": 256},
        "group 7, all keys visible": {"heads": 7, "kv_heads": 1, "is_causal": False},
        "window and soft cap": {"local_window_size": 1024, "logits_soft_cap": 30.0},
        "window and soft cap, H=64": {"head_dim": 64, "local_window_size": 1024, "logits_soft_cap": 30.0},
    }.items()
}
