"""The compiled steps: the pool is never copied, free pages may hold anything, a full pool harms nobody."""

import json
import os
import re
import subprocess
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.models import create_model
from jaxattn.sampling import NO_TOKEN, SamplingParams, row_of
from pallas_kernels import NULL_PAGE
from serving import pages, step
from serving.pages import NO_ROW
from serving.step import PrefillBatch, init_engine_state, make_steps
from tests.pallas_kernels.test_tiers import HOPPER_PYTHON, ROOT
from tests.serving.conftest import CONFIGS, MAX_MODEL_LEN, MAX_NUM_SEQS, NUM_PAGES, PAGE_SIZE
from tests.serving.oracle import check_invariants

NUM_ROWS = MAX_NUM_SEQS


def greedy_steps(model):
    """The steps of a model, for greedy rows: in this file no other kind of sampling is asked for."""
    steps = make_steps(model)
    return SimpleNamespace(
        params=steps.params,
        prefill=partial(steps.prefill, kind="greedy"),
        decode=partial(steps.decode, kind="greedy"),
        release=steps.release,
    )


def make_state(name):
    return init_engine_state(
        CONFIGS[name],
        num_rows=NUM_ROWS,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        pages_per_row=MAX_MODEL_LEN // PAGE_SIZE,
        dtype=jnp.float32,
    )


def make_batch(prompts, rows, max_outputs=100, length=32, **params):
    """Four prompts or fewer, padded; greedy unless told."""
    row = row_of(SamplingParams(**{"temperature": 0.0, **params}), seed=0)
    batch = PrefillBatch(
        rows=np.full(NUM_ROWS, NO_ROW, np.int32),
        tokens=np.full((NUM_ROWS, length), 7, np.int32),
        lengths=np.zeros(NUM_ROWS, np.int32),
        max_outputs=np.full(NUM_ROWS, max_outputs, np.int32),
        sampling=jax.tree.map(lambda leaf: np.stack([leaf] * NUM_ROWS), row),
    )
    for index, (prompt, target) in enumerate(zip(prompts, rows, strict=True)):
        batch.rows[index] = target
        batch.tokens[index, : len(prompt)] = prompt
        batch.lengths[index] = len(prompt)
    return batch


def test_the_allocator_and_the_kernels_mean_the_same_null_page():
    assert pages.NULL_PAGE == NULL_PAGE


@pytest.mark.parametrize(
    ("name", "which"), [("llama", "prefill"), ("llama", "decode"), ("llama", "release"), ("gpt2", "decode")]
)
def test_no_step_copies_the_pool(models, name, which):
    steps = make_steps(models[name])
    state = make_state(name)
    lowered = {
        "prefill": lambda: steps.prefill.lower(steps.params, state, make_batch([], []), kind="any"),
        "decode": lambda: steps.decode.lower(steps.params, state, num_rows=NUM_ROWS, kind="any"),
        "release": lambda: steps.release.lower(state, np.zeros(NUM_ROWS, np.bool_)),
    }
    compiled = lowered[which]().compile()
    memory = compiled.memory_analysis()
    pool_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.pool))
    shape = ",".join(map(str, state.pool.k_pages.shape))
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / CONFIGS[name].num_layers
    assert not re.search(rf"f32\[{shape}\]\S* copy\(", compiled.as_text())


def test_donated_state_is_updated_in_place(models):
    steps = greedy_steps(models["llama"])
    state, _ = steps.prefill(steps.params, make_state("llama"), make_batch([[1, 2, 3]], [0]))
    before = state.pool.k_pages
    address = before.unsafe_buffer_pointer()
    state, _ = steps.decode(steps.params, state, num_rows=NUM_ROWS)
    assert before.is_deleted()
    assert state.pool.k_pages.unsafe_buffer_pointer() == address


@pytest.mark.parametrize("name", CONFIGS)
def test_what_free_pages_hold_never_reaches_a_token(models, name):
    steps = greedy_steps(models[name])

    def run(state):
        state, output = steps.prefill(steps.params, state, make_batch([[1, 2, 3], [4] * 9], [0, 2]))
        tokens = [output.sampled.tokens[:2]]
        for _ in range(8):
            state, output = steps.decode(steps.params, state, num_rows=NUM_ROWS)
            tokens.append(output.sampled.tokens[jnp.array([0, 2])])
        return np.array(tokens)

    poisoned = make_state(name)
    poisoned = poisoned._replace(pool=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), poisoned.pool))
    np.testing.assert_array_equal(run(poisoned), run(make_state(name)))


def test_idle_rows_bring_no_token_and_own_no_page(models):
    steps = greedy_steps(models["llama"])
    state, output = steps.prefill(steps.params, make_state("llama"), make_batch([[5, 6]], [3]))
    assert (np.asarray(output.sampled.tokens)[1:] == NO_TOKEN).all()
    np.testing.assert_array_equal(output.page_usage, [1, 2])
    state, output = steps.decode(steps.params, state, num_rows=NUM_ROWS)
    assert (np.asarray(output.sampled.tokens)[:3] == NO_TOKEN).all()
    assert output.sampled.tokens[3] != NO_TOKEN
    np.testing.assert_array_equal(state.pages.lengths, [0, 0, 0, 3])
    check_invariants(state.pages, PAGE_SIZE)


