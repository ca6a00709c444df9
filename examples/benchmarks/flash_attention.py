"""FlashAttention on this GPU against cuDNN, Tokamax (where installed) and XLA.

    python examples/benchmarks/flash_attention.py --out flash_attention.json --plot flash_attention.png
    python examples/benchmarks/flash_attention.py --quick                        # the main table, one process
    python examples/benchmarks/flash_attention.py --rows "window|H=96"
    python examples/benchmarks/flash_attention.py --shape "B=4 T=4096 N=32 K=8 H=128 causal"

Forward, and forward + backward. Time is the time in kernels by CUPTI on random data: the median over fresh
processes (3 by default) of each one's median over runs; peers take turns within a process. FLOPs are counted
as 4 H for each pair of a query and a key it sees, x 3.5 for forward + backward, whatever an implementation
does. The rows that ask for deterministic gradients run in processes of their own, with
--xla_gpu_deterministic_ops, which makes cuDNN so. Standard attention, computed by XLA, is measured in the
first process and beside the main table and on float32 only. FlashAttention's claims against it
(flash_claims.py) are measured last, unless --no-claims.

A process that hangs is killed. --out is rewritten as figures come in, so that a run which is cut off, or has
no more --max-seconds, leaves what was measured, and says what was not.
"""

import argparse
import dataclasses
import os
import re
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import attention_tables
import flash_claims
import report
from attention_peers import PEERS, STANDARD
from attention_rows import MAIN_ROWS, ROWS, Row, parse_row
from processes import Deadline, Worker, device_of, run_in_turn

COMPILE_SECONDS = 400  # of all processes at once
COMPILE_SHARE = 0.6  # of what is left of --max-seconds
PART_SECONDS = 90  # between two figures of a process; standard attention is compiled in between


