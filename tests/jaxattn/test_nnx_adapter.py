"""nnx_attention inside flax.nnx.MultiHeadAttention gives what nnx's own attention gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn import nnx_adapter, nnx_attention

FEATURES = 24


def layers(**options):
    """The same weights around either attention."""
    make = lambda fn: nnx.MultiHeadAttention(
        num_heads=4, in_features=FEATURES, attention_fn=fn, rngs=nnx.Rngs(0), **{"decode": False, **options}
    )
    return make(nnx.dot_product_attention), make(nnx_attention)


def x(*shape):
    return jax.random.normal(jax.random.key(1), (*shape, FEATURES))


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_any_number_of_batch_dimensions(shape, is_causal):
    theirs, ours = layers()
    expected = theirs(x(*shape), is_causal=is_causal)
    np.testing.assert_allclose(ours(x(*shape), is_causal=is_causal), expected, atol=2e-6)


@pytest.mark.parametrize("mask_shape", [(2, 1, 6, 6), (1, 4, 6, 6), (2, 4, 6, 6)])
def test_boolean_mask(mask_shape):
    theirs, ours = layers()
    mask = (jax.random.uniform(jax.random.key(2), mask_shape) > 0.4).at[..., 0].set(True)
    np.testing.assert_allclose(ours(x(2, 6), mask=mask), theirs(x(2, 6), mask=mask), atol=2e-6)


def test_float_mask_as_nnx_makes_it():
    theirs, ours = layers()
    mask = nnx.make_causal_mask(jnp.ones((2, 6)))
    np.testing.assert_allclose(ours(x(2, 6), mask=mask), theirs(x(2, 6), mask=mask), atol=2e-6)


def test_grouped_kv_heads_and_cross_attention():
    theirs, ours = layers(num_kv_heads=2, normalize_qk=True)
    expected = theirs(x(2, 6), x(2, 9))
    np.testing.assert_allclose(ours(x(2, 6), x(2, 9)), expected, atol=2e-6)


def test_decode_fills_the_cache_as_nnx_does():
    theirs, ours = layers(decode=True)
    for layer in (theirs, ours):
        layer.init_cache((2, 5, FEATURES))
    whole = layers()[1](x(2, 5), is_causal=True)
    for i in range(5):
        token = x(2, 5)[:, i : i + 1]
        step = ours(token)
        np.testing.assert_allclose(step, theirs(token), atol=2e-6)
        np.testing.assert_allclose(step[:, 0], whole[:, i], atol=2e-6)


def test_dtype_and_precision_are_honoured():
    theirs, ours = layers(dtype=jnp.bfloat16)
    assert ours(x(2, 6)).dtype == theirs(x(2, 6)).dtype == jnp.bfloat16
    np.testing.assert_allclose(
        ours(x(2, 6)).astype(jnp.float32), theirs(x(2, 6)).astype(jnp.float32), atol=0.03
    )
    theirs, ours = layers(precision=jax.lax.Precision.HIGHEST)
    np.testing.assert_allclose(ours(x(2, 6)), theirs(x(2, 6)), atol=2e-6)


def test_dropout_follows_deterministic_and_the_rngs():
    _, ours = layers(dropout_rate=0.5)
    calm = ours(x(2, 6), deterministic=True)
    np.testing.assert_allclose(calm, layers()[1](x(2, 6)), atol=2e-6)
    first = ours(x(2, 6), deterministic=False, rngs=nnx.Rngs(dropout=1))
    again = ours(x(2, 6), deterministic=False, rngs=nnx.Rngs(dropout=1))
    other = ours(x(2, 6), deterministic=False, rngs=nnx.Rngs(dropout=2))
    assert (first == again).all()
    assert (first != other).any()
    assert (first != calm).any()


def test_sown_weights_come_from_nnx():
    sown = []
    for layer in layers():
        _, intermediates = nnx.capture(layer, nnx.Intermediate)(x(2, 6), sow_weights=True)
        sown.append(intermediates["attention_weights"].get_value()[0])
    np.testing.assert_array_equal(*sown)


def test_gradients_flow_through_the_layer():
    theirs, ours = layers()
    loss = lambda layer: (layer(x(2, 6), is_causal=True) ** 2).sum()
    expected, actual = nnx.grad(loss)(theirs), nnx.grad(loss)(ours)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-4)


PRESETS = jax.lax.DotAlgorithmPreset


@pytest.mark.parametrize(
    ("precision", "implementation"),
    [
        (None, None),
        ("highest", "reference"),
        ((jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST), "reference"),
        (PRESETS.F32_F32_F32, "reference"),
        ("BF16_BF16_F32_X9", "reference"),
        (PRESETS.TF32_TF32_F32, None),
        (PRESETS.BF16_BF16_F32, None),
    ],
)
def test_who_computes_a_precision(precision, implementation, monkeypatch):
    asked = []

    def attend(query, key, value, *, implementation, **options):
        asked.append(implementation)
        return query

    monkeypatch.setattr(nnx_adapter, "dot_product_attention", attend)
    nnx_attention(*[jnp.ones((1, 2, 2, 8))] * 3, precision=precision)
    assert asked == [implementation]


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ([(2, 3, 0, 4, 8)] * 3, r"query must have the dimensions \[\*batch T N H\], each >= 1"),
        ([(2, 3, 5, 4, 8), (2, 3, 0, 4, 8), (2, 3, 0, 4, 8)], "key must have the dimensions"),
        ([(4, 8)] * 3, r"query must have .* got shape \(4, 8\)"),
        ([(8,)] * 3, "query must have"),
    ],
)
def test_wrong_operands_are_named(shapes, named):
    with pytest.raises(ValueError, match=named):
        nnx_attention(*map(jnp.ones, shapes))


def test_operands_as_lists_are_arrays():
    operands = [np.arange(48, dtype=np.float32).reshape(3, 2, 8) / 48] * 3
    expected = nnx_attention(*operands)
    np.testing.assert_array_equal(nnx_attention(*(x.tolist() for x in operands)), expected)
    with pytest.raises(ValueError, match="value must be an array, got 'v'"):
        nnx_attention(*operands[:2], "v")
