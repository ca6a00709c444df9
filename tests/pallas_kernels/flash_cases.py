"""Rows of tables.py for flash_attention."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import FlashConfig, flash_attention
from pallas_kernels.flash_attention.config import GradientConfig
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.tables import CompileCase

SMALL = FlashConfig(tile_q=64, tile_kv=64, stages=2)


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
    batch=1, t=100, s=100, n=1, k=1, h=64, hv=None, dtype=jnp.bfloat16, poison=False, **arguments
):
    """Gradients through output and log-sum-exp: the interpreted kernels against the reference."""
    hv = hv or h
    shapes = [(batch, t, n, h), (batch, s, k, h), (batch, s, k, hv), (batch, t, n, hv)]
    query, key, value, out_grad = random_inputs(shapes, dtype)
    lse_grad = jax.random.normal(jax.random.key(9), (batch, t, n))
    if poison:
        query, key, value = poison_padding(query, key, value, **arguments)
    arguments = {"config": SMALL} | arguments

    def gradients(implementation):
        call = functools.partial(flash_attention, return_lse=True, implementation=implementation, **arguments)
        _, vjp = jax.vjp(call, query, key, value)
        return jax.block_until_ready(vjp((out_grad, lse_grad)))

    expected = gradients("reference")
    with interpreted():
        actual = gradients("sm90")
    for one, other in zip(actual, expected, strict=True):
        compare(one, other, dtype)


def poison_padding(query, key, value, q_lengths=None, kv_lengths=None, **_):
    def poison(x, lengths):
        inside = jnp.arange(x.shape[1]) < lengths[:, None]
        return jnp.where(inside[..., None, None], x, jnp.nan)

    if q_lengths is not None:
        query = poison(query, q_lengths)
    if kv_lengths is not None:
        key, value = poison(key, kv_lengths), poison(value, kv_lengths)
    return query, key, value


def compare(actual, expected, dtype):
    """Relative RMS error against fp32, as the precision of the dtype allows."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    error = np.sqrt(np.mean((actual - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), 1e-3)
    assert error < {"bfloat16": 6e-3, "float16": 8e-4}[jnp.dtype(dtype).name], error


RAGGED = {
    "q_lengths": jnp.array([100, 0]),
    "kv_lengths": jnp.array([70, 150]),
    "batch": 2,
    "t": 150,
    "s": 150,
}
FORWARD_CASES: dict[str, dict[str, Any]] = {
    "plain": {"t": 128, "s": 128},
    "causal": {"batch": 2, "n": 2, "is_causal": True},
    "causal top left, T < S": {"t": 100, "s": 200, "is_causal": True},
    "causal bottom right, T < S": {"t": 100, "s": 200, "is_causal": True, "causal_alignment": "bottom_right"},
    "causal bottom right, T > S": {"t": 200, "s": 70, "is_causal": True, "causal_alignment": "bottom_right"},
    "grouped heads": {"t": 65, "s": 65, "n": 4, "k": 2, "is_causal": True},
    "head dim 128, fp16": {"t": 70, "s": 129, "h": 128, "dtype": jnp.float16},
    "head dim 40 padded": {"t": 70, "s": 70, "h": 40},
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
    "three warpgroups": {
        "is_causal": True,
        "config": FlashConfig(tile_q=64, tile_kv=64, stages=2, warpgroups=3, ping_pong=False),
    },
}

BACKWARD_CASES: dict[str, dict[str, Any]] = {
    "plain": {"t": 128, "s": 64},
    "causal": {"is_causal": True},
    "causal bottom right, T < S": {"t": 70, "s": 140, "is_causal": True, "causal_alignment": "bottom_right"},
    "causal top left, T > S": {"t": 140, "s": 70, "is_causal": True},
    "grouped heads": {"t": 65, "s": 65, "n": 4, "k": 2, "is_causal": True},
    "head dim 128, fp16": {"h": 128, "dtype": jnp.float16, "is_causal": True},
    "value dim": {"h": 64, "hv": 128},
    "lengths": dict(RAGGED, poison=True),
    "lengths, causal bottom right": dict(
        RAGGED, poison=True, is_causal=True, causal_alignment="bottom_right"
    ),
    "window": {"t": 200, "s": 200, "local_window_size": (40, 20)},
    "soft cap": {"is_causal": True, "logits_soft_cap": 2.0},
    "two passes": {
        "is_causal": True,
        "config": dataclasses.replace(SMALL, dq=GradientConfig(stages=1), dkv_passes=2),
    },
}

