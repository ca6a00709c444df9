"""Rows of tables.py for flash_attention's fused backward kernel; of those compiled some are whole calls, the
others hold that kernel alone.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import backward_fused_sm90, sm90
from pallas_kernels.flash_attention.config import FlashConfig, FusedConfig, default_config
from pallas_kernels.flash_attention.spec import AttentionInputs, AttentionSpec
from tests.pallas_kernels.flash_cases import BACKWARD_CASES, ONE_BUFFER, SMALL, check_backward
from tests.pallas_kernels.flash_compile_cases import (
    LENGTHS,
    PERSISTENT_SPILLS,
    backward_case,
    shapes,
    unbounded,
)
from tests.pallas_kernels.flash_features import DROPOUT, SLOPES, bias_of, block_mask, packed
from tests.pallas_kernels.tables import CompileCase

LOADER_SPILLS = 64  # of the warpgroup that loads and adds in order, which has 24 registers
ENDING_SPILLS = 8  # of the same where it loads a tile in which a length ends


def fused_config(head_dim: int, config: FlashConfig | None = None) -> FlashConfig:
    """A config whose backward is the fused kernel."""
    fused = FusedConfig(tile_q=128 if head_dim <= 64 else 64)
    return dataclasses.replace(config or default_config(head_dim), fused=fused)


def fused_feature_cases(t=1024, n=4, batch=2):
    """A row for each feature, or what is asked for together."""
    spec = jax.ShapeDtypeStruct
    lengths = dict(zip(("q_lengths", "kv_lengths"), LENGTHS, strict=True))
    ids = dict.fromkeys(("q_segment_ids", "kv_segment_ids"), spec((batch, t), jnp.int32))
    slopes = {"alibi_slopes": spec((1, n), jnp.float32)}
    blocks = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, block_mask(t, t)))
    seed = {"dropout_seed": spec((2,), jnp.uint32)}
    causal, window = {"is_causal": True}, {"window": (256, None), "logits_soft_cap": 30.0}
    # head dim, KV heads, arrays, options
    rows: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {
        "segments, full": (128, 4, ids, {}),
        "segments, causal": (64, 4, ids, causal),
        "narrow, segments, full": (96, 4, ids, {}),
        "segments, grouped heads": (128, 1, ids, {}),
        "window, grouped heads": (128, 1, {}, causal | {"window": (256, None)}),
        "soft cap, grouped heads": (128, 1, {}, causal | {"logits_soft_cap": 30.0}),
        "lengths, grouped heads": (128, 1, lengths, causal),
        "narrow, grouped heads": (96, 1, {}, causal),
        "slopes, lengths": (128, 4, slopes | lengths, causal),
        "block mask, grouped heads": (128, 1, blocks, {}),
        "block mask, dropout": (64, 4, blocks | seed, {"dropout_rate": 0.1}),
        "wide, causal, window": (192, 4, {}, causal | window),
        "wide, dropout": (256, 4, seed, causal | {"dropout_rate": 0.1}),
        "wide, slopes": (256, 4, slopes, causal),
        "wide, segments, lengths, dropout": (256, 1, ids | lengths | seed, causal | {"dropout_rate": 0.1}),
        "wide, block mask, segments": (256, 1, blocks | ids | lengths, causal),
    }
    cases = {
        f"flash_attention:backward fused H={h} {name}": fused_case(shapes(t, t, n, k, h, batch), *more)
        for name, (h, k, *more) in rows.items()
    }
    spills = {"block mask, grouped heads": PERSISTENT_SPILLS}
    spills |= dict.fromkeys(("lengths, grouped heads", "slopes, lengths"), ENDING_SPILLS)
    for name, size in spills.items():
        name = f"flash_attention:backward fused H=128 {name}"
        cases[name] = cases[name]._replace(max_spill_bytes=size)
    return cases


def fused_case(specs, arrays, options):
    query = specs[0]
    spec = AttentionSpec(scale=0.1, config=fused_config(query.shape[3]), **options)

    def gradients(inputs, out, lse):
        assert backward_fused_sm90.serves(sm90.plan_of(inputs, spec), inputs)
        return sm90.backward(inputs, spec, out, lse, out, lse)[:3]

    lse = jax.ShapeDtypeStruct((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)
    return CompileCase(gradients, (AttentionInputs(*specs, **arrays), query, lse))


# The fused kernel, where its protocol differs: several tiles of queries and heads, ragged keys, tiles not
# visited.
CASES: dict[str, dict[str, Any]] = {
    f"fused, {name}": {"config": fused_config(64, SMALL)} | BACKWARD_CASES[name]
    for name in (
        "grouped heads",
        "lengths, causal bottom right",
        "causal top left, T > S",
        "window",
        "block mask, causal",
    )
} | {
    "fused, head dim 128, fp16": BACKWARD_CASES["head dim 128, fp16"] | {"config": fused_config(128, SMALL)},
    "fused, head dim 128, segments, grouped heads": {
        **{"h": 128, "t": 130, "s": 70, "n": 2, "k": 1, "config": fused_config(128, SMALL)},
        **{"q_segment_ids": packed(130, 20, 75), "kv_segment_ids": packed(70, 20, 60, 65)},
    },
    "fused, segments, causal": {
        **{"t": 300, "s": 260, "n": 2, "k": 1, "is_causal": True, "config": fused_config(64, SMALL)},
        **{"q_segment_ids": packed(300, 20, 175), "kv_segment_ids": packed(260, 20, 175)},
    },
    # Several items a thread block, whose first tiles are whole or not.
    "fused, head dim 128, block mask": {
        **{"t": 384, "s": 256, "h": 128, **block_mask(384, 256, seed=6), "config": fused_config(128, SMALL)},
    },
    # Each tile of keys takes the queries in an order of its own.
    "fused, deterministic, grouped heads": {
        **{"batch": 2, "t": 290, "s": 290, "h": 128, "n": 2, "k": 1, "deterministic": True},
        "config": fused_config(128, SMALL),
    },
    "fused, deterministic, T > S, head dim 96": {
        **{"t": 330, "s": 290, "h": 96, "n": 1, "deterministic": True, "config": fused_config(96, SMALL)},
    },
    "fused, deterministic, a multiprocessor is left over": {
        **{"t": 190, "s": 190, "h": 128, "n": 2, "k": 2, "deterministic": True, "num_cores": 3},
        "config": fused_config(128, SMALL),
    },
    "fused, many at once": {
        **{"t": 70, "s": 140, "n": 2, "k": 1, "is_causal": True, "logits_soft_cap": 5.0, "poison": True},
        **{"causal_alignment": "bottom_right", "local_window_size": (50, None), "sinks": jnp.zeros(2)},
        **{"kv_lengths": jnp.array([120]), **SLOPES, **bias_of(1, 1, 1, 140)},
        **{"config": fused_config(64, SMALL)},
    },
    # The warpgroups' parts of dQ have 64 and 32 columns.
    "fused, head dim 96, grouped heads, causal bottom right": {
        **{"h": 96, "t": 70, "s": 150, "n": 2, "k": 1, "is_causal": True},
        **{"causal_alignment": "bottom_right", "config": fused_config(96, SMALL)},
    },
    "fused, head dim 24, window": {
        **{"h": 24, "t": 200, "s": 130, "local_window_size": (40, 20), "config": fused_config(32, SMALL)},
    },
    "fused, head dim 256, grouped heads, causal bottom right": {
        **{"h": 256, "t": 130, "s": 150, "n": 2, "k": 1, "is_causal": True},
        **{"causal_alignment": "bottom_right", "config": fused_config(256, ONE_BUFFER)},
    },
    "fused, head dim 256, lengths": {
        **BACKWARD_CASES["lengths"],
        **{"h": 256, "config": fused_config(256, ONE_BUFFER)},
    },
    "fused, head dim 256, block mask, causal, dropout": {
        **BACKWARD_CASES["block mask, causal"],
        **{"h": 256, "config": fused_config(256, ONE_BUFFER)},
    },
    "fused, head dim 192, one stage, fp16, window": {
        **{"h": 192, "t": 200, "s": 100, "dtype": jnp.float16, "local_window_size": (40, 20)},
        "config": dataclasses.replace(SMALL, fused=FusedConfig(stages=1)),
    },
    "fused, head dim 256, segments, dropout": {
        **{"batch": 2, "t": 100, "s": 130, "n": 2, "k": 1, "h": 256, "is_causal": True, "poison": True},
        **{"q_segment_ids": jnp.arange(100)[None] // jnp.array([[60], [200]])},
        **{"kv_segment_ids": jnp.arange(130)[None] // jnp.array([[60], [200]])},
        **{"kv_lengths": jnp.array([130, 80]), "sinks": jnp.array([0.0, 1.0]), **DROPOUT},
        "config": fused_config(256, ONE_BUFFER),
    },
    "fused, head dim 256, soft cap, slopes": {
        **{"t": 140, "s": 70, "n": 2, "k": 2, "h": 256, "is_causal": True, "logits_soft_cap": 5.0, **SLOPES},
        "config": fused_config(256, ONE_BUFFER),
    },
}

INTERPRET = {
    f"flash_attention:backward {name}": functools.partial(check_backward, **case)
    for name, case in CASES.items()
}
COMPILE = (
    {
        f"flash_attention:backward fused H={h} {name}": unbounded(
            backward_case(shapes(h=h, k=k), config=fused_config(h), is_causal=causal)
        )
        for h in (64, 128, 256)
        for name, k, causal in (("full", 4, False), ("causal, grouped heads", 1, True))
    }
    | fused_feature_cases()
    | {
        f"flash_attention:backward fused H={h} deterministic": unbounded(
            backward_case(shapes(h=h), config=fused_config(h), deterministic=True)
        )._replace(max_spill_bytes=LOADER_SPILLS)
        for h in (96, 128)
    }
)