def start_workers(rows: list[Row], options: argparse.Namespace, compile_seconds: float) -> list[Worker]:
    """All processes, those of the first turn first; `share` are the labels of a process's rows."""
    plain = [row for row in rows if not row.deterministic]
    deterministic = [row for row in rows if row.deterministic]
    # Python traces and lowers on one core a process: several processes share the rows of one turn.
    groups = max(1, len(os.sched_getaffinity(0)) // (options.processes + 1))
    shares = [(plain[group::groups], "") for group in range(groups)]
    shares.append((deterministic, "--xla_gpu_deterministic_ops"))
    shares = [share for share in shares if share[0]]
    peers = [peer for peer in PEERS if peer != STANDARD]
    workers = []
    for turn in range(options.processes):
        for index, (share, flags) in enumerate(shares):
            job = {"turn": turn, "peers": peers, "ceiling": index == 0, "compile_seconds": compile_seconds}
            job["rows"] = [dataclasses.asdict(row) for row in share]
            labels = tuple(row.label for row in share)
            workers.append(Worker("attention_worker.py", job, flags, labels))
    return workers


def result_of(worker: Worker) -> dict:
    """What a process measured, its parts put together."""
    rows: dict[str, dict] = {}
    for part in worker.parts:
        if "row" in part:
            label, peers = part["row"]["label"], part["row"]["peers"]
            row = rows.setdefault(label, {"label": label, "peers": {}})
            for peer, figures in peers.items():
                row["peers"][peer] = row["peers"].get(peer, {}) | figures
    return {
        "compile_seconds": worker.facts.get("seconds"),
        "matmul_tflops": [part["matmul_tflops"] for part in worker.parts if "matmul_tflops" in part],
        "rows": list(rows.values()),
        "share": list(worker.share),
        **(worker.done or {}),
        **({"failure": worker.failure} if worker.failure else {}),
    }


def measure(
    rows: list[Row], options: argparse.Namespace, deadline: Deadline, keep: Callable[[dict], None]
) -> dict:
    """Compiles in all processes at once; then each has the GPU to itself in turn. `keep` is given all figures
    whenever there are more.
    """
    start = time.perf_counter()
    figures: dict = {}
    compile_seconds = deadline.at_most(COMPILE_SECONDS, share=COMPILE_SHARE)
    workers = start_workers(rows, options, compile_seconds)

    def update() -> None:
        results = [result_of(worker) for worker in workers]
        compiling = max((worker.facts.get("seconds", 0) for worker in workers), default=0)
        seconds = {"compile, all processes at once": compiling}
        seconds["all"] = round(time.perf_counter() - start, 1)
        figures.update(device_of(workers))
        timing = f"CUPTI kernel time; median of {options.processes} fresh processes of medians over runs"
        processes = [{k: v for k, v in r.items() if k not in ("rows", "share")} for r in results]
        figures.update({"timing": timing, "seconds": seconds, "processes": processes})
        figures.update(attention_tables.combine(rows, results))
        if figures["rows"]:
            keep(figures)

    run_in_turn(workers, deadline, compile_seconds, PART_SECONDS, update)
    return figures


def measure_claims(deadline: Deadline, keep: Callable[[dict], None]) -> dict:
    """The claims, in a process of their own."""
    worker = Worker("flash_claims.py", {})
    figures: dict = {}

    def update() -> None:
        figures.update(flash_claims.collect(worker.parts) | (worker.done or {}))
        figures.update(device_of([worker]))
        figures.update({"failure": worker.failure} if worker.failure else {})
        if figures["calls"]:
            keep(figures)

    run_in_turn([worker], deadline, COMPILE_SECONDS, PART_SECONDS, update)
    return figures


def parse() -> argparse.Namespace:
    parser = report.parser(
        __doc__, "write every figure here, as JSON; those of the claims to NAME_claims.json"
    )
    parser.add_argument("--plot", help="write charts here, as PNG")
    parser.add_argument("--plot-from", help="measure nothing: tables and charts of this JSON")
    parser.add_argument("--markdown", action="store_true", help="print tables as Markdown, for the README")
    parser.add_argument("--quick", action="store_true", help="one process and the main table only")
    parser.add_argument("--rows", metavar="REGEX", help="only rows whose section or label matches")
    parser.add_argument(
        "--shape", action="append", help='a row of your own, "B=4 T=4096 N=32 K=8 H=128 causal"'
    )
    parser.add_argument("--processes", type=int, default=3, help="fresh processes (3)")
    parser.add_argument("--claims", action=argparse.BooleanOptionalAction, help="against standard attention")
    parser.add_argument("--only-claims", action="store_true", help="nothing but those")
    options = parser.parse_args()
    if options.quick:
        options.processes = 1
    if options.processes < 1:
        parser.error(f"--processes must be at least 1, got {options.processes}")
    if options.claims is None:
        options.claims = options.only_claims or not (options.quick or options.rows or options.shape)
    try:
        options.selected = select(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def select(options: argparse.Namespace) -> list[Row]:
    """The rows that the command line asks for."""
    if options.only_claims:
        return []
    if options.shape:
        return [parse_row(text) for text in options.shape]
    rows = MAIN_ROWS if options.quick else ROWS
    if not options.rows:
        return rows
    try:
        chosen = [row for row in ROWS if re.search(options.rows, f"{row.section} {row.label}")]
    except re.error as error:
        raise ValueError(f"--rows: {options.rows!r} is no regular expression: {error}") from error
    if not chosen:
        raise ValueError(f"--rows: {options.rows!r} matches none of " + "; ".join(row.label for row in ROWS))
    return chosen


def beside(path: str | None) -> str | None:
    """NAME_claims.png of NAME.png."""
    return path and str(Path(path).with_stem(Path(path).stem + "_claims"))


def publish(
    figures: dict, module: types.ModuleType, options: argparse.Namespace, rename=lambda path: path
) -> None:
    """Prints the table of what was measured, writes its JSON and its chart."""
    if not (figures.get("rows") or figures.get("calls")):
        return
    if not options.plot_from:
        report.save(rename(options.out), figures)
        figures = report.environment(figures) | figures
    print(module.text(figures, report.markdown if options.markdown else report.table) + "\n")
    if options.plot:
        module.plot(figures, rename(options.plot))


def run(options: argparse.Namespace) -> tuple[dict, dict]:
    """Measures the rows, then the claims."""
    what = f"{len(options.selected)} rows of attention, {options.processes} turns"
    report.begin_processes(what if options.selected else "Claims against standard attention")
    deadline = Deadline(options.max_seconds)
    rows, claims = {}, {}
    if options.selected:
        rows = measure(options.selected, options, deadline, lambda f: report.save(options.out, f, False))
    if options.claims:
        claims = measure_claims(deadline, lambda f: report.save(beside(options.out), f, False))
    return rows, claims


def earlier(path: str) -> tuple[dict, dict]:
    """Figures of an earlier run: rows, the claims beside them, or both."""
    rows, claims, beside_it = {}, {}, str(beside(path))
    if Path(path).exists() or not Path(beside_it).exists():
        rows = report.read("--plot-from", path, attention_tables.FIELDS, ("label", "section", "peers"))
    if Path(beside_it).exists():
        fields, of_calls = ("shape", "limit_bytes", "longest"), ("name", "metric", "T")
        claims = report.read("--plot-from", beside_it, fields, of_calls, "calls")
    return rows, claims


def main() -> int:
    options = parse()
    if options.plot_from:
        rows, claims = earlier(options.plot_from)
    else:
        rows, claims = run(options)
    publish(rows, attention_tables, options)
    publish(claims, flash_claims, options, rename=beside)
    failures = [process["failure"] for process in rows.get("processes", ()) if "failure" in process]
    failures += [f"the claims: {claims['failure']}"] if "failure" in claims else []
    for failure in dict.fromkeys(failures):
        print(f"flash_attention.py: a process failed: {failure}", file=sys.stderr)
    return 1 if failures and not options.plot_from else 0


if __name__ == "__main__":
    sys.exit(main())