INTERPRET = {
    f"flash_attention:{direction} {name}": functools.partial(check, **case)
    for direction, check, cases in (
        ("forward", check_forward, FORWARD_CASES),
        ("backward", check_backward, BACKWARD_CASES),
    )
    for name, case in cases.items()
}


def shapes(t=1024, s=1024, n=4, k=4, h=128, batch=2, dtype=jnp.bfloat16):
    return [
        jax.ShapeDtypeStruct(shape, dtype) for shape in ((batch, t, n, h), (batch, s, k, h), (batch, s, k, h))
    ]


def forward_case(specs, extra=(), **arguments):
    def attend(query, key, value, *lengths):
        named = dict(zip(("q_lengths", "kv_lengths"), lengths, strict=False))
        return flash_attention(
            query, key, value, implementation="sm90", return_lse=True, **named, **arguments
        )

    query = specs[0]
    lse_bytes = query.shape[0] * query.shape[1] * query.shape[2] * 4
    return CompileCase(attend, (*specs, *extra), max_temp_bytes=2 * lse_bytes + 65536)


def unbounded(case: CompileCase) -> CompileCase:
    return case._replace(max_temp_bytes=None)


def backward_case(specs, extra=(), max_spill_bytes=0, **arguments):
    def gradients(query, key, value, out_grad, *lengths):
        named = dict(zip(("q_lengths", "kv_lengths"), lengths, strict=False))
        call = functools.partial(flash_attention, implementation="sm90", **named, **arguments)
        _, vjp = jax.vjp(call, query, key, value)
        return vjp(out_grad)

    query = specs[0]
    out_bytes = query.size * query.dtype.itemsize
    row_bytes = query.size // query.shape[-1] * 4
    return CompileCase(
        gradients,
        (*specs, query, *extra),
        max_temp_bytes=out_bytes + 6 * row_bytes + 65536,
        max_spill_bytes=max_spill_bytes,
    )


LENGTHS = (jax.ShapeDtypeStruct((2,), jnp.int32),) * 2
# Bytes that the assembler still spills: a register or a few at H = 128; at H = 256 the accumulators fill the
# registers.
BACKWARD_SPILLS = {64: 0, 128: 32, 256: 1100}
COMPILE = (
    {
        f"flash_attention:forward H={h} {'causal' if causal else 'full'}": forward_case(
            shapes(h=h), is_causal=causal
        )
        for h in (64, 128, 256)
        for causal in (False, True)
    }
    | {
        f"flash_attention:backward H={h} {'causal' if causal else 'full'}": backward_case(
            shapes(h=h), is_causal=causal, max_spill_bytes=BACKWARD_SPILLS[h]
        )
        for h in (64, 128, 256)
        for causal in (False, True)
    }
    | {
        "flash_attention:forward fp16": forward_case(shapes(dtype=jnp.float16), is_causal=True),
        "flash_attention:forward window": forward_case(
            shapes(), is_causal=True, local_window_size=(256, None)
        ),
        "flash_attention:forward soft cap": forward_case(shapes(), is_causal=True, logits_soft_cap=30.0),
        # Zeroing what lies beyond the lengths copies the values, and padding the rest.
        "flash_attention:forward lengths": unbounded(forward_case(shapes(), LENGTHS, is_causal=True)),
        "flash_attention:forward odd, full": unbounded(
            forward_case(shapes(t=333, s=777))._replace(max_spill_bytes=8)
        ),
        "flash_attention:backward grouped heads": backward_case(shapes(k=1, h=64), is_causal=True),
        "flash_attention:backward window": backward_case(
            shapes(), is_causal=True, local_window_size=(256, None), max_spill_bytes=256
        ),
        "flash_attention:backward soft cap": backward_case(
            shapes(h=64), is_causal=True, logits_soft_cap=30.0
        ),
        "flash_attention:backward lengths, odd": unbounded(
            backward_case(
                shapes(t=333, s=777, h=64),
                LENGTHS,
                is_causal=True,
                causal_alignment="bottom_right",
                max_spill_bytes=8,
            )
        ),
    }
)
