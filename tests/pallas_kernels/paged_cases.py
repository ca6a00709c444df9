"""Rows of tables.py for paged_attention and kv_pages."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import PagedConfig, copy_pages, paged_attention, write_kv
from pallas_kernels.paged_attention import decode_plan
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.paged_inputs import cast, make_case
from tests.pallas_kernels.tables import CompileCase

SMALL = PagedConfig(tile=64, split=128, stages=2)
RMS_ERROR = {"bfloat16": 6e-3, "float16": 8e-4}


def check_decode(dtype=jnp.bfloat16, config=SMALL, programs=2, call=None, **shapes):
    """The interpreted kernel against the reference; free pages and tails are NaN, tables end in garbage."""
    case = cast(make_case(head_dim=shapes.pop("head_dim", 64), **shapes), dtype)
    arguments = dict(layer=case.layer, return_lse=True, **(call or {}))
    arrays = [jnp.asarray(x) for x in case[:5]]
    expected, expected_lse = paged_attention(*arrays, implementation="reference", **arguments)
    # Few programs, so that each takes several units and none is left out.
    all_programs, decode_plan.NUM_PROGRAMS = decode_plan.NUM_PROGRAMS, programs
    try:
        with interpreted():
            out, lse = jax.block_until_ready(
                paged_attention(*arrays, implementation="sm90", config=config, **arguments)
            )
    finally:
        decode_plan.NUM_PROGRAMS = all_programs
    compare(out, expected, RMS_ERROR[jnp.dtype(dtype).name])
    np.testing.assert_allclose(lse, expected_lse, atol=2e-3)


def compare(actual, expected, tolerance):
    """Relative RMS error against the fp32 reference."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    error = np.sqrt(np.mean((actual - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), 1e-3)
    assert error < tolerance, error


DECODE_CASES: dict[str, dict[str, Any]] = {
    "one split, an empty row": {"rows": 3, "page_size": 16, "width": 8, "lengths": [100, 0, 128]},
    "splits of uneven rows": {"rows": 2, "page_size": 16, "width": 21, "lengths": [300, 17], "programs": 3},
    "page size 8": {"rows": 2, "page_size": 8, "width": 20, "lengths": [150, 9]},
    "page size 32, fp16": {
        "rows": 2,
        "page_size": 32,
        "width": 4,
        "lengths": [97, 128],
        "dtype": jnp.float16,
    },
    "page size 128 over two tiles": {
        "rows": 1,
        "page_size": 128,
        "width": 2,
        "lengths": [200],
        "programs": 1,
    },
    "page size 256": {"rows": 2, "page_size": 256, "width": 1, "lengths": [70, 256]},
    "group 1": {"rows": 2, "heads": 2, "kv_heads": 2, "page_size": 16, "width": 5, "lengths": [70, 33]},
    "group 7": {"rows": 2, "heads": 7, "kv_heads": 1, "page_size": 16, "width": 5, "lengths": [70, 33]},
    "group 16": {"rows": 2, "heads": 16, "kv_heads": 1, "page_size": 16, "width": 5, "lengths": [70, 33]},
    "head dim 128": {"rows": 1, "head_dim": 128, "page_size": 16, "width": 9, "lengths": [130]},
    "tile 128": {
        "rows": 2,
        "page_size": 16,
        "width": 14,
        "lengths": [200, 5],
        "config": PagedConfig(128, 128, 2),
    },
    "window and soft cap": {
        "rows": 2,
        "page_size": 16,
        "width": 21,
        "lengths": [300, 90],
        "call": {"local_window_size": 150, "logits_soft_cap": 3.0},
    },
}


