"""Rows of figures from fresh processes, which lower and compile all at once and measure one after another.

A module of peers has `Row`, a NamedTuple with a `label`; PEERS[name](row), which gives a Program or raises
NotImplementedError with why it cannot do that row; and ceiling(iterations), the facts that rows are held to.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import report
from processes import Deadline, Worker, device_of, run_in_turn

COMPILE_SECONDS = 400
PART_SECONDS = 60  # between two figures

Sections = dict[str, list[Any]]  # title: rows
NamesOf = Callable[[Any], Sequence[str]]  # of a row: the peers that are to compute it
FiguresOf = Callable[[Any, dict[str, dict], dict], dict]  # of a row, each peer's figures, and the facts


def measure(
    peers: str,
    sections: Sections,
    names_of: NamesOf,
    figures_of: FiguresOf,
    options: argparse.Namespace,
) -> dict:
    """peers: the name of the module. options.out is rewritten whenever there is more."""
    deadline = Deadline(options.max_seconds)
    compile_seconds = deadline.at_most(COMPILE_SECONDS, share=0.6)
    rows = [row for rows in sections.values() for row in rows]
    # Programs are lowered in Python, one core a process.
    groups = max(1, min(len(rows), len(os.sched_getaffinity(0)) - 2))
    job = {"peers": peers, "iterations": options.iterations, "compile_seconds": compile_seconds}
    workers = []
    for group in range(groups):
        share = rows[group::groups]
        one = {"rows": [row._asdict() for row in share], "names": [list(names_of(row)) for row in share]}
        one |= {**job, "ceiling": group == 0}
        workers.append(Worker("row_worker.py", one, share=tuple(row.label for row in share)))
    result: dict = {"timing": f"CUPTI kernel time, median of {options.iterations}"}

    def update() -> None:
        result.update(device_of(workers))
        result["failures"] = [worker.failure for worker in workers if worker.failure]
        result.update(combine(sections, names_of, figures_of, workers))
        if any(worker.parts for worker in workers):
            report.save(options.out, result, is_last=False)

    run_in_turn(workers, deadline, compile_seconds, PART_SECONDS, update)
    return result


def combine(
    sections: Sections, names_of: NamesOf, figures_of: FiguresOf, workers: Iterable[Worker]
) -> dict[str, Any]:
    """The facts, the figures of all processes by section and row, and why there is none."""
    facts: dict[str, Any] = {}
    said: dict[tuple[str, str], dict] = {}
    failures: dict[str, str] = {}
    for worker in workers:
        for part in worker.parts:
            if "row" in part:
                said[part["row"], part["name"]] = part
            else:
                facts |= part
        failures |= dict.fromkeys(worker.share, worker.failure) if worker.failure else {}
    result: dict[str, Any] = {**facts, "sections": {}, "no_figure": {}}
    for title, rows in sections.items():
        result["sections"][title] = []
        for row in rows:
            parts = {name: said.get((row.label, name), {}) for name in names_of(row)}
            result["sections"][title].append(figures_of(row, parts, facts))
            for name in (name for name, part in parts.items() if "microseconds" not in part):
                reason = parts[name].get("reason", failures.get(row.label, "not reached"))
                result["no_figure"].setdefault(f"{name}: {reason}", []).append(row.label)
    return result


def without_figures(result: dict) -> list[str]:
    """A paragraph, or none, that says what was not measured and why."""
    missing = [f"  {reason} ({', '.join(rows)})" for reason, rows in result.get("no_figure", {}).items()]
    return ["\n".join(["no figure:", *missing])] if missing else []


def parse(parser: argparse.ArgumentParser, sections: Sections) -> argparse.Namespace:
    """The command line of a benchmark whose rows can be chosen: these become its `sections`."""
    parser.add_argument("--rows", metavar="REGEX", help="only rows whose section or label matches")
    parser.add_argument("--iterations", type=report.positive, default=8, help="runs of each call (8)")
    options = parser.parse_args()
    try:
        options.sections = _matching(sections, re.compile(options.rows or ""))
    except re.error as error:
        parser.error(f"--rows must be a regular expression, got {options.rows!r}: {error}")
    if not options.sections:
        parser.error(f"--rows: {options.rows!r} matches no section and no row")
    return options


def _matching(sections: Sections, pattern: re.Pattern) -> Sections:
    """The rows whose section or label matches, and no empty section."""
    chosen = {
        title: [row for row in rows if pattern.search(f"{title}: {row.label}")]
        for title, rows in sections.items()
    }
    return {title: rows for title, rows in chosen.items() if rows}


def percent(share: float | None) -> str:
    return f"{100 * share:.0f}%" if share else "-"


def finish(path: str | None, result: dict, text_of: Callable[[dict], str]) -> int:
    """Saves and prints what was measured, and which processes failed: then exit code 1."""
    if "device" in result:
        report.save(path, result)
        print(text_of(result))
    for failure in dict.fromkeys(result["failures"]):
        print(f"{Path(sys.argv[0]).name}: a process failed: {failure}", file=sys.stderr)
    return 1 if result["failures"] else 0
