"""The example scripts as a user starts them."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
WRONG = {
    "train_gpt2.py run.num_stps=5": "num_steps",
    "train_gpt2.py data.text=nowhere.txt": "nowhere.txt",
    "generate_batch.py nowhere.gguf hello": "nowhere.gguf",
    "generate_batch.py nowhere.gguf hello --temperature -1": "temperature",
    "generate_batch.py": "prompt",
    "demo.py --text nowhere.txt": "nowhere.txt",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_arguments_get_one_clear_line(command, tmp_path):
    script, *arguments = command.split()
    run = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert WRONG[command] in run.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
