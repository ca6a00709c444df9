"""flash_attention's Hopper kernels on the device: the table of contracts, at sizes that fill the machine."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention.block_tiles import visible_elements
from pallas_kernels.flash_attention.config import default_config
from tests.pallas_kernels.flash_cases import (
    BACKWARD_CASES,
    FORWARD_CASES,
    IN_BLOCKS,
    poison_padding,
    random_inputs,
)
from tests.pallas_kernels.flash_features import DROPOUT, FEATURES, bias_of, block_mask
from tests.pallas_kernels.flash_fused_cases import fused_config
from tests.pallas_kernels.flash_random import assert_near_reference, attention, random_arrays
from tests.pallas_kernels.tolerance import LIMITS, assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("JAXATTN_TEST_GPU") != "1", reason="needs a Hopper GPU"),
]

RAGGED = {"q_lengths": jnp.array([0, 500, 900]), "kv_lengths": jnp.array([900, 77, 0])}
BOTTOM = {"is_causal": True, "causal_alignment": "bottom_right"}
LARGE = {
    "full": {"t": 1024, "s": 1024},
    "causal": {"t": 1024, "s": 1024, "is_causal": True},
    "odd": {"t": 777, "s": 999, "is_causal": True},
    "bottom right, T < S": {"t": 333, "s": 999, **BOTTOM},
    "bottom right, T > S": {"t": 999, "s": 333, **BOTTOM},
    "one query": {"t": 1, "s": 4001},
    "one key": {"t": 300, "s": 1},
    "grouped heads": {"t": 500, "s": 500, "n": 8, "k": 2, "is_causal": True},
    "one KV head": {"t": 500, "s": 500, "n": 8, "k": 1},
    "lengths": {"t": 900, "s": 900, "batch": 3, "poison": True, **RAGGED},
    "lengths, bottom right": {"t": 900, "s": 900, "batch": 3, "poison": True, **RAGGED, **BOTTOM},
    "window": {"t": 3001, "s": 3001, "local_window_size": (300, 40)},
    "window, causal": {"t": 3000, "s": 3000, "is_causal": True, "local_window_size": (300, None)},
    "soft cap": {"t": 513, "s": 513, "is_causal": True, "logits_soft_cap": 10.0},
    "long": {"t": 8192, "s": 8192, "n": 1, "k": 1, "is_causal": True},
}
SMALL = {name: case for name, case in (FORWARD_CASES | BACKWARD_CASES).items() if "config" not in case}
CASES = {f"H={h} {name}": {"h": h} | case for h in (64, 128, 256) for name, case in LARGE.items()}
CASES |= {f"small, {name}": case for name, case in SMALL.items()}
CASES |= {
    f"H={h} causal": {"t": 700, "s": 700, "h": h, "is_causal": True} for h in (32, 40, 80, 96, 112, 160, 192)
}
# Blocks of columns that end within, and vectors of no whole 16 bytes.
CASES |= {
    f"H={h} columns": {"t": 701, "s": 1024, "h": h, "is_causal": True} for h in (36, 72, 88, 104, 136, 224)
}
# Tiles of 128, 96 and 112 keys.
CASES |= {
    f"H={h} T={t} {'causal' if is_causal else 'full'}": {
        **{"t": t, "s": t, "n": 16, "k": 16, "h": h, "is_causal": is_causal}
    }
    for h in (160, 192)
    for t, is_causal in ((1100, False), (1100, True), (2304, False))
}
# Short rows that see all, more blocks than multiprocessors.
CASES |= {
    f"short, H={h} T={t}": {"t": t, "s": t, "batch": 8, "n": 12, "k": 12, "h": h}
    for h, t in (
        (64, 40),
        (64, 128),
        (64, 192),
        (64, 197),
        (64, 257),
        (64, 384),
        (64, 640),
        (32, 320),
        (96, 384),
    )
}
# The same in the tiles of calls that fill the machine.
CASES |= {
    f"H={h} columns, {name}": {"h": h, "batch": 4, "n": 16, "k": 16} | case
    for h in (40, 72, 104, 120, 136, 200)
    for name, case in (
        ("full", {"t": 1000, "s": 1024}),
        ("causal", {"t": 1000, "s": 1000, "is_causal": True}),
        ("causal, long", {"t": 2100, "s": 2100, "batch": 1, "is_causal": True}),
    )
}
CASES |= {
    # More items than multiprocessors, most of which see nothing: no warpgroup may wait for another's turn.
    f"H={h} rows of no queries": {
        **{"batch": 400, "t": 8, "s": 8, "h": h, **DROPOUT},
        "q_lengths": jnp.where(jnp.arange(400) % 7 == 0, 8, 0),
    }
    for h in (64, 128, 256)
}
CASES |= {
    # Each block of queries has a multiprocessor of its own, and takes a tile of either end: 9, 16, 5 tiles.
    f"one wave, H={h} {name}": {"h": h, "n": 12, "k": 4, "batch": 2} | case
    for h in (32, 64, 96, 128, 192, 256)
    for name, case in {
        "odd": {"t": 570, "s": 570, "is_causal": True},
        "sinks, T < S": {"t": 641, "s": 900, "batch": 1, "n": 15, "k": 15, "sinks": jnp.ones(15), **BOTTOM},
        "T > S": {
            "t": 300,
            "s": 180,
            "batch": 3,
            "local_window_size": (None, 3),
            **BOTTOM,
            "is_causal": False,
        },
    }.items()
}
CASES |= {
    f"H={h} block mask of each head, grouped heads{', causal' if is_causal else ''}": {
        **{"h": h, "batch": 2, "t": 1000, "s": 1100, "n": 8, "k": 2, **block_mask(1000, 1100, heads=8)},
        "is_causal": is_causal,
    }
    for h in (64, 128, 256)
    for is_causal in (False, True)
}
CASES |= {
    # The decode kernel's; the backward is not.
    f"H={h} one query, {name}": {"h": h, "batch": 3, "n": 8, "k": 2, "t": 1, "s": 4096} | case
    for h in (64, 80, 128, 256)
    for name, case in {
        "full": {},
        "few keys": {"s": 264, "kv_lengths": jnp.array([0, 1, 257]), "poison": True, **BOTTOM},
        "lengths": {"kv_lengths": jnp.array([0, 4096, 1001]), "poison": True, **BOTTOM},
        "window": {"local_window_size": (1500, 0), "logits_soft_cap": 10.0, **BOTTOM},
        "slopes, sinks": {
            **{"alibi_slopes": jnp.linspace(0.001, 0.5, 8), "sinks": jnp.linspace(-1, 4, 8)},
            "causal_alignment": "bottom_right",
        },
    }.items()
}
CASES |= {
    f"H={h} value dim {hv}": {"t": 300, "s": 300, "h": h, "hv": hv}
    for h, hv in ((64, 256), (72, 40), (64, 200))
}
CASES |= {
    f"fused, H={h} {name}": {"h": h, "config": fused_config(h)} | case
    for h in (32, 64, 96, 128, 256)
    for name, case in LARGE.items()
}
CASES |= {
    f"fused, H={h} {name}": {"h": h, "config": fused_config(h, IN_BLOCKS if h <= 128 else None)} | case
    for h in (64, 96, 128, 256)
    for name, case in FEATURES.items()
}
# Adds in order: one class of tiles of keys and several, one wave and several.
IN_ORDER = {
    "full": {"t": 1024, "s": 1024},
    "T > S": {"t": 1300, "s": 1100},
    "odd": {"t": 1090, "s": 1090, "n": 8, "k": 2},
    "one query": {"t": 1, "s": 1},
    "many heads": {"t": 1500, "s": 1500, "batch": 4, "n": 16, "k": 16},
}
CASES |= {
    f"fused, deterministic, H={h} {name}": {"h": h, "deterministic": True, "config": fused_config(h)} | case
    for h in (96, 128)
    for name, case in IN_ORDER.items()
}
CASES |= {f"fp16 {name}": {"h": 128, "dtype": jnp.float16} | case for name, case in LARGE.items()}
CASES |= {
    f"float32 H={h} {name}": {"h": h, "dtype": jnp.float32} | case
    for h in (64, 128, 256)
    for name, case in LARGE.items()
}
CASES |= {
    f"float32 fused, H={h} {name}": {
        **{"h": h, "dtype": jnp.float32, "config": fused_config(h, IN_BLOCKS if h <= 128 else None)},
        **case,
    }
    for h in (32, 64, 96, 128, 256)
    for name, case in {**FEATURES, **{name: LARGE[name] for name in ("odd", "grouped heads", "full")}}.items()
}
LSE_TOLERANCE = {"float32": 4e-3}  # its queries and keys are rounded, those of 16 bits are not


def run(implementation, arrays, out_grad, lse_grad, arguments):
    call = functools.partial(flash_attention, return_lse=True, implementation=implementation, **arguments)

    @jax.jit
    def step(arrays, out_grad, lse_grad):
        results, vjp = jax.vjp(call, *arrays)
        return results, vjp((out_grad.astype(results[0].dtype), lse_grad))

    return step(arrays, out_grad, lse_grad)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name):
    case = {"batch": 1, "n": 2, "k": 2, "h": 64, "poison": False} | CASES[name]
    batch, t, s, n, k, h, poison = (
        case.pop(key, 130) for key in ("batch", "t", "s", "n", "k", "h", "poison")
    )
    hv, dtype = case.pop("hv", h), case.pop("dtype", jnp.bfloat16)
    shapes = [(batch, t, n, h), (batch, s, k, h), (batch, s, k, hv), (batch, t, n, hv)]
    *arrays, out_grad = random_inputs(shapes, dtype)
    lse_grad = jax.random.normal(jax.random.key(9), (batch, t, n))
    exact = [x.astype(jnp.float32) for x in arrays]
    (expected, expected_lse), expected_grads = run("reference", exact, out_grad, lse_grad, case)
    if poison:
        arrays = poison_padding(*arrays, **case)
    (out, lse), grads = run("sm90", arrays, out_grad, lse_grad, case)
    limit = LIMITS[jnp.dtype(dtype).name]
    assert_close("out", out, expected, limit)
    tolerance = LSE_TOLERANCE.get(jnp.dtype(dtype).name, 1e-4)
    np.testing.assert_allclose(lse, expected_lse, atol=tolerance, rtol=1e-4)
    for name, actual, wanted in zip(("query", "key", "value"), grads, expected_grads, strict=True):
        assert_close(name, actual, wanted, limit)


def naive(query, key, value, is_causal):
    """Standard attention in the dtype of its arguments, logits and softmax in fp32."""
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    logits *= query.shape[-1] ** -0.5
    if is_causal:
        visible = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(visible, logits, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits).astype(query.dtype), value)


@pytest.mark.parametrize("h", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("dtype", "atol"), [(jnp.bfloat16, 1e-3), (jnp.float32, 1e-5)])
def test_error_at_most_twice_the_naive_one(h, is_causal, dtype, atol):
    """In float32 XLA multiplies in TF32: the precision of matmuls is JAX's default."""
    arrays = random_inputs([(2, 512, 4, h)] * 4, dtype)
    *qkv, out_grad = arrays
    ours = functools.partial(flash_attention, is_causal=is_causal, implementation="sm90")
    exact = functools.partial(flash_attention, is_causal=is_causal, implementation="reference")

    def results(function, dtype):
        out, vjp = jax.vjp(function, *(x.astype(dtype) for x in qkv))
        return [np.asarray(x, np.float32) for x in (out, *vjp(out_grad.astype(dtype)))]

    truth = results(exact, jnp.float32)
    for one, other, true in zip(
        results(ours, dtype),
        results(lambda *a: naive(*a, is_causal), dtype),
        truth,
        strict=True,
    ):
        assert np.abs(one - true).max() <= 2 * np.abs(other - true).max() + atol


