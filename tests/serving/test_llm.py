"""LLM: vLLM's names over the engine, in every form that prompts and models come in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxattn.tokenizer import ByteTokenizer
from jaxattn.weights import GenerationDefaults, LoadedModel, save_hf
from serving import LLM, RequestOutput, SamplingParams
from serving import pool_size as pool_size_module
from serving.pool_size import choose_pool_size
from tests.serving.conftest import CONFIGS, MAX_MODEL_LEN, MAX_NUM_SEQS, NUM_PAGES, PAGE_SIZE

SIZES = {
    "max_num_seqs": MAX_NUM_SEQS,
    "max_model_len": MAX_MODEL_LEN,
    "page_size": PAGE_SIZE,
    "num_pages": NUM_PAGES,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


@pytest.fixture(scope="module")
def llm(models):
    return LLM((models["llama"], ByteTokenizer()), **SIZES)


def test_prompts_come_as_text_ids_or_dicts_and_results_in_their_order(llm):
    text = "abc"
    ids = list(text.encode())
    forms = [
        text,
        ids,
        {"prompt": text},
        {"prompt_token_ids": ids},
        {"prompt": text, "prompt_token_ids": ids},
    ]
    outputs = llm.generate([*forms, "another"], GREEDY, use_tqdm=False)
    assert all(isinstance(output, RequestOutput) and output.finished for output in outputs)
    assert [output.prompt_token_ids for output in outputs[:5]] == [ids] * 5
    assert [output.prompt for output in outputs] == [text, None, text, None, text, "another"]
    assert len({tuple(output.outputs[0].token_ids) for output in outputs[:5]}) == 1
    assert outputs[5].outputs[0].token_ids != outputs[0].outputs[0].token_ids
    assert all(o.outputs[0].text == ByteTokenizer().decode(o.outputs[0].token_ids) for o in outputs)


def test_a_model_serves_from_quantized_pages(models, capsys):
    quantized = LLM((models["llama"], ByteTokenizer()), kv_cache_dtype="fp8", **SIZES)
    pool = quantized.engine.state.pool
    assert pool.k_pages.dtype == jnp.float8_e4m3fn
    assert pool.k_scale.shape == pool.k_pages.shape[:4]
    assert "(8 head dim x 1 byte + 4 of a scale) = 768 bytes a page" in capsys.readouterr().err
    (output,) = quantized.generate(["abcdefghijkl"], GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 6
    assert (quantized.engine.state.pool.v_scale > 0).any()


def test_the_kv_cache_dtype_is_one_of_a_few(models):
    with pytest.raises(ValueError, match="kv_cache_dtype='int4': must be 'auto' or one of"):
        LLM((models["llama"], ByteTokenizer()), kv_cache_dtype="int4", **SIZES)


def test_one_prompt_needs_no_list(llm):
    (expected,) = llm.generate(["abc"], GREEDY, use_tqdm=False)
    for prompt in ("abc", list(b"abc"), np.array(list(b"abc")), {"prompt": "abc"}):
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert llm.generate([], use_tqdm=False) == []


def test_each_prompt_may_have_its_own_parameters(llm):
    params = [SamplingParams(temperature=0.0, max_tokens=n) for n in (1, 5, 3)]
    outputs = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 3]


def test_defaults_are_vllms(llm):
    (output,) = llm.generate("abc", use_tqdm=False)
    assert len(output.outputs) == 1
    assert len(output.outputs[0].token_ids) <= 16


def test_chat_answers_in_the_form_of_the_template(models):
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    llm = LLM((models["llama"], tokenizer), **SIZES)
    conversation = [{"role": "user", "content": "Hi"}]
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert output.prompt == "<user>Hi<assistant>"
    (expected,) = llm.generate("<user>Hi<assistant>", GREEDY, use_tqdm=False)
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert len(llm.chat([conversation, conversation], GREEDY, use_tqdm=False)) == 2


def test_a_bar_shows_progress_and_speed(llm, capsys):
    llm.generate(["abc"] * 3, GREEDY)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "output tokens/s" in shown


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["ok", ""], None, r"prompts\[1\]: the prompt is empty"),
        (["ok", "x" * 64], None, r"prompts\[1\]: the prompt has 64 tokens; at most 63"),
        (["a", "b"], [SamplingParams()], "sampling_params: 1 for 2 prompts"),
        ([{"text": "a"}], None, "a dict with 'prompt' or 'prompt_token_ids'"),
        ([{}], None, "a dict with 'prompt' or 'prompt_token_ids'"),
        ([[999]], None, r"prompts\[0\]: prompt_token_ids has 999"),
    ],
)
def test_nothing_runs_when_a_prompt_cannot_be_served(llm, prompts, params, message):
    finished = llm.metrics.num_finished
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params, use_tqdm=False)
    assert not llm.engine.has_unfinished()
    assert llm.metrics.num_finished == finished


def test_an_interrupt_leaves_an_empty_engine_that_works_on(llm, monkeypatch):
    step, calls = llm.engine.step, []

    def interrupted():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    long = SamplingParams(max_tokens=30, ignore_eos=True)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a"] * 6, long, use_tqdm=False)
    assert not llm.engine.has_unfinished()
    assert llm.engine.num_free_pages() == NUM_PAGES - 1
    assert len(llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 6


def test_a_model_comes_as_a_folder_a_loaded_model_or_a_pair(models, llm, tmp_path):
    model = models["llama"]
    save_hf(model, tmp_path, tokenizer=ByteTokenizer())
    loaded = LoadedModel(model, ByteTokenizer(), GenerationDefaults((256,)))
    (expected,) = llm.generate("abc", GREEDY, use_tqdm=False)
    for form in (str(tmp_path), tmp_path, loaded):
        (output,) = LLM(form, **SIZES).generate("abc", GREEDY, use_tqdm=False)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids


def test_the_models_end_of_sequence_ends_it(models):
    loaded = LoadedModel(models["llama"], ByteTokenizer(), GenerationDefaults())
    plain = LLM(loaded, **SIZES).generate("abc", GREEDY, use_tqdm=False)[0].outputs[0]
    third = plain.token_ids[2]
    ending = loaded._replace(generation=GenerationDefaults((third,)))
    output = LLM(ending, **SIZES).generate("abc", GREEDY, use_tqdm=False)[0].outputs[0]
    assert output.token_ids == plain.token_ids[: plain.token_ids.index(third) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_dtype_is_float32_on_a_cpu_unless_asked(models, llm):
    assert {p.dtype for p in llm.engine.steps.params} == {jnp.dtype("float32")}
    half = LLM((models["llama"], ByteTokenizer()), dtype="bfloat16", **SIZES)
    assert {p.dtype for p in half.engine.steps.params} == {jnp.dtype("bfloat16")}
    assert half.engine.state.pool.k_pages.dtype == jnp.bfloat16
    assert {p.dtype for p in jax.tree.leaves(nnx.state(models["llama"]))} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization=1.5"),
        ({"max_model_len": 1000}, "max_model_len=1000"),
    ],
)
def test_impossible_options_are_refused(models, options, message):
    with pytest.raises(ValueError, match=message):
        LLM((models["llama"], ByteTokenizer()), **{**SIZES, **options})


def test_text_without_a_tokenizer_is_refused(models):
    llm = LLM((models["llama"], None), **SIZES)
    with pytest.raises(ValueError, match="tokenizer"):
        llm.generate("abc")
    assert len(llm.generate([[1, 2]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 6


def choose(**options):
    defaults = {
        "page_size": 8,
        "dtype": jnp.float32,
        "max_num_seqs": 4,
        "max_model_len": 64,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.9,
    }
    return choose_pool_size(CONFIGS["llama"], **{**defaults, **options})


def test_the_pool_holds_every_row_where_memory_does():
    size = choose()
    assert size.num_pages == 4 * 8 + 1
    page = 2 * 2 * 2 * 8 * 8 * 4
    assert (
        f"2 x 2 layers x 2 KV heads x 8 tokens x 8 head dim x 4 bytes = {page:,} bytes a page"
        in size.explanation
    )


def test_the_pool_is_a_share_of_the_memory_where_that_is_less(monkeypatch):
    monkeypatch.setattr(pool_size_module, "_available_host_bytes", lambda: 100 * 2048)
    size = choose()
    assert size.num_pages == int(0.25 * 100 * 2048 // 2048)


def test_the_pool_has_the_pages_asked_for():
    assert choose(num_pages=7).num_pages == 7


def test_the_context_shrinks_to_a_small_pool_and_the_formula_shows(models, capsys):
    llm = LLM((models["llama"], ByteTokenizer()), num_pages=5, page_size=8, max_num_seqs=4)
    assert llm.engine.max_model_len == 32
    assert "page pool: 2 x 2 layers" in capsys.readouterr().err


def test_gpu_memory_is_what_the_device_says_less_weights_and_work(monkeypatch):
    class Device:
        platform, device_kind = "gpu", "NVIDIA H200"

        def memory_stats(self):
            return {"bytes_limit": 10**9, "bytes_in_use": 3 * 10**8}

    monkeypatch.setattr(pool_size_module.jax, "local_devices", lambda: [Device()])
    size = choose(max_num_seqs=10**6, max_num_batched_tokens=1)
    expected = 0.9 * 10**9 - 3 * 10**8 - pool_size_module._workspace_bytes(CONFIGS["llama"], 10**6, 1)
    assert size.num_pages == max(2, int(expected // 2048))
    monkeypatch.setattr(Device, "memory_stats", lambda self: None)
    with pytest.raises(ValueError, match="num_pages"):
        choose()
    assert np.isfinite(choose(num_pages=3).num_pages)
