"""Every benchmark's command line without a GPU, and what those of one process have in common."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import in_turn
import pytest
import report
import timing

from jaxattn.models import MODELS, GPT2Config

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "report.parser(" in path.read_text())
WRONG = {
    "ring_attention": ["--lengths", "100"],
    "training": ["--presets", "small", "--batch-sizes", "1", "2"],
    "serving": ["--num-requests", "0"],
    "quantized_pages": ["--rows", "1"],
    "page_layout": ["--prefill-tokens", "100"],
    "flash_attention": ["--rows", "no such row"],
    "compile_time": ["--length", "0"],
}


def load(name: str):
    """A script as a module; serving.py and training.py are packages' names too."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch, module, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", [f"{module.__name__}.py", *arguments])
    return module.main()


@pytest.mark.parametrize("name", SCRIPTS)
def test_command_lines(monkeypatch, capsys, name):
    module = load(name)
    with pytest.raises(SystemExit, match="0"):
        run(monkeypatch, module, "--help")
    assert "--out" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, module, *WRONG.get(name, ["--no-such-option"]))
    assert capsys.readouterr().err
    if name != "quantized_pages":
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, module)
        assert "needs an NVIDIA GPU" in capsys.readouterr().err


RESULTS = FOLDER / "results"
READERS = {"flash_attention": "--plot-from", "paged_attention": "--plot-from", "flash_io": "--from"}


@pytest.mark.parametrize("name", READERS)
def test_figures_of_an_earlier_run(monkeypatch, tmp_path, capsys, name):
    module, option = load(name), READERS[name]
    others = [
        RESULTS / f"{other}.json" for other in ("training", "decode_configs", *READERS) if other != name
    ]
    not_json, plot = tmp_path / "x.json", tmp_path / "charts" / "x.png"
    not_json.write_text("{")
    for path in (tmp_path / "missing.json", tmp_path, not_json, *others):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, module, option, str(path))
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"{option}: " in error
        assert path.name in error
    arguments = ["--plot", str(plot)] if option == "--plot-from" else []
    assert run(monkeypatch, module, option, str(RESULTS / f"{name}.json"), *arguments) == 0
    assert "NVIDIA H" in capsys.readouterr().out or name == "flash_io"
    assert not arguments or plot.stat().st_size > 10_000


def test_rows_are_saved_as_they_come(tmp_path, capsys):
    out = str(tmp_path / "out.json")
    saved = []

    def second() -> dict:
        saved.append(json.loads(Path(out).read_text())["rows"])
        time.sleep(0.2)
        raise ValueError("out of memory\nand more")

    cases = {"first": lambda: {"x": 1}, "second": second, "third": lambda: {"x": 3}}
    rows = in_turn.measured(out, {"fact": 1}, cases, limit=10, budget=0.1)
    assert saved == [[{"x": 1}]]
    assert rows[1:] == [
        {"case": "second", "error": "ValueError: out of memory"},
        {"case": "third", "error": "not reached"},
    ]
    assert in_turn.finish(out, {"fact": 1}, rows) == 1
    assert json.loads(Path(out).read_text())["rows"] == rows
    assert "not measured: second: ValueError" in capsys.readouterr().err


def test_the_demo_needs_no_benchmark_on_its_path():
    demo = FOLDER.parent / "demo.py"
    assert (
        subprocess.run([sys.executable, str(demo), "--help"], capture_output=True, timeout=60).returncode == 0
    )


def test_what_hangs_ends_the_process():
    code = "import time, timing\nwith timing.at_most(0.1, 'a row'): time.sleep(100)"
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert (ended.returncode, ended.stderr) == (3, "a row: no end within 0 s, giving up\n")
    with timing.at_most(0.01, "nothing"):
        pass
    time.sleep(0.05)


@pytest.mark.slow
def test_serving_and_training_of_a_tiny_model(monkeypatch, tmp_path):
    tiny = GPT2Config.small(num_layers=1, num_heads=1, embed_dim=16, mlp_dim=16, vocab_size=300)
    monkeypatch.setattr(report, "begin", lambda what: None)
    serving, training = load("serving"), load("training")
    monkeypatch.setattr(serving, "CONFIGS", {"tiny": tiny})
    out = tmp_path / "serving.json"
    arguments = ["--models", "tiny", "--num-requests", "2", "--max-tokens", "3", "--out", str(out)]
    assert run(monkeypatch, serving, *arguments) == 0
    assert [row["requests"] for row in json.loads(out.read_text())["rows"]] == [2, 2, 1]
    gpt2 = MODELS["gpt2"]
    monkeypatch.setattr(training, "MODELS", {"gpt2": dataclasses.replace(gpt2, presets={"small": tiny})})
    out = tmp_path / "training.json"
    arguments = ["--presets", "small", "--batch-sizes", "1", "--sequence-length", "16", "--repeats", "1"]
    run(monkeypatch, training, *arguments, "--attention", "reference", "sm90", "--out", str(out))
    good, bad = json.loads(out.read_text())["rows"]
    assert good["tokens_per_second"] > 0
    assert "sm90" in bad["case"]


@pytest.mark.slow
def test_ring_of_simulated_devices(monkeypatch, tmp_path):
    ring = load("ring_attention")
    monkeypatch.setattr(report, "begin", lambda what: None)
    out = tmp_path / "ring.json"
    arguments = ["--lengths", "256", "--devices", "1", "2", "--heads", "2", "1", "32", "--repeats", "1"]
    assert run(monkeypatch, ring, *arguments, "--out", str(out)) == 0
    result = json.loads(out.read_text())
    assert max(result["rms_difference"].values()) < 1e-2
    assert {row["num_devices"] for row in result["rows"]} == {1, 2}
    assert all(row["efficiency"] > 0 for row in result["rows"])


def test_compile_times(monkeypatch, tmp_path, capsys):
    compile_time = load("compile_time")
    monkeypatch.setattr(report, "begin", lambda what: None)
    out = tmp_path / "compile_time.json"
    assert run(monkeypatch, compile_time, "--length", "32", "--out", str(out)) == 1  # no cuDNN on a CPU
    good = [row for row in json.loads(out.read_text())["rows"] if "error" not in row]
    assert [row["call"].split(",")[0] for row in good] == ["jaxattn"] * len(good)
    assert len(good) == 10
    assert all(row[name] > 0 for row in good for name in ("trace_s", "lower_s", "compile_s"))
    assert "not measured: cuDNN, H = 64" in capsys.readouterr().err
