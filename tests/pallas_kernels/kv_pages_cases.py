"""Rows of tables.py for kv_pages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import copy_pages, gather_pages, paged_attention, scatter_pages, write_kv
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.page_writes import random_pool, random_tokens, scales_of
from tests.pallas_kernels.tables import CompileCase

POOL = (2, 6, 3, 8, 64)


def equal_in_the_interpreter(op, pools, *arguments, **options):
    """An op, interpreted, gives the reference's bits."""
    options |= scales_of(pools)
    expected = op(*pools[:2], *arguments, implementation="reference", **options)
    with interpreted():
        actual = jax.block_until_ready(op(*pools[:2], *arguments, implementation="sm90", **options))
    for name, wanted, array in zip(("k", "v", "k_scale", "v_scale"), expected, actual, strict=False):
        np.testing.assert_array_equal(np.asarray(array), np.asarray(wanted), err_msg=name)


def check_write(dtype=jnp.bfloat16, num_tokens=7, shape=POOL, token_dtype=None):
    pools = random_pool(shape, dtype)
    key, value, slots = random_tokens(shape, num_tokens, token_dtype or dtype)
    equal_in_the_interpreter(write_kv, pools, key, value, jnp.asarray(slots), layer=jnp.int32(shape[0] - 1))


def check_copy(dtype=jnp.bfloat16, shape=POOL):
    pairs = jnp.asarray([2, 0, 1, 9]), jnp.asarray([3, 2, 4, 5])
    equal_in_the_interpreter(copy_pages, random_pool(shape, dtype), *pairs)


def check_gather(dtype=jnp.bfloat16, shape=POOL):
    equal_in_the_interpreter(gather_pages, random_pool(shape, dtype), jnp.asarray([4, 0, 1, 9]))


def check_scatter(dtype=jnp.bfloat16, shape=POOL):
    buffers = random_pool((shape[0], 4, *shape[2:]), dtype, seed=1)
    equal_in_the_interpreter(scatter_pages, random_pool(shape, dtype), buffers, jnp.asarray([4, 0, 1, 9]))


INTERPRET = {
    "kv_pages:write": check_write,
    "kv_pages:write one token, fp16": functools.partial(check_write, jnp.float16, 1, (1, 4, 2, 16, 64)),
    "kv_pages:write f32": functools.partial(check_write, jnp.float32, 9, (2, 6, 3, 8, 8)),
    "kv_pages:quantize to int8": functools.partial(check_write, jnp.int8, 7, token_dtype=jnp.bfloat16),
    "kv_pages:quantize to fp8, many heads": functools.partial(
        check_write, jnp.float8_e4m3fn, 3, (1, 4, 67, 8, 16), token_dtype=jnp.float32
    ),
    "kv_pages:copy": check_copy,
    "kv_pages:copy in blocks, f32": functools.partial(check_copy, jnp.float32, (1, 6, 2, 64, 256)),
    "kv_pages:copy int8": functools.partial(check_copy, jnp.int8),
    "kv_pages:gather": check_gather,
    "kv_pages:gather fp8": functools.partial(check_gather, jnp.float8_e4m3fn),
    "kv_pages:scatter int8": functools.partial(check_scatter, jnp.int8),
}


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def pool_specs(shape, dtype):
    """k_pages, v_pages, and k_scale, v_scale where the dtype is quantized."""
    pages, scales = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[:4], jnp.float32)
    return (pages, pages, scales, scales) if jnp.dtype(dtype).itemsize == 1 else (pages, pages)


def in_place_case(op, shape, dtype, specs, **options):
    """op(pool, ...) with the pool donated: all of it aliases the results, nothing like it is allocated."""
    pools = pool_specs(shape, dtype)

    def call(pools, *arguments):
        return op(*pools[:2], *arguments, implementation="sm90", **scales_of(pools), **options)

    num_bytes = sum(int(np.prod(spec.shape)) * spec.dtype.itemsize for spec in pools)
    return CompileCase(
        call, (pools, *specs), donate=(0,), max_temp_bytes=num_bytes // 64, min_alias_bytes=num_bytes
    )


LARGE_POOL = (2, 1024, 8, 16, 128)


