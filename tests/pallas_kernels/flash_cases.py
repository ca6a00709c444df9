"""Rows of tables.py for flash_attention."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import FlashConfig, flash_attention
from pallas_kernels.flash_attention.config import Call, GradientConfig, default_config
from tests.pallas_kernels.flash_features import FEATURES, RAGGED
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.tables import CompileCase

THREE = FlashConfig(tile_q=64, tile_kv=64, stages=2, warpgroups=3, ping_pong=False)
AHEAD = FlashConfig(tile_q=64, tile_kv=64, stages=2, overlap=True, ping_pong=False)
SMALL = FlashConfig(tile_q=64, tile_kv=64, stages=2, q_stages=2)
ONE_BUFFER = dataclasses.replace(SMALL, q_stages=1)  # of queries, of which wide heads have no room for two
EIGHTY = dataclasses.replace(AHEAD, tile_kv=80)
IN_BLOCKS = default_config(128, Call(crowded=True, in_blocks=True, busy=1))  # serves all calls


def random_inputs(shapes, dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def check_forward(
    batch=1, t=130, s=130, n=1, k=1, h=64, hv=None, dtype=jnp.bfloat16, poison=False, **arguments
):
    """The interpreted kernel against the reference on the same inputs; NaN beyond the lengths must not
    matter.
    """
    hv = hv or h
    query, key, value = random_inputs([(batch, t, n, h), (batch, s, k, h), (batch, s, k, hv)], dtype)
    if poison:
        query, key, value = poison_padding(query, key, value, **arguments)
    arguments = {"config": SMALL} | arguments
    call = functools.partial(flash_attention, return_lse=True, **arguments)
    expected, expected_lse = call(query, key, value, implementation="reference")
    with interpreted():
        out, lse = jax.block_until_ready(call(query, key, value, implementation="sm90"))
    compare(out, expected, dtype)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4, rtol=1e-4)


def check_backward(
    batch=1,
    t=100,
    s=100,
    n=1,
    k=1,
    h=64,
    hv=None,
    dtype=jnp.bfloat16,
    poison=False,
    num_cores=2,
    **arguments,
):
    """Gradients through output and log-sum-exp, also of a bias and sinks: the interpreted kernels against the
    reference.
    """
    hv = hv or h
    shapes = [(batch, t, n, h), (batch, s, k, h), (batch, s, k, hv), (batch, t, n, hv)]
    query, key, value, out_grad = random_inputs(shapes, dtype)
    lse_grad = jax.random.normal(jax.random.key(9), (batch, t, n))
    if poison:
        query, key, value = poison_padding(query, key, value, **arguments)
    arguments = {"config": SMALL} | arguments

    differentiated = {name: arguments.pop(name) for name in ("bias", "sinks") if name in arguments}

    def gradients(implementation):
        call = functools.partial(flash_attention, return_lse=True, implementation=implementation, **arguments)
        _, vjp = jax.vjp(lambda qkv, named: call(*qkv, **named), (query, key, value), differentiated)
        return jax.tree.leaves(jax.block_until_ready(vjp((out_grad, lse_grad))))

    expected = gradients("reference")
    with interpreted(num_cores):
        actual = gradients("sm90")
    for one, other in zip(actual, expected, strict=True):
        # Sums of whole rows, in which most cancels, carry the rounding of the outputs.
        sums_rows = one.ndim == 1 or (one.shape[-1] == 1 and one.ndim == 4)
        compare(one, other, dtype, tolerance=10 if sums_rows else 1)


def poison_padding(query, key, value, q_lengths=None, kv_lengths=None, poison_with=jnp.nan, **_):
    def poison(x, lengths):
        inside = jnp.arange(x.shape[1]) < lengths[:, None]
        return jnp.where(inside[..., None, None], x, poison_with)

    if q_lengths is not None:
        query = poison(query, q_lengths)
    if kv_lengths is not None:
        key, value = poison(key, kv_lengths), poison(value, kv_lengths)
    return query, key, value


def compare(actual, expected, dtype, tolerance=1):
    """Relative RMS error against fp32, as the precision of the dtype allows."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    error = np.sqrt(np.mean((actual - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), 1e-3)
    assert error < tolerance * {"bfloat16": 6e-3, "float16": 8e-4, "float32": 7e-4}[jnp.dtype(dtype).name], (
        error
    )


