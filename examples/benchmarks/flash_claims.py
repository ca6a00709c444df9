"""FlashAttention's claims against standard attention (XLA, which stores the logits), on this GPU.

What the paper claims (Dao et al., 2022, sections 1 and 4.3): faster, by more the longer the sequence; memory
linear in the length, not quadratic; longer sequences on the same device. One causal layer of 16 heads of 128,
bf16, B = 1. A process of flash_attention.py (processes.py), limited to 16 GB of device memory:

    python examples/benchmarks/flash_attention.py --only-claims --out flash_attention.json
"""

import functools
import gc
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

LIMIT_BYTES = 16e9
LENGTHS = tuple(512 << power for power in range(8))  # 512 .. 65536
MAX_STANDARD_LENGTH = 16384  # far beyond what fits
GRAIN = 256  # the longest sequence is searched in steps of this
STEP, NUM_STEPS = 0.03, 15  # of it, where it does not run: how much, and how often, less is tried
NUM_HEADS, HEAD_DIM = 16, 128
OURS, STANDARD = "jaxattn", "standard"
METRICS = ("forward", "forward_backward")
# Where the search for the longest sequence begins; ours takes other kernels below 4096.
PROBES = {OURS: (8192, 16384, 32768), STANDARD: (2048, 4096, 8192)}


def main() -> None:
    if sys.argv[1:] or sys.stdin.isatty():
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    sys.stdin.readline()
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{memory_fraction():.4f}"  # before JAX is imported
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "true"  # in one piece, so that one array may fill it
    import report
    from processes import say
    from timing import or_reason

    start = time.perf_counter()
    cases = [
        (name, metric, length)
        for name in (OURS, STANDARD)
        for metric in METRICS
        for length in LENGTHS
        if name == OURS or length <= MAX_STANDARD_LENGTH
    ]
    with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // 2)) as pool:
        searches = {
            (name, metric): pool.submit(or_reason, longest, name, metric)
            for name in (OURS, STANDARD)
            for metric in METRICS
        }
        # XLA tries its matrix products on the GPU: one call at a time does, when it is measured.
        compiled = {case: pool.submit(or_reason, compile_call, *case) for case in cases if case[0] == OURS}
    say("@compiled", {"seconds": round(time.perf_counter() - start, 1), **report.device_facts()})
    if not sys.stdin.readline():  # the parent is gone
        return
    start = time.perf_counter()
    for case in cases:
        call = compiled[case].result() if case in compiled else or_reason(compile_call, *case)
        say("@part", {"call": measure(case, call)})
    for (name, metric), search in searches.items():
        case = {"name": name, "metric": metric, "T": 0}
        found = or_reason(verify, search.result())
        say("@part", {"longest": {**case, "error": found} if isinstance(found, str) else found})
    say("@done", {"timing_seconds": round(time.perf_counter() - start, 1)})


def memory_fraction() -> float:
    """The part of the device's memory that this process may have."""
    total = subprocess.check_output(
        ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    )
    return LIMIT_BYTES / (int(total.split()[0]) * 2**20)


def collect(parts: list[dict]) -> dict:
    """The figures of all parts."""
    return {
        "shape": f"B=1 N={NUM_HEADS} H={HEAD_DIM} causal bfloat16",
        "limit_bytes": LIMIT_BYTES,
        "calls": [part["call"] for part in parts if "call" in part],
        "longest": [part["longest"] for part in parts if "longest" in part],
    }


def compile_call(name: str, metric: str, length: int, quickly: bool = False) -> Any:
    """A compiled call; quickly: without timing candidates for XLA's matrix products, which takes memory.
    So is what cannot run.
    """
    import jax
    from attention_peers import forward_and_backward
    from jax import numpy as jnp

    array = jax.ShapeDtypeStruct((1, length, NUM_HEADS, HEAD_DIM), jnp.bfloat16)
    attend = _attend(name)
    call, arrays = (attend, 3) if metric == "forward" else (forward_and_backward(attend), 4)
    is_too_large = name == STANDARD and 4 * NUM_HEADS * length**2 > LIMIT_BYTES
    options = {"xla_gpu_autotune_level": 0} if quickly or is_too_large else None
    return jax.jit(call).lower(*[array] * arrays, {}).compile(compiler_options=options)


def _attend(name: str) -> Any:
    import jax

    from pallas_kernels import flash_attention

    if name == OURS:
        return lambda q, k, v, _: flash_attention(q, k, v, is_causal=True, implementation="sm90")
    return lambda q, k, v, _: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")


def inputs(metric: str, length: int) -> list:
    import jax
    from jax import numpy as jnp

    keys = jax.random.split(jax.random.key(0), 3 if metric == "forward" else 4)
    return [jax.random.normal(key, (1, length, NUM_HEADS, HEAD_DIM), jnp.bfloat16) for key in keys]


def measure(case: tuple[str, str, int], call: Any) -> dict:
    """Kernel time and memory of one call, or why there is none."""
    from timing import milliseconds, or_reason

    name, metric, length = case
    figures: dict[str, Any] = {"name": name, "metric": metric, "T": length}
    if isinstance(call, str):
        return {**figures, "error": call}
    figures["temp_bytes"] = call.memory_analysis().temp_size_in_bytes
    if call_bytes(call) > LIMIT_BYTES:
        return {**figures, "error": f"needs {call_bytes(call) / 1e9:.1f} GB"}
    timed = or_reason(lambda: milliseconds(call, (*inputs(metric, length), {}), 3 if length > 8192 else 6))
    return {**figures, "error" if isinstance(timed, str) else "ms": timed}


