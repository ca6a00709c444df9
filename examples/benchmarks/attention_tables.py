"""Medians, ratios, tables and charts of what the processes of flash_attention.py measured."""

import dataclasses
import math
import statistics
from collections.abc import Callable
from typing import Any

import report
from attention_peers import OURS, STANDARD
from attention_rows import Row

FACTORS = {"forward": 1.0, "forward_backward": 3.5}  # FLOPs over those of the forward pass
TITLES = {"forward": "forward", "forward_backward": "forward + backward"}
FIELDS = ("device", "versions", "seconds", "matmul_8192_tflops", "means")  # that the tables take, beside rows
TIE = 0.02  # rates that are closer are equal


def combine(rows: list[Row], results: list[dict]) -> dict:
    """The ceiling, for each row the medians over processes, and why rows were not measured."""
    by_label: dict[str, list[dict]] = {}
    for result in results:
        for row in result.get("rows", ()):
            by_label.setdefault(row["label"], []).append(row["peers"])
    matmuls = [rate for result in results for rate in result.get("matmul_tflops", ())]
    ceiling = statistics.median(matmuls) if matmuls else None
    combined = [_combine_row(row, by_label[row.label], ceiling) for row in rows if row.label in by_label]
    failures = {
        label: result["failure"]
        for result in reversed(results)
        for label in result.get("share", ())
        if "failure" in result
    }
    missing = {row.label: failures.get(row.label, "not reached") for row in rows if row.label not in by_label}
    return {
        "matmul_8192_tflops": ceiling,
        "rows": combined,
        "not_measured": missing,
        "means": means(combined),
    }


def _combine_row(row: Row, runs: list[dict], ceiling: float | None) -> dict:
    names = dict.fromkeys(peer for run in runs for peer in run)  # standard attention is in one run only
    peers = {}
    for peer in sorted(names, key=lambda peer: (peer != OURS, peer == STANDARD)):
        of_runs = [run[peer] for run in runs if peer in run]
        figures: dict[str, Any] = {}
        for metric, factor in FACTORS.items():
            known = {key: value for run in reversed(of_runs) for key, value in run.items()}
            times = [run[f"{metric}_ms"] for run in of_runs if f"{metric}_ms" in run]
            figures[f"{metric}_temp_bytes"] = known.get(f"{metric}_temp_bytes")
            if times:
                rate = factor * row.flops / statistics.median(times) / 1e9
                figures[f"{metric}_ms"] = times
                figures[f"{metric}_tflops"] = rate
                figures[f"{metric}_share_of_matmul"] = ceiling and rate / ceiling
            else:
                figures[f"{metric}_error"] = known.get(f"{metric}_error", "not reached")
        peers[peer] = figures
    entry = {"label": row.label, **dataclasses.asdict(row), "forward_flops": row.flops, "peers": peers}
    entry["ratio_to_best_peer"] = {metric: _ratio(entry, metric) for metric in FACTORS}
    if row.recorded:
        entry["recorded"] = dict(zip(("source", *FACTORS), (row.recorded[0], *row.recorded[1]), strict=True))
    return entry


def _ratio(entry: dict, metric: str) -> float | None:
    """Our rate over the best peer's. Standard attention is shown, but is no peer to be ahead of."""
    rates = {peer: figures.get(f"{metric}_tflops") for peer, figures in entry["peers"].items()}
    ours = rates.pop(OURS, None)
    rates.pop(STANDARD, None)
    others = [rate for rate in rates.values() if rate]
    return ours / max(others) if ours and others else None


def means(rows: list[dict]) -> dict:
    """Geometric means of our rate over the best peer's, and over FlashAttention-4's recorded one."""
    figures: dict[str, Any] = {}
    for metric in FACTORS:
        main = [row for row in rows if row["section"] == "main"]
        figures[f"{metric}, main table, over the best peer"] = _mean(
            row["ratio_to_best_peer"][metric] for row in main
        )
        figures[f"{metric}, all rows, over the best peer"] = _mean(
            row["ratio_to_best_peer"][metric] for row in rows
        )
        figures[f"{metric}, over FlashAttention-4 (recorded)"] = _mean(
            (rate := row["peers"].get(OURS, {}).get(f"{metric}_tflops")) and rate / row["recorded"][metric]
            for row in main
        )
    return figures


def _mean(ratios: Any) -> float | None:
    ratios = [ratio for ratio in ratios if ratio]
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else None


