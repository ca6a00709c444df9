"""The runner of the GPU tests, on a folder of tests that pass, fail, hang, crash and lose their GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu.sanitize import PYTEST, ROWS

ROOT = Path(__file__).parents[1]
GOOD = "import pytest\n@pytest.mark.parametrize('n', range(8))\ndef test_passes(n): pass\n"
BAD = """
import os, sys, time
def test_fails(): assert 1 == 2, 'one is\\nnot two'
def test_hangs(): time.sleep(1000)
def test_crashes(): os._exit(9)
def test_after(): pass
"""
LOST = """
import os
def test_loses_the_gpu(): raise RuntimeError('CUDA_ERROR_ILLEGAL_ADDRESS: ' + str(os.getpid()))
def test_after(): pass
"""


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.gpu.record", str(folder / "result.json"), str(folder)]
    command += ["-c", os.devnull, "-p", "no:cacheprovider", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.DEVNULL)


def short(names) -> set[str]:
    return {name.split("::")[-1] for name in names}


def test_what_hangs_or_crashes_takes_no_other_test_with_it(tmp_path):
    for name, text in {"good": GOOD, "bad": BAD, "lost": LOST, "broken": "import no_such_module"}.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    assert start(tmp_path, JOBS="2", TEST_SECONDS="2").wait(timeout=60) == 1
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["is_complete"]
    assert short(result["hung"]) == {"test_hangs"}
    assert short(result["crashed"]) == {"test_crashes"}
    assert short(result["failed"]) >= {"test_fails", "test_loses_the_gpu"}
    assert any("no_such_module" in reason for reason in result["failed"].values())
    assert result["counts"]["test_good"] == {"passed": 8}
    assert result["counts"]["test_bad"] == {"passed": 1, "failed": 1, "hung": 1, "crashed": 1}
    assert result["counts"]["test_lost"] == {"passed": 1, "failed": 1}
    assert result["not_run"] == []
    (reason,) = (text for name, text in result["failed"].items() if name.endswith("test_fails"))
    assert reason == "AssertionError: one is"
    assert result["versions"]["pytest"] == pytest.__version__


def test_a_run_that_is_cut_off_leaves_what_it_found(tmp_path):
    (tmp_path / "test_good.py").write_text(GOOD)
    (tmp_path / "test_bad.py").write_text(BAD)
    run, result = start(tmp_path, "-k", "passes or hangs", JOBS="2"), {}
    for _ in range(200):
        time.sleep(0.1)
        if (tmp_path / "result.json").exists():
            result = json.loads((tmp_path / "result.json").read_text())
        if result.get("total", {}).get("passed"):
            break
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=10) == 143
    result = json.loads((tmp_path / "result.json").read_text())
    assert not result["is_complete"]
    assert "test_hangs" in short(result["not_run"])
    assert "test_fails" not in str(result)
    assert result["total"]["passed"] > 0
    (tmp_path / "first.json").write_text(json.dumps(result))
    (tmp_path / "test_bad.py").write_text("def test_hangs(): pass")
    assert start(tmp_path, LEFT_OF=str(tmp_path / "first.json")).wait(timeout=30) == 0
    after = json.loads((tmp_path / "result.json").read_text())
    assert after["total"] == {"passed": len(result["not_run"])}


def test_only_what_passes_is_exit_code_0(tmp_path):
    (tmp_path / "test_good.py").write_text(GOOD)
    assert start(tmp_path, MAX_SECONDS="30").wait(timeout=40) == 0
    assert start(tmp_path, MAX_SECONDS="0.1").wait(timeout=40) == 1


FAKE_SANITIZER = """#!/bin/sh
case "$*" in
  --help) echo "--kernel-name arg" ;;
  --version) echo "Version 2025.1" ;;
  *memcheck*write*) echo "1 passed"; echo "========= ERROR SUMMARY: 0 errors" ;;
  *racecheck*write*) echo "1 passed"; echo "========= RACECHECK SUMMARY: 2 hazards displayed" ;;
esac
"""


def test_rows_of_the_sanitizer_are_tests():
    rows = [f"tests/gpu/{name}" for name in ROWS.values()]
    command = [sys.executable, "-m", "pytest", *PYTEST, "--collect-only", *rows]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120).stdout
    assert all(row in collected.splitlines() for row in rows), collected


def sanitize(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = ["tests/gpu/sanitize.sh", str(folder / "result.json"), *arguments]
    variables = {**os.environ, "PATH": f"{folder}:/usr/bin:/bin", "PYTHON": sys.executable}
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)


def test_sanitizer_records_what_each_tool_says_of_each_row(tmp_path):
    ended = sanitize(tmp_path)
    assert (ended.returncode, ended.stderr.count("nothing was checked")) == (2, 1)
    for name, text in (("compute-sanitizer", FAKE_SANITIZER), ("nvidia-smi", "#!/bin/sh\necho H200\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    assert sanitize(tmp_path, "-k", "copy, int8").returncode == 1
    result = json.loads((tmp_path / "result.json").read_text())
    outcomes = {(row["row"], row["tool"]): row["outcome"] for row in result["rows"]}
    assert outcomes == {
        ("pages: write, copy, int8", "memcheck"): "clean",
        ("pages: write, copy, int8", "racecheck"): "2 hazards displayed",
    }
    assert result["device"] == "H200"
    assert result["versions"]["compute-sanitizer"] == "Version 2025.1"
    assert result["command"].startswith("tests/gpu/sanitize.sh")
