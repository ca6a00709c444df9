"""dot_product_attention refuses wrong arguments by name, the same whoever would compute it."""

import functools

import jax
import jax.numpy as jnp
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
    ({"bias": jnp.ones((T, S), jnp.int32)}, "bias"),
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
    ({"sinks": jnp.ones(N + 1)}, "sinks"),
    ({"alibi_slopes": jnp.ones((1, 1, N))}, "alibi_slopes"),
    ({"dropout_rate": 1.5, "dropout_key": jax.random.key(0)}, "dropout_rate"),
    ({"dropout_rate": -1.0}, "dropout_rate"),
    ({"dropout_rate": "x"}, "dropout_rate"),
    ({"dropout_rate": 0.5, "dropout_key": 0}, "dropout_key"),
]


@pytest.mark.parametrize("implementation", [*HERE, "cudnn", "sm90"])
@pytest.mark.parametrize(("options", "named"), WRONG)
def test_wrong_arguments_are_named(options, named, implementation):
    with pytest.raises(ValueError, match=rf"\b{named}"):
        dot_product_attention(*inputs(), **options, implementation=implementation)


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="implementation"):
        dot_product_attention(*inputs(), implementation="triton")


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
    }
    for message, operands in wrong.items():
        with pytest.raises(ValueError, match=message):
            call(*operands)
