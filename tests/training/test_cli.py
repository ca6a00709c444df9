import re

import pytest

from tests.training.conftest import write_documents
from training.cli import main
from training.config import all_keys


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
data: {{text: {tmp_path / "text"}, sequence_length: 16, validation_fraction: 0.25}}
model: {{num_layers: 1, embed_dim: 16, num_heads: 2}}
schedule: {{warmup_steps: 1}}
run: {{dir: {tmp_path / "run"}, num_steps: 4, batch_size: 4, log_every: 1}}
eval: {{num_batches: 1}}
sample: {{num_tokens: 4}}
""",
        encoding="utf-8",
    )
    return path


def one_line(captured: str) -> str:
    assert captured.count("\n") == 1, captured
    assert captured.startswith("jaxattn-train: error: ")
    return captured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/missing.yaml"], r"recipe '.*missing.yaml': no such file; recipes by name: .*sotu_bytes"),
        (["{recipe}", "run.num_stpes=3"], r"unknown setting run.num_stpes: did you mean run.num_steps\?"),
        (["{recipe}", "run.num_steps=many"], r"run.num_steps='many': must be a whole number"),
        (["{recipe}", "num_steps"], r"an override is written section.key=value"),
        (["{recipe}", "model.num_heads=3"], r"model: num_heads=3: must be a divisor of embed_dim=16"),
        (["{recipe}", "data.text={tmp}/nowhere"], r"nowhere: no such file or folder"),
        (["{recipe}", "data.text={tmp}/empty"], r"no files that match"),
        (["{recipe}", "data.text={tmp}/latin1.txt"], r"latin1.txt: not UTF-8 at byte 3 \(0xe9\)"),
        (["{recipe}", "data.text=package:nonesuch1/x"], r"package 'nonesuch1' is not installed"),
        (["{recipe}", "data.tokenizer={tmp}/nowhere"], r"tokenizer '.*nowhere': .*a path that exists"),
        (["{recipe}", "run.batch_size=5000"], r"training tokens are too few .* lower run.batch_size"),
        (
            ["{recipe}", "data.sequence_length=32", "model.max_positions=16"],
            r"data.sequence_length=32: must be at most",
        ),
        (["{recipe}", "run.dir={tmp}/latin1.txt"], r"latin1.txt"),
        (["{recipe}", "run.attention=nonesuch"], r"run.attention='nonesuch': must be null or one of sm90"),
        (["prepare", "{tmp}/nowhere", "--out", "{tmp}/out"], r"nowhere: no such file or folder"),
        (
            ["prepare", "{tmp}/text", "--out", "{tmp}/out", "--validation-fraction", "2"],
            r"validation_fraction=2.0",
        ),
        (["prepare", "{tmp}/text", "--out", "{tmp}/text"], r"text: holds other files"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(recipe, tmp_path, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 au lait " * 100)
    assert main([argument.format(tmp=tmp_path, recipe=recipe) for argument in arguments]) == 2
    assert re.search(message, one_line(capsys.readouterr().err))


@pytest.mark.parametrize("arguments", [[], ["recipe", "--freshh"], ["prepare"], ["prepare", "x"]])
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert "usage: jaxattn-train" in capsys.readouterr().err


def test_help_names_recipes_and_every_setting(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "shakespeare_bytes" in text
    assert [key for key in all_keys() if key not in text] == []


def test_prepare_says_what_it_made(recipe, tmp_path, capsys):
    assert main(["prepare", str(tmp_path / "text"), "--out", str(tmp_path / "tokens")]) == 0
    text = capsys.readouterr().out
    assert "train: 3 documents" in text
    assert f"data.tokens={tmp_path / 'tokens'}" in text


def test_a_run_says_what_it_does_and_goes_on_where_it_stopped(recipe, tmp_path, capsys):
    assert main([str(recipe)]) == 0
    text = capsys.readouterr().out
    for words in (
        "device   cpu",
        "parameters, 4 x 16 tokens a step",
        "step 0 of 4",
        "done: 4 steps, validation loss",
    ):
        assert words in text
    assert main([str(recipe), "run.num_steps=6"]) == 0
    text = capsys.readouterr().out
    assert f"continues {tmp_path / 'run'} from step 4" in text
    assert "run.num_steps: 4 -> 6" in text
    assert "done: 6 steps" in text
    for path in (tmp_path / "run" / "checkpoints" / "6").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert main([str(recipe), "run.num_steps=8"]) == 2
    assert "checkpoints/6: broken checkpoint" in one_line(capsys.readouterr().err)
    assert main([str(recipe), "--fresh", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "run.old-1" / "checkpoints" / "4").is_dir()
