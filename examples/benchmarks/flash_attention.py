"""FlashAttention on this GPU against cuDNN, Tokamax (where installed) and XLA.

    python examples/benchmarks/flash_attention.py --out flash_attention.json --plot flash_attention.png
    python examples/benchmarks/flash_attention.py --quick                        # the main table, one process
    python examples/benchmarks/flash_attention.py --rows "window|H=96"
    python examples/benchmarks/flash_attention.py --shape "B=4 T=4096 N=32 K=8 H=128 causal"

Forward, and forward + backward. Time is the time in kernels by CUPTI on random data: the median over fresh
processes (3 by default) of each one's median over runs; peers take turns within a process. FLOPs are counted
as 4 H for each pair of a query and a key it sees, x 3.5 for forward + backward, whatever an implementation
does. The rows that ask for deterministic gradients run in processes of their own, with
--xla_gpu_deterministic_ops, which makes cuDNN so. FlashAttention's claims against standard attention
(flash_claims.py) are measured too, unless --no-claims.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import attention_tables
import flash_claims
import report
from attention_peers import PEERS
from attention_rows import MAIN_ROWS, ROWS, Row, parse_row

HERE = Path(__file__).parent


@dataclasses.dataclass
class Worker:
    """A fresh process that compiles at once, and times when told to."""

    process: subprocess.Popen
    rows: list[Row]
    compile_seconds: float = 0.0

    @classmethod
    def start(cls, script: str, job: dict, rows: list[Row], flags: str = "") -> "Worker":
        paths = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
        # Processes share the GPU's memory: none may take most of it at its start.
        variables = {**os.environ, "PYTHONPATH": paths, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        variables["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        command = [sys.executable, str(HERE / script)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        worker = cls(subprocess.Popen(command, env=variables, **pipes), rows)
        worker._say(json.dumps({**job, "rows": [dataclasses.asdict(row) for row in rows]}))
        return worker

    def wait_compiled(self) -> None:
        self.compile_seconds = float(self._hear("@compiled") or 0)

    def measure(self) -> dict:
        """What the process reports; {"failure": ...} where it died, as a kernel can make it."""
        if self.compile_seconds:
            with contextlib.suppress(BrokenPipeError):
                self._say("measure")
        answer = self._hear("@done") if self.compile_seconds else None
        exit_code = self._close()
        result = (
            json.loads(answer) if answer else {"failure": f"the process ended with exit code {exit_code}"}
        )
        return {"compile_seconds": self.compile_seconds, **result}

    def _say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def _hear(self, word: str) -> str | None:
        """The rest of the next line that begins with a word; None where none comes any more."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(word + " "):
                return line[len(word) + 1 :]
        return None

    def _close(self) -> int:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()
        return self.process.wait()


def measure(rows: list[Row], options: argparse.Namespace) -> dict:
    """Compiles in all processes at once; then each has the GPU to itself in turn."""
    start = time.perf_counter()
    plain = [row for row in rows if not row.deterministic]
    deterministic = [row for row in rows if row.deterministic]
    peers = list(PEERS)
    workers = []
    # Python traces and lowers on one core a process: several processes share the rows of one turn.
    groups = max(1, len(os.sched_getaffinity(0)) // (options.processes + 1))
    shares = [(plain[group::groups], "") for group in range(groups)]
    shares.append((deterministic, "--xla_gpu_deterministic_ops"))
    shares = [share for share in shares if share[0]]
    for turn in range(options.processes):
        for index, (share, flags) in enumerate(shares):
            job = {"turn": turn, "peers": peers, "ceiling": index == 0}
            workers.append(Worker.start("attention_worker.py", job, share, flags))
    claims = None
    if options.claims:
        claims = Worker.start("flash_claims.py", {}, [])
    for worker in [*workers, *([claims] if claims else [])]:
        worker.wait_compiled()
    compile_seconds = time.perf_counter() - start
    results = [worker.measure() for worker in workers]
    if failures := [result["failure"] for result in results if "failure" in result]:
        print(f"{len(failures)} of {len(results)} processes failed: {failures[0]}", file=sys.stderr)
    if results and all("failure" in result for result in results):
        raise SystemExit("flash_attention.py: no process measured anything")
    figures = {
        "timing": f"CUPTI kernel time; median of {options.processes} fresh processes of medians over runs",
        "seconds": {"compile, all processes at once": round(compile_seconds, 1)},
        "processes": [{k: v for k, v in result.items() if k != "rows"} for result in results],
        **attention_tables.combine(rows, results),
    }
    figures["seconds"]["timing, one process after the other"] = sum(
        result.get("timing_seconds", 0) for result in results
    )
    if claims:
        figures["claims"] = claims.measure()
        figures["seconds"]["claims"] = figures["claims"].get("timing_seconds", 0)
    figures["seconds"]["all"] = round(time.perf_counter() - start, 1)
    return figures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", help="write every figure here, as JSON; those of the claims to NAME_claims.json"
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
    if options.claims is None:
        options.claims = options.only_claims or not (options.quick or options.rows or options.shape)
    try:
        options.selected = select(options)
    except (ValueError, re.error) as error:
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
    chosen = [row for row in ROWS if re.search(options.rows, f"{row.section} {row.label}")]
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
    print(module.text(figures, report.markdown if options.markdown else report.table) + "\n")
    if options.plot:
        module.plot(figures, rename(options.plot))


def main() -> int:
    options = parse()
    if options.plot_from:
        paths = [Path(options.plot_from), Path(beside(options.plot_from) or "")]
        result, claims = (json.loads(path.read_text()) if path.exists() else {} for path in paths)
    elif shutil.which("nvidia-smi") is None:  # asking JAX would take GPU memory in this process
        print("flash_attention.py: needs an NVIDIA GPU, found no nvidia-smi", file=sys.stderr)
        return 2
    else:
        result = measure(options.selected, options)
        claims = result.pop("claims", {})
        # Only now: this process must not hold GPU memory while the others measure.
        result, claims = ({**report.environment(), **figures} for figures in (result, claims))
    publish(result, attention_tables, options)
    publish(claims, flash_claims, options, rename=beside)
    if "failure" in claims:
        print(f"the claims were not measured: {claims['failure']}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
