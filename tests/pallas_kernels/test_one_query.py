"""Which calls of one query a row flash_attention gives to the decode kernel."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import FlashConfig, flash_attention
from pallas_kernels.flash_attention import one_query_sm90
from tests.pallas_kernels.hopper import abstract_mesh

LAST = {"causal_alignment": "bottom_right"}
BATCH, KEYS, HEADS = 2, one_query_sm90.MIN_KEYS, 4


def kernels_of(t=1, s=KEYS, h=64, hv=None, dtype=jnp.bfloat16, given=(), **options) -> str:
    """The call as lowered for a Hopper GPU."""
    shapes = [(BATCH, t, HEADS, h), (BATCH, s, 2, h), (BATCH, s, 2, hv or h)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    named = {name: jax.ShapeDtypeStruct(*array) for name, array in given}
    call = functools.partial(flash_attention, implementation="sm90", **options)
    with jax.sharding.use_abstract_mesh(abstract_mesh()):
        lowered = jax.jit(lambda arrays, named: call(*arrays, **named)).trace(arrays, named)
        return lowered.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"local_window_size": (7, None)},  # of the first position: everything is on its right
        {"is_causal": True, "local_window_size": 100, **LAST},
        {"given": [("kv_lengths", ((BATCH,), jnp.int32)), ("sinks", ((HEADS,), jnp.float32))]},
        {"given": [("alibi_slopes", ((HEADS,), jnp.float32))], **LAST},
        {"h": 256, "dtype": jnp.float16, "logits_soft_cap": 3.0},
    ],
)
def test_decode_takes(call):
    assert "paged_decode" in kernels_of(**call)


@pytest.mark.parametrize(
    "call",
    [
        {"t": 2},
        {"s": KEYS - 8},
        {"s": KEYS + 1},
        {"h": 40},
        {"hv": 128},
        {"dtype": jnp.float32},
        {"is_causal": True},  # one key
        {"given": [("alibi_slopes", ((HEADS,), jnp.float32))]},  # distances from the first key
        {"given": [("alibi_slopes", ((BATCH, HEADS), jnp.float32))], **LAST},
        {"given": [("q_lengths", ((BATCH,), jnp.int32))]},
        {"given": [("bias", ((1, 1, 1, KEYS), jnp.float32))]},
        {"given": [(f"{x}_segment_ids", ((BATCH, n), jnp.int32)) for x, n in (("q", 1), ("kv", KEYS))]},
        {"config": FlashConfig(tile_q=64, tile_kv=64, stages=2)},
    ],
)
def test_tiles_of_queries_take(call):
    text = kernels_of(**call)
    assert "flash_attention_forward" in text
    assert "paged_decode" not in text
