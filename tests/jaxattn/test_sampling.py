"""Every sampling parameter against a NumPy oracle, distributions with fixed seeds, rows that do not meet."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.sampling import (
    MAX_LOGIT_BIAS,
    SamplingArrays,
    SamplingParams,
    TokenCounts,
    add_outputs,
    idle_rows,
    init_token_counts,
    row_of,
    sample,
    set_prompts,
    set_rows,
)

V = 37
EOS = 5
DRAWS = 4000
LOGITS = np.asarray(jax.random.normal(jax.random.key(0), (V,)) * 2.0)
BEST = np.argsort(-LOGITS).tolist()  # penalties act on likely tokens, so that their effect shows
PROMPT, OUTPUT = [BEST[0], BEST[9], BEST[9], BEST[3]], [BEST[3], *[BEST[1]] * 3, BEST[20]]
NUM_OUTPUTS = len(OUTPUT)


def oracle(logits, params, num_outputs=NUM_OUTPUTS):
    """The probabilities of the next token, parameter by parameter, with sorts: vLLM's definition."""
    logits = logits.astype(np.float64).copy()
    if num_outputs < params.min_tokens:
        logits[[*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]] = -np.inf
    for token, bias in params.logit_bias.items():
        logits[token] += np.clip(bias, -100, 100)
    for token in set(PROMPT) | set(OUTPUT):
        positive = logits[token] > 0
        logits[token] *= 1 / params.repetition_penalty if positive else params.repetition_penalty
    for token in set(OUTPUT):
        logits[token] -= params.frequency_penalty * OUTPUT.count(token) + params.presence_penalty
    if params.temperature == 0:
        return np.eye(V)[np.argmax(logits)]
    p = np.exp((logits - logits.max()) / params.temperature)
    p[p < params.min_p * p.max()] = 0
    if 0 < params.top_k < V:
        p[p < np.sort(p)[-params.top_k]] = 0
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.top_p * p.sum()]] = 0
    return p / p.sum()


def arrays_of(params, seeds):
    rows = [row_of(params, seed=seed, eos_token_ids=[EOS]) for seed in seeds]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows)


def counts_of(num_rows):
    counts = init_token_counts(num_rows, V)
    rows = jnp.arange(num_rows)
    counts = set_prompts(
        counts, rows, jnp.tile(jnp.asarray([*PROMPT, 0, 0]), (num_rows, 1)), jnp.full(num_rows, 4)
    )
    for token in OUTPUT:
        counts = add_outputs(counts, jnp.full(num_rows, token), jnp.ones(num_rows, bool))
    return counts


def draw(params, num_rows=DRAWS, logits=LOGITS, position=7, num_outputs=NUM_OUTPUTS):
    return np.asarray(
        sample(
            jnp.tile(logits, (num_rows, 1)),
            arrays_of(params, range(num_rows)),
            counts_of(num_rows),
            jnp.full(num_rows, position),
            jnp.full(num_rows, num_outputs),
        ).tokens
    )


EFFECTS = {
    "plain": {},
    "temperature": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_p": {"top_p": 0.6},
    "top_p_one_token": {"top_p": 0.01},
    "top_k": {"top_k": 3},
    "top_k_all": {"top_k": 10 * V, "temperature": 0.7},
    "min_p": {"min_p": 0.2},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "repetition_reward": {"repetition_penalty": 0.6},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": 0.9},
    "frequency_reward": {"frequency_penalty": -0.7},
    "logit_bias": {"logit_bias": {0: 3.0, 36: 2.0, 7: -100.0}},
    "min_tokens": {"min_tokens": 6, "stop_token_ids": [int(np.argmax(LOGITS))], "max_tokens": 9},
    "min_tokens_ignoring_eos": {"min_tokens": 6, "ignore_eos": True, "max_tokens": 9},
    "all": {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 12,
        "min_p": 0.03,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {1: 2.0},
        "min_tokens": 6,
    },
}


@pytest.mark.parametrize("name", EFFECTS)
def test_distribution_is_the_oracles(name):
    params = SamplingParams(**EFFECTS[name])
    expected = oracle(LOGITS, params)
    tokens = draw(params)
    observed = np.bincount(tokens, minlength=V) / DRAWS
    assert set(tokens) <= set(np.flatnonzero(expected))
    # five standard deviations of a binomial; the seeds are fixed, so this passes or fails for good
    deviation = 5 * np.sqrt(expected * (1 - expected) / DRAWS) + 1e-9
    np.testing.assert_array_less(np.abs(observed - expected), deviation + 1 / DRAWS)
    if name not in ("plain", "min_tokens_ignoring_eos", "top_k_all"):
        assert np.abs(expected - oracle(LOGITS, SamplingParams())).sum() > 0.05, "no effect to test"


