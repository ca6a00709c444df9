"""The bound of the GPU tests: kept by what rounds as a kernel does, broken by what is a little wrong."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.flash_attention import reference
from tests.pallas_kernels.flash_random import assert_near_reference, attention, draw, random_arrays
from tests.pallas_kernels.tolerance import FLOOR, assert_close

SHAPE = {"batch": 1, "t": 200, "s": 200, "n": 4, "k": 2, "h": 64, "hv": 64, "dtype": jnp.bfloat16}
CALLS = {
    "causal": (SHAPE, {"is_causal": True, "sinks": jnp.arange(4.0)}),
    "tiny, dropout": draw(123),
}


@functools.cache
def prepared(name):
    """The reference, the arrays and cotangents of a call, and its results in 16 bits."""
    shape, arguments = CALLS[name]
    arrays, cotangents = random_arrays(shape, 0)
    call = attention("reference", arguments)
    return call, arrays, cotangents, call(arrays, cotangents)


def wrong_scale(shape, arguments, arrays, cotangents, results):
    """1.02 instead of 1."""
    return attention("reference", {**arguments, "scale": 1.02 * shape["h"] ** -0.5})(arrays, cotangents)


def lost_keys(shape, arguments, arrays, cotangents, results):
    """The last eighth of the keys, or the last key, is not seen."""
    lengths = jnp.full(shape["batch"], shape["s"] - max(1, shape["s"] // 8))
    return attention("reference", {**arguments, "kv_lengths": lengths})(arrays, cotangents)


def swapped_heads(shape, arguments, arrays, cotangents, results):
    return {**results, "query": results["query"][:, :, ::-1]}


# A scale is nothing to queries that see one key.
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("causal", wrong_scale),
        ("causal", lost_keys),
        ("causal", swapped_heads),
        ("tiny, dropout", lost_keys),
        ("tiny, dropout", swapped_heads),
    ],
)
def test_what_is_wrong_is_found(name, fault):
    call, arrays, cotangents, results = prepared(name)
    assert_near_reference(results, call, arrays, cotangents)
    wrong = fault(*CALLS[name], arrays, cotangents, results)
    with pytest.raises(AssertionError):
        # The log-sum-exp alone would show most of it.
        assert_near_reference({**wrong, "lse": results["lse"]}, call, arrays, cotangents)


@pytest.mark.parametrize("seed", [8, 123])
def test_weights_rounded_to_16_bits_are_near_enough(monkeypatch, seed):
    """As a kernel multiplies them. Of tiny calls, and of the gradient of a bias of one number."""
    shape, arguments = draw(seed)
    arrays, cotangents = random_arrays(shape, seed)
    exact = reference._einsum

    def rounded(subscripts, x, y):
        is_weights = subscripts.startswith("bkgts")
        return exact(subscripts, x.astype(shape["dtype"]).astype(jnp.float32) if is_weights else x, y)

    jax.clear_caches()  # what is traced is kept
    with monkeypatch.context() as patched:
        patched.setattr(reference, "_einsum", rounded)
        results = attention("reference", arguments)(arrays, cotangents)
    jax.clear_caches()
    assert_near_reference(results, attention("reference", arguments), arrays, cotangents)


def test_few_numbers_may_be_right_by_chance():
    assert_close("one", [1.07], [1.0], 0.01, lambda: 0.01)
    with pytest.raises(AssertionError, match="one: error"):
        assert_close("one", [1.09], [1.0], 0.01, lambda: 0.01)
    with pytest.raises(AssertionError, match="many"):
        assert_close("many", [1.07] * 10_000, [1.0] * 10_000, 0.01, lambda: 0.01)
    assert_close("nothing", [0.9 * FLOOR * 0.01], [0.0], 0.01)
