"""Paged decode on this GPU against contiguous caches and the rate at which memory can be read.

    python examples/benchmarks/paged_attention.py --out paged_attention.json --plot paged_attention.png
    python examples/benchmarks/paged_attention.py --only Batch-invariant --out batch_invariant.json
    python examples/benchmarks/paged_attention.py --heads 32/8 --head-dim 128 --rows 1 64 --context 4096

One query token a row. Without --heads: the decode comparison of the vAttention paper (Prabhu et al. 2024) at
the level of kernels, batches of 1 to 32 rows of 16384 tokens in the shapes of Yi-6B, Llama-3-8B and Yi-34B;
other shapes; rows of very uneven lengths against even ones; rows that share a prefix, alone and as a layer of
a step, whose layers share the work list (and here the queries' order); quantized pages; batch_invariant=True
against the default; every page size. Every row's pages lie scattered over the pool. Time is kernel time by
CUPTI, the median of several runs, the merging of splits included; caches that would fit in the L2 cache are
taken in turn. Rates count the K and V of each row once, and the scales of quantized pages. `contiguous` is
our kernel without pages: what the first page size takes longer is the tax of paging. Peers: cuDNN through
jax.nn.dot_product_attention, and JAX's own paged attention (Pallas Triton, deprecated) while it can be
imported.
"""

import argparse
import sys

import in_processes
import jax.numpy as jnp
import numpy as np
import report
from decode_peers import PEERS, Row

