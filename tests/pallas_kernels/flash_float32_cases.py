"""Rows of tables.py for flash_attention on float32: the kernels of 16 bits, on scaled operands."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flash_attention
from tests.pallas_kernels import flash_compile_cases, flash_fused_cases
from tests.pallas_kernels.flash_cases import ONE_BUFFER, SMALL, compare, poison_padding, random_inputs
from tests.pallas_kernels.flash_compile_cases import unbounded
from tests.pallas_kernels.flash_features import DROPOUT, FEATURES, RAGGED, bias_of
from tests.pallas_kernels.flash_fused_cases import fused_config
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.tables import CompileCase

SCALED = {"factors": (1e3, 1e-3, 1e6, 1e-8)}


def check(
    batch=1, t=70, s=100, n=1, k=1, h=64, hv=None, factors=(1.0, 1.0, 1.0, 1.0), heavy=False, **arguments
):
    """Output, log-sum-exp and gradients: the interpreted kernels against the reference.

    factors: of query, key, value and cotangent. heavy: the cotangent has heavy tails.
    """
    hv = hv or h
    shapes = [(batch, t, n, h), (batch, s, k, h), (batch, s, k, hv), (batch, t, n, hv)]
    arrays = random_inputs(shapes, jnp.float32)
    if heavy:
        arrays[3] = jax.random.t(jax.random.key(3), 2.0, shapes[3])
    query, key, value, out_grad = (x * factor for x, factor in zip(arrays, factors, strict=True))
    lse_grad = jax.random.normal(jax.random.key(9), (batch, t, n)) * factors[2] * factors[3]
    if arguments.pop("poison", False):
        query, key, value = poison_padding(query, key, value, **arguments)
    arguments = {"config": SMALL} | arguments
    differentiated = {name: arguments.pop(name) for name in ("bias", "sinks") if name in arguments}

    def results(implementation):
        call = functools.partial(flash_attention, return_lse=True, implementation=implementation, **arguments)
        (out, lse), vjp = jax.vjp(lambda qkv, named: call(*qkv, **named), (query, key, value), differentiated)
        return lse, jax.tree.leaves(jax.block_until_ready((out, vjp((out_grad, lse_grad)))))

    expected_lse, expected = results("reference")
    with interpreted():
        lse, actual = results("sm90")
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3, rtol=1e-4)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        size = float(jnp.sqrt(jnp.mean(jnp.square(other.astype(jnp.float32)))))  # compare's floor is of ones
        compare(one / size, other / size, one.dtype, tolerance=10 if one.ndim == 1 else 1)


CASES: dict[str, dict[str, Any]] = {
    "fused, scaled, heavy tails": SCALED | {"heavy": True, "config": fused_config(64, SMALL)},
    "lengths, grouped heads, causal": {**RAGGED, "t": 110, "n": 2, "is_causal": True, "poison": True},
    "far from one": {"factors": (1e-6, 1e6, 1e-6, 1e6), "n": 4, "k": 2},
    "wide, heavy tails": {"h": 256, "n": 2, "heavy": True, "config": fused_config(256, ONE_BUFFER)},
    "all at once": FEATURES["all at once"],
    "bias": {**bias_of(1, 1, 70, 100, dtype=jnp.float32), "batch": 2, "n": 2, "k": 2},
    "dropout": {"hv": 128, **DROPOUT},
}
INTERPRET = {
    f"flash_attention:float32 {name}": functools.partial(check, **case) for name, case in CASES.items()
}


def on_float32(case: CompileCase) -> CompileCase:
    """A row of 16 bits on float32; the copies of what is scaled take memory."""
    is_16_bits = lambda x: x.dtype in (jnp.bfloat16, jnp.float16)
    specs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32) if is_16_bits(x) else x, case.specs
    )
    return unbounded(case._replace(specs=specs))


PREFIX = "flash_attention:"
COMPILED = flash_compile_cases.COMPILE | flash_fused_cases.COMPILE
COMPILE = {
    f"{PREFIX}float32 {name}": on_float32(COMPILED[f"{PREFIX}{name}"])
    for name in (
        *(f"backward H={h} causal" for h in (64, 128, 256)),
        "backward H=128 full",
        "backward fused H=64 causal, grouped heads",
        "backward fused H=128 causal, grouped heads",
        "backward fused H=256 causal, grouped heads",
        "backward grouped heads",
        "backward, rows on two devices",
        "backward, heads on two devices",
        "backward H=64 bias",
        "backward H=128 dropout",
        "backward H=128 slopes",
        "backward H=128 segments",
        "backward H=128 block mask",
        "backward H=256 dropout",
        "backward H=256 block mask",
        "backward soft cap",
        "forward value dim",
    )
}
SPILLS = {"backward H=128 block mask": 0, "backward H=256 dropout": 44}  # others as with 16 bits
COMPILE |= {
    f"{PREFIX}float32 {name}": COMPILE[f"{PREFIX}float32 {name}"]._replace(max_spill_bytes=size)
    for name, size in SPILLS.items()
}
FAST = {
    "fused, scaled, heavy tails",
    "lengths, grouped heads, causal",
    "backward H=128 causal",
    "backward fused H=64 causal, grouped heads",
}
SLOW = {*INTERPRET, *COMPILE} - {f"{PREFIX}float32 {name}" for name in FAST}
