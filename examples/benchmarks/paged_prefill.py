"""Paged prefill on this GPU against dense attention, and batches of prompts and decodes in one call.

    python examples/benchmarks/paged_prefill.py --out paged_prefill.json
    python examples/benchmarks/paged_prefill.py --rows "Mixed|GPT-2"

Prompts: paged_attention(query_start=...) over pages that lie scattered, of whole prompts and of chunks behind
what is cached already, against our own flash_attention over contiguous K and V of the same sizes, causal and
aligned bottom right, and cuDNN through jax.nn.dot_product_attention. FLOPs are 4 H for each query head and
pair of a query and a key it sees, whatever an implementation computes: t queries in a row of length s see
t s - t (t - 1) / 2 keys. `of dense` is flash_attention's time divided by ours.

Mixed batches: rows of many queries and rows of one in one call, against one call of either kind alone, each
with block tables as wide as its own rows need; page size 16.

Batch-invariant: what batch_invariant=True costs, where a row has the same bits whatever else is in the batch,
and keys of few queries are not split. What it costs decode paged_attention.py shows.

us is the time in kernels by CUPTI, the median of several runs; `elapsed`, of the mixed batches, is the time
from one call to the next on the clock, gaps between kernels included. Inputs that would fit in the L2 cache
are taken in turn, several sets in a run: the list of work is then made once for all of them, as it is for all
layers of a model.
"""

import sys

import in_processes
import report
from in_processes import percent
from prefill_peers import CUDNN, DECODE, DENSE, INVARIANT, ONE_CALL, PAGE_16, PAGE_128, PREFILL, Row

LLAMA, YI = ("Llama-3-8B", 32, 8, 128), ("Yi-6B", 32, 4, 128)
GPT2 = ("GPT-2 medium", 16, 16, 64)
MIXED, BATCH_INVARIANT = "Mixed batches", "Batch-invariant"

Model = tuple[str, int, int, int]


def prompts(model: Model, count: int, num_queries: int, num_cached: int = 0) -> Row:
    """Rows that are all alike."""
    behind = f" behind {num_cached}" if num_cached else ""
    lengths = (num_queries + num_cached,) * count
    return Row(*model, (num_queries,) * count, lengths, f"{count} x {num_queries}{behind}")


def mixed(model: Model, chunks: tuple[int, int, int], decodes: tuple[int, int]) -> Row:
    """Chunks (rows, queries, cached tokens), and decodes (rows, length)."""
    count, num_queries, num_cached = chunks
    num_decodes, length = decodes
    queries = (num_queries,) * count + (1,) * num_decodes
    lengths = (num_queries + num_cached,) * count + (length,) * num_decodes
    prefix = f"{prompts(model, *chunks).note} + " if count else ""
    note = f"{prefix}{num_decodes} decodes at {length}"
    return Row(*model, queries, lengths, note, (ONE_CALL, PREFILL, DECODE) if count else (ONE_CALL, DECODE))


SECTIONS = {
    "Whole prompts": [
        prompts(LLAMA, 16, 1024),
        prompts(LLAMA, 4, 4096),
        prompts(LLAMA, 1, 16384),
        prompts(YI, 4, 4096),
        prompts(GPT2, 16, 1024),
    ],
    "Chunks": [
        prompts(LLAMA, 8, 512, 3584),
        prompts(LLAMA, 1, 2048, 14336),
        prompts(YI, 8, 512, 3584),
        prompts(GPT2, 16, 256, 768),
    ],
    "Other models": [
        prompts(("Qwen2-7B", 28, 4, 128), 4, 2048),
        prompts(("heads", 40, 8, 128), 4, 1536, 512),
        prompts(("heads", 32, 2, 128), 4, 4096),
        prompts(("heads", 16, 8, 256), 4, 2048),
        prompts(("heads", 8, 1, 256), 4, 2048),
        prompts(LLAMA, 1, 512),
        prompts(LLAMA, 1, 333),
        prompts(("GPT-2 small", 12, 12, 64), 32, 512),
        prompts(("Llama-2-7B", 32, 32, 128), 8, 1000),
        prompts(("SmolLM2-135M", 9, 3, 64), 16, 777),
        prompts(("Qwen2-0.5B", 14, 2, 64), 8, 1024),
    ],
    MIXED: [
        mixed(LLAMA, (8, 1024, 0), (120, 2048)),
        mixed(LLAMA, (1, 2048, 0), (64, 4096)),
        mixed(LLAMA, (2, 512, 3584), (126, 4096)),
        mixed(GPT2, (4, 1024, 0), (252, 1024)),
        mixed(LLAMA, (0, 0, 0), (128, 2048)),
    ],
    BATCH_INVARIANT: [
        row._replace(note=f"{row.note}, batch-invariant or not", names=(PAGE_16, INVARIANT))
        for row in (
            prompts(LLAMA, 1, 16, 16368),
            prompts(LLAMA, 1, 512, 15872),
            prompts(LLAMA, 8, 512, 3584),
            prompts(GPT2, 16, 256, 768),
        )
    ],
}


