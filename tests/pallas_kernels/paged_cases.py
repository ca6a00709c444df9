"""Rows of tables.py for paged_attention."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import PagedConfig, contiguous_attention, paged_attention
from pallas_kernels.paged_attention import decode_plan
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.paged_inputs import cast, contiguous, make_case, quantize
from tests.pallas_kernels.tables import CompileCase

SMALL = PagedConfig(tile=64, split=128, stages=2)
RMS_ERROR = {"bfloat16": 6e-3, "float16": 8e-4}


def check_decode(
    dtype=jnp.bfloat16,
    pages=None,
    room=None,
    config=SMALL,
    programs=2,
    call=None,
    heads=4,
    magnitudes=None,
    **shapes,
):
    """The interpreted kernel against the reference; free pages and tails are NaN, tables end in garbage.

    pages: the dtype of quantized pages, or "contiguous" for caches without pages, of as much room for tokens
    as the kernel takes as it lies, or of `room`. magnitudes: decimal exponents between which those of the
    values lie, each token's its own.
    """
    case = make_case(head_dim=shapes.pop("head_dim", 64), heads=heads, **shapes)
    if magnitudes is not None:
        exponents = np.random.default_rng(0).uniform(*magnitudes, case.v_pages.shape[:4])
        case = case._replace(v_pages=case.v_pages * 10 ** exponents[..., None].astype(np.float32))
    case = cast(case, dtype)
    arguments = {"return_lse": True} | (call or {})
    for name in {"sinks", "alibi_slopes"} & set(arguments):
        arguments[name] = jnp.linspace(-0.5, 2.0, heads)
    if pages == "contiguous":
        room = room or max(decode_plan.MIN_ROOM, -(-int(case.kv_lengths.max()) // 8) * 8)
        arrays, attend = [case.query, *contiguous(case, room), case.kv_lengths], contiguous_attention
    else:
        arrays, attend = list(case[:5]), paged_attention
        arguments["layer"] = case.layer
    if pages in (jnp.int8, jnp.float8_e4m3fn):
        quantized = quantize(case, pages)
        arrays[1:3] = quantized[:2]
        arguments |= {"k_scale": jnp.asarray(quantized.k_scale), "v_scale": jnp.asarray(quantized.v_scale)}
    arrays = [jnp.asarray(x) for x in arrays]
    expected, expected_lse = attend(*arrays, implementation="reference", **arguments)
    # Few programs, so that each takes several units and none is left out.
    with mock.patch.object(decode_plan, "NUM_PROGRAMS", programs), interpreted():
        out, lse = jax.block_until_ready(attend(*arrays, implementation="sm90", config=config, **arguments))
    is_quantized = "k_scale" in arguments  # which is multiplied in bf16
    compare(out, expected, RMS_ERROR["bfloat16" if is_quantized else jnp.dtype(dtype).name])
    np.testing.assert_allclose(lse, expected_lse, atol=4e-3)


def compare(actual, expected, tolerance):
    """Relative RMS error against the fp32 reference."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    error = np.sqrt(np.mean((actual - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), 1e-12)
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
    "group 1 of 9": {"rows": 2, "heads": 9, "kv_heads": 9, "page_size": 16, "width": 5, "lengths": [70, 33]},
    "group 7": {"rows": 2, "heads": 14, "kv_heads": 2, "page_size": 16, "width": 5, "lengths": [70, 33]},
    "group 12, head dim 128": {
        **{"rows": 2, "heads": 24, "head_dim": 128, "page_size": 16, "width": 5, "lengths": [70, 33]},
    },
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
    "eight heads, sinks and ALiBi, one split": {
        "rows": 2,
        "heads": 8,
        "page_size": 16,
        "width": 5,
        "lengths": [70, 33],
        "call": {"sinks": None, "alibi_slopes": None},
    },
    "sinks, ALiBi and a window over splits": {
        "rows": 2,
        "heads": 8,
        "page_size": 16,
        "width": 21,
        "lengths": [300, 0],
        "call": {"sinks": None, "alibi_slopes": None, "local_window_size": 100},
    },
    "head dim 80 over splits": {"rows": 1, "head_dim": 80, "page_size": 16, "width": 9, "lengths": [130]},
    "head dim 96, one split, group 5": {
        "rows": 1,
        "heads": 10,
        "head_dim": 96,
        "page_size": 16,
        "width": 8,
        "lengths": [99],
    },
    "int8 pages, two consumers": {
        "rows": 2,
        "page_size": 8,
        "width": 48,
        "lengths": [300, 70],
        "pages": jnp.int8,
        "config": PagedConfig(64, 256, 2, 2),
    },
    "fp8 pages, group 12, one split, a window": {
        "rows": 2,
        "heads": 24,
        "page_size": 64,
        "width": 4,
        "lengths": [200, 9],
        "pages": jnp.float8_e4m3fn,
        "config": PagedConfig(128, 256, 2, 2),
        "call": {"local_window_size": 150, "sinks": None},
    },
    **{
        f"{name}, values of size 1e{magnitudes[0]} to 1e{magnitudes[1]}": {
            "rows": 2,
            "page_size": 16,
            "width": 13,
            "lengths": [200, 9],
            "pages": dtype,
            "config": PagedConfig(64, 256, 2, 1),
            "magnitudes": magnitudes,
        }
        for name, dtype, magnitudes in (
            ("int8", jnp.int8, (-2, 6)),
            ("fp8", jnp.float8_e4m3fn, (-9, -5)),
        )
    },
    "units are drawn, an int8 consumer pair": {
        "rows": 3,
        "heads": 8,
        "page_size": 32,
        "width": 6,
        "lengths": [190, 0, 3],
        "pages": jnp.int8,
        "config": PagedConfig(64, 128, 2, 2, dynamic=True),
    },
    "short rows of an int8 consumer pair": {
        "rows": 5,
        "heads": 8,
        "page_size": 32,
        "width": 6,
        "lengths": [3, 0, 64, 1, 2],
        "pages": jnp.int8,
        "config": PagedConfig(64, 192, 2, 2),
    },
    "caches without pages": {
        "rows": 2,
        "page_size": 16,
        "width": 17,
        "lengths": [270, 3],
        "pages": "contiguous",
    },
    "caches of little room": {
        **{"rows": 3, "page_size": 16, "width": 5, "lengths": [77, 3, 0], "pages": "contiguous", "room": 77},
    },
    "caches without pages, head dim 72": {
        "rows": 2,
        "head_dim": 72,
        "page_size": 16,
        "width": 9,
        "lengths": [136, 3],
        "pages": "contiguous",
    },
    "int8 pages, head dim 80, two consumers": {
        "rows": 2,
        "head_dim": 80,
        "page_size": 16,
        "width": 9,
        "lengths": [130, 20],
        "pages": jnp.int8,
        "config": PagedConfig(64, 192, 2, 2),
    },
    "fp8 pages over two tiles, head dim 144, a window": {
        "rows": 1,
        "head_dim": 144,
        "page_size": 128,
        "width": 2,
        "lengths": [150],
        "pages": jnp.float8_e4m3fn,
        "call": {"local_window_size": 120},
    },
}


