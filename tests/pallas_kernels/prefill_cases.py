"""Rows of tables.py for paged_attention over ragged queries."""

import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import PrefillConfig, paged_attention
from pallas_kernels.paged_attention import prefill_plan, sm90
from pallas_kernels.paged_attention.prefill_list_sm90 import list_items
from pallas_kernels.paged_attention.prefill_plan import PrefillPlan
from pallas_kernels.paged_attention.prefill_units import NO_WORK, Work
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.late_items import taken_together
from tests.pallas_kernels.paged_cases import RMS_ERROR, compare, integers
from tests.pallas_kernels.paged_inputs import cast, make_case, quantize
from tests.pallas_kernels.tables import CompileCase

SMALL, PAIR = (PrefillConfig(warpgroups, tile_kv=64, stages=2) for warpgroups in (1, 2))
AHEAD = dataclasses.replace(PAIR, overlap=True)


def listed_by_xla():
    """The list of work as XLA computes it, which is quicker here: its kernel has rows of its own."""
    return mock.patch.multiple(sm90, MAX_ROWS=0, plan_work=taken_together)


def check_prefill(
    dtype=jnp.bfloat16, pages=None, config=SMALL, call=None, heads=4, padding=0, past=0, **shapes
):
    """The interpreted kernels against the reference; free pages and tails are NaN, tables end in garbage.

    pages: the dtype of quantized pages. padding: tokens of no row, behind the last. past: how far beyond the
    tokens the last row is said to end.
    """
    case = cast(make_case(head_dim=shapes.pop("head_dim", 64), heads=heads, **shapes), dtype)
    arguments = dict(
        query_start=jnp.asarray(case.query_start).at[-1].add(past),
        layer=case.layer,
        return_lse=True,
        **(call or {}),
    )
    for name in {"sinks", "alibi_slopes"} & set(arguments):
        arguments[name] = jnp.linspace(-0.5, 2.0, heads)
    arrays = [np.pad(case.query, ((0, padding), (0, 0), (0, 0))), *case[1:5]]
    if pages is not None:
        quantized = quantize(case, pages)
        arrays[1:3] = quantized[:2]
        arguments |= {"k_scale": jnp.asarray(quantized.k_scale), "v_scale": jnp.asarray(quantized.v_scale)}
    arrays = [jnp.asarray(x) for x in arrays]
    expected, expected_lse = paged_attention(*arrays, implementation="reference", **arguments)
    with listed_by_xla(), interpreted():
        out, lse = jax.block_until_ready(
            paged_attention(*arrays, implementation="sm90", prefill_config=config, **arguments)
        )
    compare(out, expected, RMS_ERROR["bfloat16" if pages else jnp.dtype(dtype).name])
    np.testing.assert_allclose(lse, expected_lse, atol=4e-3 if pages else 2e-3)


