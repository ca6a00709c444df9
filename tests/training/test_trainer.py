import math
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training import Trainer, load_recipe
from training import trainer as trainer_module
from training.data import DataError
from training.meter import TrainingError
from training.metrics import read_rows


def test_loss_falls_on_real_text(tmp_path):
    """Tiny Shakespeare: from 8 bits a byte (all alike) below 4.2; letter frequencies alone give 4.78."""
    overrides = {
        "run.dir": str(tmp_path / "run"),
        "run.log_every": 10,
        "run.num_steps": 100,
        "run.batch_size": 16,
        "data.sequence_length": 64,
        "model.num_layers": 2,
        "model.embed_dim": 128,
        "model.num_heads": 4,
        "schedule.warmup_steps": 10,
        "sample.num_tokens": 30,
        "eval.num_batches": 10,
    }
    result = Trainer(load_recipe("shakespeare_bytes", overrides), progress=False).run()
    losses = [row for row in result.rows if row.loss is not None]
    assert losses[0].bits_per_byte > 5
    assert result.bits_per_byte < 4.2
    assert result.validation_bits_per_byte < 4.2
    assert result.num_skipped == 0
    assert result.stopped_by == "num_steps"
    assert len(result.samples) == 1
    assert result.samples[0].startswith("ROMEO:")
    check_run_folder(tmp_path / "run")


def check_run_folder(run_dir):
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.json", "config.yaml", "checkpoints", "data", "loss.png", "metrics.csv"} <= names
    assert {"samples.txt", "tensorboard"} <= names
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "step 100, sample 1" in (run_dir / "samples.txt").read_text(encoding="utf-8")
    events = next((run_dir / "tensorboard").iterdir()).read_bytes()
    assert b"validation_bits_per_byte" in events
    rows = read_rows(run_dir / "metrics.csv")
    assert [row.step for row in rows if row.loss is not None] == list(range(10, 101, 10))
    assert rows[-1].validation_loss is not None
    last = rows[-2]
    assert last.num_tokens == 100 * 16 * 64
    assert last.tokens_per_second > 0
    np.testing.assert_allclose(last.bits_per_byte, last.loss / math.log(2) * 1003859 / 1003854, rtol=1e-4)


def test_bad_steps_end_the_run_with_a_clear_error(tiny_config, tmp_path):
    trainer = Trainer(tiny_config(run={"max_bad_steps": 3, "checkpoint_every": 100}), progress=False)
    table = trainer.state.params["token_embedding"]["table"]
    trainer.state.params["token_embedding"]["table"] = table.at[:, 0].set(jnp.nan)
    with pytest.raises(TrainingError, match=r"of 3 steps in a row were NaN or infinite .*up to step 3"):
        trainer.run()
    assert trainer.step <= 4  # the numbers are read one step late
    assert trainer.checkpoints.latest_step() is None
    assert read_rows(tmp_path / "run" / "metrics.csv")[-1].num_skipped == 3


def test_a_few_bad_steps_are_skipped_and_counted(tiny_config):
    trainer = Trainer(tiny_config(run={"max_bad_steps": 3}), progress=False)
    step = trainer.train_step

    def sometimes_bad(state, batch):
        if trainer.step not in (2, 3, 6):
            return step(state, batch)
        kept = jax.tree.map(jnp.copy, state.params)
        params = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params)
        state, metrics = step(state._replace(params=params), batch)
        return state._replace(params=kept), metrics

    trainer.train_step = sometimes_bad
    result = trainer.run()
    assert result.num_skipped == 3
    assert result.step == 10
    by_step = {row.step: row for row in result.rows if row.num_skipped is not None}
    assert [by_step[step].num_skipped for step in (2, 3, 4, 6, 7, 10)] == [0, 1, 2, 2, 3, 3]
    assert by_step[3].loss is None
    assert by_step[10].loss is not None


@pytest.fixture
def trained(tiny_config):
    """A trainer whose step is compiled, so that times below are short."""
    return Trainer(tiny_config(run={"num_steps": 2000, "checkpoint_every": 5000}), progress=False)


def test_max_seconds_stops_with_a_checkpoint(trained):
    trained.config = _with_run(trained.config, max_seconds=1e-3)
    result = trained.run()
    assert result.stopped_by == "max_seconds"
    assert result.step == trained.checkpoints.latest_step() == 1
    assert result.validation_loss is not None


