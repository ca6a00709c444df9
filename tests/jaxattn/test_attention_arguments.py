"""dot_product_attention refuses wrong arguments by name, the same whoever would compute it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import dot_product_attention
from tests.jaxattn.test_attention import HERE, B, K, N, S, T, inputs

IDS = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
WRONG = [
    ({"causal_alignment": "left"}, "causal_alignment"),
    ({"local_window_size": -1}, "local_window_size"),
    ({"mask": jnp.ones((1, 1, T, S))}, "mask"),
    ({"mask": jnp.ones((1, 3, T, S), bool)}, "mask"),
    ({"bias": jnp.ones((1, 1, T, S + 1))}, "bias"),
    ({"bias": jnp.ones((1, 3, T, S))}, "bias"),
    ({"bias": jnp.ones((1, 1, 1, T, S))}, "bias"),
    ({"bias": jnp.ones((T, S), jnp.complex64)}, "bias"),
    ({"bias": object()}, "bias must be an array"),
    ({"mask": {}}, "mask must be an array"),
    ({"sinks": "x"}, "sinks must be an array"),
    ({"alibi_slopes": [None] * N}, "alibi_slopes must be an array"),
    ({"bias": jnp.ones((T, S), bool)}, "bias"),
    ({"scale": "x"}, "scale"),
    ({"scale": float("nan")}, "scale"),
    ({"scale": jnp.ones(2)}, "scale"),
    ({"scale": jnp.array(1j)}, "scale"),
    ({"logits_soft_cap": 0.0}, "logits_soft_cap"),
    ({"logits_soft_cap": "a"}, "logits_soft_cap"),
    ({"query_segment_ids": IDS[0]}, "query_segment_ids"),
    ({"query_segment_ids": IDS[0], "key_value_segment_ids": IDS[0]}, "key_value_segment_ids"),
    (
        {"query_segment_ids": IDS[0].astype(float), "key_value_segment_ids": IDS[1]},
        "query_segment_ids",
    ),
    ({"query_seq_lengths": jnp.ones(B)}, "query_seq_lengths"),
    ({"key_value_seq_lengths": jnp.ones(B + 1, jnp.int32)}, "key_value_seq_lengths"),
    ({"key_value_seq_lengths": 5}, r"key_value_seq_lengths must have shape \[B\] = \[2\], got \(\)"),
    ({"query_seq_lengths": "x"}, "query_seq_lengths"),
    ({"query_seq_lengths": [[1], [1, 2]]}, "query_seq_lengths must be an array"),
    (
        {"query_segment_ids": np.full((B, T), 2**32 + 1), "key_value_segment_ids": IDS[1]},
        r"query_segment_ids must lie in -2147483648\.\.2147483647 \(int32\), got 4294967297",
    ),
    (
        {"query_segment_ids": IDS[0], "key_value_segment_ids": [[-(2**31) - 1] * S] * B},
        "key_value_segment_ids must lie in .* got -2147483649",
    ),
    ({"sinks": jnp.ones(N + 1)}, "sinks"),
    ({"alibi_slopes": jnp.ones((1, 1, N))}, "alibi_slopes"),
    ({"dropout_rate": 1.5, "dropout_key": jax.random.key(0)}, "dropout_rate"),
    ({"dropout_rate": -1.0}, "dropout_rate"),
    ({"dropout_rate": "x"}, "dropout_rate"),
    ({"dropout_rate": 0.5, "dropout_key": 0}, "dropout_key"),
    ({"dropout_rate": 0.5, "dropout_key": jnp.zeros(3, jnp.uint32)}, r"dropout_key must be one key.*\[3\]"),
    ({"dropout_rate": 0.5, "dropout_key": jnp.zeros(4, jnp.uint32)}, r"dropout_key must be one key.*\[4\]"),
    ({"is_causal": "no"}, "is_causal must be a bool"),
    ({"is_causal": jnp.array(True)}, "is_causal must be a bool"),
    ({"deterministic": None}, "deterministic must be a bool"),
    ({"return_residual": 1}, "return_residual must be a bool"),
]


@pytest.mark.parametrize("implementation", [*HERE, "cudnn", "sm90"])
@pytest.mark.parametrize(("options", "named"), WRONG)
def test_wrong_arguments_are_named(options, named, implementation):
    with pytest.raises(ValueError, match=rf"\b{named}"):
        dot_product_attention(*inputs(), **options, implementation=implementation)


@pytest.mark.parametrize("name", ["triton", [], {}])
def test_an_unknown_implementation_is_named(name):
    with pytest.raises(ValueError, match="implementation must be one of"):
        dot_product_attention(*inputs(), implementation=name)


@pytest.mark.parametrize("name", ["is_causal", "deterministic", "return_residual"])
def test_a_traced_bool_is_named(name):
    call = jax.jit(lambda flag: dot_product_attention(*inputs(), **{name: flag}))
    with pytest.raises(ValueError, match=f"{name} must be a bool, known when it is traced"):
        call(True)
    assert dot_product_attention(*inputs(), **{name: np.bool_(False)}).shape == (B, T, N, 16)


@pytest.mark.parametrize("implementation", HERE)
def test_wrong_operands_are_named(implementation):
    q, k, v = inputs()
    call = functools.partial(dot_product_attention, implementation=implementation)
    wrong = {
        "heads": (q[:, :, :3], k, v),
        "value must have shape": (q, k, v[:, :-1]),
        r"query must have the dimensions \[B T N H\] or \[T N H\]": (q[0, 0], k, v),
        r"query must have the dimensions .*, got shape \(1, 2": (q[None], k, v),
        "query must have one of the dtypes": [x.astype(jnp.int32) for x in (q, k, v)],
        "key must have one of the dtypes": (q.astype(jnp.bfloat16), k, v),
        "the head dim of query": inputs((1, T, S, N, K, 300)),
        "query must be an array, got None": (None, k, v),
        "key must be an array, got 'q'": (q, "q", v),
        "value must be an array, got {}": (q, k, {}),
    }
    for message, operands in wrong.items():
        with pytest.raises(ValueError, match=message):
            call(*operands)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("implementation", HERE)
def test_what_jax_nn_takes_too(implementation, x64):
    call = functools.partial(dot_product_attention, *inputs(), implementation=implementation)
    bias = np.arange(T * S).reshape(T, S) % 3
    with jax.enable_x64(x64):
        expected = jax.nn.dot_product_attention(*inputs(), bias)
        for given in (bias, bias.astype(np.float64), bias.tolist(), jnp.asarray(bias, jnp.int8)):
            np.testing.assert_allclose(call(given), expected, atol=2e-6)
        gradient = jax.grad(lambda bias: jnp.sin(call(bias)).sum())(jnp.asarray(bias * 1.0))
        assert gradient.dtype == (jnp.float64 if x64 else jnp.float32)
        windowed = call(local_window_size=[1, 1])
    np.testing.assert_array_equal(windowed, call(local_window_size=(1, 1)))


@pytest.mark.parametrize("x64", [False, True])
def test_terms_of_the_logits_as_lists_and_numpy(x64):
    call = functools.partial(dot_product_attention, *inputs())
    slopes = [0.5, 0.25, 0.125, 0.0]
    expected = call(sinks=jnp.array(slopes), alibi_slopes=jnp.array(slopes))
    with jax.enable_x64(x64):
        for given in (slopes, np.array(slopes), np.array([slopes] * B)):
            actual = call(sinks=np.ravel(given)[:N], alibi_slopes=given)
            np.testing.assert_allclose(actual, expected, atol=2e-6)