def call_bytes(call: Any) -> int:
    """Arguments, results and everything between."""
    memory = call.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def longest(name: str, metric: str) -> dict:
    """The longest T whose call fits: a parabola through three lengths foretells it, its neighbours decide."""
    import numpy as np

    @functools.cache
    def needed(length: int) -> int:
        return call_bytes(compile_call(name, metric, length, quickly=True))

    probes = PROBES[name]
    curve = np.polyfit(probes, [needed(probe) for probe in probes], 2)
    if abs(curve[0]) * probes[-1] < 0.01 * curve[1]:  # linear, but for padding
        curve = np.polyfit(probes, [needed(probe) for probe in probes], 1)
    length = int(max(np.roots(np.polysub(curve, [LIMIT_BYTES])).real)) // GRAIN * GRAIN
    for _ in range(4):  # the curve's slope and the true size lead on
        left = LIMIT_BYTES - needed(length)
        length += int(left / np.polyval(np.polyder(curve), length)) // GRAIN * GRAIN
    while needed(length) > LIMIT_BYTES:
        length -= GRAIN
    while needed(length + GRAIN) <= LIMIT_BYTES:
        length += GRAIN
    return {"name": name, "metric": metric, "T": length, "bytes": needed(length)}


def verify(limit: dict | str) -> dict:
    """Runs the longest call; where the allocator cannot place it, the longest that runs of those that are
    3%, 6% .. 45% shorter, which halving finds.
    """
    from processes import say

    if isinstance(limit, str):  # why none was found
        raise RuntimeError(limit)
    lengths = [int(limit["T"] * (1 - STEP * step)) // GRAIN * GRAIN for step in range(NUM_STEPS + 1)]
    first, last, index = 0, NUM_STEPS, 0  # the answer, if there is one, lies in first..last
    figures: dict[str, Any] = {}
    while first <= last:
        say("@part", {"trying": lengths[index]})  # one of them, not all, is what must not take too long
        outcome = attempt(limit["name"], limit["metric"], lengths[index])
        if isinstance(outcome, str):
            figures |= {"failed_T": lengths[index], "failure": outcome}
            first = index + 1
        else:
            figures |= {"ran_T": lengths[index], "ran_seconds": round(outcome, 2)}
            last = index - 1
        index = (first + last) // 2
    return {**limit, **figures}


def attempt(name: str, metric: str, length: int) -> float | str:
    """The seconds of one run, inputs included, or why there is none."""
    import jax
    from timing import or_reason

    def run() -> float:
        call = compile_call(name, metric, length, quickly=True)
        start = time.perf_counter()
        jax.block_until_ready(call(*inputs(metric, length), {}))
        return time.perf_counter() - start

    gc.collect()  # what an attempt that failed may hold
    return or_reason(run)


# --- tables and charts ---


def _figure(claims: dict, name: str, metric: str, length: int, field: str) -> Any:
    for call in claims["calls"]:
        if (call["name"], call["metric"], call["T"]) == (name, metric, length):
            return call.get(field)
    return None


def rows(claims: dict) -> tuple[tuple[str, ...], list[tuple]]:
    """Header and rows of the table: times, speedup and extra memory over T."""
    header = (
        "T",
        *(f"{m}: {c}" for m in ("forward", "+ backward") for c in ("standard ms", "ours ms", "speedup")),
    )
    header += ("extra MB: standard", "ours")
    table = []
    for length in LENGTHS:
        line: list = [length]
        for metric in METRICS:
            standard, ours = (_figure(claims, name, metric, length, "ms") for name in (STANDARD, OURS))
            line += [standard, ours, standard and ours and standard / ours]
        for name in (STANDARD, OURS):
            extra = _figure(claims, name, "forward_backward", length, "temp_bytes")
            line.append(None if extra is None else extra / 1e6)
        table.append(tuple(line))
    return header, table


def text(claims: dict, as_table: Any) -> str:
    lines = [f"Against standard attention, {claims['shape']}:", "", as_table(*rows(claims)), ""]
    for limit in claims["longest"]:
        why_not = limit.get("failure", limit.get("error", "not run"))
        ran = f"ran at {limit['ran_T']:,}" if "ran_T" in limit else why_not
        what = f"{limit['metric'].replace('_', ' + ')}, {limit['name']}"
        lines.append(f"longest T in {claims['limit_bytes'] / 1e9:.0f} GB, {what}: {limit['T']:,} ({ran})")
    return "\n".join(lines)


def plot(result: dict, path: str) -> None:
    """Time and extra memory over T, forward + backward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import report

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    for axis, field, scale, label in zip(
        axes,
        ("ms", "temp_bytes"),
        (1, 1e6),
        ("kernel time, ms", "memory beside inputs and outputs, MB"),
        strict=True,
    ):
        for name in (STANDARD, OURS):
            for metric, style in zip(METRICS, (":", "-"), strict=True):
                points = [(t, _figure(result, name, metric, t, field)) for t in LENGTHS]
                points = [(t, value / scale) for t, value in points if value]
                title = f"{name}, {metric.replace('_', ' + ')}"
                xs, ys = zip(*points, strict=True) if points else ((), ())
                axis.loglog(xs, ys, style, marker="o", label=title, base=2)
        axis.set_xlabel("T")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{result['shape']}, {result['device']}")
    figure.tight_layout()
    report.save_chart(figure, path)
    plt.close(figure)


if __name__ == "__main__":
    main()