@pytest.mark.parametrize("name", [n for n in EFFECTS if "penalty" in n or "bias" in n or "min_tokens" in n])
def test_greedy_rows_obey_what_changes_logits(name):
    params = SamplingParams(**{**EFFECTS[name], "temperature": 0.0})
    assert draw(params, num_rows=1)[0] == np.argmax(oracle(LOGITS, params))


def test_min_tokens_ends():
    stop = int(np.argmax(LOGITS))
    params = SamplingParams(temperature=0.0, min_tokens=6, stop_token_ids=[stop])
    assert draw(params, 1, num_outputs=5)[0] != stop
    assert draw(params, 1, num_outputs=6)[0] == stop


def test_a_large_vocabulary_in_uneven_blocks():
    """The two-level draw: every token of a flat distribution can come, none outside."""
    size = 1009
    arrays = arrays_of(SamplingParams(), range(20_000))
    logits = jnp.where(jnp.arange(size) % 3 == 0, 0.0, -jnp.inf)
    zeros = jnp.zeros(20_000, jnp.int32)
    tokens = np.asarray(sample(jnp.tile(logits, (20_000, 1)), arrays, None, zeros, zeros).tokens)
    observed = np.bincount(tokens, minlength=size)
    assert set(np.flatnonzero(observed)) == set(range(0, size, 3))
    expected = 20_000 / 337
    assert np.abs(observed[::3] - expected).max() < 5 * np.sqrt(expected)


# --- rows -------------------------------------------------------------------------------------------------


def mixed_rows():
    every = [SamplingParams(**options) for options in EFFECTS.values()]
    rows = [row_of(params, seed=i, eos_token_ids=[EOS]) for i, params in enumerate(every)]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *rows)


def test_a_row_depends_on_nothing_but_itself():
    arrays = mixed_rows()
    num_rows = len(EFFECTS)
    logits = jax.random.normal(jax.random.key(1), (num_rows, V)) * 2
    positions, num_outputs = jnp.arange(num_rows) + 3, jnp.full(num_rows, 5)
    together = sample(logits, arrays, counts_of(num_rows), positions, num_outputs)
    shuffled = jnp.asarray(np.random.default_rng(0).permutation(num_rows))
    take = lambda tree: jax.tree.map(lambda x: x[shuffled], tree)
    again = sample(take(logits), take(arrays), counts_of(num_rows), take(positions), take(num_outputs))
    np.testing.assert_array_equal(again.tokens, together.tokens[shuffled])
    for row in range(num_rows):
        pick = lambda tree, row=row: jax.tree.map(lambda x: x[row : row + 1], tree)
        alone = sample(pick(logits), pick(arrays), counts_of(1), pick(positions), pick(num_outputs))
        assert alone.tokens[0] == together.tokens[row]


@pytest.mark.parametrize("change", ["seed", "sample_index", "position"])
def test_random_numbers_follow_seed_sample_and_position(change):
    num_rows = 64
    flat = jnp.zeros((num_rows, V))
    arrays = jax.tree.map(lambda x: jnp.asarray(np.stack([x] * num_rows)), row_of(SamplingParams(), seed=3))
    positions = jnp.full(num_rows, 9)
    same = sample(flat, arrays, None, positions, positions).tokens
    assert len(set(same.tolist())) == 1
    varied = jnp.arange(num_rows)
    if change == "position":
        positions = varied
    else:
        arrays = arrays._replace(**{change: varied.astype(getattr(arrays, change).dtype)})
    assert len(set(sample(flat, arrays, None, positions, positions).tokens.tolist())) > V / 2


def test_counts_of_one_row_do_not_touch_others():
    counts = set_prompts(
        init_token_counts(3, V),
        jnp.array([2, 3, -1]),
        jnp.array([[1, 4], [7, 7], [8, 8]]),
        jnp.array([1, 2, 2]),
    )
    assert np.argwhere(counts.in_prompt).tolist() == [[2, 1]]  # beyond the length and out of range: dropped
    counts = add_outputs(counts, jnp.array([5, 6, 6]), jnp.array([True, False, True]))
    counts = add_outputs(counts, jnp.array([5, 6, 6]), jnp.array([True, False, False]))
    assert {tuple(at): int(counts.outputs[tuple(at)]) for at in np.argwhere(counts.outputs).tolist()} == {
        (0, 5): 2,
        (2, 6): 1,
    }
    fresh = set_prompts(counts, jnp.array([0]), jnp.array([[2]]), jnp.array([1]))
    assert not fresh.outputs[0].any()
    assert fresh.outputs[2, 6] == 1


