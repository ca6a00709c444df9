"""The bytes that io_bytes foretells against those that Nsight Compute counts, on this GPU.

    python examples/benchmarks/flash_io.py --out flash_io.json

Runs itself under `ncu`, which must be on the PATH and allowed to read the GPU's counters; clocks are left
alone. L2 -> SMs is what arrives at the SMs' memory stage (l1tex__m_xbar2l1tex_read_bytes, TMA loads
included); device memory is read from cold caches, ncu's default. Backward is all its kernels together.
"""

import argparse
import csv
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import report

METRICS = {
    "l2_to_sm": "l1tex__m_xbar2l1tex_read_bytes.sum",
    "sm_to_l2": "l1tex__m_l1tex2xbar_write_bytes.sum",
    "dram_read": "dram__bytes_read.sum",
    "dram_write": "dram__bytes_write.sum",
}
UNITS = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
KERNELS = "flash_attention"  # what the names of ours begin with
TOLERANCE = 0.1


class Shape(NamedTuple):
    """A call that is counted."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    causal: bool = True
    window: int | None = None

    @property
    def label(self) -> str:
        mask = "causal" if self.causal else "full"
        window = f" window={self.window}" if self.window else ""
        return f"B={self.B} T={self.T} S={self.S} N={self.N}/{self.K} H={self.H} {mask}{window}"

    @property
    def options(self) -> dict[str, Any]:
        window = None if self.window is None else (self.window - 1, 0)
        return {"is_causal": self.causal, "local_window_size": window}

    def arrays(self) -> list[tuple[int, ...]]:
        """Shapes of query, key, value and the output's cotangent."""
        query, key = (self.B, self.T, self.N, self.H), (self.B, self.S, self.K, self.H)
        return [query, key, key, query]


SHAPES = [
    Shape(2, 4096, 4096, 16, 16, 128),
    Shape(2, 4096, 4096, 16, 16, 128, causal=False),
    Shape(2, 4096, 4096, 32, 32, 64),
    Shape(1, 16384, 16384, 16, 16, 128, window=1024),
    Shape(2, 4096, 4096, 32, 8, 128),
    Shape(4, 512, 8192, 16, 16, 128, causal=False),
    Shape(1, 4096, 4096, 8, 8, 256),
]


def run_calls() -> None:
    """What ncu watches: one forward and backward pass of each shape."""
    import functools

    import jax

    from pallas_kernels import flash_attention

    for shape in SHAPES:
        attend = functools.partial(flash_attention, implementation="sm90", **shape.options)

        def step(query, key, value, out_grad, attend=attend):
            out, vjp = jax.vjp(attend, query, key, value)
            return out, vjp(out_grad)

        keys = jax.random.split(jax.random.key(0), 4)
        arrays = [
            jax.random.normal(k, s, jax.numpy.bfloat16) for k, s in zip(keys, shape.arrays(), strict=True)
        ]
        jax.block_until_ready(jax.jit(step)(*arrays))


def count(seconds: float | None) -> list[dict[str, dict[str, float]]]:
    """For each shape {direction: {metric: bytes}}."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = ["ncu", "--clock-control", "none", "--kernel-name", f"regex:^{KERNELS}"]
        command += ["--metrics", ",".join(METRICS.values()), "--csv", "--page", "raw", "--log-file", str(log)]
        # ncu saves and restores what is allocated for each pass over a kernel: all of the GPU's memory, else.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command += [sys.executable, __file__, "--calls"]
        with subprocess.Popen(command, env=environment, start_new_session=True) as process:
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # what ncu watches too, which holds the GPU
                raise SystemExit(f"flash_io.py: ncu came to no end within {seconds} s") from None
        text = log.read_text() if log.exists() else ""
    if code or '"Kernel Name"' not in text:
        raise SystemExit(f"ncu counted nothing, exit code {code}:\n{text[-2000:]}")
    return parse_counts(text)


def parse_counts(text: str) -> list[dict[str, dict[str, float]]]:
    """Sums ncu's rows, one a kernel, to passes; each forward kernel begins a new shape."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    header, units, *kernels = csv.reader(io.StringIO("\n".join(lines)))
    passes: list[dict[str, dict[str, float]]] = []
    for kernel in kernels:
        fields = dict(zip(header, kernel, strict=True))
        unit_of = dict(zip(header, units, strict=True))
        direction = "forward" if f"{KERNELS}_forward" in fields["Kernel Name"] else "backward"
        if direction == "forward":
            passes.append({name: dict.fromkeys(METRICS, 0.0) for name in ("forward", "backward")})
        for name, metric in METRICS.items():
            value = float(fields[metric].replace(",", "")) * UNITS[unit_of[metric]]
            passes[-1][direction][name] += value
    return passes


def foretell(shape: Shape) -> dict[str, dict[str, int]]:
    import jax
    from jax import numpy as jnp

    from pallas_kernels import io_bytes

    query, key, *_ = (jax.ShapeDtypeStruct(one, jnp.bfloat16) for one in shape.arrays())
    return {name: t._asdict() for name, t in io_bytes(query, key, **shape.options)._asdict().items()}


def compare(counted: list[dict[str, dict[str, float]]]) -> list[dict]:
    rows = []
    for shape, figures in zip(SHAPES, counted, strict=True):
        model = foretell(shape)
        for direction in ("forward", "backward"):
            m, c = model[direction], figures[direction]
            rows.append(
                {
                    "shape": shape.label,
                    "direction": direction,
                    "model": m,
                    "counted": c,
                    "l2_to_sm_model_over_counted": m["l2_to_sm"] / c["l2_to_sm"],
                    "dram_read_over_compulsory": c["dram_read"] / m["dram_read"],
                    "share_of_loads_served_by_l2": 1 - c["dram_read"] / c["l2_to_sm"],
                }
            )
    return rows


def text(rows: list[dict], as_table: Any) -> str:
    header = ("shape", "", "L2 -> SMs, MB: model", "counted", "ratio", "SMs -> L2: model", "counted")
    header += ("DRAM read: least", "counted", "L2 serves")
    lines = []
    for row in rows:
        mega = {
            (kind, name): row[kind][name] / 1e6
            for kind, name in itertools.product(("model", "counted"), METRICS)
        }
        line = (row["shape"], row["direction"], mega["model", "l2_to_sm"], mega["counted", "l2_to_sm"])
        line += (round(row["l2_to_sm_model_over_counted"], 3), mega["model", "sm_to_l2"])
        line += (mega["counted", "sm_to_l2"], mega["model", "dram_read"], mega["counted", "dram_read"])
        lines.append((*line, row["share_of_loads_served_by_l2"]))
    return as_table(header, lines)


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--from", dest="source", help="count nothing: the table of this JSON")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--calls", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.calls:
        run_calls()
        return 0
    if options.source:
        rows = report.read(
            "--from", options.source, ("metrics",), ("shape", "direction", "model", "counted")
        )["rows"]
    else:
        for tool in ("nvidia-smi", "ncu"):
            if shutil.which(tool) is None:
                report.refuse(f"needs an NVIDIA GPU and Nsight Compute, found no {tool}")
        print(f"Bytes of {len(SHAPES)} calls of flash_attention, under ncu on this GPU", flush=True)
        rows = compare(count(options.max_seconds))
        report.save(options.out, {"metrics": METRICS, "rows": rows})
    print(text(rows, report.markdown if options.markdown else report.table))
    off = [r for r in rows if abs(r["l2_to_sm_model_over_counted"] - 1) > TOLERANCE]
    print(f"{len(rows) - len(off)} of {len(rows)} within {TOLERANCE:.0%} of what was counted")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
