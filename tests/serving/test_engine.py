"""Continuous batching changes nothing: every request gets the tokens it would get alone."""

import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.attention import FlashAttention
from jaxattn.sampling import SamplingParams
from serving.engine import Engine
from serving.scheduler import Scheduler
from tests.serving.conftest import CONFIGS, EOS, MAX_MODEL_LEN, MAX_NUM_SEQS, NUM_PAGES, PAGE_SIZE
from tests.serving.oracle import check_invariants

GREEDY = {"temperature": 0.0}


def make_workload(num_requests, seed=0, **limits):
    """Prompts and parameters of many kinds: (request id, prompt, parameters)."""
    rng = random.Random(seed)
    workload = []
    for index in range(num_requests):
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 3, PAGE_SIZE, 17, 33, 50]))]
        kind = rng.choice(
            [
                GREEDY,
                {"temperature": 1.0, "seed": index},
                {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "seed": index},
                {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5},
                {"temperature": 1.2, "min_p": 0.05, "frequency_penalty": 0.3, "seed": index},
            ]
        )
        options = {**kind, "max_tokens": rng.choice([1, 2, 9, 24]), **limits}
        workload.append((f"request-{index}", prompt, SamplingParams(**options)))
    return workload


def run(engine, workload, *, arrivals=None):
    """Adds each request before step `arrivals[i]` and steps until all are finished; outputs by id."""
    arrivals = arrivals or [0] * len(workload)
    waiting = sorted(zip(arrivals, range(len(workload)), strict=True))
    outputs, num_steps = {}, 0
    while waiting or engine.has_unfinished():
        while waiting and waiting[0][0] <= num_steps:
            engine.add_request(*workload[waiting.pop(0)[1]])
        for output in engine.step():
            outputs[output.request_id] = output
        num_steps += 1
    return outputs


def tokens_of(outputs):
    return {request_id: output.outputs[0].token_ids for request_id, output in outputs.items()}


def assert_idle(engine):
    """The accounting identity: nobody is served, so every page is free, to the host and to the device."""
    assert not engine.has_unfinished()
    assert not engine.scheduler.running
    assert engine.scheduler.free_pages == engine.scheduler.num_pages
    assert engine.num_free_pages() == engine.state.pages.ref_count.size - 1
    check_invariants(engine.state.pages, PAGE_SIZE)


def greedy_without_pages(model, prompt, max_tokens):
    """The plain loop: the whole sequence through the model for every token."""

    @jax.jit
    def forward(tokens):
        hidden, _ = model(tokens[None], jnp.arange(MAX_MODEL_LEN)[None], FlashAttention())
        return model.logits(hidden[0])

    tokens = list(prompt)
    for _ in range(max_tokens):
        padded = np.array(tokens + [0] * (MAX_MODEL_LEN - len(tokens)), np.int32)
        tokens.append(int(forward(padded)[len(tokens) - 1].argmax()))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", CONFIGS)
def test_paged_generation_equals_the_plain_loop(make_engine, models, name):
    engine = make_engine(name)
    prompts = [[1, 2, 3], [200] * PAGE_SIZE, list(range(40))]
    workload = [(str(i), p, SamplingParams(**GREEDY, max_tokens=20)) for i, p in enumerate(prompts)]
    outputs = tokens_of(run(engine, workload))
    for request_id, prompt, params in workload:
        assert outputs[request_id] == greedy_without_pages(models[name], prompt, params.max_tokens)


def test_continuous_batching_equals_one_by_one(make_engine):
    """Greedy and seeded sampling, mixed lengths, requests that join and leave between steps."""
    workload = make_workload(24)
    alone = {}
    engine = make_engine()
    for request in workload:
        alone |= tokens_of(run(engine, [request]))
    rng = random.Random(1)
    arrivals = [rng.randrange(30) for _ in workload]
    engine = make_engine()
    together = run(engine, workload, arrivals=arrivals)
    assert tokens_of(together) == alone
    assert_idle(engine)
    steps_alone = sum(len(tokens) for tokens in alone.values())
    assert engine.metrics.num_decode_steps < steps_alone, "requests must share steps"


def test_a_pool_too_small_for_all_makes_requests_wait(make_engine):
    workload = make_workload(16, seed=2)
    expected = tokens_of(run(make_engine(), workload))
    engine = make_engine()
    engine.scheduler = Scheduler(
        num_rows=MAX_NUM_SEQS, num_pages=12, page_size=PAGE_SIZE, buckets=engine.buckets
    )
    running = []
    outputs = {}
    for request in workload:
        engine.add_request(*request)
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
        running.append(len(engine.scheduler.running))
    assert tokens_of(outputs) == expected
    assert engine.metrics.peak_pages <= 11, "the host's count must never fall short of the device's"
    assert max(running) < MAX_NUM_SEQS, "the pool was meant to be the limit"
    assert_idle(engine)