def row_figures(row: Row, parts: dict[str, dict], facts: dict) -> dict:
    times = {name: part.get("microseconds") for name, part in parts.items()}
    figures = {
        "row": row.label,
        "heads": f"{row.num_heads}/{row.num_kv_heads}",
        "head_dim": row.head_dim,
        "num_rows": len(row.queries),
        "num_tokens": row.num_tokens,
        "flops": row.flops,
        "microseconds": times,
        "elapsed_us": {name: part.get("elapsed_us") for name, part in parts.items()},
    }
    if ONE_CALL in parts:
        return figures | mixed_figures(figures)
    whole = times.get(DENSE)
    paged = {name: time for name, time in times.items() if name in (PAGE_16, PAGE_128)}
    figures["tflops"] = {name: time and row.flops / time / 1e6 for name, time in times.items()}
    figures["share_of_dense"] = {name: time and whole and whole / time for name, time in paged.items()}
    return figures


def mixed_figures(figures: dict) -> dict:
    """What the calls apart take together, and one call divided by that."""
    made = {}
    for field in ("microseconds", "elapsed_us"):
        apart = [time for name, time in figures[field].items() if name != ONE_CALL]
        one = figures[field][ONE_CALL]
        made[f"{field}_apart"] = total = None if None in apart else sum(apart)
        made[f"{field}_ratio"] = one / total if one and total else None
    return made


def prompt_table(title: str, rows: list[dict]) -> str:
    names = (PAGE_16, PAGE_128, DENSE, CUDNN)
    header = [f"{title} (us, TFLOP/s)", *names, f"of dense: {PAGE_16}", f"of dense: {PAGE_128}"]
    lines = []
    for row in rows:
        times, rates = row["microseconds"], row["tflops"]
        cells = [f"{times[name]:8.1f} {rates[name]:4.0f}" if times.get(name) else "-" for name in names]
        shares = [percent(row["share_of_dense"].get(name)) for name in (PAGE_16, PAGE_128)]
        lines.append((row["row"], *cells, *shares))
    return report.table(tuple(header), lines)


def invariant_table(title: str, rows: list[dict]) -> str:
    lines = []
    for row in rows:
        before, after = (row["microseconds"][name] for name in (PAGE_16, INVARIANT))
        lines.append((row["row"], before, after, after / before if before and after else None))
    return report.table((f"{title} (us)", PAGE_16, INVARIANT, "ratio"), lines)


def mixed_table(title: str, rows: list[dict]) -> str:
    header = (
        f"{title} (us)",
        PREFILL,
        DECODE,
        "apart",
        ONE_CALL,
        "ratio",
        "elapsed: apart",
        ONE_CALL,
        "ratio",
    )
    lines = []
    for row in rows:
        times = row["microseconds"]
        line = [times.get(PREFILL), times[DECODE], row["microseconds_apart"], times[ONE_CALL]]
        line += [row["microseconds_ratio"], row["elapsed_us_apart"], row["elapsed_us"][ONE_CALL]]
        lines.append((row["row"], *line, row["elapsed_us_ratio"]))
    return report.table(header, lines)


def summary(result: dict) -> str:
    """One line: the range of each figure that paging is held to."""
    rows = [row for rows in result["sections"].values() for row in rows]
    shares = [share for row in rows for share in row.get("share_of_dense", {}).values() if share]
    ratios = [row["microseconds_ratio"] for row in rows if row.get("microseconds_ratio")]
    said = [f"prefill at {percent(min(shares))} to {percent(max(shares))} of dense"] if shares else []
    said += [f"one mixed call {min(ratios):.2f} to {max(ratios):.2f} times its parts"] if ratios else []
    return f"{result['device']}: {'; '.join(said) or 'nothing measured'}"


def tables(result: dict) -> str:
    table_of = {MIXED: mixed_table, BATCH_INVARIANT: invariant_table}
    sections = [table_of.get(title, prompt_table)(title, rows) for title, rows in result["sections"].items()]
    return "\n\n".join([*sections, *in_processes.without_figures(result), summary(result)])


def main() -> int:
    options = in_processes.parse(report.parser(__doc__), SECTIONS)
    report.begin_processes(f"{sum(map(len, options.sections.values()))} batches of paged prefill")
    names_of = lambda row: row.names
    result = in_processes.measure("prefill_peers", options.sections, names_of, row_figures, options)
    return in_processes.finish(options.out, result, tables)


if __name__ == "__main__":
    sys.exit(main())