def write_case(num_tokens, dtype=jnp.bfloat16, shape=LARGE_POOL, token_dtype=None):
    token = jax.ShapeDtypeStruct((num_tokens, shape[2], shape[4]), token_dtype or dtype)
    write = lambda *arguments, layer_index=1, **options: write_kv(*arguments, layer=layer_index, **options)
    return in_place_case(write, shape, dtype, (token, token, integers(num_tokens)))


def copy_case(pairs, dtype=jnp.bfloat16, shape=LARGE_POOL):
    return in_place_case(copy_pages, shape, dtype, (integers(pairs), integers(pairs)))


def part_case(num_tokens=32, shape=LARGE_POOL):
    """write_kv to one of a pool's layers, sliced off."""
    pages, token = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (shape, (num_tokens, shape[2], shape[4])))

    def write(k_pages, v_pages, *arrays):
        return write_kv(k_pages[1:], v_pages[1:], *arrays, implementation="sm90")

    return CompileCase(write, (pages, pages, token, token, integers(num_tokens)), keep_hlo=True)


def scatter_case(num_pages, dtype=jnp.bfloat16, shape=LARGE_POOL):
    buffers = pool_specs((shape[0], num_pages, *shape[2:]), dtype)
    return in_place_case(scatter_pages, shape, dtype, (buffers, integers(num_pages)))


def gather_case(num_pages, dtype=jnp.bfloat16, shape=LARGE_POOL):
    def gather(pools, pages):
        return gather_pages(*pools[:2], pages, implementation="sm90", **scales_of(pools))

    return CompileCase(gather, (pool_specs(shape, dtype), integers(num_pages)), max_temp_bytes=2**16)


def step_case(rows=16, num_layers=3, page_size=16):
    """Copy-on-write, then layers that write their token and attend to it, as a model's decode step does."""
    shape = (num_layers, 4096, 8, page_size, 128)
    hidden = jax.ShapeDtypeStruct((rows, 8, 128), jnp.bfloat16)

    def step(k_pages, v_pages, hidden, slots, tables, lengths, src, dst, implementation):
        k_pages, v_pages = copy_pages(k_pages, v_pages, src, dst, implementation=implementation)
        for layer in range(num_layers):
            arguments = {"layer": layer, "implementation": implementation}
            k_pages, v_pages = write_kv(k_pages, v_pages, hidden, 2 * hidden, slots, **arguments)
            query = jnp.repeat(hidden, 4, axis=1)
            out = paged_attention(query, k_pages, v_pages, tables, lengths, **arguments)
            hidden = hidden + out[:, ::4]
        return k_pages, v_pages, hidden

    specs = (hidden, integers(rows), integers(rows, 128), integers(rows), integers(rows), integers(rows))
    return in_place_case(step, shape, jnp.bfloat16, specs)


COMPILE = {
    "kv_pages:write a decode step": write_case(256),
    "kv_pages:write a prefill, f32": write_case(5000, jnp.float32),
    "kv_pages:write to a part of a pool": part_case(),
    "kv_pages:write a pool beyond 2^31 elements": write_case(8, shape=(2, 80_000, 8, 16, 128)),
    "kv_pages:quantize a decode step to int8": write_case(256, jnp.int8, token_dtype=jnp.bfloat16),
    "kv_pages:quantize a prefill to fp8": write_case(
        8192, jnp.float8_e4m3fn, (2, 1024, 4, 16, 64), jnp.float32
    ),
    "kv_pages:quantize H=80, one token": write_case(1, jnp.int8, (2, 1024, 12, 8, 80), jnp.bfloat16),
    "kv_pages:quantize H=256": write_case(100, jnp.float8_e4m3fn, (2, 1024, 1, 64, 256), jnp.bfloat16),
    "kv_pages:a decode step of three layers": step_case(),
    "kv_pages:copy": copy_case(64),
    "kv_pages:copy large pages, f32": copy_case(3, jnp.float32, (2, 1024, 8, 256, 256)),
    "kv_pages:copy int8": copy_case(64, jnp.int8),
    "kv_pages:gather": gather_case(64),
    "kv_pages:scatter fp8": scatter_case(64, jnp.float8_e4m3fn),
}