def test_same_seed_same_tokens_whatever_the_row_and_the_batch(make_engine):
    prompt = [10, 20, 30]
    request = ("seeded", prompt, SamplingParams(temperature=1.0, seed=7, max_tokens=12))
    alone = tokens_of(run(make_engine(), [request]))["seeded"]
    others = make_workload(3, seed=5)
    assert tokens_of(run(make_engine(), [*others, request]))["seeded"] == alone
    other_seed = ("other", prompt, SamplingParams(temperature=1.0, seed=8, max_tokens=12))
    assert tokens_of(run(make_engine(), [other_seed]))["other"] != alone


def test_unseeded_requests_follow_the_engines_seed(make_engine):
    workload = [(str(i), [1, 2], SamplingParams(max_tokens=10)) for i in range(3)]
    first = tokens_of(run(make_engine(seed=3), workload))
    assert tokens_of(run(make_engine(seed=3), workload)) == first
    assert tokens_of(run(make_engine(seed=4), workload)) != first
    assert len({tuple(tokens) for tokens in first.values()}) == 3


def test_n_samples_differ_and_the_first_is_the_single_one(make_engine):
    params = {"temperature": 1.0, "seed": 11, "max_tokens": 10}
    engine = make_engine()
    many = run(engine, [("many", [4, 5], SamplingParams(n=6, **params))])["many"]
    one = run(make_engine(), [("one", [4, 5], SamplingParams(**params))])["one"]
    assert [completion.index for completion in many.outputs] == list(range(6))
    assert many.outputs[0].token_ids == one.outputs[0].token_ids
    assert len({tuple(completion.token_ids) for completion in many.outputs}) > 1
    assert many.finished
    assert_idle(engine)


def test_nothing_compiles_after_warm_up(make_engine):
    engine = make_engine()
    engine.warm_up()
    assert_idle(engine)
    compilations = []

    def count(name, *_, **__):
        if name == "/jax/core/compile/backend_compile_duration":
            compilations.append(name)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        jax.jit(lambda x: x + 1)(3.0)
        assert len(compilations) == 1, "the counter must count"
        workload = make_workload(20, seed=3)
        workload.append(("logprobs", [1, 2], SamplingParams(logprobs=3, n=2, stop="x")))
        run(engine, workload, arrivals=[index % 9 for index in range(len(workload))])
        engine.add_request("aborted", [1], SamplingParams(max_tokens=30))
        engine.step()
        engine.abort("aborted")
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(compilations) == 1
    assert_idle(engine)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_abort_ends_one_request_and_disturbs_no_other(make_engine, num_steps):
    workload = make_workload(6, seed=4, max_tokens=20, ignore_eos=True)
    expected = tokens_of(run(make_engine(), workload))
    engine = make_engine()
    for request in workload:
        engine.add_request(*request)
    outputs = {}
    for _ in range(num_steps):
        outputs |= {output.request_id: output for output in engine.step()}
    for request_id in ("request-1", "request-5"):  # one runs, one may still wait
        aborted = engine.abort(request_id)
        assert aborted.finished
        assert aborted.outputs[0].finish_reason == "abort"
        tokens = aborted.outputs[0].token_ids
        assert tokens == expected.pop(request_id)[: len(tokens)]
    assert engine.abort("request-1") is None
    while engine.has_unfinished():
        outputs |= {output.request_id: output for output in engine.step()}
    assert tokens_of(outputs) == expected
    assert_idle(engine)


def test_the_host_reads_one_step_late(make_engine):
    engine = make_engine()
    engine.add_request("r", [1, 2], SamplingParams(**GREEDY, max_tokens=3), stream=True)
    lengths = []
    while engine.has_unfinished():
        outputs = engine.step()
        lengths.append([len(output.outputs[0].token_ids) for output in outputs])
    # The first call launches a prefill and a decode and reads nothing; the second launches the last decode
    # and reads two tokens.
    assert lengths == [[], [2], [3]]


def test_streaming_reports_every_token_and_the_same_text(make_engine):
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=24)
    whole = run(make_engine(), [("whole", [65], params)])["whole"].outputs[0]
    engine = make_engine()
    engine.add_request("streamed", [65], params, stream=True)
    texts = []
    while engine.has_unfinished():
        texts += [output.outputs[0].text for output in engine.step()]
    assert texts[-1] == whole.text
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert len(texts) > 5


def test_logprobs_come_only_where_asked_and_add_up(make_engine):
    asked = SamplingParams(temperature=1.0, seed=2, logprobs=3, max_tokens=6)
    workload = [("asked", [1, 2], asked), ("not", [1, 2], SamplingParams(**GREEDY, max_tokens=6))]
    outputs = run(make_engine(), workload)
    asked, silent = outputs["asked"].outputs[0], outputs["not"].outputs[0]
    assert silent.logprobs is None
    assert silent.cumulative_logprob is None
    assert len(asked.logprobs) == len(asked.token_ids)
    for token, entries in zip(asked.token_ids, asked.logprobs, strict=True):
        assert 3 <= len(entries) <= 4
        ranked = sorted((e for e in entries.values() if e.rank), key=lambda e: e.rank)
        assert [e.logprob for e in ranked] == sorted((e.logprob for e in ranked), reverse=True)
        assert entries[token].logprob <= ranked[0].logprob
    total = sum(entries[t].logprob for t, entries in zip(asked.token_ids, asked.logprobs, strict=True))
    assert asked.cumulative_logprob == pytest.approx(total)


