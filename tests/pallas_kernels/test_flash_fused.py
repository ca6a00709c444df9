"""Which calls take the fused backward kernel."""

import jax
import jax.numpy as jnp

from pallas_kernels import FlashConfig
from pallas_kernels.flash_attention import backward_fused_sm90, sm90
from pallas_kernels.flash_attention.config import FusedConfig
from pallas_kernels.flash_attention.spec import AttentionInputs, AttentionSpec


def test_the_fused_backward_is_taken_unasked_only_where_it_was_measured():
    def takes(h=128, k=4, t=4096, config=None, ids=None, batch=16, **options):
        query, key = (jax.ShapeDtypeStruct((batch, t, n, h), jnp.bfloat16) for n in (4, k))
        inputs = AttentionInputs(query, key, key, q_segment_ids=ids, kv_segment_ids=ids)
        spec = AttentionSpec(scale=1.0, config=config, **options)
        return backward_fused_sm90.serves(sm90.plan_of(inputs, spec), inputs)

    ids = jax.ShapeDtypeStruct((16, 4096), jnp.int32)
    asked = FlashConfig(fused=FusedConfig(tile_q=64))
    assert takes()
    assert takes(is_causal=True)
    assert takes(t=1024)
    assert not takes(t=512)
    assert not takes(t=2048, is_causal=True)
    assert takes(t=2048, is_causal=True, config=asked)
    assert takes(t=2048, is_causal=True, logits_soft_cap=9.0)
    assert takes(h=64, t=1024, is_causal=True)
    assert takes(h=64, k=1)
    assert takes(h=256)
    assert takes(h=192, is_causal=True)
    assert takes(h=256, k=1)
    assert takes(h=256, t=512, k=1)
    assert takes(h=256, ids=ids)
    assert takes(h=256, k=1, dropout_rate=0.1, logits_soft_cap=9.0, config=asked)
    assert not takes(h=256, k=1, ids=ids, dropout_rate=0.1, logits_soft_cap=9.0, config=asked)
    assert takes(k=1)
    assert takes(k=1, is_causal=True)
    assert not takes(k=1, t=2048)
    assert not takes(k=1, t=2048, is_causal=True)
    assert takes(k=1, t=2048, is_causal=True, config=asked)
    few = {"batch": 2, "is_causal": True}  # tiles of keys: they would leave multiprocessors idle
    assert takes(t=2048, **few)
    assert takes(k=1, t=2048, **few)
    assert takes(k=1, t=1024, **few)
    assert takes(h=64, k=1, t=1024, **few)
    assert not takes(t=1024, **few)
    assert not takes(ids=ids)
    assert takes(h=64, ids=ids)
    assert takes(ids=ids, config=asked)
    assert not takes(ids=ids, is_causal=True, config=asked)
    assert not takes(window=(256, None))
    assert takes(window=(256, None), config=asked)
    assert takes(h=64, dropout_rate=0.1)
    assert not takes(dropout_rate=0.1, config=asked)
    assert not takes(ids=ids, logits_soft_cap=9.0, config=asked)
    assert takes(deterministic=True)
    assert not takes(deterministic=True, t=2048)
    assert not takes(deterministic=True, k=1)
    assert takes(deterministic=True, k=1, config=asked)
    assert not takes(deterministic=True, h=96)
    assert takes(deterministic=True, h=96, config=asked)
    assert takes(deterministic=True, t=2048, config=asked)
    assert not takes(deterministic=True, is_causal=True, config=asked)
    assert not takes(deterministic=True, ids=ids, config=asked)
    assert not takes(deterministic=True, logits_soft_cap=9.0, config=asked)
    assert not takes(deterministic=True, h=64)
    assert not takes(deterministic=True, h=256)
