"""Turns the numbers of single steps into rows of metrics.csv, one step behind the device."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from training.data.batches import NO_TARGET, Batch
from training.losses import bits_per_byte
from training.metrics import MetricsLog, ProgressBar, Row
from training.step import StepMetrics


class TrainingError(RuntimeError):
    """A run that cannot go on."""


class Pending(NamedTuple):
    step: int
    metrics: StepMetrics  # perhaps still being computed
    batch: Batch


class Meter:
    """Reads the numbers of step i once step i + 1 has been started: the device never waits for the host.

    Speed is counted from the end of the first step after a pause: compilation and evaluations are not in it.
    """

    def __init__(
        self,
        log: MetricsLog,
        bar: ProgressBar,
        *,
        log_every: int,
        max_bad_steps: int,
        bytes_per_token: float,
        batch_flops: Callable[[Batch], float],
        peak_flops: float | None,
    ):
        self.log, self.bar = log, bar
        self.log_every, self.max_bad_steps = log_every, max_bad_steps
        self.bytes_per_token, self.batch_flops, self.peak_flops = bytes_per_token, batch_flops, peak_flops
        self.seconds = log.rows[-1].seconds if log.rows else 0.0
        self.pending: Pending | None = None
        self.losses: list[float] = []
        self.rate: tuple[float | None, float | None] = (None, None)  # tokens/s and MFU of the last row
        self.pause()

    def pause(self) -> None:
        """Reads what is pending; time does not count until the next step has ended."""
        self._read()
        self.clock: float | None = None
        self.timed_tokens, self.timed_flops, self.timed_seconds = 0, 0.0, 0.0

    def add(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
        self._read()
        self.pending = Pending(step, metrics, batch)

    def _read(self) -> None:
        if self.pending is None:
            return
        step, metrics, batch = self.pending
        self.pending = None
        loss = float(metrics.loss)  # waits for the step
        self._count_time(batch)
        if not metrics.is_skipped:
            self.losses.append(loss)
        if step % self.log_every == 0:
            self._write_row(step, metrics, batch)
        self.bar.update(loss, bits_per_byte(loss, self.bytes_per_token), *self.rate)
        num_bad = int(metrics.num_skipped_in_row)
        if num_bad >= self.max_bad_steps:
            raise TrainingError(
                f"the gradients of {num_bad} steps in a row were NaN or infinite (run.max_bad_steps="
                f"{self.max_bad_steps}), up to step {step}; the parameters are those from before them. "
                "A lower optimizer.learning_rate or a longer schedule.warmup_steps often helps"
            )

    def _count_time(self, batch: Batch) -> None:
        now = time.monotonic()
        if self.clock is not None:
            self.seconds += now - self.clock
            self.timed_seconds += now - self.clock
            self.timed_tokens += int(np.sum(batch.targets != NO_TARGET))
            self.timed_flops += self.batch_flops(batch)
        self.clock = now

    def _write_row(self, step: int, metrics: StepMetrics, batch: Batch) -> None:
        if self.timed_seconds:
            flops_per_second = self.timed_flops / self.timed_seconds
            mfu = flops_per_second / self.peak_flops if self.peak_flops else None
            self.rate = (self.timed_tokens / self.timed_seconds, mfu)
        loss = float(np.mean(self.losses)) if self.losses else None
        self.log.write(
            Row(
                step=step,
                seconds=self.seconds,
                num_tokens=step * batch.tokens.size,
                loss=loss,
                bits_per_byte=bits_per_byte(loss, self.bytes_per_token) if loss is not None else None,
                gradient_norm=float(metrics.gradient_norm),
                learning_rate=float(metrics.learning_rate),
                tokens_per_second=self.rate[0],
                mfu=self.rate[1],
                num_skipped=int(metrics.num_skipped),
            )
        )
        self.losses.clear()
        self.timed_tokens, self.timed_flops, self.timed_seconds = 0, 0.0, 0.0
