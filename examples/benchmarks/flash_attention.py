"""FlashAttention on this GPU: ours, cuDNN, XLA and, where installed, Tokamax; forward and forward + backward.

    python examples/benchmarks/flash_attention.py --out results/flash_attention.json --plot
    results/flash_attention.png

16,384 tokens and N x H = 2048 in each row. Time is kernel time by CUPTI, the median of several runs on random
data. FLOPs are counted as 4 B N T^2 H, half of it if causal, x 3.5 for forward + backward, whatever an
implementation does.
"""

import argparse
import functools
import json
import statistics
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import report
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import flash_attention

TOKENS, WIDTH = 16384, 2048
ROWS = [
    *((128, True, length) for length in (1024, 2048, 4096, 8192, 16384)),
    *((128, False, length) for length in (1024, 4096)),
    *((64, True, length) for length in (1024, 4096, 16384)),
    *((64, False, length) for length in (1024, 4096)),
    *((256, True, length) for length in (4096, 16384)),
    (256, False, 4096),
]
MAX_XLA_LENGTH = 4096  # beyond, its T x T logits do not fit


def implementations() -> dict:
    """name -> function(query, key, value, is_causal)."""
    table = {
        "jaxattn": lambda q, k, v, causal: flash_attention(q, k, v, is_causal=causal, implementation="sm90"),
        "cudnn": lambda q, k, v, causal: jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, implementation="cudnn"
        ),
        "xla": lambda q, k, v, causal: jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, implementation="xla"
        ),
    }
    # Tokamax imports a profiler's command line that an installation need not have.
    sys.modules.setdefault("xprof.cli.tools", types.SimpleNamespace(get_kernel_stats_tool=None))
    try:
        import tokamax

        table["tokamax"] = lambda q, k, v, causal: tokamax.dot_product_attention(
            q, k, v, is_causal=causal, implementation="mosaic"
        )
    except ImportError:
        pass
    return table


def forward_and_backward(attend):
    def step(query, key, value, out_grad):
        out, vjp = jax.vjp(attend, query, key, value)
        return out, vjp(out_grad)

    return step


def milliseconds(function, arrays, iterations: int) -> float | None:
    """Median kernel time of function(*arrays), or None where it cannot run."""
    try:
        jitted = jax.jit(function)
        jax.block_until_ready(jitted(*arrays))
        _, times = profiler.measure(jitted, iterations=iterations)(*arrays)
        return statistics.median(times)
    except Exception as error:
        print(f"  {type(error).__name__}: {str(error).splitlines()[0][:100]}", file=sys.stderr)
        return None


def memory_bytes(attend, arrays) -> int:
    """Device memory beside arguments and results."""
    return jax.jit(attend).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def measure_row(head_dim: int, is_causal: bool, length: int, iterations: int) -> dict:
    batch, heads = TOKENS // length, WIDTH // head_dim
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (batch, length, heads, head_dim), jnp.bfloat16) for key in keys]
    flops = 4 * batch * heads * length**2 * head_dim * (0.5 if is_causal else 1)
    row = {"H": head_dim, "causal": is_causal, "T": length, "B": batch, "N": heads}
    for name, function in implementations().items():
        if (name == "xla" and length > MAX_XLA_LENGTH) or (name == "cudnn" and head_dim > 128):
            continue
        attend = functools.partial(_attend, function, is_causal)
        forward = milliseconds(attend, arrays[:3], iterations)
        both = milliseconds(forward_and_backward(attend), arrays, iterations)
        row[name] = {
            "forward_ms": forward,
            "forward_tflops": flops / forward / 1e9 if forward else None,
            "forward_backward_ms": both,
            "forward_backward_tflops": 3.5 * flops / both / 1e9 if both else None,
            "forward_temp_bytes": memory_bytes(attend, arrays[:3]) if forward else None,
        }
    return row


def _attend(function, is_causal, query, key, value):
    return function(query, key, value, is_causal)


def matmul_tflops(size: int = 8192) -> float | None:
    """The ceiling: a bf16 matrix product on random data."""
    x, y = (jax.random.normal(jax.random.key(seed), (size, size), jnp.bfloat16) for seed in (0, 1))
    time = milliseconds(jnp.matmul, (x, y), 8)
    return 2 * size**3 / time / 1e9 if time else None


def table(rows: list[dict]) -> str:
    """TFLOP/s of every row, and the ratio to the best peer."""
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(row[name], dict)))
    lines = []
    for metric in ("forward", "forward_backward"):
        lines.append(
            f"{metric} TFLOP/s".ljust(32) + "".join(name.rjust(10) for name in names) + "  / best peer"
        )
        for row in rows:
            rates = {name: row[name][f"{metric}_tflops"] for name in names if name in row}
            peers = [rate for name, rate in rates.items() if name != "jaxattn" and rate]
            ours = rates.get("jaxattn")
            cells = "".join(
                f"{rates.get(name):10.0f}" if rates.get(name) else " " * 9 + "-" for name in names
            )
            ratio = f"{ours / max(peers):10.2f}" if ours and peers else ""
            kind = "causal" if row["causal"] else "full"
            lines.append(f"H={row['H']:<4} {kind:<7} T={row['T']:<6}".ljust(32) + cells + ratio)
    return "\n".join(lines)


def plot(result: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row if isinstance(row[name], dict)))
    labels = [f"H {row['H']}\n{'causal' if row['causal'] else 'full'}\nT {row['T']}" for row in rows]
    figure, axes = plt.subplots(2, 1, figsize=(14, 8), sharex=True)
    titles = ("forward", "forward_backward"), ("forward", "forward + backward")
    for axis, metric, title in zip(axes, *titles, strict=True):
        width = 0.8 / len(names)
        for index, name in enumerate(names):
            rates = [row.get(name, {}).get(f"{metric}_tflops") or 0 for row in rows]
            axis.bar([x + index * width for x in range(len(rows))], rates, width, label=name)
        axis.set_ylabel("TFLOP/s")
        axis.set_title(f"{title}, bf16, {result['device']}")
        axis.grid(axis="y", alpha=0.3)
    axes[0].legend(ncols=len(names))
    axes[1].set_xticks([x + 0.3 for x in range(len(rows))], labels, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the figures here, as JSON")
    parser.add_argument("--plot", help="write a bar chart here, as PNG")
    parser.add_argument("--plot-from", help="only plot: read this JSON instead of measuring")
    parser.add_argument("--iterations", type=int, default=8)
    options = parser.parse_args()
    if options.plot_from:
        result = json.loads(Path(options.plot_from).read_text())
    else:
        rows = []
        for head_dim, is_causal, length in ROWS:
            rows.append(measure_row(head_dim, is_causal, length, options.iterations))
            print(f"measured H={head_dim} causal={is_causal} T={length}", file=sys.stderr, flush=True)
        result = {
            **report.environment(),
            "timing": f"CUPTI kernel time, median of {options.iterations}",
            "matmul_8192_tflops": matmul_tflops(),
            "rows": rows,
        }
        report.save(options.out, result)
    print(f"{result['device']}, {result['versions']}, matmul {result['matmul_8192_tflops'] or 0:.0f} TFLOP/s")
    print(table(result["rows"]))
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