# Rows, page size, table width, and lengths of each row's keys and queries.
PREFILL_CASES: dict[str, dict[str, Any]] = {
    "a prompt, a decode row, an empty row, a chunk behind a prefix": {
        **{"rows": 4, "heads": 6, "page_size": 16, "width": 9, "lengths": [40, 70, 0, 130]},
        "query_lengths": [40, 1, 3, 9],
    },
    "group 1, two warpgroups with tokens of their own, fp16": {
        **{"rows": 2, "heads": 2, "kv_heads": 2, "page_size": 8, "width": 20, "lengths": [150, 40]},
        **{"query_lengths": [145, 20], "dtype": jnp.float16, "config": PAIR},
    },
    "softmax a tile ahead, two warpgroups with tokens of their own": {
        "rows": 2,
        "heads": 1,
        "kv_heads": 1,
        "page_size": 16,
        "width": 17,
        "lengths": [150, 260],
        "query_lengths": [130, 3],
        "config": AHEAD,
    },
    "softmax a tile ahead, a window, sinks": {
        "rows": 2,
        "heads": 2,
        "kv_heads": 1,
        "page_size": 8,
        "width": 40,
        "lengths": [310, 0],
        "query_lengths": [130, 2],
        "config": dataclasses.replace(AHEAD, stages=3),
        "call": {"local_window_size": 100, "sinks": None},
    },
    "rows that are said to end beyond the tokens": {
        **{"rows": 3, "page_size": 16, "lengths": [40, 70, 30], "query_lengths": [6, 1, 8], "past": 500},
    },
    "one query, the only row": {
        **{"rows": 1, "width": 20, "lengths": [150], "query_lengths": [1], "padding": 15},
        "config": dataclasses.replace(SMALL, splits=2),
        "call": {"sinks": None},
    },
    "one query, the only row, packed tiles": {
        **{"rows": 1, "heads": 3, "kv_heads": 1, "lengths": [40], "query_lengths": [1], "padding": 15},
        "config": dataclasses.replace(SMALL, packs=True),
    },
    "softmax a tile ahead, H=256, group 5 of 15 octets": {
        **{"rows": 1, "heads": 5, "kv_heads": 1, "head_dim": 256, "width": 24, "lengths": [190]},
        **{"query_lengths": [20], "config": AHEAD},
    },
    "packed tiles, group 3, a window and sinks": {
        **{"rows": 2, "heads": 3, "kv_heads": 1, "lengths": [48, 40], "query_lengths": [32, 9]},
        "config": dataclasses.replace(SMALL, packs=True),
        "call": {"local_window_size": 30, "sinks": None},
    },
    "group 4 over two warpgroups, whole tiles": {
        **{"rows": 1, "heads": 4, "kv_heads": 1, "page_size": 64, "width": 2, "lengths": [128]},
        **{"query_lengths": [64], "config": PAIR},
    },
    "whole tiles and a last token, head dim 128": {
        **{"rows": 1, "heads": 4, "kv_heads": 1, "head_dim": 128, "page_size": 64, "width": 2},
        **{"lengths": [128], "query_lengths": [33], "config": PAIR},
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
    "sinks and ALiBi, a token of no row": {
        "rows": 2,
        "heads": 2,
        "kv_heads": 1,
        "page_size": 16,
        "width": 5,
        "lengths": [70, 0],
        "query_lengths": [20, 3],
        "padding": 2,
        "call": {"sinks": None, "alibi_slopes": None},
    },
    "sinks over split keys, all visible, ALiBi": {
        "rows": 1,
        "heads": 2,
        "kv_heads": 1,
        "page_size": 64,
        "width": 8,
        "lengths": [480],
        "query_lengths": [5],
        "config": PrefillConfig(warpgroups=1, tile_kv=64, stages=2, splits=2),
        "call": {"sinks": None, "alibi_slopes": None, "is_causal": False},
    },
    "head dim 80, a window": {
        **{"rows": 2, "heads": 2, "kv_heads": 1, "head_dim": 80, "page_size": 16, "width": 9},
        "lengths": [130, 70],
        "query_lengths": [21, 1],
        "call": {"local_window_size": 40},
    },
    "head dim 96, whole tiles": {
        "rows": 1,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 96,
        "page_size": 32,
        "width": 3,
        "lengths": [96],
        "query_lengths": [64],
    },
    "int8 pages, two warpgroups with tokens of their own, a window": {
        "rows": 2,
        "heads": 1,
        "kv_heads": 1,
        "page_size": 8,
        "width": 24,
        "lengths": [190, 40],
        "query_lengths": [80, 20],
        "pages": jnp.int8,
        "config": PAIR,
        "call": {"local_window_size": 60},
    },
    "fp8 pages, sinks, ALiBi, soft cap": {
        "rows": 2,
        "heads": 2,
        "kv_heads": 1,
        "page_size": 16,
        "width": 9,
        "lengths": [130, 9],
        "query_lengths": [7, 9],
        "pages": jnp.float8_e4m3fn,
        "dtype": jnp.float16,
        "config": PAIR,
        "call": {"sinks": None, "alibi_slopes": None, "logits_soft_cap": 5.0},
    },
    "int8 pages, head dim 160, one slot": {
        "rows": 1,
        "heads": 1,
        "kv_heads": 1,
        "head_dim": 160,
        "page_size": 64,
        "width": 3,
        "lengths": [190],
        "query_lengths": [9],
        "pages": jnp.int8,
    },
}


def make_plan(tokens, rows, group, width, config, is_causal=True, window_left=None):
    return PrefillPlan(
        spec=PagedSpec(1.0, window_left, is_causal=is_causal),
        config=config,
        query_dtype=jnp.bfloat16,
        page_dtype=jnp.bfloat16,
        num_tokens=tokens,
        num_rows=rows,
        num_heads=2 * group,
        num_kv_heads=2,
        head_dim=64,
        page_size=16,
        num_pages=100,
        table_width=width,
    )


def check_list(rows, tokens, group, config, num_single, cached=640, num_late=None, **options):
    """The records that the kernel lists against those that XLA computes: rows without queries and of one, all
    of other lengths, between tokens of no row; and whether it sees that no row has one query.

    cached: fewer tokens than so many were there before. num_late: rows that are taken together, at least.
    """
    rng = np.random.default_rng(rows)
    queries = rng.choice(3 * tokens // (2 * rows), rows) * rng.choice((0, 1, 1), rows)
    queries += queries == 1
    queries[rng.choice(rows, num_single)] = 1
    starts = 3 + np.minimum(np.cumsum([0, *queries]), tokens - 5)
    lengths = rng.integers(0, cached, rows) + (np.diff(starts) if num_late else 0)
    batch = jnp.asarray(starts), jnp.asarray(lengths)
    with interpreted(num_cores=4):
        plan = make_plan(tokens, rows, group, 40, config, **options)
        records, counters = list_items(plan, *batch)
        records = np.asarray(records)
        expected = np.asarray(taken_together(plan, *batch).items)
    is_item = expected[:, 0] != NO_WORK
    item = expected[is_item, Work._fields.index("item")]
    assert len(item) > 0
    moved = expected[is_item][item != np.arange(len(item)), 0]
    assert num_late is None or len({*moved}) >= num_late
    np.testing.assert_array_equal(records[: len(expected)][is_item], expected[is_item])
    np.testing.assert_array_equal(records[np.count_nonzero(is_item) :, 0], NO_WORK)
    np.testing.assert_array_equal(np.flatnonzero(counters.decode), [] if num_single else [1])
    assert not np.any(counters.prefill)


INTERPRET = {
    f"paged_attention:prefill {name}": functools.partial(check_prefill, **case)
    for name, case in PREFILL_CASES.items()
} | {
    "paged_attention:list of work, ranges of three warpgroups": functools.partial(
        check_list, 5, 400, 1, PrefillConfig(), num_single=0
    ),
    "paged_attention:list of work, packed tiles": functools.partial(
        check_list, 6, 300, 5, PrefillConfig(packs=True), num_single=1
    ),
    "paged_attention:list of work, many rows, splits, a window": functools.partial(
        check_list, 130, 800, 3, PrefillConfig(2, 64, 2, splits=3), num_single=43, window_left=150
    ),
    "paged_attention:list of work, rows taken together": functools.partial(
        check_list, 6, 2400, 1, PrefillConfig(1), num_single=1, cached=30, num_late=2
    ),
}


def prefill_case(
    tokens=2048,
    rows=16,
    heads=32,
    kv_heads=8,
    head_dim=128,
    page_size=16,
    dtype=jnp.bfloat16,
    pages=None,
    per_head=(),
    whole=False,
    **arguments,
):
    """A mixed batch over two layers of 1024 pages, with a traced layer, as the default config cuts it.

    whole: with the kernels of the list of work and of rows of one query, which have rows of their own.
    """
    pool = jax.ShapeDtypeStruct((2, 1024, kv_heads, page_size, head_dim), pages or dtype)
    scale = jax.ShapeDtypeStruct(pool.shape[:4], jnp.float32) if pages else None
    of_heads = {name: jax.ShapeDtypeStruct((heads,), jnp.float32) for name in per_head}
    inputs = PagedInputs(
        query=jax.ShapeDtypeStruct((tokens, heads, head_dim), dtype),
        k_pages=pool,
        v_pages=pool,
        block_tables=integers(rows, 8192 // page_size),
        kv_lengths=integers(rows),
        layer=integers(),
        query_start=integers(rows + 1),
        k_scale=scale,
        v_scale=scale,
        **of_heads,
    )
    spec = PagedSpec(head_dim**-0.5, **arguments)
    assert sm90.unsupported(inputs, spec) is None
    given = {name: x for name, x in inputs._asdict().items() if x is not None}

    def attend(*arrays):
        attended = PagedInputs(**dict.fromkeys(PagedInputs._fields) | dict(zip(given, arrays, strict=True)))
        if whole:
            return sm90.forward(attended, spec)
        with listed_by_xla():
            plan = prefill_plan.make_plan(attended, spec)
            return sm90.prefill(plan, attended, sm90.list_work(plan, attended))

    # The log-sum-exp by tile, the parts of split keys, and what decode's splits need.
    case = CompileCase(attend, tuple(given.values()), max_temp_bytes=80 * 2**20, keep_hlo=whole)
    return case._replace(pads_nothing=whole and not pages)


EVERYTHING = {"window_left": 1024, "logits_soft_cap": 30.0, "per_head": ("sinks", "alibi_slopes")}

COMPILE = {
    f"paged_attention:prefill {name}": prefill_case(**arguments)
    for name, arguments in {
        "Llama-3-8B": {"whole": True},
        "tokens no multiple of eight": {"tokens": 1023, "whole": True},
        "page size 8, fp16": {"page_size": 8, "dtype": jnp.float16},
        "GPT-2 medium, page size 256": {"heads": 16, "kv_heads": 16, "head_dim": 64, "page_size": 256},
        "few tokens of few rows, keys split": {"tokens": 64, "rows": 4},
        "tiles that fit the GPU at once": {"tokens": 512, "rows": 1},
        "group 16, page size 64": {"heads": 32, "kv_heads": 2, "page_size": 64},
        "H=256, few tokens": {"tokens": 5, "rows": 1, "heads": 8, "kv_heads": 4, "head_dim": 256},
        "H=256, group 2": {"heads": 8, "kv_heads": 4, "head_dim": 256},
        "H=256, group 8": {"heads": 8, "kv_heads": 1, "head_dim": 256},
        "group 7, all keys visible": {"heads": 7, "kv_heads": 1, "is_causal": False},
        "window and soft cap": {"window_left": 1024, "logits_soft_cap": 30.0},
        "window and soft cap, H=64": {"head_dim": 64, "window_left": 1024, "logits_soft_cap": 30.0},
        "sinks": {"per_head": ("sinks",)},
        "H=64, everything": {"head_dim": 64, **EVERYTHING},
        "H=80": {"head_dim": 80},
        "H=96, everything": {"head_dim": 96, **EVERYTHING},
        "H=128, everything": EVERYTHING,
        "H=256, everything": {"heads": 8, "kv_heads": 4, "head_dim": 256, **EVERYTHING},
        "int8 pages": {"pages": jnp.int8},
        "int8 pages, H=96, decode rows, sinks and slopes": {
            "tokens": 671,
            "rows": 5,
            "heads": 8,
            "kv_heads": 2,
            "head_dim": 96,
            "pages": jnp.int8,
            "per_head": ("sinks", "alibi_slopes"),
            "whole": True,
        },
        "int8 pages of 8, H=64, keys split": {
            "tokens": 64,
            "rows": 4,
            "head_dim": 64,
            "page_size": 8,
            "pages": jnp.int8,
        },
        "fp8 pages of 8, everything": {"page_size": 8, "pages": jnp.float8_e4m3fn, **EVERYTHING},
        "fp8 pages, H=160, everything": {
            "heads": 8,
            "head_dim": 160,
            "pages": jnp.float8_e4m3fn,
            **EVERYTHING,
        },
        "int8 pages, H=224": {"heads": 8, "head_dim": 224, "pages": jnp.int8},
    }.items()
}
for _wide in ("paged_attention:prefill H=256, group 2", "paged_attention:prefill H=256, group 8"):
    # Once a unit, once a tile that needs a mask, and in the loading warpgroup's 24 registers.
    COMPILE[_wide] = COMPILE[_wide]._replace(max_spill_bytes=100)