@pytest.mark.parametrize(
    ("is_fused", "length", "heads", "is_causal"),
    [
        (False, 1000, 4, True),
        (False, 1000, 4, False),
        (True, 1000, 4, False),
        (True, 1000, 40, False),
        (True, 4096, 16, False),  # eight waves, of every other tile of a head's keys
    ],
)
def test_same_bits_every_time(is_fused, length, heads, is_causal):
    *qkv, out_grad = random_inputs([(2, length, heads, 128)] * 4, jnp.bfloat16)
    config = fused_config(128) if is_fused else default_config(128)
    options = {"is_causal": is_causal, "deterministic": True, "config": config}
    call = functools.partial(flash_attention, implementation="sm90", **options)
    step = jax.jit(lambda qkv, out_grad: (call(*qkv), jax.vjp(call, *qkv)[1](out_grad)))
    step = step.lower(qkv, out_grad).compile()
    assert ("flash_attention_backward" in step.as_text()) == is_fused  # else dq and dkv

    @jax.jit
    def has_same_bits(*results):
        bits = [[x.view(jnp.uint16) for x in jax.tree.leaves(result)] for result in results]
        return jnp.stack([(x == y).all() for x, y in zip(*bits, strict=True)]).all()

    first = step(qkv, out_grad)
    for _ in range(100):
        assert has_same_bits(first, step(qkv, out_grad))


