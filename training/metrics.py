"""What a run leaves for people: metrics.csv, TensorBoard events, loss.png, and a progress bar."""

import csv
import os
from pathlib import Path
from typing import Any, NamedTuple, Self

from tqdm.auto import tqdm


class Row(NamedTuple):
    """One line of metrics.csv; None where a step has no such number."""

    step: int  # optimizer steps done
    seconds: float  # of training since the run folder was begun, without evaluations and samples
    num_tokens: int  # read so far, padding included
    loss: float | None = None  # nats a token, mean over the steps since the last row
    bits_per_byte: float | None = None
    gradient_norm: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None  # without padding
    mfu: float | None = None  # share of the device's peak, 0 to 1
    num_skipped: int | None = None  # steps with a NaN or infinite gradient so far
    validation_loss: float | None = None
    validation_bits_per_byte: float | None = None


_KINDS = {"step": int, "num_tokens": int, "num_skipped": int}


class MetricsLog:
    """Appends rows to `metrics.csv` and to TensorBoard; opening it for a resumed run drops later rows."""

    def __init__(self, run_dir: Path, *, resume_step: int, tensorboard: bool):
        self.path = run_dir / "metrics.csv"
        self.rows = [row for row in read_rows(self.path) if row.step <= resume_step]
        partial = self.path.with_suffix(".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows(map(_cells, self.rows))
        os.replace(partial, self.path)
        self.file = self.path.open("a", newline="", encoding="utf-8")
        self.events = _open_events(run_dir, resume_step) if tensorboard else None

    def write(self, row: Row) -> None:
        self.rows.append(row)
        csv.writer(self.file).writerow(_cells(row))
        self.file.flush()
        if self.events is not None:
            for name, value in row._asdict().items():
                if value is not None and name not in ("step", "seconds"):
                    self.events.add_scalar(name, value, row.step)

    def write_text(self, name: str, text: str, step: int) -> None:
        if self.events is not None:
            self.events.add_text(name, text, step)

    def close(self) -> None:
        self.file.close()
        if self.events is not None:
            self.events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.csv; a line that a kill cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for cells in csv.DictReader(file):
            if tuple(cells) != Row._fields or None in cells.values():
                continue
            values: dict[str, Any] = {k: _KINDS.get(k, float)(v) if v else None for k, v in cells.items()}
            rows.append(Row(**values))
    return rows


def _cells(row: Row) -> list[Any]:
    return ["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in row]


def _open_events(run_dir: Path, resume_step: int) -> Any:
    from tensorboardX import SummaryWriter  # imported only where it is used: 0.5 s

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)


def plot_losses(rows: list[Row], path: Path) -> None:
    """Loss curve, training and validation, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    series = {"training": ("bits_per_byte", "-"), "validation": ("validation_bits_per_byte", "o-")}
    for label, (name, style) in series.items():
        points = [(row.step, value) for row in rows if (value := getattr(row, name)) is not None]
        if points:
            axes.plot(
                *zip(*points, strict=True), style, label=f"{label}, last {points[-1][1]:.3f}", markersize=4
            )
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


class ProgressBar:
    """A tqdm line with loss, bits per byte and tokens/s; its ETA is tqdm's own."""

    def __init__(self, *, total: int, initial: int, enabled: bool):
        self.bar = tqdm(
            total=total,
            initial=initial,
            unit="step",
            desc="training",
            disable=not enabled,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def update(
        self, loss: float, bits_per_byte: float, tokens_per_second: float | None, mfu: float | None
    ) -> None:
        text = f"loss {loss:.3f}, {bits_per_byte:.3f} bits/byte"
        if tokens_per_second is not None:
            text += f", {tokens_per_second:,.0f} tokens/s"
        if mfu is not None:
            text += f", MFU {mfu:.1%}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