CONTEXT = 16384
MODELS = {"Yi-6B": (32, 4, 128), "Llama-3-8B": (32, 8, 128), "Yi-34B": (56, 8, 128)}
BATCHES = (1, 2, 4, 8, 16, 32)
LLAMA = ("Llama-3-8B", *MODELS["Llama-3-8B"])
PAGE_SIZE_NAMES = tuple(f"page {size}" for size in (16, 8, 32, 64, 128, 256))
INVARIANT = ("page 16", "batch-invariant, page 16")
UNEVEN = tuple(int(x) for x in np.geomspace(32768, 1, 83).round())  # 275,161 tokens
EVEN = (sum(UNEVEN) // len(UNEVEN),) * len(UNEVEN)

SECTIONS: dict[str, list[Row]] = {
    "vAttention's comparison": [
        Row(model, *heads, (CONTEXT,) * batch) for model, heads in MODELS.items() for batch in BATCHES
    ],
    "Other shapes": [
        Row(*LLAMA, (2048,) * 128),
        Row("GPT-2 medium", 16, 16, 64, (1024,) * 256),
    ],
    "Other models": [
        Row(name, *heads, (context,) * batch)
        for name, heads, batch, context in (
            ("GPT-2 small", (12, 12, 64), 64, 512),
            ("SmolLM2-135M", (9, 3, 64), 64, 2048),
            ("Llama-2-7B", (32, 32, 128), 32, 2048),
            ("Llama-3-70B", (64, 8, 128), 32, 4096),
            ("Qwen2-7B", (28, 4, 128), 64, 4096),
            ("heads", (32, 2, 128), 64, 8192),
            ("Gemma-2-9B", (16, 8, 256), 32, 4096),
            ("Gemma-2B", (8, 1, 256), 32, 4096),
            ("Phi-2", (32, 32, 80), 32, 2048),
            ("Phi-3-mini", (32, 32, 96), 32, 4096),
        )
    ],
    "Uneven rows": [
        Row(*LLAMA, EVEN, f"83 rows of {EVEN[0]}", capacity=32768),
        Row(*LLAMA, UNEVEN, "83 rows, 1 to 32768 tokens"),
    ],
    "Shared prefix": [
        Row(*LLAMA, (8192 + 256,) * 64, "64 rows share 8192, own 256", prefix=8192),
        Row(*LLAMA, (8192 + 256,) * 64, "the same, a layer of 4", prefix=8192, layers=4),
    ],
    "Quantized pages": [
        Row(*LLAMA, (length,) * batch, f"{batch} x {length}, {dtype}", dtype)
        for batch, length in ((16, CONTEXT), (128, 2048))
        for dtype in ("int8", "float8_e4m3fn")
    ],
    "Batch-invariant": [
        Row(*shape, (length,) * batch, f"{batch} x {length}, batch-invariant or not", names=INVARIANT)
        for shape, batch, length in (
            (LLAMA, 1, CONTEXT),
            (("Yi-6B", *MODELS["Yi-6B"]), 1, CONTEXT),
            (LLAMA, 16, CONTEXT),
            (("Yi-6B", *MODELS["Yi-6B"]), 16, CONTEXT),
            (LLAMA, 128, 2048),
            (LLAMA, 256, 512),
        )
    ],
    "Page sizes": [
        Row(*LLAMA, (CONTEXT,) * 16, f"16 x {CONTEXT}, every page size", names=PAGE_SIZE_NAMES),
    ],
}
OF_A_SHAPE = {"head_dim": 128, "rows": list(BATCHES), "context": CONTEXT, "dtype": "bfloat16"}  # with --heads
NAMES = ("page 16", "page 128", "cascade, page 16", "contiguous", "cuDNN contiguous", "JAX Triton page 16")


def row_figures(row: Row, parts: dict[str, dict], facts: dict) -> dict:
    ceiling = facts.get("read_ceiling_tb_per_s")
    times = {name: part.get("microseconds") for name, part in parts.items()}
    rates = {name: time and row.cache_bytes / time / 1e6 for name, time in times.items()}
    return {
        "row": row.label,
        "num_rows": row.num_rows,
        "heads": f"{row.num_heads}/{row.num_kv_heads}",
        "head_dim": row.head_dim,
        "dtype": row.dtype,
        "cache_bytes": row.cache_bytes,
        "microseconds": times,
        "tokens_per_s": {name: time and row.num_rows / time * 1e6 for name, time in times.items()},
        "tb_per_s": rates,
        "share_of_ceiling": {name: rate and ceiling and rate / ceiling for name, rate in rates.items()},
    }


def tables(result: dict) -> str:
    """A table a section: us and TB/s of each name; tokens/s, share of the ceiling and paging's tax of the
    first, or what it costs the second to be batch-invariant."""
    parts = [f"{result['device']}: read ceiling {result.get('read_ceiling_tb_per_s') or 0:.2f} TB/s"]
    for title, rows in result["sections"].items():
        names = [name for name in rows[0]["microseconds"] if any(row["microseconds"][name] for row in rows)]
        if not names:
            parts.append(f"{title}: no figures")
            continue
        first, lines = names[0], []
        for row in rows:
            times, rates = row["microseconds"], row["tb_per_s"]
            cells = [f"{times[name]:7.1f} {rates[name]:5.2f}" if times[name] else "" for name in names]
            slower, faster = times[first], times.get("contiguous")
            if len(names) > 1 and names[1] == INVARIANT[1]:
                slower, faster = times[names[1]], times[first]
            tax = f"{100 * (slower / faster - 1):+.1f}%" if slower and faster else "-"
            rest = (row["tokens_per_s"][first], row["share_of_ceiling"][first], tax)
            lines.append((row["row"], *cells, *rest))
        header = (f"{title} (us, TB/s)", *names, f"{first}: tokens/s", "of ceiling", "tax")
        parts.append(report.table(header, lines))
    return "\n\n".join([*parts, *in_processes.without_figures(result)])


def plot(result: dict, path: str) -> None:
    """One panel a model of vAttention's comparison: rate against rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    section, ceiling = next(iter(result["sections"].values())), result["read_ceiling_tb_per_s"]
    models = list(dict.fromkeys(row["row"].split(";")[0] for row in section))
    figure, axes = plt.subplots(1, len(models), figsize=(4.6 * len(models), 4.4), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        rows = [row for row in section if row["row"].split(";")[0] == model]
        for name in (name for name, rate in rows[0]["tb_per_s"].items() if rate):
            rates = [row["tb_per_s"][name] or float("nan") for row in rows]
            ours = not name.startswith(("cuDNN", "JAX"))
            label = f"jaxattn, {name}" if ours else name
            axis.plot([row["num_rows"] for row in rows], rates, "o-" if ours else "s--", ms=4, label=label)
        axis.axhline(ceiling, color="black", linewidth=1, label=f"read ceiling, {ceiling:.2f} TB/s")
        axis.set_xscale("log", base=2)
        axis.set_xticks([row["num_rows"] for row in rows], [str(row["num_rows"]) for row in rows])
        axis.set(title=model, xlabel="rows", ylim=(0, 1.08 * ceiling))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("TB/s of K and V")
    figure.suptitle(f"Decode, one query token a row of {measured(section)}, {result['device']}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(labels), fontsize=8, loc="lower center")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    report.save_chart(figure, path)


def measured(section: list[dict]) -> str:
    """Tokens of a row, on average, and dtypes: of all rows of a section."""
    tokens = []
    for row in section:
        itemsize, num_kv_heads = jnp.dtype(row["dtype"]).itemsize, int(row["heads"].split("/")[1])
        vector = row["head_dim"] * itemsize + 4 * (itemsize == 1)
        tokens.append(round(row["cache_bytes"] / (2 * num_kv_heads * vector * row["num_rows"])))
    dtypes = dict.fromkeys({"bfloat16": "bf16"}.get(row["dtype"], row["dtype"]) for row in section)
    span = " to ".join(map(str, dict.fromkeys((min(tokens), max(tokens)))))
    return f"{span} tokens, {' and '.join(dtypes)}"


def chosen_sections(options: argparse.Namespace) -> dict[str, list[Row]]:
    """What the command line asks for; without --heads everything."""
    if options.heads is None:
        return SECTIONS
    num_heads, num_kv_heads = map(report.positive, options.heads.split("/"))
    if num_heads % num_kv_heads:
        raise ValueError("the first must be a multiple of the second")
    shape = ("heads", num_heads, num_kv_heads, options.head_dim)
    rows = [Row(*shape, (options.context,) * batch, dtype=options.dtype) for batch in options.rows]
    return {f"{options.context} tokens a row": rows}


def parse() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--heads", help="query heads/KV heads, such as 32/8: only this shape")
    parser.add_argument("--head-dim", type=report.positive, help="of --heads: by default 128")
    parser.add_argument("--rows", type=report.positive, nargs="+", help="of --heads: by default 1 to 32")
    parser.add_argument("--context", type=report.positive, help=f"of --heads: by default {CONTEXT}")
    dtypes = ("bfloat16", "int8", "float8_e4m3fn")
    parser.add_argument("--dtype", choices=dtypes, help="of --heads: by default bfloat16")
    sizes = [int(name.split()[1]) for name in PEERS if name.startswith("page ")]
    parser.add_argument("--page-size", type=int, nargs="+", default=[16, 128], choices=sizes)
    parser.add_argument("--iterations", type=report.positive, default=8)
    parser.add_argument("--plot", help="write a chart here, as PNG")
    parser.add_argument("--plot-from", help="only plot: read this JSON instead of measuring")
    parser.add_argument("--only", default="", metavar="TEXT", help="sections whose title holds this")
    options = parser.parse_args()
    for name, default in OF_A_SHAPE.items():
        if options.heads is None and getattr(options, name) is not None:
            parser.error(f"--{name.replace('_', '-')} is of --heads, which must be given with it")
        if getattr(options, name) is None:
            setattr(options, name, default)
    try:
        options.sections = chosen_sections(options)
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(f"--heads must be such as 32/8, got {options.heads!r}: {error}")
    return options


def show(result: dict, options: argparse.Namespace) -> str:
    if options.plot and result.get("read_ceiling_tb_per_s"):
        plot(result, options.plot)
    return tables(result)


def main() -> int:
    options = parse()
    if options.plot_from:
        of_rows = ("row", "microseconds", "tb_per_s", "tokens_per_s", "share_of_ceiling")
        of_rows += ("num_rows", "heads", "head_dim", "dtype", "cache_bytes")
        print(show(report.read("--plot-from", options.plot_from, ("device",), of_rows, "sections"), options))
        return 0
    options.sections = {title: rows for title, rows in options.sections.items() if options.only in title}
    if not options.sections:
        report.refuse(f"--only: no section's title holds {options.only!r}")
    report.begin_processes(f"{sum(map(len, options.sections.values()))} rows of paged decode")
    names = [f"page {size}" for size in options.page_size]
    names += [name for name in NAMES if not name.startswith("page")]
    names_of = lambda row: row.names or names
    result = in_processes.measure("decode_peers", options.sections, names_of, row_figures, options)
    return in_processes.finish(options.out, result, lambda result: show(result, options))


if __name__ == "__main__":
    sys.exit(main())
