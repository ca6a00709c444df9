"""Under jax_enable_x64 kernels are what they are without: numbers in them have 32 bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    cascade_attention,
    contiguous_attention,
    copy_pages,
    flash_attention,
    gather_pages,
    paged_attention,
    write_kv,
)
from tests.pallas_kernels.hopper import abstract_mesh

DTYPE, LONG = jnp.bfloat16, jnp.int64
POOLS = [((2, 64, 2, 16, 64), DTYPE)] * 2
TABLES = [((4, 64), LONG), ((4,), LONG)]
CALLS = {
    "decode": (paged_attention, [((4, 8, 64), DTYPE), *POOLS, *TABLES], {}),
    "ragged": (paged_attention, [((40, 8, 64), DTYPE), *POOLS, *TABLES], {"query_start": ((5,), LONG)}),
    "caches": (contiguous_attention, [((4, 8, 64), DTYPE), *[((4, 512, 2, 64), DTYPE)] * 2, TABLES[1]], {}),
    "cascade": (cascade_attention, [((4, 8, 64), DTYPE), *POOLS, *TABLES, ((1,), LONG), ((4,), LONG)], {}),
    "writes": (write_kv, [*POOLS, *[((40, 2, 64), DTYPE)] * 2, ((40,), LONG)], {}),
    "copies": (copy_pages, [*POOLS, TABLES[1], TABLES[1]], {}),
    "gathers": (gather_pages, [*POOLS, TABLES[1]], {}),
}
QKV = [((2, length, heads, 64), DTYPE) for length, heads in ((200, 4), (300, 2), (300, 2))]
IDS = {"q_segment_ids": ((2, 200), LONG), "kv_segment_ids": ((2, 300), LONG)}
LENGTHS = {"q_lengths": ((2,), LONG), "kv_lengths": ((2,), LONG)}


def lowered(function, arrays, named) -> str:
    """For a Hopper GPU, under x64."""
    with jax.enable_x64(True), jax.sharding.use_abstract_mesh(abstract_mesh()):
        arrays, named = (
            jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(*x), x, is_leaf=lambda x: isinstance(x, tuple) and len(x) == 2
            )
            for x in (arrays, named)
        )
        traced = jax.jit(lambda arrays, named: function(*arrays, **named)).trace(arrays, named)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("name", CALLS)
def test_paged_kernels(name):
    op, arrays, named = CALLS[name]
    assert "mosaic_gpu" in lowered(functools.partial(op, implementation="sm90"), arrays, named)


@pytest.mark.parametrize("named", [{}, IDS, LENGTHS], ids=["plain", "segments", "lengths"])
def test_flash_kernels(named):
    def gradients(query, key, value, **named):
        call = functools.partial(flash_attention, is_causal=True, implementation="sm90", **named)
        return jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), (0, 1, 2))(query, key, value)

    text = lowered(gradients, QKV, named)
    assert "flash_attention_forward" in text
    assert "float64" not in text


def test_references_give_the_same():
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [
        np.asarray(jax.random.normal(key, shape, jnp.float32))
        for key, (shape, _) in zip(keys, QKV, strict=True)
    ]
    lengths = np.array([150, 300])

    def gradients():
        call = functools.partial(flash_attention, is_causal=True, kv_lengths=jnp.asarray(lengths))
        return jax.grad(lambda *x: (call(*x) ** 2).sum(), (0, 1, 2))(*map(jnp.asarray, arrays))

    expected = gradients()
    with jax.enable_x64(True):
        actual = gradients()
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype == jnp.float32
        np.testing.assert_allclose(one, other, atol=1e-6)