def check_write(dtype=jnp.bfloat16, layers=2, pages=6, kv_heads=3, page_size=8, head_dim=64, tokens=7):
    rng = np.random.default_rng(tokens)
    shape = (layers, pages, kv_heads, page_size, head_dim)
    k_pages, v_pages = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    key, value = (jnp.asarray(rng.standard_normal((tokens, kv_heads, head_dim)), dtype) for _ in range(2))
    slots = rng.permutation(pages * page_size)[:tokens].astype(np.int32)
    slots[tokens // 2] = -5
    arguments = (k_pages, v_pages, key, value, jnp.asarray(slots))
    expected = write_kv(*arguments, layer=layers - 1, implementation="reference")
    with interpreted():
        written = jax.block_until_ready(
            write_kv(*arguments, layer=jnp.int32(layers - 1), implementation="sm90")
        )
    for actual, wanted in zip(written, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


def check_copy(dtype=jnp.bfloat16, layers=2, kv_heads=3, page_size=8, head_dim=64):
    rng = np.random.default_rng(page_size)
    shape = (layers, 6, kv_heads, page_size, head_dim)
    k_pages, v_pages = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    pairs = jnp.asarray([2, 0, 1]), jnp.asarray([3, 2, 4])
    expected = copy_pages(k_pages, v_pages, *pairs, implementation="reference")
    with interpreted():
        copied = jax.block_until_ready(copy_pages(k_pages, v_pages, *pairs, implementation="sm90"))
    for actual, wanted in zip(copied, expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)


INTERPRET = {
    f"paged_attention:{name}": functools.partial(check_decode, **case) for name, case in DECODE_CASES.items()
} | {
    "kv_pages:write": check_write,
    "kv_pages:write one token, fp16": functools.partial(check_write, jnp.float16, tokens=1, page_size=16),
    "kv_pages:write f32": functools.partial(check_write, jnp.float32, tokens=9, head_dim=8),
    "kv_pages:copy": check_copy,
    "kv_pages:copy in blocks, f32": functools.partial(
        check_copy, jnp.float32, layers=1, kv_heads=2, page_size=64, head_dim=256
    ),
}


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def decode_case(
    rows=16, heads=32, kv_heads=8, head_dim=128, page_size=16, capacity=16384, dtype=jnp.bfloat16
):
    """A decode over two layers of 1024 pages, with a traced layer, as the default config cuts it."""
    pages = jax.ShapeDtypeStruct((2, 1024, kv_heads, page_size, head_dim), dtype)
    query = jax.ShapeDtypeStruct((rows, heads, head_dim), dtype)

    def attend(query, k_pages, v_pages, tables, lengths, layer):
        return paged_attention(
            query, k_pages, v_pages, tables, lengths, layer=layer, return_lse=True, implementation="sm90"
        )

    specs = (query, pages, pages, integers(rows, capacity // page_size), integers(rows), integers())
    splits = -(-capacity // 256)  # at most: the shortest split of the default config
    return CompileCase(attend, specs, max_temp_bytes=splits * rows * heads * (head_dim + 16) * 4 + 2**21)


def write_case(tokens, dtype=jnp.bfloat16, num_pages=1024):
    pages = jax.ShapeDtypeStruct((2, num_pages, 8, 16, 128), dtype)
    token = jax.ShapeDtypeStruct((tokens, 8, 128), dtype)

    def write(k_pages, v_pages, key, value, slots, layer):
        return write_kv(k_pages, v_pages, key, value, slots, layer=layer, implementation="sm90")

    specs = (pages, pages, token, token, integers(tokens), integers())
    return in_place_case(write, specs)


def copy_case(pairs, page_size=16, head_dim=128, dtype=jnp.bfloat16):
    pages = jax.ShapeDtypeStruct((2, 1024, 8, page_size, head_dim), dtype)
    copy = functools.partial(copy_pages, implementation="sm90")
    return in_place_case(copy, (pages, pages, integers(pairs), integers(pairs)))


def step_case(rows=16, num_layers=3, page_size=16):
    """Copy-on-write, then layers that write their token and attend to it, as a model's decode step does."""
    pages = jax.ShapeDtypeStruct((num_layers, 4096, 8, page_size, 128), jnp.bfloat16)
    hidden = jax.ShapeDtypeStruct((rows, 8, 128), jnp.bfloat16)

    def step(k_pages, v_pages, hidden, slots, tables, lengths, src, dst):
        k_pages, v_pages = copy_pages(k_pages, v_pages, src, dst, implementation="sm90")
        for layer in range(num_layers):
            arguments = {"layer": layer, "implementation": "sm90"}
            k_pages, v_pages = write_kv(k_pages, v_pages, hidden, 2 * hidden, slots, **arguments)
            query = jnp.repeat(hidden, 4, axis=1)
            out = paged_attention(query, k_pages, v_pages, tables, lengths, **arguments)
            hidden = hidden + out[:, ::4]
        return k_pages, v_pages, hidden

    specs = (pages, pages, hidden, integers(rows), integers(rows, 128), integers(rows), *[integers(rows)] * 2)
    return in_place_case(step, specs)


def in_place_case(function, specs):
    """Both pools, donated, alias the results, and nothing of a pool's size is allocated."""
    pool_bytes = int(np.prod(specs[0].shape)) * specs[0].dtype.itemsize
    return CompileCase(
        function, specs, donate=(0, 1), max_temp_bytes=pool_bytes // 64, min_alias_bytes=2 * pool_bytes
    )


COMPILE = {
    f"paged_attention:decode {name}": decode_case(**arguments)
    for name, arguments in {
        "Llama-3-8B": {},
        "Llama-3-8B, one row": {"rows": 1},
        "Llama-3-8B, one split": {"rows": 128, "capacity": 2048},
        "Yi-6B, fp16": {"kv_heads": 4, "dtype": jnp.float16},
        "GPT-2 medium": {"rows": 256, "heads": 16, "kv_heads": 16, "head_dim": 64, "capacity": 1024},
        "SmolLM2, page size 8": {
            "rows": 8,
            "heads": 9,
            "kv_heads": 3,
            "head_dim": 64,
            "page_size": 8,
            "capacity": 2048,
        },
        "group 16": {"heads": 16, "kv_heads": 1},
        "H=256, group 16": {"heads": 16, "kv_heads": 1, "head_dim": 256},
        "H=256, group 1": {"heads": 4, "kv_heads": 4, "head_dim": 256, "page_size": 256},
        **{f"page size {size}": {"page_size": size} for size in (8, 32, 64, 128, 256)},
    }.items()
} | {
    "kv_pages:write a decode step": write_case(256),
    "kv_pages:write a prefill, f32": write_case(5000, jnp.float32),
    "kv_pages:write a pool beyond 2^31 elements": write_case(8, num_pages=80_000),
    "kv_pages:a decode step of three layers": step_case(),
    "kv_pages:copy": copy_case(64),
    "kv_pages:copy large pages, f32": copy_case(3, page_size=256, head_dim=256, dtype=jnp.float32),
}