def test_a_row_stops_by_itself_at_its_last_token(models):
    steps = greedy_steps(models["llama"])
    state, output = steps.prefill(steps.params, make_state("llama"), make_batch([[5, 6]], [0], max_outputs=3))
    tokens = []
    for _ in range(4):
        state, output = steps.decode(steps.params, state, num_rows=NUM_ROWS)
        tokens.append(int(output.sampled.tokens[0]))
    assert NO_TOKEN not in tokens[:2]
    assert tokens[2:] == [NO_TOKEN, NO_TOKEN]
    assert state.pages.lengths[0] == 4  # two of the prompt, two of the three sampled


def test_a_row_stops_by_itself_at_a_stop_token(models):
    steps = greedy_steps(models["llama"])
    _, output = steps.prefill(steps.params, make_state("llama"), make_batch([[5, 6]], [0]))
    first = int(output.sampled.tokens[0])
    batch = make_batch([[5, 6], [5, 6]], [0, 1], stop_token_ids=[first])
    state, _ = steps.prefill(steps.params, make_state("llama"), batch)
    assert not state.active.any()


def test_without_a_free_page_nothing_changes(models):
    steps = greedy_steps(models["llama"])
    state, _ = steps.prefill(steps.params, make_state("llama"), make_batch([[1] * 8, [2] * 16], [0, 1]))
    state = state._replace(pages=state.pages._replace(free_top=jnp.zeros_like(state.pages.free_top)))
    lengths, tables = np.asarray(state.pages.lengths), np.asarray(state.pages.block_tables)
    state, output = steps.decode(steps.params, state, num_rows=NUM_ROWS)
    assert (np.asarray(output.sampled.tokens) == NO_TOKEN).all()
    np.testing.assert_array_equal(state.pages.lengths, lengths)
    np.testing.assert_array_equal(state.pages.block_tables, tables)
    state, output = steps.prefill(steps.params, state, make_batch([[1] * 8], [2]))
    assert (np.asarray(output.sampled.tokens) == NO_TOKEN).all()
    np.testing.assert_array_equal(state.pages.block_tables, tables)


def test_forked_rows_copy_the_page_they_share_and_go_their_own_ways(models):
    """Copy-on-write through the whole step: both rows continue as rows that never shared a page."""
    steps = greedy_steps(models["llama"])

    def run(state, rows, num_steps=6):
        outputs = []
        for _ in range(num_steps):
            state, output = steps.decode(steps.params, state, num_rows=NUM_ROWS)
            outputs.append(np.asarray(output.sampled.tokens)[rows])
        return np.array(outputs).T, state

    prompt = [3, 1, 4, 1, 5]
    alone, _ = steps.prefill(steps.params, make_state("llama"), make_batch([prompt, prompt], [0, 1]))
    alone = alone._replace(last_tokens=alone.last_tokens.at[1].set(9))
    shared, _ = steps.prefill(steps.params, make_state("llama"), make_batch([prompt], [0]))
    page_state, ok = pages.fork(shared.pages, np.array([0]), np.array([1]), page_size=PAGE_SIZE)
    assert ok
    like_row_0 = lambda x: x.at[1].set(x[0])
    shared = shared._replace(
        pages=page_state,
        sampling=jax.tree.map(like_row_0, shared.sampling),
        counts=jax.tree.map(like_row_0, shared.counts),
        num_outputs=like_row_0(shared.num_outputs),
        max_outputs=like_row_0(shared.max_outputs),
        active=like_row_0(shared.active),
        last_tokens=shared.last_tokens.at[1].set(9),
    )
    expected, _ = run(alone, [0, 1])
    tokens, state = run(shared, [0, 1])
    np.testing.assert_array_equal(tokens, expected)
    assert (expected[0] != expected[1]).any()
    check_invariants(state.pages, PAGE_SIZE)


def test_equal_models_share_their_programs():
    config = CONFIGS["llama"]
    first, second = (make_steps(create_model(config, seed=seed)) for seed in (0, 1))
    assert first.decode is second.decode
    assert step.decode is not first.decode


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.environ.get("JAXATTN_TEST_GPU") == "1", reason="stands in for a GPU; here is one")
def test_no_step_copies_the_pool_on_hopper():
    """The same steps compiled for an H200, with the Mosaic kernels in them."""
    if not HOPPER_PYTHON.exists():
        pytest.skip(f"no sm_90a compiler: {HOPPER_PYTHON} is missing (make .venv-hopper/installed)")
    program = [str(HOPPER_PYTHON), "-m", "tests.serving.compile_steps"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    run = subprocess.run(program, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    answers = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [answer["step"] for answer in answers] == ["decode", "prefill"]
    for answer in answers:
        assert answer["num_kernels"] >= 2, "the kernels were meant to be in it"
        assert answer["alias_bytes"] >= answer["pool_bytes"]
        assert answer["temp_bytes"] < answer["layer_bytes"]
        assert answer["pool_copies"] == []
