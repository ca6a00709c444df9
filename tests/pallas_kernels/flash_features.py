"""What calls of flash_attention ask for in the rows of flash_cases.py and its like: arguments, and sizes to
ask for them at.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxattn.block_mask import BlockMask

RAGGED = {
    "q_lengths": jnp.array([100, 0]),
    "kv_lengths": jnp.array([70, 150]),
    "batch": 2,
    "t": 150,
    "s": 150,
}


def packed(length, *ends):
    """Segment ids of one batch row whose documents end at `ends`."""
    return jnp.searchsorted(jnp.array(ends), jnp.arange(length), side="right")[None]


PACKED = {
    "t": 200,
    "s": 200,
    "is_causal": True,
    "q_segment_ids": packed(200, 30, 140),
    "kv_segment_ids": packed(200, 30, 140),
}
DROPOUT = {"dropout_rate": 0.25, "dropout_key": jax.random.key(5)}
SLOPES = {"alibi_slopes": jnp.array([0.5, 0.0625])}


def bias_of(*shape, dtype=jnp.bfloat16):
    return {"bias": jax.random.normal(jax.random.key(6), shape).astype(dtype)}


def block_mask(t, s, density=0.5, seed=0, heads=1):
    """Tiles that are whole, absent or random, for all heads or for each."""
    rng = np.random.default_rng(seed)
    shape, odds = (1, heads, t // 128 + 1, s // 128 + 1), [1 - density, density / 2, density / 2]
    kinds = np.kron(rng.choice([0, 1, 2], shape, p=odds), np.ones((128, 128), np.int32))[:, :, :t, :s]
    dense = (kinds == 1) | ((kinds == 2) & (rng.random(kinds.shape) < 0.3))
    return {"block_mask": BlockMask.from_dense(dense).tiles()}


# What changes single logits: each alone where it reads memory in a way of its own, then many together.
FEATURES: dict[str, dict[str, Any]] = {
    "segments": PACKED,
    "segments in any order": {
        "t": 100,
        "s": 140,
        "q_segment_ids": jnp.arange(100)[None] % 3,
        "kv_segment_ids": jnp.arange(140)[None] // 7 % 4,
    },
    "dropout": {"t": 70, "s": 100, **DROPOUT},
    "slopes, bottom right": {"t": 70, "s": 130, "n": 2, "k": 2, "is_causal": True, **SLOPES}
    | {"causal_alignment": "bottom_right"},
    "sinks": {"t": 70, "s": 70, "n": 2, "sinks": jnp.array([-1.0, 3.0]), "q_lengths": jnp.array([50])},
    "bias": {"t": 70, "s": 100, **bias_of(1, 1, 70, 100)},
    "bias of keys": {"t": 100, "s": 70, "n": 2, "k": 2, **bias_of(1, 2, 1, 70, dtype=jnp.float32)},
    "bias of queries": {"t": 70, "s": 70, **bias_of(1, 1, 70, 1)},
    "block mask": {"t": 256, "s": 140, **block_mask(256, 140, seed=3)},
    "block mask, causal": {"t": 130, "s": 140, "is_causal": True, **block_mask(130, 140, seed=4), **DROPOUT},
    "block mask, bias": {"t": 130, "s": 140, **block_mask(130, 140, seed=1), **bias_of(1, 1, 130, 140)},
    "block mask, bias of keys": {"t": 140, "s": 70, **block_mask(140, 70, seed=14), **bias_of(1, 1, 1, 70)},
    "block mask of each head, grouped heads, bias": {
        **{"t": 140, "s": 130, "n": 2, "k": 1, **block_mask(140, 130, seed=7, heads=2)},
        **bias_of(1, 1, 140, 130),
    },
    "block mask of each head, slopes": {
        **{"t": 140, "s": 130, "n": 2, "k": 1, **block_mask(140, 130, seed=1, heads=2), **SLOPES},
    },
    # Its tiles of 128 hold two of the kernels', of which the second lies beyond all keys and queries.
    "block mask, segments": {
        **{"t": 40, "s": 40, **block_mask(40, 40, seed=5), "is_causal": True},
        **{"q_segment_ids": packed(40, 30), "kv_segment_ids": packed(40, 30)},
    },
    "all at once": {
        **{"batch": 2, "t": 100, "s": 130, "n": 2, "k": 1, "is_causal": True, "logits_soft_cap": 5.0},
        **{"q_segment_ids": jnp.arange(100)[None] // jnp.array([[60], [200]])},
        **{"kv_segment_ids": jnp.arange(130)[None] // jnp.array([[60], [200]])},
        **{"kv_lengths": jnp.array([130, 80]), "sinks": jnp.array([0.0, 1.0]), "poison": True},
        **{"local_window_size": (60, None), **DROPOUT, **SLOPES, **bias_of(2, 1, 100, 130)},
    },
}
