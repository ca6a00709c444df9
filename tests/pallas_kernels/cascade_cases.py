"""Rows of tables.py for cascade_attention."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import PagedConfig, PrefillConfig, cascade_attention, paged_attention
from pallas_kernels.paged_attention import cascade_rows_sm90, decode_plan, prefill_plan
from pallas_kernels.paged_attention.cascade_rows import group_rows
from pallas_kernels.paged_attention.cascade_rows_sm90 import Rows, list_rows
from pallas_kernels.paged_attention.prefill_units import NO_WORK
from pallas_kernels.paged_attention.prefill_work import plan_work
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.paged_cases import RMS_ERROR, compare, integers
from tests.pallas_kernels.paged_inputs import Case, cast, make_case, quantize
from tests.pallas_kernels.tables import CompileCase


def share(case: Case, prefix_lengths, group_of_row) -> Case:
    """The case with every row of a group on the shared pages of its first row."""
    page_size = case.k_pages.shape[3]
    for group, length in enumerate(prefix_lengths):
        rows = np.flatnonzero(np.asarray(group_of_row) == group)
        case.block_tables[rows, : length // page_size] = case.block_tables[rows[:1], : length // page_size]
    return case


def check_cascade(
    prefixes, groups, heads=4, head_dim=64, pages=None, call=None, splits=2, by_xla=False, **shapes
):
    """The interpreted kernels against the reference of paged_attention, which knows of no groups.

    by_xla: rows are listed as those of larger batches are.
    """
    case = make_case(rows=len(groups), heads=heads, head_dim=head_dim, page_size=16, **shapes)
    case = cast(share(case, prefixes, groups), jnp.bfloat16)
    arrays, arguments = list(case[:5]), {"return_lse": True, "layer": case.layer, **(call or {})}
    if pages is not None:
        quantized = quantize(case, pages)
        arrays[1:3] = quantized[:2]
        arguments |= {"k_scale": jnp.asarray(quantized.k_scale), "v_scale": jnp.asarray(quantized.v_scale)}
    if "sinks" in arguments:
        arguments["sinks"] = jnp.linspace(-0.5, 2.0, heads)
    arrays = [jnp.asarray(x) for x in arrays]
    expected, expected_lse = paged_attention(*arrays, implementation="reference", **arguments)
    config = PagedConfig(64, 64, 2, 1)
    prefill = PrefillConfig(warpgroups=1, tile_kv=64, stages=2, splits=splits)
    few = mock.patch.object(cascade_rows_sm90, "MAX_ROWS", 0 if by_xla else 10)
    with few, mock.patch.object(decode_plan, "NUM_PROGRAMS", 3), interpreted():
        out, lse = cascade_attention(
            *arrays,
            jnp.asarray(prefixes),
            jnp.asarray(groups),
            config=config,
            prefill_config=prefill,
            implementation="sm90",
            **arguments,
        )
        jax.block_until_ready(out)
    compare(out, expected, RMS_ERROR["bfloat16"])
    np.testing.assert_allclose(lse, expected_lse, atol=4e-3)


CASES: dict[str, dict[str, Any]] = {
    "two groups, a row of none, an empty row, sinks": {
        "prefixes": [272, 16],
        "groups": [1, 0, -1, 0, -1],
        "lengths": [20, 353, 70, 273, 0],
        "width": 23,
        "call": {"sinks": None},
    },
    "head dim 96, group 5, no splits": {
        "prefixes": [64],
        "groups": [0, 0],
        "heads": 10,
        "head_dim": 96,
        "lengths": [70, 65],
        "width": 5,
        "splits": 1,
        "by_xla": True,
    },
    "int8 pages, soft cap": {
        "prefixes": [48],
        "groups": [0, 0, 0],
        "lengths": [50, 70, 49],
        "width": 5,
        "pages": jnp.int8,
        "call": {"logits_soft_cap": 4.0},
    },
}


def check_rows(num_rows, num_groups):
    """What the kernel says of rows and groups, some of which do not exist, and of rows that are shorter than
    their prefix or longer than their table, against what XLA does."""
    rng = np.random.default_rng(num_rows)
    groups = rng.integers(-2, num_groups + 2, num_rows).astype(np.int32)
    prefixes = 16 * rng.integers(0, 20, num_groups).astype(np.int32)
    prefixes[::5] += rng.integers(-40, 9, len(prefixes[::5]), np.int32)  # no whole pages
    lengths = rng.integers(250, 500, num_rows)
    case = cast(make_case(rows=num_rows, width=32, page_size=16, lengths=lengths), jnp.bfloat16)
    inputs = PagedInputs(*(jnp.asarray(x) for x in case[:5]), layer=jnp.int32(0))
    inputs = inputs._replace(
        kv_lengths=jnp.asarray(np.where(lengths < 400, lengths, lengths + 200), jnp.int32)
    )
    given = jnp.asarray(prefixes), jnp.asarray(groups)
    config = PrefillConfig(warpgroups=1, tile_kv=64, stages=2, splits=2)
    spec = PagedSpec(1.0, is_causal=False, prefill_config=config)
    plan = prefill_plan.make_plan(inputs._replace(kv_lengths=given[0]), spec, keeps_parts=True)
    grouped = group_rows(inputs, *given)
    work = plan_work(plan, grouped.query_start, given[0])
    with interpreted():
        listed = jax.block_until_ready(list_rows(plan, inputs, *given))
    is_grouped = np.asarray(grouped.skipped) > 0
    rows = Rows(*(np.asarray(x)[:num_rows] for x in listed.rows))
    np.testing.assert_array_equal(rows.skipped, grouped.skipped)
    np.testing.assert_array_equal(rows.lengths, grouped.lengths)
    for name in ("first_item", "num_splits", "place"):
        expected = np.asarray(getattr(work, name))[grouped.place]
        np.testing.assert_array_equal(getattr(rows, name)[is_grouped], expected[is_grouped], err_msg=name)
    assert not rows.num_splits[~is_grouped].any()
    np.testing.assert_array_equal(
        np.asarray(listed.query)[grouped.place[is_grouped]], np.asarray(inputs.query)[is_grouped]
    )
    # A group is a row of the list; in its place stands the row whose table holds its pages.
    expected = np.array(work.items)
    is_item = expected[:, 0] != NO_WORK
    expected[is_item, 0] = np.asarray(grouped.leaders)[expected[is_item, 0]]
    is_ours = is_item & (expected[:, 5] > 0)  # items of keys
    assert is_ours.any()
    np.testing.assert_array_equal(np.asarray(listed.items)[: len(expected)][is_ours], expected[is_ours])
    np.testing.assert_array_equal(np.asarray(listed.items)[np.count_nonzero(is_item) :, 0], NO_WORK)


INTERPRET = {
    f"cascade_attention:{name}": functools.partial(check_cascade, **case) for name, case in CASES.items()
} | {
    "cascade_attention:rows of many groups, in two copies": functools.partial(check_rows, 20, 250),
    "cascade_attention:many rows": functools.partial(check_rows, 140, 5),
}
# Of which make test compiles a row: 256 rows.
SLOW = {"cascade_attention:Llama-3-8B, 1024 rows"}


def cascade_case(
    rows=64, groups=1, heads=32, kv_heads=8, head_dim=128, capacity=8448, page_size=16, pages=None
):
    pool = jax.ShapeDtypeStruct((2, 1024, kv_heads, page_size, head_dim), pages or jnp.bfloat16)
    scale = jax.ShapeDtypeStruct(pool.shape[:4], jnp.float32)
    query = jax.ShapeDtypeStruct((rows, heads, head_dim), jnp.bfloat16)

    def attend(query, k_pages, v_pages, tables, lengths, prefixes, groups, layer, *scales):
        named = dict(zip(("k_scale", "v_scale"), scales, strict=False))
        arrays = query, k_pages, v_pages, tables, lengths, prefixes, groups
        return cascade_attention(*arrays, layer=layer, implementation="sm90", **named)

    specs = (query, pool, pool, integers(rows, capacity // page_size), integers(rows), integers(groups))
    specs += (integers(rows), integers(), *((scale,) * 2 if pages else ()))
    # Parts of a tile of queries a group, in fp32.
    return CompileCase(attend, specs, max_temp_bytes=80 * 2**20 + groups * 2**19)


COMPILE = {
    "cascade_attention:Llama-3-8B": cascade_case(),
    # Numbers of rows, and of groups, that are copied in several boxes, the last past their end.
    "cascade_attention:Llama-3-8B, 256 rows, 250 groups": cascade_case(rows=256, groups=250, capacity=1024),
    "cascade_attention:Llama-3-8B, 1024 rows": cascade_case(rows=1024, capacity=1024),
    "cascade_attention:H=96, fp8 pages": cascade_case(
        heads=8, kv_heads=2, head_dim=96, pages=jnp.float8_e4m3fn
    ),
}