def test_ctrl_c_stops_between_steps_with_a_checkpoint(trained):
    step = trained.train_step

    def interrupted_step(state, batch):
        if trained.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(state, batch)

    trained.train_step = interrupted_step
    before = signal.getsignal(signal.SIGINT)
    result = trained.run()
    assert result.stopped_by == "interrupt"
    assert result.step == trained.checkpoints.latest_step() == 4
    assert signal.getsignal(signal.SIGINT) is before


def _with_run(config, **changes):
    tree = config.to_dict()
    tree["run"] |= changes
    return type(config).from_dict(tree)


def test_a_run_in_a_thread_needs_no_signals(tiny_config):
    trainer, results = Trainer(tiny_config(run={"num_steps": 3}), progress=False), []
    thread = threading.Thread(target=lambda: results.append(trainer.run()))
    thread.start()
    thread.join()
    assert results[0].step == 3


def test_a_finished_run_has_nothing_left_to_do(tiny_config):
    first = Trainer(tiny_config(run={"num_steps": 3}), progress=False).run()
    again = Trainer(tiny_config(run={"num_steps": 3}), progress=False)
    again.train_step = None
    second = again.run()
    assert second.step == 3
    assert second.validation_loss == pytest.approx(first.validation_loss, rel=1e-5)
    assert [row.step for row in second.rows] == [row.step for row in first.rows]


def test_events_come_at_their_steps(tiny_config, monkeypatch):
    config = tiny_config(
        run={"num_steps": 7, "checkpoint_every": 3, "log_every": 2},
        eval={"every": 2},
        sample={"every": 5, "num_tokens": 3, "prompts": ["the", ""]},
    )
    trainer = Trainer(config, progress=False)
    saved = []
    save = trainer.checkpoints.save
    trainer.checkpoints.save = lambda state: (saved.append(int(state.step)), save(state))
    result = trainer.run()
    assert saved == [3, 6, 7]
    assert [row.step for row in result.rows if row.loss is not None] == [2, 4, 6]
    assert [row.step for row in result.rows if row.validation_loss is not None] == [2, 4, 6, 7]
    samples = (trainer.run_dir / "samples.txt").read_text(encoding="utf-8")
    titles = [line for line in samples.splitlines() if line.startswith("--- ")]
    assert titles == [f"--- step {step}, sample {number} ---" for step in (5, 7) for number in (1, 2)]
    assert result.samples[0].startswith("the")


def test_the_host_reads_a_step_only_after_it_has_started_the_next(tiny_config, monkeypatch):
    """Otherwise the device would idle while Python writes numbers down."""
    trainer = Trainer(tiny_config(run={"num_steps": 5}), progress=False)
    events, step, count_time = [], trainer.train_step, trainer_module.Meter._count_time

    def noted_step(state, batch):
        events.append("start")
        return step(state, batch)

    def noted_count(self, batch):
        events.append("read")
        count_time(self, batch)

    trainer.train_step = noted_step
    monkeypatch.setattr(trainer_module.Meter, "_count_time", noted_count)
    trainer.run()
    assert events == ["start", "start", "read", "start", "read", "start", "read", "start", "read", "read"]


def test_prefetch_reads_every_step_in_order():
    assert list(trainer_module.prefetch(lambda step: step * 10, 3, 9)) == [30, 40, 50, 60, 70, 80]
    assert list(trainer_module.prefetch(lambda step: step, 4, 4)) == []


def test_prefetch_passes_errors_on():
    def read(step):
        if step == 2:
            raise DataError("broken")
        return step

    batches = trainer_module.prefetch(read, 0, 5)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(DataError, match="broken"):
        next(batches)


def test_no_text_is_an_error(tiny_config):
    with pytest.raises(DataError, match=r"data\.text: give a text file or folder"):
        Trainer(tiny_config(data={"text": None}), progress=False)


def test_prepared_tokens_are_enough(tiny_config, tmp_path):
    Trainer(tiny_config(), progress=False)
    config = tiny_config(
        data={"text": None, "tokens": str(tmp_path / "run" / "data")}, run={"dir": str(tmp_path / "b")}
    )
    trainer = Trainer(config, progress=False)
    assert trainer.tokens.num_documents == 3
    assert not (tmp_path / "b" / "data").exists()
