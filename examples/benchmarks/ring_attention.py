"""Ring attention over the GPUs of this machine, against the same work on one.

    python examples/benchmarks/ring_attention.py --out ring_attention.json

One causal sequence of T tokens, bf16, its tokens split over D devices in zig-zag order. Time is that of whole
steps on the host's clock, the median of several. FLOPs are 4 T T N H / 2, and 3.5 times that with the
backward pass. Efficiency is the rate per GPU divided by that of one GPU alone, attending over T / sqrt(D)
tokens: as many FLOPs as each of the D has.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import in_turn
import jax
import jax.numpy as jnp
import numpy as np
import report
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from timing import at_most, or_reason

from jaxattn import dot_product_attention, from_zigzag, ring_attention, to_zigzag

LENGTHS = (32768, 65536, 131072, 262144)
MULTIPLE = 256  # of a length
CASE_SECONDS = 180
COMPILE_SECONDS = 400  # of all cases
COMPILE_SHARE = 0.6  # of --max-seconds
SPEC = P(None, "context")


class Heads(NamedTuple):
    """Those of Llama-3-8B by default."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128


class Case(NamedTuple):
    """One measurement."""

    num_devices: int
    num_tokens: int
    backward: bool

    @property
    def alone(self) -> "Case":
        """As many FLOPs on one device as each of these has."""
        num_tokens = self.num_tokens / math.sqrt(self.num_devices)
        return Case(1, round(num_tokens / MULTIPLE) * MULTIPLE, self.backward)

    def flops(self, heads: Heads) -> float:
        forward = 2 * self.num_tokens**2 * heads.num_heads * heads.head_dim
        return forward * (3.5 if self.backward else 1)


def mesh_of(num_devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:num_devices]), ("context",), axis_types=(AxisType.Auto,))


def ring(mesh: Mesh) -> Any:
    attend = functools.partial(ring_attention, is_causal=True)
    return jax.shard_map(attend, mesh=mesh, in_specs=(SPEC,) * 3, out_specs=SPEC)


def specs(case: Case, heads: Heads) -> list[jax.ShapeDtypeStruct]:
    sharding = NamedSharding(mesh_of(case.num_devices), SPEC)
    counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
    shapes = [(1, case.num_tokens, count, heads.head_dim) for count in counts]
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]


def compiled(case: Case, heads: Heads) -> Any:
    """The step of a case: the output, or the gradients for a cotangent that is the output itself."""
    attend = ring(mesh_of(case.num_devices))

    def step(*operands):
        if not case.backward:
            return attend(*operands)
        out, vjp = jax.vjp(attend, *operands)
        return vjp(out)

    return jax.jit(step).lower(*specs(case, heads)).compile()


def median_seconds(step: Any, operands: list[jax.Array], repeats: int) -> float:
    jax.block_until_ready(step(*operands))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(*operands))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def random_operands(case: Case, heads: Heads) -> list[jax.Array]:
    def draw(key, spec):
        return jax.random.normal(key, spec.shape, spec.dtype)

    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.jit(functools.partial(draw, spec=spec), out_shardings=spec.sharding)(key)
        for key, spec in zip(keys, specs(case, heads), strict=True)
    ]


def measure(case: Case, step: Any, heads: Heads, repeats: int) -> dict[str, Any]:
    step = step.result()
    seconds = median_seconds(step, random_operands(case, heads), repeats)
    return case._asdict() | {
        "seconds": seconds,
        "tokens_per_second": case.num_tokens / seconds,
        "tflops_per_gpu": case.flops(heads) / seconds / case.num_devices / 1e12,
        "temporary_bytes_per_gpu": step.memory_analysis().temp_size_in_bytes,
    }


def with_efficiency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """efficiency: None where the rate of one device alone was not measured."""
    rates = {_case(row): row["tflops_per_gpu"] for row in rows if "error" not in row}

    def efficiency(row: dict[str, Any]) -> float | None:
        alone = rates.get(_case(row).alone)
        return alone and row["tflops_per_gpu"] / alone

    return [row if "error" in row else row | {"efficiency": efficiency(row)} for row in rows]


def _case(row: dict[str, Any]) -> Case:
    return Case(row["num_devices"], row["num_tokens"], row["backward"])


def error_on(num_devices: int, heads: Heads, num_tokens: int) -> float:
    """The relative RMS difference of output and gradients, on these devices, from one device."""
    case = Case(1, num_tokens, True)
    operands = random_operands(case, heads)

    def run(attend, *operands):
        out, vjp = jax.vjp(attend, *operands)
        return (out, *vjp(out))

    attend = ring(mesh_of(num_devices))
    on_ring = lambda *qkv: from_zigzag(attend(*(to_zigzag(x, num_devices) for x in qkv)), num_devices)
    sharding = NamedSharding(mesh_of(num_devices), SPEC)
    actual = jax.jit(functools.partial(run, on_ring))(*(jax.device_put(x, sharding) for x in operands))
    alone = functools.partial(dot_product_attention, is_causal=True)
    expected = jax.jit(functools.partial(run, alone))(*operands)
    errors = []
    for one, other in zip(jax.device_get(actual), jax.device_get(expected), strict=True):
        one, other = one.astype(np.float32), other.astype(np.float32)
        errors.append(math.sqrt(np.mean((one - other) ** 2) / np.mean(other**2)))
    return max(errors)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="T of all devices together")
    parser.add_argument("--devices", type=int, nargs="+", help="how many; by default 1, 2, 4.. as there are")
    parser.add_argument("--heads", type=int, nargs=3, default=Heads(), help="N, K and H")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    if odd := [length for length in options.lengths if length < 1 or length % MULTIPLE]:
        parser.error(f"--lengths must be multiples of {MULTIPLE}, got {odd}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    report.begin("Ring attention")
    heads = Heads(*options.heads)
    devices = options.devices or [count for count in (1, 2, 4, 8) if count <= jax.device_count()]
    if max(devices) > jax.device_count():
        report.refuse(f"--devices {max(devices)}: there are {jax.device_count()}")
    most_first = sorted(devices, reverse=True)  # what one device needs for all tokens comes last
    wanted = [Case(d, t, b) for d in most_first for t in options.lengths for b in (False, True)]
    cases = list(dict.fromkeys(case for one in wanted for case in (one, one.alone)))  # an efficiency each
    with at_most(CASE_SECONDS, "comparing with one device"):
        errors = {d: or_reason(error_on, d, heads, min(8192, *options.lengths)) for d in devices}
    print("relative RMS difference from one device:", errors)
    pool = ThreadPoolExecutor(8)
    steps = {case: pool.submit(compiled, case, heads) for case in cases}
    # Compiled side by side, and only then timed: XLA tries out kernels, and Python has one lock.
    start = time.monotonic()
    wait(steps.values(), timeout=COMPILE_SHARE * (options.max_seconds or COMPILE_SECONDS))
    print(f"{sum(step.done() for step in steps.values())} of {len(steps)} compiled", flush=True)
    budget = options.max_seconds and options.max_seconds - (time.monotonic() - start)
    calls = {
        str(tuple(case)): functools.partial(measure, case, step, heads, options.repeats)
        for case, step in steps.items()
    }
    facts = {"heads": heads._asdict(), "rms_difference": errors}
    rows = in_turn.measured(options.out, facts, calls, CASE_SECONDS, budget)
    pool.shutdown(wait=False, cancel_futures=True)
    return in_turn.finish(options.out, facts, with_efficiency(rows))


if __name__ == "__main__":
    sys.exit(main())
