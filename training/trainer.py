"""The run: steps, evaluations, samples, checkpoints, and a clean stop."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
from tqdm.auto import tqdm

from jaxattn.tokenizer_files import get_tokenizer
from jaxattn.weights.checkpoint import write_metadata
from training import flops
from training.checkpoint import Checkpoints
from training.config import TrainConfig
from training.data import Batch, BatchLoader, evaluation_batches
from training.losses import bits_per_byte
from training.meter import Meter
from training.metrics import MetricsLog, ProgressBar, Row, plot_losses
from training.sample import make_generate, write_samples
from training.setup import (
    check_attention,
    check_same_run,
    initial_params,
    make_model_config,
    moved_aside,
    open_or_prepare,
    write_config,
)
from training.step import init_train_state, make_eval_step, make_train_step

BATCHES_AHEAD = 2


class TrainResult(NamedTuple):
    run_dir: Path  # jaxattn.load_model(run_dir) gives the trained model
    step: int  # optimizer steps done
    stopped_by: str  # "num_steps", "max_seconds" or "interrupt"
    loss: float | None  # training, nats a token, last row of metrics.csv
    bits_per_byte: float | None
    validation_loss: float | None
    validation_bits_per_byte: float | None
    num_skipped: int  # steps with a NaN or infinite gradient
    samples: list[str]  # the last ones, prompts included
    rows: list[Row]  # metrics.csv


class Trainer:
    """Prepares all that a run needs; `run()` trains and returns what came of it.

        trainer = Trainer(load_recipe("shakespeare_bytes", {"run.num_steps": 200}))
        result = trainer.run()

    A run folder that has checkpoints is continued, on a CPU bit for bit as if it had never stopped; with
    `fresh` it is moved aside first.

    Raises:
        ConfigError, DataError, CheckpointError: with one line that says what to change.
    """

    def __init__(self, config: TrainConfig, *, fresh: bool = False, progress: bool = True):
        self.config, self.progress, self.run_dir = config, progress, Path(config.run.dir)
        check_attention(config)
        with moved_aside(self.run_dir) if fresh else contextlib.nullcontext() as earlier:
            self._prepare()
        if earlier is not None:
            self._say(f"the earlier run is kept in {earlier}")

    def _prepare(self) -> None:
        """Reads, checks and builds everything; what is wrong shows here."""
        config, progress = self.config, self.progress
        changes = check_same_run(self.run_dir, config)
        self.tokens = open_or_prepare(config, progress=progress)
        self.tokenizer = get_tokenizer(str(self.tokens.folder))
        self.model_config = make_model_config(config, self.tokenizer.vocab_size)
        by_default = "packed" if self.tokens.num_documents > 1 else "stream"
        self._windows: dict[str, Any] = {
            "sequence_length": config.data.sequence_length,
            "documents": config.data.documents or by_default,
        }
        self.loader = BatchLoader(
            self.tokens, batch_size=config.run.batch_size, seed=config.run.seed, **self._windows
        )
        params = initial_params(self.model_config, config.run.seed)
        self.num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self.num_matmul_parameters = flops.matmul_parameters(params, self.model_config)
        self.state = init_train_state(config, params)
        self.checkpoints = Checkpoints(self.run_dir, keep=config.run.keep_checkpoints)
        self.step = self.checkpoints.latest_step() or 0  # optimizer steps done
        if self.step:
            self.state = self.checkpoints.restore(self.step, self.state)
            self._say(f"continues {self.run_dir} from step {self.step:,}", *changes)
        self.train_step = make_train_step(config, self.model_config)
        self.eval_step = make_eval_step(config, self.model_config)
        self.generate = make_generate(config, self.model_config)
        self.samples: list[str] = []
        self.run_dir.mkdir(parents=True, exist_ok=True)

    def run(self) -> TrainResult:
        """Trains until num_steps, max_seconds or Ctrl-C; whichever it is, a checkpoint holds the state.

        Raises:
            TrainingError: max_bad_steps gradients in a row were NaN or infinite.
        """
        run = self.config.run
        write_metadata(self.run_dir, self.model_config, self.tokenizer)
        write_config(self.run_dir, self.config)
        with contextlib.ExitStack() as stack:
            stack.callback(self.checkpoints.wait)
            log = MetricsLog(self.run_dir, resume_step=self.step, tensorboard=run.tensorboard)
            self.log = stack.enter_context(log)
            bar = ProgressBar(total=run.num_steps, initial=self.step, enabled=self.progress)
            self.meter = self._make_meter(stack.enter_context(bar))
            stop_signal = stack.enter_context(catch_stop_signals())
            stopped_by = self._train(stop_signal)
            self.checkpoints.save(self.state)
            if stopped_by != "interrupt":
                self._finish()
            plot_losses(self.log.rows, self.run_dir / "loss.png")
        return self._result(stopped_by)

    def _train(self, is_stopped: Callable[[], bool]) -> str:
        run = self.config.run
        deadline = time.monotonic() + (run.max_seconds or float("inf"))
        with contextlib.closing(prefetch(self.loader.batch, self.step, run.num_steps)) as batches:
            for batch in batches:
                self.state, metrics = self.train_step(self.state, batch)
                self.step += 1
                self.meter.add(self.step, metrics, batch)
                if is_stopped() or time.monotonic() > deadline:
                    self.meter.pause()
                    return "interrupt" if is_stopped() else "max_seconds"
                if self.step < run.num_steps:
                    self._look()
        self.meter.pause()
        return "num_steps"

    def _look(self) -> None:
        """Whatever is due after this step: checkpoint, evaluation, samples."""

        def is_due(every: int) -> bool:
            return every > 0 and self.step % every == 0

        config = self.config
        save, evaluate = is_due(config.run.checkpoint_every), is_due(config.eval.every)
        sample = is_due(config.sample.every) and config.sample.num_tokens > 0
        if not (save or evaluate or sample):
            return
        self.meter.pause()
        if save:
            self.checkpoints.save(self.state)
        if evaluate:
            self.evaluate()
        if sample:
            self.write_samples()

    def _finish(self) -> None:
        if not any(row.step == self.step and row.validation_loss is not None for row in self.log.rows):
            self.evaluate()
        if self.config.sample.num_tokens:
            self.write_samples()

    def evaluate(self) -> float:
        """Mean loss of the held-out text in nats a token; also written to the log."""
        batches = evaluation_batches(
            self.tokens,
            batch_size=self.config.num_micro_sequences,
            num_batches=self.config.eval.num_batches,
            **self._windows,
        )
        sums = [self.eval_step(self.state.params, batch) for batch in batches]
        loss = sum(float(part.total) for part in sums) / sum(int(part.count) for part in sums)
        bits = bits_per_byte(loss, self.tokens.bytes_per_token("validation"))
        self.log.write(
            Row(
                step=self.step,
                seconds=self.meter.seconds,
                num_tokens=self.step * self.config.run.batch_size * self.config.data.sequence_length,
                validation_loss=loss,
                validation_bits_per_byte=bits,
            )
        )
        self._say(f"step {self.step:,}: validation loss {loss:.4f}, {bits:.4f} bits per byte")
        return loss

    def write_samples(self) -> list[str]:
        """Texts by the model as it is now; also written to samples.txt and TensorBoard."""
        self.samples = write_samples(
            self.generate,
            self.config,
            self.state.params,
            self.tokenizer,
            self.step,
            self.model_config.max_positions,
        )
        with (self.run_dir / "samples.txt").open("a", encoding="utf-8") as file:
            for number, text in enumerate(self.samples):
                title = f"step {self.step:,}, sample {number + 1}"
                file.write(f"--- {title} ---\n{text}\n\n")
                self.log.write_text(f"sample {number + 1}", text, self.step)
                self._say(f"{title}: {text!r}")
        return self.samples

    def _make_meter(self, bar: ProgressBar) -> Meter:
        return Meter(
            self.log,
            bar,
            log_every=self.config.run.log_every,
            max_bad_steps=self.config.run.max_bad_steps,
            bytes_per_token=self.tokens.bytes_per_token("train"),
            batch_flops=lambda batch: flops.step_flops(batch, self.num_matmul_parameters, self.model_config),
            peak_flops=flops.peak_flops(jax.devices()[0], self.config.run.dtype),
        )

    def _result(self, stopped_by: str) -> TrainResult:
        def last(name: str) -> Any:
            return next((v for row in reversed(self.log.rows) if (v := getattr(row, name)) is not None), None)

        return TrainResult(
            run_dir=self.run_dir,
            step=self.step,
            stopped_by=stopped_by,
            loss=last("loss"),
            bits_per_byte=last("bits_per_byte"),
            validation_loss=last("validation_loss"),
            validation_bits_per_byte=last("validation_bits_per_byte"),
            num_skipped=int(self.state.optimizer.num_skipped),
            samples=self.samples,
            rows=self.log.rows,
        )

    def _say(self, *lines: str) -> None:
        if self.progress:
            tqdm.write("\n  ".join(lines))


def prefetch(read: Callable[[int], Batch], start: int, stop: int) -> Generator[Batch]:
    """read(start), ..., read(stop - 1), made in a thread while the steps before them run."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = [pool.submit(read, step) for step in range(start, min(stop, start + BATCHES_AHEAD))]
        for step in range(start, stop):
            batch = ahead.pop(0).result()
            if step + BATCHES_AHEAD < stop:
                ahead.append(pool.submit(read, step + BATCHES_AHEAD))
            yield batch


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C or SIGTERM came; a second one acts at once.

    A step that is cut off in the middle would leave a half-donated state: the loop asks between steps.
    """
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number: int, frame: Any) -> None:
        came.set()
        restore()

    for number in handlers:
        signal.signal(number, note)
    try:
        yield came.is_set
    finally:
        restore()
