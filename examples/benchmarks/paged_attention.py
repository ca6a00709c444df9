"""Paged decode on this GPU against contiguous caches and the rate at which memory can be read.

    python examples/benchmarks/paged_attention.py --out paged_attention.json --plot paged_attention.png

One query token a row, bf16. Every row's pages lie scattered over the pool. Time is kernel time by CUPTI, the
median of several runs, the merging of splits included; caches that would fit in the L2 cache are rotated.
Rates count each K and V once. Peers: cuDNN's decode over a contiguous cache, through
jax.nn.dot_product_attention, and JAX's own paged attention (Pallas Triton, deprecated) while it can be
imported.
"""

import argparse
import functools
import json
import statistics
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import report
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import paged_attention

L2_BYTES = 60e6
GOAL = 0.95  # of the read ceiling


class Shape(NamedTuple):
    """Heads of a model, and a batch of rows of one length."""

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rows: int
    length: int

    @property
    def cache_bytes(self) -> int:
        return 4 * self.rows * self.length * self.num_kv_heads * self.head_dim

    @property
    def num_caches(self) -> int:
        """Caches to rotate, so that none is found in the L2 cache."""
        return max(1, -(-int(4 * L2_BYTES) // self.cache_bytes))

    @property
    def label(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv_heads}, {self.head_dim}"
        return f"{self.model} {heads}; {self.rows} x {self.length}"


SHAPES = [
    Shape("Yi-6B", 32, 4, 128, 16, 16384),
    Shape("Llama-3-8B", 32, 8, 128, 16, 16384),
    Shape("Llama-3-8B", 32, 8, 128, 128, 2048),
    Shape("GPT-2 medium", 16, 16, 64, 256, 1024),
    Shape("Llama-3-8B", 32, 8, 128, 1, 16384),
]


def microseconds(attend, shape: Shape, arrays, iterations: int) -> float:
    """Kernel time of one call of attend(cache index, *arrays), the median over runs of all caches in turn."""
    run = jax.jit(lambda *arrays: [attend(index, *arrays) for index in range(shape.num_caches)])
    _, times = profiler.measure(run, iterations=iterations)(*arrays)
    assert times is not None, "no kernel ran"
    return 1e3 * statistics.median(times) / shape.num_caches


def random(index: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(index), shape, jnp.bfloat16)


def scattered_tables(shape: Shape, page_size: int) -> jax.Array:
    width = shape.length // page_size
    pages = np.random.default_rng(0).permutation(shape.rows * width) + 1
    return jnp.asarray(pages.reshape(shape.rows, width), jnp.int32)


def measure_ours(shape: Shape, page_size: int, iterations: int) -> float:
    tables = scattered_tables(shape, page_size)
    pool = (shape.num_caches, tables.size + 1, shape.num_kv_heads, page_size, shape.head_dim)
    lengths = jnp.full((shape.rows,), shape.length, jnp.int32)
    query = random(0, shape.rows, shape.num_heads, shape.head_dim)

    def attend(index, query, k_pages, v_pages, tables, lengths):
        return paged_attention(
            query, k_pages, v_pages, tables, lengths, layer=jnp.int32(index), implementation="sm90"
        )

    arrays = query, random(1, *pool), random(2, *pool), tables, lengths
    return microseconds(attend, shape, arrays, iterations)


def measure_cudnn(shape: Shape, iterations: int) -> float:
    cache = (shape.rows, shape.length, shape.num_kv_heads, shape.head_dim)
    query = random(0, shape.rows, 1, shape.num_heads, shape.head_dim)
    caches = [(random(2 * i + 1, *cache), random(2 * i + 2, *cache)) for i in range(shape.num_caches)]

    def attend(index, query, caches):
        return jax.nn.dot_product_attention(query, *caches[index], implementation="cudnn")

    return microseconds(attend, shape, (query, caches), iterations)


def measure_triton(shape: Shape, page_size: int, iterations: int) -> float:
    """JAX's deprecated op, the better of two splits."""
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as triton_paged_attention

    tables = scattered_tables(shape, page_size)
    pool = (shape.num_kv_heads, tables.size + 1, page_size, shape.head_dim)
    query = random(0, shape.rows, shape.num_heads, shape.head_dim)
    caches = [(random(2 * i + 1, *pool), random(2 * i + 2, *pool)) for i in range(shape.num_caches)]
    lengths = jnp.full((shape.rows,), shape.length, jnp.int32)

    def attend(splits, index, query, caches, tables, lengths):
        return triton_paged_attention(
            query, *caches[index], tables, lengths, k_splits=splits, pages_per_compute_block=64 // page_size
        )

    arrays = query, caches, tables, lengths
    return min(
        microseconds(functools.partial(attend, splits), shape, arrays, iterations) for splits in (4, 16)
    )


def read_ceiling(iterations: int) -> float:
    """TB/s of a reduction over 2 GB."""
    array = random(0, 1 << 30)
    _, times = profiler.measure(jax.jit(lambda x: x.astype(jnp.float32).sum()), iterations=iterations)(array)
    assert times is not None
    return array.nbytes / statistics.median(times) / 1e9


def attempt(measure, *arguments) -> float | None:
    """A peer that cannot do a shape, or is not there any more, has no figure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return measure(*arguments)
    except Exception as error:
        print(f"{measure.__name__}{arguments}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
        return None


def measure_shape(shape: Shape, page_sizes: list[int], iterations: int) -> dict:
    times: dict[str, float | None] = {
        f"jaxattn, page {size}": measure_ours(shape, size, iterations) for size in page_sizes
    }
    times["cuDNN, contiguous"] = attempt(measure_cudnn, shape, iterations)
    times["JAX Triton, page 16"] = attempt(measure_triton, shape, 16, iterations)
    rates = {name: time and shape.cache_bytes / time / 1e6 for name, time in times.items()}
    return {"shape": shape.label, "cache_bytes": shape.cache_bytes, "microseconds": times, "tb_per_s": rates}


def table(result: dict) -> str:
    names = list(result["rows"][0]["tb_per_s"])
    rows = [(row["shape"], *(row["tb_per_s"][name] for name in names)) for row in result["rows"]]
    return report.table(("TB/s of K and V", *names), rows)


def plot(result: dict, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(12, 5))
    names = list(result["rows"][0]["tb_per_s"])
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        rates = [row["tb_per_s"][name] or 0 for row in result["rows"]]
        axis.bar([x + index * width for x in range(len(rates))], rates, width, label=name)
    ceiling = result["read_ceiling_tb_per_s"]
    axis.axhline(ceiling, color="black", linewidth=1, label=f"read ceiling, {ceiling:.2f} TB/s")
    labels = [row["shape"].replace("; ", "\n") for row in result["rows"]]
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(labels))], labels, fontsize=8)
    axis.set_ylabel("TB/s of K and V")
    axis.set_title(f"Decode, one query token a row, bf16, {result['device']}")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the figures here, as JSON")
    parser.add_argument("--plot", help="write a bar chart here, as PNG")
    parser.add_argument("--plot-from", help="only plot: read this JSON instead of measuring")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--iterations", type=int, default=8)
    options = parser.parse_args()
    if options.plot_from:
        result = json.loads(Path(options.plot_from).read_text())
    else:
        rows = []
        for shape in SHAPES:
            rows.append(measure_shape(shape, options.page_sizes, options.iterations))
            print(f"measured {shape.label}", file=sys.stderr, flush=True)
        ceiling = read_ceiling(options.iterations)
        for row in rows:
            row["share_of_ceiling"] = {
                name: rate and rate / ceiling for name, rate in row["tb_per_s"].items()
            }
        timing = f"CUPTI kernel time, median of {options.iterations}"
        result = {"timing": timing, "read_ceiling_tb_per_s": ceiling, "goal_share": GOAL, "rows": rows}
        result = report.environment() | result
        report.save(options.out, result)
    print(f"{result['device']}: read ceiling {result['read_ceiling_tb_per_s']:.2f} TB/s")
    print(table(result))
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