def test_float32_of_any_size_and_only_at_the_default_precision():
    factors = (1e3, 1e-3, 1e6, 1e-8)
    arrays = random_inputs([(2, 2048, 4, 64)] * 4, jnp.float32)
    arrays = [x * factor for x, factor in zip(arrays, factors, strict=True)]
    lse_grad = jnp.zeros((2, 2048, 4))
    results = [run(name, arrays[:3], arrays[3], lse_grad, {}) for name in ("sm90", "reference", None)]
    ((out, _), grads), ((exact, _), exact_grads), ((chosen, _), _) = results
    assert (out == chosen).all()
    for one, other in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert one.dtype == jnp.float32
        assert_close("scaled", one, other, LIMITS["float32"])
    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(flash_attention).lower(*arrays[:3]).compile()
    assert "flash_attention_forward" not in compiled.as_text()


@pytest.mark.parametrize("shape", [(1, 1, 300, 400), (1, 4, 300, 400), (2, 4, 1, 400), (2, 1, 300, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [{}, block_mask(300, 400)], ids=["all visible", "block mask"])
def test_float32_gradients_of_a_bias_and_sinks(shape, dtype, options):
    query, key, value = random_inputs([(2, length, 4, 64) for length in (300, 400, 400)], jnp.float32)
    named = {"bias": jax.random.normal(jax.random.key(6), shape, dtype), "sinks": jnp.full(4, 3.0)}

    def gradients(implementation):
        call = lambda named: flash_attention(
            query, key, value * 1e4, implementation=implementation, **named, **options
        )
        return jax.jit(jax.grad(lambda named: jnp.sum(call(named) ** 2)))(named)

    for one, other in zip(*map(jax.tree.leaves, map(gradients, ("sm90", "reference"))), strict=True):
        # Sums of whole rows, in which most cancels, carry the rounding of their terms.
        one, other = np.float64(one), np.float64(other)
        assert np.sqrt(np.mean((one - other) ** 2) / np.mean(other**2)) < 10 * LIMITS["float32"]


@pytest.mark.parametrize("shape", [(1, 1, 900, 1000), (2, 4, 900, 1000), (1, 4, 1, 1000), (2, 1, 900, 1)])
@pytest.mark.parametrize("h", [64, 128, 256])
@pytest.mark.parametrize("masks", [1, 4])
def test_gradients_of_a_bias_under_a_block_mask(shape, h, masks):
    sizes = {"batch": 2, "t": 900, "s": 1000, "n": 4, "k": 2, "h": h, "hv": h, "dtype": jnp.bfloat16}
    arrays, cotangents = random_arrays(sizes, seed=0)
    arguments = bias_of(*shape) | block_mask(900, 1000, density=0.3, heads=masks)
    results = attention("sm90", arguments)(arrays, cotangents)
    assert_near_reference(results, attention("reference", arguments), arrays, cotangents)
    if shape[2:] == (900, 1000):
        visible = visible_elements(arguments["block_mask"], jnp.arange(900), 1000)
        visible = visible.any(axis=1, keepdims=True) if shape[1] == 1 else visible
        assert (jnp.where(visible, 0, results["bias"]) == 0).all()


def test_float32_rows_are_independent():
    arrays = random_inputs([(2, 700, 4, 64)] * 4, jnp.float32)
    changed = [x.at[1].multiply(1e5) for x in arrays]
    options = {"deterministic": True}
    lse_grad = jnp.zeros((2, 700, 4))
    one, other = (run("sm90", x[:3], x[3], lse_grad, options) for x in (arrays, changed))
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (x[0] == y[0]).all()


def test_chosen_by_default_and_memory_is_linear():
    spec = jax.ShapeDtypeStruct((4, 4096, 16, 128), jnp.bfloat16)
    call = functools.partial(flash_attention, is_causal=True)
    compiled = jax.jit(call).lower(spec, spec, spec).compile()
    assert "flash_attention_forward" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4096 * 16 * 4 * 4