INTERPRET = {
    f"paged_attention:{name}": functools.partial(check_decode, **case) for name, case in DECODE_CASES.items()
}


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def decode_case(
    rows=16,
    heads=32,
    kv_heads=8,
    head_dim=128,
    page_size=16,
    capacity=16384,
    dtype=jnp.bfloat16,
    pages=None,
    per_head=(),
    config=None,
):
    """A decode over two layers of 1024 pages, with a traced layer, as the default config cuts it."""
    pool = jax.ShapeDtypeStruct((2, 1024, kv_heads, page_size, head_dim), pages or dtype)
    scale = jax.ShapeDtypeStruct(pool.shape[:4], jnp.float32)
    query = jax.ShapeDtypeStruct((rows, heads, head_dim), dtype)
    names = (*(("k_scale", "v_scale") if pages else ()), *per_head)

    def attend(query, k_pages, v_pages, tables, lengths, layer, *others):
        arguments = dict(zip(names, others, strict=True), layer=layer, return_lse=True, config=config)
        return paged_attention(query, k_pages, v_pages, tables, lengths, implementation="sm90", **arguments)

    specs = (query, pool, pool, integers(rows, capacity // page_size), integers(rows), integers())
    specs += (scale,) * (2 if pages else 0) + (jax.ShapeDtypeStruct((heads,), jnp.float32),) * len(per_head)
    splits = -(-capacity // (config.split if config else 256))  # at most: the default config's shortest
    width = -(-head_dim // 64) * 64
    max_temp_bytes = splits * rows * heads * (width + 16) * 4 + 2**21
    # Codes and what is given for each head are made by XLA, for whole columns.
    return CompileCase(attend, specs, max_temp_bytes=max_temp_bytes, pads_nothing=not (pages or per_head))


def contiguous_case(rows=16, heads=32, kv_heads=8, head_dim=128, capacity=16384, dtype=jnp.bfloat16):
    cache = jax.ShapeDtypeStruct((rows, capacity, kv_heads, head_dim), dtype)
    attend = functools.partial(contiguous_attention, return_lse=True, implementation="sm90")
    specs = (jax.ShapeDtypeStruct((rows, heads, head_dim), dtype), cache, cache, integers(rows))
    return CompileCase(attend, specs, max_temp_bytes=rows * capacity // 256 * heads * head_dim * 5 + 2**21)


COMPILE = {
    f"paged_attention:decode {name}": decode_case(**arguments)
    for name, arguments in {
        "Llama-3-8B": {},
        "Llama-3-8B, one row": {"rows": 1},
        "Llama-3-8B, one split": {"rows": 128, "capacity": 2048},
        "Yi-6B, fp16": {"kv_heads": 4, "dtype": jnp.float16},
        "GPT-2 medium": {"rows": 256, "heads": 16, "kv_heads": 16, "head_dim": 64, "capacity": 1024},
        "300 rows": {"rows": 300, "capacity": 2048 * 3},
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
        "int8 pages": {"pages": jnp.int8},
        "int8 pages, H=256, group 8": {"pages": jnp.int8, "heads": 8, "kv_heads": 1, "head_dim": 256},
        "int8 pages, group 16": {"pages": jnp.int8, "heads": 16, "kv_heads": 1},
        "fp8 pages, H=256, group 16": {
            "pages": jnp.float8_e4m3fn,
            "heads": 16,
            "kv_heads": 1,
            "head_dim": 256,
        },
        "int8 pages, H=96": {"pages": jnp.int8, "head_dim": 96},
        "int8 pages, GPT-2 medium": {
            "pages": jnp.int8,
            "rows": 256,
            "heads": 16,
            "kv_heads": 16,
            "head_dim": 64,
            "capacity": 1024,
        },
        "fp8 pages, H=64, group 12, sinks": {
            **{"pages": jnp.float8_e4m3fn, "heads": 24, "kv_heads": 2, "head_dim": 64},
            "per_head": ("sinks",),
        },
        "fp8 pages of 8": {"pages": jnp.float8_e4m3fn, "page_size": 8},
        "H=72": {"head_dim": 72},
        "H=80": {"head_dim": 80},
        "H=80, one split": {"rows": 32, "kv_heads": 32, "head_dim": 80, "capacity": 4096},
        "H=240, group 5, parts of pages": {"heads": 10, "kv_heads": 2, "head_dim": 240, "page_size": 128},
        "int8 pages, H=80, parts of them": {"pages": jnp.int8, "head_dim": 80, "page_size": 256},
        "H=96, group 7, one split": {
            "rows": 128,
            "heads": 28,
            "kv_heads": 4,
            "head_dim": 96,
            "capacity": 2048,
        },
        "sinks and ALiBi": {"per_head": ("sinks", "alibi_slopes")},
        "units drawn": {"config": PagedConfig(128, 1024, 3, dynamic=True)},
    }.items()
} | {
    "paged_attention:contiguous": contiguous_case(),
    "paged_attention:contiguous, H=96": contiguous_case(head_dim=96),
}