FORWARD_CASES: dict[str, dict[str, Any]] = {
    "plain": {"t": 128, "s": 128},
    "causal": {"batch": 2, "n": 2, "is_causal": True},
    "causal top left, T < S": {"t": 100, "s": 200, "is_causal": True},
    "causal bottom right, T < S": {"t": 100, "s": 200, "is_causal": True, "causal_alignment": "bottom_right"},
    "causal bottom right, T > S": {"t": 200, "s": 70, "is_causal": True, "causal_alignment": "bottom_right"},
    "grouped heads": {"t": 65, "s": 65, "n": 4, "k": 2, "is_causal": True},
    "head dim 128, fp16": {"t": 70, "s": 129, "h": 128, "dtype": jnp.float16},
    "head dim 40 padded, in turns": {"t": 70, "s": 70, "h": 40, "is_causal": True},
    "head dim 104 padded, overlap": {"t": 70, "s": 130, "h": 104, "config": AHEAD},
    "head dim 72, value dim 40": {"t": 70, "s": 70, "h": 72, "hv": 40, "is_causal": True, "config": THREE},
    "value dim": {"t": 70, "s": 70, "h": 64, "hv": 128},
    "lengths": dict(RAGGED, poison=True),
    "lengths, causal bottom right": dict(
        RAGGED, poison=True, is_causal=True, causal_alignment="bottom_right"
    ),
    "window": {"t": 260, "s": 260, "local_window_size": (40, 20)},
    "window, causal": {"t": 260, "s": 260, "is_causal": True, "local_window_size": (70, None)},
    "soft cap": {"t": 70, "s": 70, "is_causal": True, "logits_soft_cap": 2.0},
    "one token": {"t": 1, "s": 1},
    "tile_q 128": {"is_causal": True, "config": FlashConfig(tile_q=128, tile_kv=64, stages=2)},
    "overlap, causal, grouped heads": {"n": 2, "k": 1, "is_causal": True, "config": AHEAD},
    "overlap, lengths": dict(RAGGED, poison=True, config=dataclasses.replace(AHEAD, q_stages=2)),
    "overlap, window": {"t": 260, "s": 260, "local_window_size": (40, 20), "config": AHEAD},
    "overlap, in turns": {"n": 2, "is_causal": True, "config": dataclasses.replace(AHEAD, ping_pong=True)},
    "overlap, head dim 256, a tail and a diagonal": {
        **{"t": 130, "s": 190, "h": 256, "is_causal": True, "causal_alignment": "bottom_right"},
        "config": dataclasses.replace(AHEAD, ping_pong=True),
    },
    "overlap, a third tile of V": {"t": 130, "s": 330, "config": dataclasses.replace(AHEAD, value_stages=3)},
    "tiles of 80 keys": {"t": 130, "s": 330, "h": 256, "config": EIGHTY},
    "tiles of 80 keys, a tail and a diagonal": {
        **{"t": 130, "s": 190, "h": 256, "is_causal": True, "causal_alignment": "bottom_right"},
        "config": EIGHTY,
    },
    "tiles of 80 keys, a diagonal, fp16": {
        **{"t": 330, "s": 330, "h": 200, "is_causal": True, "dtype": jnp.float16},
        "config": dataclasses.replace(ONE_BUFFER, tile_kv=80),
    },
    "tiles of 112 keys, a tail and a diagonal": {
        **{"t": 130, "s": 290, "h": 192, "is_causal": True, "causal_alignment": "bottom_right"},
        "config": dataclasses.replace(EIGHTY, tile_kv=112),
    },
    "tiles of 80 keys, lengths": dict(RAGGED, poison=True, config=dataclasses.replace(SMALL, tile_kv=80)),
    "tiles of 80 keys, window": {"t": 260, "s": 260, "local_window_size": (40, 20), "config": EIGHTY},
    "in turns, queries in one buffer": {"n": 2, "config": ONE_BUFFER},
    "head dim 96": {"t": 70, "s": 70, "h": 96, "is_causal": True},
    # One block has two items to attend and three without a key: nobody may wait for a turn in between.
    "in turns, items that see nothing": {
        **{"batch": 10, "t": 5, "s": 5, "config": SMALL},
        "q_lengths": jnp.array([5, 5, 0, 0, 0, 0, 0, 0, 5, 5]),
    },
    "folded, a tile in the middle": {
        **{"t": 300, "s": 300, "is_causal": True, "config": dataclasses.replace(AHEAD, folds=True)},
    },
    # Where later queries do not see more keys, nothing is folded.
    "folded, a window": {
        **{"t": 260, "s": 260, "local_window_size": (40, 20)},
        "config": dataclasses.replace(AHEAD, folds=True),
    },
    "folded, lengths": {
        **{**RAGGED, "poison": True, "is_causal": True},
        "config": dataclasses.replace(SMALL, folds=True),
    },
    "folded, in turns, T < S": {
        **{"t": 190, "s": 260, "n": 2, "is_causal": True, "causal_alignment": "bottom_right"},
        "config": dataclasses.replace(SMALL, folds=True),
    },
    "three warpgroups": {"is_causal": True, "config": THREE},
    # The first thread block of a head has 64 rows for three warpgroups: the first two stay idle.
    "three warpgroups, idle ones first": {
        **{"t": 250, "s": 310, "is_causal": True, "causal_alignment": "bottom_right"},
        "config": dataclasses.replace(THREE, overlap=True, q_stages=2),
    },
    "three warpgroups, idle ones first, keys ahead": {
        **{"t": 130, "s": 100, "local_window_size": (None, 70), "config": THREE},
    },
    **FEATURES,
}

