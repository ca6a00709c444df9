"""Where the caller knows what its rows need, `sample` gives the same tokens without a choice at run time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.sampling import KINDS, SamplingParams, init_token_counts, kind_of, row_of, sample

V, NUM_ROWS = 50, 6


def make_arguments(**params):
    rows = [row_of(SamplingParams(**params), seed=seed) for seed in range(NUM_ROWS)]
    arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *rows)
    logits = jax.random.normal(jax.random.key(0), (NUM_ROWS, V)) * 3
    zeros = jnp.zeros(NUM_ROWS, jnp.int32)
    return logits, arrays, init_token_counts(NUM_ROWS, V), zeros, zeros


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ({"temperature": 0.0}, "greedy"),
        ({"temperature": 0.0, "top_k": 3, "stop_token_ids": [1], "seed": 3, "n": 2}, "greedy"),
        ({}, "drawn"),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.1}, "drawn"),
        ({"temperature": 0.0, "min_tokens": 2}, "any"),
        ({"temperature": 0.0, "logprobs": 0}, "any"),
        ({"logit_bias": {1: 2.0}}, "any"),
        ({"repetition_penalty": 1.1}, "any"),
        ({"presence_penalty": 0.1}, "any"),
        ({"frequency_penalty": 0.1}, "any"),
    ],
)
def test_a_request_is_of_the_first_kind_that_serves_it(params, kind):
    assert kind_of(SamplingParams(**params)) == kind


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 9, "top_p": 0.7}]
)
def test_every_kind_that_serves_a_request_gives_the_same_tokens(params):
    arguments = make_arguments(**params)
    kinds = KINDS[KINDS.index(kind_of(SamplingParams(**params))) :]
    tokens = [sample(*arguments, kind=kind, max_logprobs=2).tokens for kind in kinds]
    for other in tokens[1:]:
        np.testing.assert_array_equal(tokens[0], other)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_kind_any_chooses_at_run_time(kind):
    text = str(jax.make_jaxpr(lambda *args: sample(*args, kind=kind, max_logprobs=2))(*make_arguments()))
    assert (" cond[" in text) == (kind == "any")


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='some'"):
        sample(*make_arguments(), kind="some")