def test_set_rows_and_idle_rows():
    arrays = idle_rows(4)
    new = arrays_of(SamplingParams(top_k=7, seed=1), [1, 2])
    arrays = set_rows(arrays, jnp.array([2, 4]), new)  # 4 is no row: dropped
    assert arrays.top_k.tolist() == [0, 0, 7, 0]
    assert arrays.temperature.tolist() == [0.0, 0.0, 1.0, 0.0]
    assert arrays.seed.tolist() == [0, 0, 1, 0]


# --- log-probabilities and cost -----------------------------------------------------------------------------


def test_logprobs_are_the_models_own():
    params = SamplingParams(logprobs=3, temperature=0.3, logit_bias={2: 50.0})
    out = sample(
        jnp.tile(LOGITS, (2, 1)), arrays_of(params, [0, 1]), None, jnp.zeros(2), jnp.zeros(2), max_logprobs=4
    )
    expected = LOGITS - np.log(np.exp(LOGITS).sum())
    assert out.tokens.tolist() == [2, 2]
    np.testing.assert_allclose(out.logprobs, expected[[2, 2]], atol=1e-5)
    best = np.argsort(-LOGITS)[:4]
    assert out.top_tokens[0].tolist() == best.tolist()
    np.testing.assert_allclose(out.top_logprobs[1], expected[best], atol=1e-5)


def test_greedy_rows_do_not_pay_for_sampling():
    """Random numbers, exponentials and scatters are in branches that all-greedy batches do not enter."""
    shapes = (jnp.zeros((2, V)), idle_rows(2), init_token_counts(2, V), jnp.zeros(2, jnp.int32))
    jaxpr = jax.make_jaxpr(lambda *args: sample(*args, args[-1], max_logprobs=5).tokens)(*shapes).jaxpr
    outside, inside = set(), set()

    def collect(jaxpr, names):
        for equation in jaxpr.eqns:
            names.add(equation.primitive.name)
            in_branch = inside if equation.primitive.name == "cond" else names
            for sub in subjaxprs(equation):
                collect(sub, in_branch)

    collect(jaxpr, outside)
    costly = {
        "exp",
        "random_bits",
        "random_fold_in",
        "scatter",
        "scatter-add",
        "sort",
        "top_k",
        "scan",
        "cumsum",
    }
    assert "cond" in outside
    assert not outside & costly
    assert inside & costly >= {"exp", "scatter", "scan", "cumsum"}
    assert "sort" not in outside | inside


def subjaxprs(equation):
    for value in equation.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            inner = getattr(item, "jaxpr", item)
            if hasattr(inner, "eqns"):
                yield inner


def test_compiles_once_for_all_parameters():
    num_rows = 3
    args = lambda params: (
        jnp.tile(LOGITS, (num_rows, 1)),
        arrays_of(params, range(3)),
        counts_of(3),
        jnp.zeros(3, jnp.int32),
        jnp.zeros(3, jnp.int32),
    )
    sample(*args(SamplingParams()))
    before = sample._cache_size()
    for options in EFFECTS.values():
        sample(*args(SamplingParams(**options)))
    assert sample._cache_size() == before


# --- SamplingParams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"n": 0},
        {"n": 1.0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"top_k": 2.5},
        {"min_p": 1.5},
        {"seed": -1},
        {"seed": 2**32},
        {"repetition_penalty": 0.0},
        {"presence_penalty": 2.5},
        {"frequency_penalty": -3},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {1: float("inf")}},
        {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)},
        {"stop": ["a", ""]},
        {"stop_token_ids": [1.5]},
        {"stop_token_ids": list(range(100))},
        {"ignore_eos": 1},
        {"max_tokens": 0},
        {"min_tokens": -1},
        {"min_tokens": 17},  # more than max_tokens
        {"logprobs": 21},
        {"logprobs": True},
    ],
    ids=str,
)
def test_out_of_range_is_named(options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"^{name}="):
        SamplingParams(**options)


def test_unknown_names_are_refused():
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)
    with pytest.raises(ValueError, match="best_of"):
        SamplingParams.from_dict({"best_of": 2})
    assert SamplingParams.from_dict({"logit_bias": {"3": 1.5}}).logit_bias == {3: 1.5}


def test_every_field_reaches_the_device_or_the_host():
    """A field that neither `row_of` nor the engine's host part knows would be accepted and ignored."""
    host = {"n", "stop", "max_tokens", "ignore_eos", "logprobs"}
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    arrays = re.sub(r"num_logprobs|sample_index", "", " ".join(SamplingArrays._fields))
    reached = {name for name in names if name in arrays or name in ("logit_bias", "stop_token_ids")}
    assert names == host | reached
    assert TokenCounts._fields == ("in_prompt", "outputs")
