import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

import jaxattn
from jaxattn.models import model_params
from jaxattn.weights.checkpoint import write_metadata
from tests.training.conftest import make_tiny_config
from training import ConfigError, DataError, Trainer
from training.checkpoint import CheckpointError, Checkpoints

# Trains like a user would, and dies without a word: at step 8 (the last checkpoint is that of step 5), or at
# the moment when the checkpoint of step 10 begins to appear.
KILLED_RUN = """
    import os, signal, sys, threading, yaml
    from pathlib import Path
    from training import TrainConfig, Trainer

    if __name__ == "__main__":
        config = TrainConfig.from_dict(yaml.safe_load(Path(sys.argv[1]).read_text()))
        trainer = Trainer(config, progress=False)
        die = lambda: os.kill(os.getpid(), signal.SIGKILL)

        if sys.argv[2] == "between checkpoints":
            step = trainer.train_step
            def dying_step(state, batch):
                if trainer.step == 8:
                    trainer.checkpoints.wait()
                    die()
                return step(state, batch)
            trainer.train_step = dying_step
        else:
            def watch():
                folder = Path(config.run.dir) / "checkpoints"
                while not any(path.name.startswith("10.") for path in folder.glob("*tmp*")):
                    pass
                die()
            threading.Thread(target=watch, daemon=True).start()
        trainer.run()
"""


RUN = {"num_steps": 12, "checkpoint_every": 5}
DROPOUT = {"dropout_rate": 0.1}  # its masks must come back too


def leaves_of(trainer: Trainer) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(trainer.state)]


@pytest.fixture(scope="module")
def straight_run(text_folder, tmp_path_factory) -> Trainer:
    run = {**RUN, "dir": str(tmp_path_factory.mktemp("straight") / "run")}
    trainer = Trainer(make_tiny_config(text_folder, Path(), run=run, model=DROPOUT), progress=False)
    trainer.run()
    return trainer


@pytest.mark.parametrize("moment", ["between checkpoints", "while a checkpoint is written"])
def test_a_killed_run_ends_with_the_same_bits(tiny_config, tmp_path, straight_run, moment):
    config = tiny_config(run=RUN, model=DROPOUT)
    config_path, script = tmp_path / "config.yaml", tmp_path / "killed_run.py"
    config_path.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    script.write_text(textwrap.dedent(KILLED_RUN), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(config_path), moment]
    killed = subprocess.run(command, env=environment, timeout=250, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()

    resumed = Trainer(config, progress=False)
    assert resumed.step == 5
    result = resumed.run()
    assert result.step == 12
    for got, want in zip(leaves_of(resumed), leaves_of(straight_run), strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype
    assert [row.step for row in result.rows if row.loss is not None] == list(range(1, 13))
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"10", "12"}


def test_a_run_folder_is_a_model_for_serving(straight_run):
    loaded = jaxattn.load_model(straight_run.run_dir)
    assert loaded.model.config == straight_run.model_config
    jax.tree.map(np.testing.assert_array_equal, model_params(loaded.model), straight_run.state.params)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("the cat")) == "the cat"
    assert loaded.generation.eos_token_ids == (256,)


def test_layers_keep_their_places(tiny_config, tmp_path):
    """The names of twelve layers sort otherwise than their numbers do."""
    trainer = Trainer(tiny_config(model={"num_layers": 12}), progress=False)
    trainer.checkpoints.save(trainer.state)
    trainer.checkpoints.wait()
    write_metadata(tmp_path / "run", trainer.model_config, trainer.tokenizer)
    loaded = jaxattn.load_model(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, model_params(loaded.model), trainer.state.params)


@pytest.fixture
def finished_run(straight_run, tmp_path) -> Path:
    """A copy that a test may spoil, in the folder of tiny_config."""
    return shutil.copytree(straight_run.run_dir, tmp_path / "run")


def largest_file(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_broken_checkpoint_is_named_and_the_one_before_still_good(finished_run, tiny_config):
    largest_file(finished_run / "checkpoints" / "12" / "params").write_bytes(b"garbage")
    config = tiny_config(model=DROPOUT)
    with pytest.raises(CheckpointError, match=r"checkpoints/12: broken checkpoint .*remove that folder"):
        Trainer(config, progress=False)
    (finished_run / "checkpoints" / "12").rename(finished_run / "twelve")
    assert Trainer(config, progress=False).step == 10


def test_a_run_goes_on_with_its_own_data_and_model_only(finished_run, tiny_config):
    with pytest.raises(ConfigError, match=r"model\.embed_dim=32: the run in .* began with 16"):
        Trainer(tiny_config(model={**DROPOUT, "embed_dim": 32}), progress=False)
    with pytest.raises(ConfigError, match=r"data\.sequence_length=8: the run in .* began with 16"):
        Trainer(tiny_config(model=DROPOUT, data={"sequence_length": 8}), progress=False)
    trainer = Trainer(tiny_config(model=DROPOUT, optimizer={"learning_rate": 0.5}), progress=False)
    assert trainer.step == 12


def test_fresh_keeps_the_earlier_run(finished_run, tiny_config):
    for number in (1, 2):
        trainer = Trainer(tiny_config(), fresh=True, progress=False)
        assert trainer.step == 0
        assert (finished_run.parent / f"run.old-{number}").is_dir()
    assert (finished_run.parent / "run.old-1" / "checkpoints" / "12").is_dir()


@pytest.mark.parametrize(
    "mistake",
    [{"data": {"text": "nowhere.txt"}}, {"model": {"embed_dim": 15}}, {"run": {"batch_size": 10**6}}],
)
def test_fresh_with_a_mistake_leaves_the_earlier_run_alone(finished_run, tiny_config, mistake):
    before = sorted(finished_run.rglob("*"))
    with pytest.raises((ConfigError, DataError)):
        Trainer(tiny_config(**mistake), fresh=True, progress=False)
    assert sorted(finished_run.rglob("*")) == before
    assert [path.name for path in finished_run.parent.glob("run*")] == ["run"]


def test_what_is_saved_is_the_state_of_that_moment(tmp_path, tiny_config):
    """The next, donating steps run while the checkpoint is written."""
    trainer = Trainer(tiny_config(run={"num_steps": 4}), progress=False)
    double = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 2 + 1, state), donate_argnums=0)
    state = jax.tree.map(jnp.copy, trainer.state)
    with Checkpoints(tmp_path / "other", keep=5) as checkpoints:
        wanted = {}
        for _ in range(4):
            wanted[int(state.step)] = jax.tree.map(np.array, state)
            checkpoints.save(state)
            state = double(state)
        checkpoints.wait()
        assert len(wanted) == 4
        for step, want in wanted.items():
            jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(step, state), want)
