"""Writes and copies of pages on this GPU against the rate at which memory is copied.

    python examples/benchmarks/page_writes.py --out page_writes.json
    python examples/benchmarks/page_writes.py --rows "decode|copy_pages"

write_kv of a prompt's tokens and of a decode step's, copy_pages of many pairs in one launch, gather_pages and
scatter_pages; pages of 16 tokens that lie scattered. Each call gets the whole pool, donated, and the layer as
a traced number. That no program of ours copies its pool is read off what the compiler says of its memory;
one that did would have no figure. Peers: the same as scatters and gathers of XLA, donated too, and a plain
copy: an elementwise operation, compiled by XLA, that reads and writes as many bytes.

us is the time in kernels by CUPTI, the median of several runs, inputs and destinations that would fit in the
L2 cache taken in turn. TB/s counts each byte that must be read or written once, scales of quantized pages
included. `of copy` is our rate divided by that of the copy.
"""

import sys

import in_processes
import report
from in_processes import percent
from page_write_peers import COPY, GATHER, OURS, PAIRS, PEERS, SCATTER, WRITE, Row

LLAMA, GPT2 = ("Llama-3-8B", 8, 128), ("GPT-2 medium", 16, 64)
DTYPES = ("bfloat16", "int8", "float8_e4m3fn")
GOALS = {"Writes of a prompt": 0.85, "Copies within the pool": 0.85}  # share of the copy's rate

SECTIONS = {
    "Writes of a prompt": [
        Row(WRITE, *model, num_tokens, dtype)
        for model, num_tokens, dtypes in (
            (LLAMA, 16384, DTYPES),
            (GPT2, 16384, DTYPES),
            (LLAMA, 2048, DTYPES[:1]),
        )
        for dtype in dtypes
    ],
    "Writes of a decode step": [
        *(Row(WRITE, *LLAMA, 256, dtype, whole_pages=False) for dtype in DTYPES),
        Row(WRITE, *GPT2, 256, whole_pages=False),
    ],
    "Copies within the pool": [
        *(Row(PAIRS, *LLAMA, num_pairs, num_layers=32) for num_pairs in (1, 16, 256)),
        Row(PAIRS, *LLAMA, 4096, num_layers=8),
        Row(PAIRS, *LLAMA, 256, "int8", num_layers=32),
    ],
    "Out of the pool and back": [
        Row(op, *LLAMA, num_pages, num_layers=32) for op in (GATHER, SCATTER) for num_pages in (16, 256)
    ],
}


def row_figures(row: Row, parts: dict[str, dict], facts: dict) -> dict:
    times = {name: part.get("microseconds") for name, part in parts.items()}
    bytes_of = dict.fromkeys(parts, row.read_bytes + row.written_bytes) | {COPY: row.copied_bytes}
    rates = {name: time and bytes_of[name] / time / 1e6 for name, time in times.items()}
    ours, copy, ceiling = rates[OURS], rates[COPY], facts.get("copy_kernel_tb_per_s")
    return {
        "row": row.label,
        **{name: value for name, value in row._asdict().items() if name != "op"},
        "read_bytes": row.read_bytes,
        "written_bytes": row.written_bytes,
        "microseconds": times,
        "tb_per_s": rates,
        "share_of_copy": ours / copy if ours and copy else None,
        "share_of_large_copy": ours / ceiling if ours and ceiling else None,
        "temp_bytes": {name: part.get("temp_bytes") for name, part in parts.items()},
    }


def tables(result: dict) -> str:
    rates = [result.get(f"copy_{by}_tb_per_s") for by in ("kernel", "driver")]
    large = ", ".join(
        f"{by} {rate:.2f}" for by, rate in zip(("a kernel", "the driver"), rates, strict=True) if rate
    )
    parts = [f"A copy of 1 GiB, TB/s read and written: by {large or '-'}"]
    for title, rows in result["sections"].items():
        lines = []
        for row in rows:
            times, rates = row["microseconds"], row["tb_per_s"]
            cells = [f"{times[name]:8.2f} {rates[name]:5.2f}" if times[name] else "-" for name in PEERS]
            lines.append(
                (row["row"], *cells, percent(row["share_of_copy"]), percent(row["share_of_large_copy"]))
            )
        header = (f"{title} (us, TB/s)", *PEERS, "of copy", "of large copy")
        parts.append(report.table(header, lines))
    return "\n\n".join([*parts, *in_processes.without_figures(result), summary(result)])


def summary(result: dict) -> str:
    """One line: the range of the shares that are aimed at, and the decode step."""
    said = []
    for title, goal in GOALS.items():
        shares = [row["share_of_copy"] for row in result["sections"].get(title, ()) if row["share_of_copy"]]
        if shares:
            name = title[0].lower() + title[1:]
            said.append(
                f"{name} at {percent(min(shares))} to {percent(max(shares))} of a copy (goal {percent(goal)})"
            )
    steps = [row["microseconds"][OURS] for row in result["sections"].get("Writes of a decode step", ())]
    if times := [time for time in steps if time]:
        said.append(f"256 decode tokens in {min(times):.1f} to {max(times):.1f} us (goal 5)")
    return f"{result['device']}: {'; '.join(said) or 'nothing measured'}"


def main() -> int:
    options = in_processes.parse(report.parser(__doc__), SECTIONS)
    report.begin_processes(f"{sum(map(len, options.sections.values()))} writes and copies of pages")
    names_of = lambda row: tuple(PEERS)
    result = in_processes.measure("page_write_peers", options.sections, names_of, row_figures, options)
    return in_processes.finish(options.out, result, tables)


if __name__ == "__main__":
    sys.exit(main())