BACKWARD_CASES: dict[str, dict[str, Any]] = {
    "plain": {"t": 128, "s": 64},
    "causal": {"is_causal": True},
    "causal bottom right, T < S": {"t": 70, "s": 140, "is_causal": True, "causal_alignment": "bottom_right"},
    "causal top left, T > S": {"t": 140, "s": 70, "is_causal": True},
    "grouped heads": {"t": 65, "s": 65, "n": 4, "k": 2, "is_causal": True},
    "head dim 128, fp16": {"h": 128, "dtype": jnp.float16, "is_causal": True},
    "head dim 72 padded": {"t": 70, "s": 130, "h": 72, "is_causal": True},
    "value dim": {"h": 64, "hv": 128},
    "lengths": dict(RAGGED, poison=True),
    "lengths, causal bottom right": dict(
        RAGGED, poison=True, is_causal=True, causal_alignment="bottom_right"
    ),
    "window": {"t": 200, "s": 200, "local_window_size": (40, 20)},
    "soft cap": {"is_causal": True, "logits_soft_cap": 2.0},
    "bias of NaN where it is not seen": {
        **{"t": 70, "s": 130, "is_causal": True, "q_lengths": jnp.array([60])},
        "bias": jnp.where(jnp.tri(70, 130) * (jnp.arange(70)[:, None] < 60) > 0, 0.5, jnp.nan)[None, None],
    },
    "two passes": {
        "is_causal": True,
        "config": dataclasses.replace(SMALL, dq=GradientConfig(stages=1), dkv_passes=2),
    },
    **FEATURES,
}

INTERPRET = {
    f"flash_attention:{direction} {name}": functools.partial(check, **case)
    for direction, check, cases in (
        ("forward", check_forward, FORWARD_CASES),
        ("backward", check_backward, BACKWARD_CASES),
    )
    for name, case in cases.items()
}
COMPILE: dict[str, CompileCase] = {}  # flash_compile_cases.py
