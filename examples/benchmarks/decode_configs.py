"""Paged decode under other configs than the default: what the rules of default_config rest on.

    python examples/benchmarks/decode_configs.py --out decode_configs.json
    python examples/benchmarks/decode_configs.py --rows "Yi-6B" --try split=2048 "split=2048 dynamic=1"

Each row of decode, page size 16, takes the default PagedConfig and it with fields changed, measured in turn
in fresh processes; rows that share a prefix go through cascade_attention. Time is kernel time by CUPTI, the
median of several runs, caches that would fit in the L2 cache taken in turn.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import decode_peers
import in_processes
import paged_attention
import report
from decode_peers import Row
from programs import Program

from pallas_kernels import PagedConfig

ceiling = decode_peers.ceiling  # for row_worker.py, as Row and PEERS
DEFAULT = "default"
FIELDS = {field.name: type(field.default) for field in dataclasses.fields(PagedConfig)}
TRIED = [
    *("stages=3", "stages=4"),
    *(f"split={split} dynamic={dynamic}" for split in (1024, 2048, 4096, 8192) for dynamic in (0, 1)),
]
SECTIONS = {
    "Decode": [
        row
        for rows in paged_attention.SECTIONS.values()
        for row in rows
        if not (row.is_quantized or row.names)
        and (row.num_rows in (1, 16) or row.room != paged_attention.CONTEXT)
    ]
}


class Variants:
    """PEERS of row_worker.py: decode with the changes that a name spells."""

    def __getitem__(self, name: str) -> Callable[[Row], Program]:
        return functools.partial(_program, changes_of(name))


PEERS = Variants()


def _program(changes: dict[str, Any], row: Row) -> Program:
    return decode_peers.over_pages(16, row, is_cascade=bool(row.prefix), changes=changes)


def changes_of(name: str) -> dict[str, Any]:
    """ "split=2048 dynamic=1" as fields and values; of the default none."""
    if name == DEFAULT:
        return {}
    changes = {}
    for part in name.split():
        field, _, value = part.partition("=")
        if field not in FIELDS or not value.isdecimal():
            raise ValueError(f"{part!r} is not FIELD=NUMBER, FIELD one of {', '.join(FIELDS)}")
        changes[field] = FIELDS[field](int(value))
    return changes


def row_figures(row: Row, parts: dict[str, dict], facts: dict) -> dict:
    figures = paged_attention.row_figures(row, parts, facts)
    return {name: figures[name] for name in ("row", "num_rows", "microseconds", "tb_per_s")} | {
        "elapsed_us": {name: part.get("elapsed_us") for name, part in parts.items()}
    }


def tables(result: dict) -> str:
    """A table a row, the fastest config first."""
    parts = [f"{result['device']}: read ceiling {result.get('read_ceiling_tb_per_s') or 0:.2f} TB/s"]
    for row in itertools.chain(*result["sections"].values()):
        times, base = row["microseconds"], row["microseconds"].get(DEFAULT)
        timed = sorted((time, name) for name, time in times.items() if time)
        lines = [
            (name, time, base and time / base, row["tb_per_s"][name], row["elapsed_us"][name])
            for time, name in timed
        ]
        parts.append(report.table((row["row"], "us", "of default", "TB/s", "from call to call, us"), lines))
    return "\n\n".join([*parts, *in_processes.without_figures(result)])


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--try", nargs="+", dest="tried", metavar="CHANGES", default=TRIED, help="configs")
    options = in_processes.parse(parser, SECTIONS)
    for name in options.tried:
        try:
            PagedConfig(**changes_of(name))
        except ValueError as error:
            parser.error(f"--try: {error}")
    report.begin_processes(f"{len(options.tried) + 1} configs of paged decode")
    names = list(dict.fromkeys([DEFAULT, *options.tried]))
    result = in_processes.measure("decode_configs", options.sections, lambda row: names, row_figures, options)
    return in_processes.finish(options.out, result, tables)


if __name__ == "__main__":
    sys.exit(main())