def test_logprobs_do_not_change_the_tokens(make_engine):
    params = {"temperature": 1.0, "seed": 2, "max_tokens": 6}
    with_logprobs = run(make_engine(), [("r", [1, 2], SamplingParams(logprobs=0, **params))])
    assert tokens_of(with_logprobs) == tokens_of(
        run(make_engine(), [("r", [1, 2], SamplingParams(**params))])
    )


def test_a_request_that_can_never_fit_is_refused_with_the_numbers(make_engine):
    engine = make_engine(num_pages=5)
    with pytest.raises(
        ValueError, match=r"20 prompt tokens and up to 30 new ones need 7 pages of 8 .* has 4"
    ):
        engine.add_request("big", [1] * 20, SamplingParams(max_tokens=30))
    assert not engine.has_unfinished()


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "empty"),
        ([1] * MAX_MODEL_LEN, {}, "has 64 tokens; at most 63 are allowed"),
        ([1, 257], {}, "prompt_token_ids has 257; the model's ids are from 0 to 256"),
        ([1], {"stop_token_ids": [300]}, "stop_token_ids has 300"),
        ([1], {"logit_bias": {999: 1.0}}, "logit_bias has 999"),
    ],
)
def test_what_cannot_be_served_is_refused_when_added(make_engine, prompt, params, message):
    engine = make_engine()
    with pytest.raises(ValueError, match=message):
        engine.add_request("r", prompt, SamplingParams(**params))
    assert not engine.has_unfinished()


def test_an_id_in_use_is_refused(make_engine):
    engine = make_engine()
    engine.add_request("r", [1], SamplingParams())
    with pytest.raises(ValueError, match="request_id='r'"):
        engine.add_request("r", [1], SamplingParams())


def test_the_longest_sequence_fills_the_context_and_stops(make_engine):
    engine = make_engine()
    params = SamplingParams(**GREEDY, max_tokens=1000, ignore_eos=True)
    output = run(engine, [("r", [1] * 60, params), ("s", [2] * 63, params)])
    assert len(output["r"].outputs[0].token_ids) == 4
    assert len(output["s"].outputs[0].token_ids) == 1
    assert output["r"].outputs[0].finish_reason == "length"
    assert_idle(engine)


def test_an_error_in_one_request_spares_the_others(make_engine, monkeypatch, caplog):
    workload = make_workload(3, seed=6)
    expected = tokens_of(run(make_engine(), workload))
    engine = make_engine()
    engine.add_request("broken", [1, 2], SamplingParams(**GREEDY, max_tokens=8, stop="never"))
    (sequence,) = engine.scheduler.waiting

    def fail(token):
        raise UnicodeError("cannot decode")

    monkeypatch.setattr(sequence, "append", fail)
    outputs = run(engine, workload)
    broken = outputs.pop("broken", None)
    assert broken.outputs[0].finish_reason == "error"
    assert "cannot decode" in caplog.text
    assert tokens_of(outputs) == expected
    assert_idle(engine)


def test_metrics_count_what_happened(make_engine):
    engine = make_engine()
    params = SamplingParams(**GREEDY, max_tokens=10, ignore_eos=True)
    output = run(engine, [("a", [1] * 5, params), ("b", [2] * 20, params)])["a"]
    metrics = engine.metrics
    assert (metrics.num_finished, metrics.num_prompt_tokens, metrics.num_output_tokens) == (2, 25, 20)
    assert (metrics.num_prefills, metrics.num_decode_steps) == (2, 9)  # 1 prefill a row bucket
    assert metrics.peak_pages == 2 + 4  # 14 and 29 tokens are written
    assert metrics.num_pages == NUM_PAGES - 1
    assert 0 < metrics.waste_percent < 50
    assert metrics.output_tokens_per_second > 0
    times = output.metrics
    assert times.arrival_time <= times.first_scheduled_time <= times.first_token_time <= times.finished_time
    assert "20 output tokens" in metrics.summary()
    metrics.reset()
    assert metrics.num_finished == 0


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"max_model_len": 129}, "max_model_len"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
        ({"num_pages": 1}, "num_pages"),
        ({"page_size": 12}, "page_size"),
    ],
)
def test_impossible_sizes_are_refused(make_engine, options, name):
    with pytest.raises(ValueError, match=name):
        make_engine(**options)


def test_an_engine_needs_no_tokenizer(models):
    engine = Engine(
        models["llama"],
        num_pages=NUM_PAGES,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=MAX_MODEL_LEN,
        page_size=PAGE_SIZE,
    )
    output = run(engine, [("r", [1, 2], SamplingParams(**GREEDY, max_tokens=4))])["r"]
    assert output.outputs[0].text == ""
    assert len(output.outputs[0].token_ids) == 4
    with pytest.raises(ValueError, match="stop="):
        engine.add_request("s", [1], SamplingParams(stop="x"))