def verdict(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return "tie" if abs(ratio - 1) <= TIE else "ahead" if ratio > 1 else "behind"


def text(result: dict, as_table: Callable[..., str]) -> str:
    """One table for each direction, and the geometric means."""
    rows = result["rows"]
    names = list(dict.fromkeys(peer for row in rows for peer in row["peers"]))
    ceiling = result["matmul_8192_tflops"]
    parts = [
        f"{result['device']}, {result['versions']}; matmul {ceiling and round(ceiling)} TFLOP/s; "
        f"seconds: {result['seconds']}"
    ]
    for metric in FACTORS:
        header = (f"{TITLES[metric]}, TFLOP/s", *names, "recorded*", "of best peer", "", "of matmul")
        parts.append(as_table(header, [_line(row, names, metric) for row in rows]))
    sources = dict.fromkeys(row["recorded"]["source"] for row in rows if "recorded" in row)
    parts.append("\n".join(["* recorded on an H200 in another run:", *(f"  {source}" for source in sources)]))
    parts += _sparse(rows)
    parts.append("\n".join(["no figure:", *_reasons(rows)]))
    if missing := result.get("not_measured"):
        lines = [f"  {label}: {reason}" for label, reason in missing.items()]
        parts.append("\n".join([f"not measured, {len(missing)} rows:", *lines]))
    ratios = {name: value for name, value in result["means"].items() if isinstance(value, float)}
    parts.append(
        "\n".join(["geometric means:", *(f"  {name}: {ratio:.3f}" for name, ratio in ratios.items())])
    )
    return "\n\n".join(parts)


def _line(row: dict, names: list[str], metric: str) -> tuple:
    ratio = row["ratio_to_best_peer"][metric]
    rates = [_whole(row["peers"].get(name, {}).get(f"{metric}_tflops")) for name in names]
    recorded = row.get("recorded", {}).get(metric)
    share = row["peers"].get(OURS, {}).get(f"{metric}_share_of_matmul")
    return (row["label"], *rates, recorded, ratio, verdict(ratio), share)


def _sparse(rows: list[dict]) -> list[str]:
    """Our rate on the work that a block mask leaves, over the rate without one."""
    lines = []
    for metric in FACTORS:
        rates = {
            row["density"]: row["peers"].get(OURS, {}).get(f"{metric}_tflops")
            for row in rows
            if row["section"] == "block sparse"
        }
        dense = rates.pop(0.0, None)
        shares = [f"{d}: {rate / dense:.2f}" for d, rate in rates.items() if rate and dense]
        lines += [f"  {TITLES[metric]}: {', '.join(shares)}"] if shares else []
    return ["\n".join(["block-sparse rate over the dense one, by density:", *lines])] if lines else []


def _reasons(rows: list[dict]) -> list[str]:
    """Why peers have no figure, each reason once with the first row that gave it."""
    reasons: dict[str, str] = {}
    for row in rows:
        for peer, figures in row["peers"].items():
            for metric in FACTORS:
                if error := figures.get(f"{metric}_error"):
                    reasons.setdefault(f"{peer}, {TITLES[metric]}: {error}", row["label"])
    return [f"  {reason} (first: {label})" for reason, label in reasons.items()] or ["  none"]


def _whole(rate: float | None) -> float | int | None:
    return round(rate) if rate and rate >= 10 else rate


def plot(result: dict, path: str) -> None:
    """Rates of the main table; below, our rate over the best peer's in every row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    main = [row for row in result["rows"] if row["section"] == "main"] or result["rows"]
    names = measured_peers(main)
    figure, axes = plt.subplots(3, 1, figsize=(14, 13), height_ratios=(1, 1, 1.2))
    for axis, metric in zip(axes, FACTORS, strict=False):
        _bars(axis, main, names, metric, result["matmul_8192_tflops"])
        axis.set_title(f"{TITLES[metric]}, {result['device']}")
    axes[0].legend(ncols=6)
    _ratios(axes[2], result["rows"])
    figure.tight_layout()
    report.save_chart(figure, path)
    plt.close(figure)


def measured_peers(rows: list[dict]) -> list[str]:
    """Those that have a figure in any row: the others, not installed perhaps, get no bars and no legend."""
    rates = [
        (peer, figures.get(f"{metric}_tflops"))
        for row in rows
        for peer, figures in row["peers"].items()
        for metric in FACTORS
    ]
    return list(dict.fromkeys(peer for peer, rate in rates if rate))


def _bars(axis: Any, rows: list[dict], names: list[str], metric: str, ceiling: float | None) -> None:
    width = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        rates = [row["peers"].get(name, {}).get(f"{metric}_tflops") or 0 for row in rows]
        axis.bar([x + index * width for x in range(len(rows))], rates, width, label=name)
    if ceiling:
        axis.axhline(ceiling, color="black", linewidth=1, linestyle=":", label="matmul of this run")
    labels = [f"H {row['H']}\n{'causal' if row['causal'] else 'full'}\nT {row['T']}" for row in rows]
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(rows))], labels, fontsize=8)
    axis.set_ylabel("TFLOP/s")
    axis.grid(axis="y", alpha=0.3)


def _ratios(axis: Any, rows: list[dict]) -> None:
    for metric, marker in zip(FACTORS, "o^", strict=True):
        points = [(x, row["ratio_to_best_peer"][metric]) for x, row in enumerate(rows)]
        points = [(x, ratio) for x, ratio in points if ratio]
        xs, ys = zip(*points, strict=True) if points else ((), ())
        axis.plot(xs, ys, marker, label=TITLES[metric])
    axis.axhspan(1 - TIE, 1 + TIE, color="gray", alpha=0.3, label="tie")
    axis.set_xticks(range(len(rows)), [row["label"] for row in rows], rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("our rate over the best peer's")
    axis.grid(alpha=0.3)
    axis.legend()
