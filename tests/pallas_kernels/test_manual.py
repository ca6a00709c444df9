"""Paged attention and page writes inside shard_map, KV heads divided over two devices: tensor parallelism."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from pallas_kernels import (
    cascade_attention,
    contiguous_attention,
    copy_pages,
    device,
    gather_pages,
    paged_attention,
    scatter_pages,
    write_kv,
)

ROWS, HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE, WIDTH, TOKENS = 4, 8, 4, 64, 16, 8, 40
WHOLE, HEAD, POOL = PartitionSpec(), PartitionSpec(None, "model"), PartitionSpec(None, None, "model")


def arrays() -> dict[str, jax.Array]:
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape):
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    pool = 2, ROWS * WIDTH + 1, KV_HEADS, PAGE_SIZE, HEAD_DIM
    tables = np.arange(1, pool[1]).reshape(ROWS, WIDTH)
    tables[:, :2] = tables[0, :2]
    return {
        "query": normal(ROWS, HEADS, HEAD_DIM),
        "ragged_query": normal(TOKENS, HEADS, HEAD_DIM),
        "k_pages": normal(*pool),
        "v_pages": normal(*pool),
        "k_cache": normal(ROWS, 256, KV_HEADS, HEAD_DIM),
        "v_cache": normal(ROWS, 256, KV_HEADS, HEAD_DIM),
        "key": normal(TOKENS, KV_HEADS, HEAD_DIM),
        "value": normal(TOKENS, KV_HEADS, HEAD_DIM),
        "tables": jnp.asarray(tables, jnp.int32),
        "lengths": jnp.array([100, 33, 128, 70], jnp.int32),
        "query_start": jnp.array([0, 30, 31, 31, 40], jnp.int32),
        "prefix": jnp.array([2 * PAGE_SIZE], jnp.int32),
        "group": jnp.array([0, 0, -1, 0], jnp.int32),
        "slots": jnp.arange(7, 7 + TOKENS, dtype=jnp.int32),
        "src": jnp.array([1, 5, 9], jnp.int32),
        "dst": jnp.array([2, 6, 30], jnp.int32),
    }


SPECS = dict.fromkeys(("query", "ragged_query", "key", "value"), HEAD)
SPECS |= dict.fromkeys(("k_pages", "v_pages", "k_cache", "v_cache"), POOL)


def ragged(query, k_pages, v_pages, tables, lengths, query_start, **options):
    return paged_attention(query, k_pages, v_pages, tables, lengths, query_start=query_start, **options)


def moved(k_pages, v_pages, src, dst, **options):
    buffers = gather_pages(k_pages, v_pages, src, **options)
    return scatter_pages(k_pages, v_pages, buffers, dst, **options)


POOLS, TABLES = ("k_pages", "v_pages"), ("tables", "lengths")
OPS = {  # the op, its arrays, and how its results lie
    "decode": (paged_attention, ("query", *POOLS, *TABLES), HEAD),
    "ragged": (ragged, ("ragged_query", *POOLS, *TABLES, "query_start"), HEAD),
    "cascade": (cascade_attention, ("query", *POOLS, *TABLES, "prefix", "group"), HEAD),
    "contiguous": (contiguous_attention, ("query", "k_cache", "v_cache", "lengths"), HEAD),
    "write": (functools.partial(write_kv, layer=1), (*POOLS, "key", "value", "slots"), POOL),
    "copy": (copy_pages, (*POOLS, "src", "dst"), POOL),
    "gather, scatter": (moved, (*POOLS, "src", "dst"), POOL),
}


def divided(op, names, result, **options):
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    specs = tuple(SPECS.get(name, WHOLE) for name in names)
    return jax.shard_map(functools.partial(op, **options), mesh=mesh, in_specs=specs, out_specs=result)


@pytest.mark.parametrize("name", OPS)
def test_divided_over_heads_is_the_same(name):
    op, names, result = OPS[name]
    given = [arrays()[name] for name in names]
    whole = op(*given, implementation="reference")
    parts = jax.jit(divided(op, names, result, implementation="reference"))(*given)
    for actual, expected in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(
            np.asarray(actual, np.float32), np.asarray(expected, np.float32), atol=2e-2, rtol=2e-2
        )


@pytest.mark.parametrize("name", OPS)
def test_kernels_lower_where_heads_are_divided(name, monkeypatch):
    """Pallas takes no references of types that differ along mesh axes."""
    monkeypatch.setattr(device, "is_abstract_gpu", lambda: True)
    op, names, result = OPS[name]
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(arrays().get, names)]
    call = jax.jit(divided(op, names, result, implementation="sm90"))
    text = call.trace(*specs).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert "all_gather" not in text


@pytest.mark.parametrize("name", OPS)
def test_explicit_axes_are_the_references(name):
    """A pool whose heads lie along an explicit axis: results lie there too, and are the same."""
    op, names, result = OPS[name]
    mesh = jax.make_mesh(
        (2,), ("model",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2]
    )
    given = [arrays()[name] for name in names]
    whole = op(*given)
    with jax.set_mesh(mesh):
        laid = [
            jax.device_put(x, jax.NamedSharding(mesh, SPECS.get(name, WHOLE)))
            for name, x in zip(names, given, strict=True)
        ]
        parts = jax.jit(op)(*laid)
        with pytest.raises(NotImplementedError, match="inside shard_map"):
            jax.jit(functools.partial(op, implementation="sm90"))(*laid)
    for actual, expected in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert actual.sharding.is_equivalent_to(jax.NamedSharding(mesh, result), actual.ndim)
        np.testing.assert_allclose(
            np.asarray(actual, np.float32), np.asarray(expected, np.float32), atol=2e-2, rtol=2e-2
        )
