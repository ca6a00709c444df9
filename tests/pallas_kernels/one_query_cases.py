"""Rows of tables.py for flash_attention of one query a row, whose forward pass is the decode kernel."""

import functools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flash_attention
from pallas_kernels.paged_attention import decode_plan, decode_sm90
from tests.pallas_kernels.flash_cases import compare, poison_padding, random_inputs
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.tables import CompileCase

LAST = {"causal_alignment": "bottom_right"}


def check(is_mapped=False, is_differentiated=True, **options):
    """Outputs, log-sum-exp and gradients of the interpreted kernels against the reference; is_mapped: each
    batch row by itself, under vmap."""
    shape = {"batch": 2, "s": 256, "n": 4, "k": 2, "h": 64, "dtype": jnp.bfloat16}
    batch, s, n, k, h, dtype = (options.pop(name, default) for name, default in shape.items())
    shapes = [(batch, 1, n, h), (batch, s, k, h), (batch, s, k, h), (batch, 1, n, h)]
    *arrays, out_grad = random_inputs(shapes, dtype)
    arrays = poison_padding(*arrays, **options)
    lse_grad = jax.random.normal(jax.random.key(9), (batch, 1, n))
    lengths = {name: options.pop(name) for name in ("kv_lengths",) if name in options}

    def results(implementation):
        def call(arrays, lengths):
            return flash_attention(
                *arrays, **lengths, **options, return_lse=True, implementation=implementation
            )

        if is_mapped:
            one = lambda arrays, lengths: jax.tree.map(
                lambda x: x[0], call(*jax.tree.map(lambda x: x[None], (arrays, lengths)))
            )
            attend = lambda arrays: jax.vmap(one)(arrays, lengths)
        else:
            attend = lambda arrays: call(arrays, lengths)
        if not is_differentiated:
            return jax.block_until_ready(attend(arrays))
        (out, lse), vjp = jax.vjp(attend, arrays)
        (gradients,) = vjp((out_grad, lse_grad))
        return jax.block_until_ready((out, lse, *gradients))

    expected_out, expected_lse, *expected = results("reference")
    few_programs = mock.patch.object(decode_plan, "NUM_PROGRAMS", 4)
    watched = mock.patch.object(decode_sm90, "attend", wraps=decode_sm90.attend)
    with few_programs, watched as attended, interpreted():
        out, lse, *gradients = results("sm90")
    assert attended.called
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4, rtol=1e-4)
    for one, other in zip((out, *gradients), (expected_out, *expected), strict=True):
        compare(one, other, dtype)


CASES: dict[str, dict[str, Any]] = {
    "merged": {"s": 1032, "is_differentiated": False},
    "lengths": {"s": 264, "kv_lengths": jnp.array([0, 259]), "is_causal": True, **LAST},
    "window, soft cap, sinks": {
        **{"local_window_size": (100, 0), "logits_soft_cap": 2.0, "sinks": jnp.array([0.0, 1.0, -1.0, 3.0])},
        **{"kv_lengths": jnp.array([170, 256]), **LAST},
    },
    "slopes, mapped": {"is_mapped": True, "alibi_slopes": jnp.array([0.5, 0.1, 0.02, 0.01]), **LAST},
}
INTERPRET = {f"flash_attention:one query, {name}": functools.partial(check, **x) for name, x in CASES.items()}

SLOW = {
    f"flash_attention:one query, {name}" for name in ("merged", "window, soft cap, sinks")
}  # decode's own


def compile_case(batch=32, s=4096, n=32, k=8, h=128, **options) -> CompileCase:
    def array(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    call = functools.partial(flash_attention, return_lse=True, implementation="sm90", **options)
    specs = (array(batch, 1, n, h), array(batch, s, k, h), array(batch, s, k, h))
    return CompileCase(lambda *arrays: call(*arrays), specs, max_temp_bytes=2**20, keep_hlo=True)


COMPILE = {
    "flash_attention:one query": compile_case(),
    "flash_attention:one query, few keys": compile_case(s=256, n=16, k=16, h=64),
    "flash_attention:one query, merged": compile_case(batch=1, s=16384, is_causal=True, **LAST),
    **{
        f"flash_attention:one query, {name} on two devices": compile_case()._replace(
            num_devices=2, partition=partition
        )
        for name, partition in (("rows", ("devices",)), ("heads", (None, None, "devices")))
    },
}
