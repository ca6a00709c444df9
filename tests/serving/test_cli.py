"""jaxattn-generate: results as they finish, resume after any end, one clear line for every mistake."""

import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxattn.tokenizer import ByteTokenizer
from jaxattn.weights import save_hf
from serving.cli import main
from tests.serving.conftest import MAX_MODEL_LEN, MAX_NUM_SEQS, NUM_PAGES, PAGE_SIZE

SIZES = (
    f"--max-num-seqs {MAX_NUM_SEQS} --max-model-len {MAX_MODEL_LEN} "
    f"--page-size {PAGE_SIZE} --num-pages {NUM_PAGES}"
).split()
TEXTS = ["The sea", "A", "Once upon a time there", "x y z"]


@pytest.fixture(scope="module")
def model(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = ByteTokenizer()
    save_hf(models["llama"], folder, tokenizer=tokenizer)
    return str(folder)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(text + "\n\n" for text in TEXTS))
    return str(path)


def generate(model, prompts, out, *options):
    return main([model, "--prompts", prompts, "--out", str(out), "--max-tokens", "8", *SIZES, *options])


def results(path):
    """Results by index; the file may hold them in any order."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({line["index"] for line in lines}) == len(lines), "a result twice"
    return {line["index"]: line for line in lines}


def test_every_prompt_gets_a_result_and_the_run_a_summary(model, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert generate(model, prompts, out) == 0
    found = results(out)
    assert [found[i]["prompt"] for i in range(4)] == TEXTS
    for result in found.values():
        (completion,) = result["outputs"]
        assert completion["finish_reason"] in ("length", "stop")
        assert 1 <= len(completion["token_ids"]) <= 8
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert "4 requests" in captured.out
    assert "output tokens/s" in captured.out
    assert "1 x cpu" in captured.out
    assert "4/4" in captured.err
    assert "page pool:" in captured.err


def test_lines_of_json_bring_ids_and_parameters_of_their_own(model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"id": "a", "prompt": "The sea", "params": {"temperature": 0, "max_tokens": 3, "n": 2}},
        {
            "id": 7,
            "prompt_token_ids": [84, 104],
            "params": {"logprobs": 2, "max_tokens": 2, "ignore_eos": True},
        },
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out.jsonl"
    assert generate(model, str(path), out) == 0
    found = results(out)
    assert (found[0]["id"], found[1]["id"]) == ("a", 7)
    assert len(found[0]["outputs"]) == 2
    assert len(found[1]["outputs"][0]["logprobs"]) == 2
    assert found[1]["outputs"][0]["cumulative_logprob"] < 0


def test_prompts_come_from_standard_input(model, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "The sea"}\n'))
    out = tmp_path / "out.jsonl"
    assert generate(model, "-", out) == 0
    assert results(out)[0]["prompt"] == "The sea"


def test_chat_puts_text_and_messages_through_the_template(models, tmp_path):
    folder = tmp_path / "chat"
    save_hf(models["llama"], folder, tokenizer=ByteTokenizer())
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    assert generate(str(folder), str(path), tmp_path / "out.jsonl") == 2  # no template: one line, not a crash


def test_resume_does_only_the_rest_with_the_same_tokens(model, prompts, tmp_path, capsys):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    assert generate(model, prompts, whole) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    resumed.write_bytes(lines[0] + lines[1] + lines[2][:25])  # as a kill in the middle of a write leaves it
    capsys.readouterr()
    assert generate(model, prompts, resumed, "--resume") == 0
    assert "2 requests" in capsys.readouterr().out
    assert results(resumed) == results(whole)
    before = resumed.read_bytes()
    assert generate(model, prompts, resumed, "--resume") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert resumed.read_bytes() == before


def test_resume_without_a_file_starts_one(model, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    assert generate(model, prompts, out, "--resume") == 0
    assert len(results(out)) == 4


def test_overwrite_starts_anew(model, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("anything\n")
    assert generate(model, prompts, out, "--overwrite") == 0
    assert len(results(out)) == 4


def test_an_interrupt_keeps_what_is_finished(model, prompts, tmp_path, monkeypatch, capsys):
    from serving import batch_files, cli

    def interrupting(prompt, output, written=[]):  # noqa: B006
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(prompt)
        return batch_files.result_line(prompt, output)

    monkeypatch.setattr(cli, "result_line", interrupting)
    out = tmp_path / "out.jsonl"
    assert generate(model, prompts, out) == 130
    assert "2 of 4 results" in capsys.readouterr().err
    assert len(results(out)) == 2
    monkeypatch.undo()
    assert generate(model, prompts, out, "--resume") == 0
    assert len(results(out)) == 4


@pytest.mark.parametrize(
    "kill_with",
    [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)],
    ids=["SIGINT", "SIGKILL"],
)
def test_a_run_that_is_ended_from_outside_can_be_resumed(model, tmp_path, kill_with):
    path, out = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    num_prompts = 800  # some 10 s of work: a busy machine may look at the file late
    path.write_text("".join(f"prompt number {index}\n" for index in range(num_prompts)))
    options = ["--prompts", str(path), "--out", str(out), "--max-tokens", "30", *SIZES]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-m", "serving.cli", model, *options]
    with subprocess.Popen(program, stderr=subprocess.PIPE, env=environment) as process:
        deadline = time.monotonic() + 200
        while not (out.exists() and out.read_bytes().count(b"\n") >= 5):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(kill_with)
        error = process.stderr.read().decode()
    assert process.returncode == (130 if kill_with == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in error
    num_kept = out.read_bytes().count(b"\n")
    assert 5 <= num_kept < num_prompts, "it was meant to be ended in the middle"
    assert main([model, *options, "--resume"]) == 0
    assert len(results(out)) == num_prompts


def write(path, text):
    path.write_text(text)
    return str(path)


MISTAKES = {
    "missing prompts file": (["--prompts", "missing.txt"], "missing.txt: No such file"),
    "empty prompts file": (["--prompts", "empty.txt"], "empty.txt: no prompts in it"),
    "malformed line": (["--prompts", "malformed.jsonl"], "malformed.jsonl, line 2: malformed JSON"),
    "unknown key": (["--prompts", "unknown.jsonl"], "unknown.jsonl, line 1: unknown keys ['promt']"),
    "no object": (["--prompts", "list.jsonl"], "list.jsonl, line 1: must be a JSON object"),
    "two prompts": (["--prompts", "two.jsonl"], "two.jsonl, line 1: must have exactly one of"),
    "wrong type": (["--prompts", "type.jsonl"], "type.jsonl, line 1: prompt must be a string"),
    "wrong parameter": (["--prompts", "params.jsonl"], "params.jsonl, line 1: sampling parameters ['topp']"),
    "long prompt": (["--prompts", "long.txt"], "long.txt, line 2: the prompt has 70 tokens; at most 63"),
    "binary prompts": (["--prompts", "binary.txt"], "binary.txt: not UTF-8"),
    "unknown option": (["--temprature", "1"], "unrecognized arguments: --temprature"),
    "no number": (["--top-k", "many"], "--top-k: invalid int value: 'many'"),
    "out of range": (["--top-p", "1.5"], "top_p=1.5"),
    "out exists": (["--out", "exists.jsonl"], "exists.jsonl: exists; --resume does the rest"),
    "out in no folder": (["--out", "nowhere/out.jsonl"], "nowhere/out.jsonl: must be a file in a folder"),
    "two ways": (["--resume", "--overwrite"], "--resume keeps results that --overwrite replaces"),
    "other results": (
        ["--out", "exists.jsonl", "--resume"],
        "exists.jsonl, line 1: not a result of these prompts",
    ),
    "other prompts": (
        ["--out", "other.jsonl", "--resume"],
        "other.jsonl, line 1: the result of another prompt",
    ),
    "page size": (["--page-size", "12"], "page_size=12"),
    "dtype": (["--dtype", "int3"], "dtype='int3'"),
    "no such model": (["MODEL", "nothing"], "nothing"),
    "no model in the folder": (["MODEL", "folder"], "config.json"),
    "broken checkpoint": (["MODEL", "broken"], "broken"),
    "chat without template": (["--chat"], "good.txt, line 1: chat_template"),
}


@pytest.fixture(scope="module")
def folder_of_mistakes(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    write(folder / "good.txt", "a prompt\n")
    write(folder / "empty.txt", "\n \n")
    write(folder / "malformed.jsonl", '{"prompt": "a"}\n{"prompt": \n')
    write(folder / "unknown.jsonl", '{"promt": "a"}\n')
    write(folder / "list.jsonl", '["a"]\n')
    write(folder / "two.jsonl", '{"prompt": "a", "prompt_token_ids": [1]}\n')
    write(folder / "type.jsonl", '{"prompt": 3}\n')
    write(folder / "params.jsonl", '{"prompt": "a", "params": {"topp": 0.5}}\n')
    write(folder / "long.txt", "short\n" + "x" * 70 + "\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    write(folder / "exists.jsonl", "something else\n")
    write(folder / "other.jsonl", '{"index": 0, "prompt": "another"}\n')
    (folder / "folder").mkdir()
    save_hf(models["llama"], folder / "broken", tokenizer=ByteTokenizer())
    for weights in (folder / "broken").glob("*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(model, folder_of_mistakes, monkeypatch, capsys, mistake):
    options, message = MISTAKES[mistake]
    monkeypatch.chdir(folder_of_mistakes)
    if options[0] == "MODEL":
        model, options = options[1], []
    defaults = {"--prompts": "good.txt", "--out": "out.jsonl"}
    given = [part for name, value in defaults.items() if name not in options for part in (name, value)]
    sizes = [] if "--page-size" in options else SIZES
    assert main([model, *given, *sizes, *options]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("page pool:")]
    assert len(lines) == 1
    assert lines[0].startswith("jaxattn-generate: error: ")
    assert message in lines[0]
    assert captured.out == ""
    assert not (folder_of_mistakes / "out.jsonl").exists(), "nothing is left behind"


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    shown = capsys.readouterr().out
    for word in ("--resume", "--chat", "--num-pages", "examples:", "exit codes:"):
        assert word in shown
