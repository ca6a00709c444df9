"""How long the kernels of one shape take to trace, to lower and to compile on this machine.

    python examples/benchmarks/compile_time.py --out compile_time.json

Tracing and lowering are Python's, on one core; compiling is XLA's and ptxas's. Tracing and lowering are
medians of three lengths, the given one and two a little longer, each new to the process; what JAX imports on
its first kernel is paid before the first row. Peer: cuDNN through jax.nn.dot_product_attention. JAX's
persistent compilation cache is off.
"""

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import in_turn
import jax
import jax.numpy as jnp
import report

from pallas_kernels import flash_attention, paged_attention

CASE_SECONDS = 120
LENGTHS, LONGER = 3, 256  # how many, and by how many tokens each is longer than the one before
ATTENTION = {
    "jaxattn": flash_attention,
    "cuDNN": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
}


def attention(peer: str, head_dim: int, is_causal: bool, *, with_gradients: bool, length: int):
    """A call of attention on 4 x length tokens with 16 heads, and what it takes."""

    def call(*arrays):
        return ATTENTION[peer](*arrays, is_causal=is_causal)

    def total(*arrays):
        return call(*arrays).astype(jnp.float32).sum()

    array = jax.ShapeDtypeStruct((4, length, 16, head_dim), jnp.bfloat16)
    return (jax.grad(total, argnums=(0, 1, 2)) if with_gradients else call), (array,) * 3


def paged(*, num_tokens: int, num_rows: int = 16, context: int = 4096):
    """A call of paged attention in the shape of Llama-3-8B: decode, or, with more tokens, prompts too."""
    pages = jax.ShapeDtypeStruct((2, 1024, 8, 16, 128), jnp.bfloat16)
    query = jax.ShapeDtypeStruct((num_tokens, 32, 128), jnp.bfloat16)
    integers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((num_rows, context // 16), (num_rows,))]
    starts = [] if num_tokens == num_rows else [jax.ShapeDtypeStruct((num_rows + 1,), jnp.int32)]

    def call(query, k_pages, v_pages, tables, lengths, *starts):
        options = {"query_start": starts[0]} if starts else {}
        return paged_attention(query, k_pages, v_pages, tables, lengths, **options)

    return call, (query, pages, pages, *integers, *starts)


def make_cases(length: int) -> dict[str, Callable[[], tuple]]:
    """Functions that make a call and the shapes it takes, by name."""
    cases: dict[str, Callable[[], tuple]] = {}
    for with_gradients in (False, True):
        for head_dim, is_causal in ((64, True), (128, True), (128, False), (256, True)):
            for peer in ATTENTION if head_dim <= 128 else ("jaxattn",):
                name = f"{peer}, H = {head_dim}, {'causal' if is_causal else 'full'}"
                name += ", forward + backward" if with_gradients else ", forward"
                cases[name] = functools.partial(
                    attention, peer, head_dim, is_causal, with_gradients=with_gradients, length=length
                )
    cases["jaxattn, paged decode"] = functools.partial(paged, num_tokens=16, context=length)
    cases["jaxattn, paged prefill and decode"] = functools.partial(paged, num_tokens=1024, context=length)
    return cases


def measure(name: str, *makers: Callable[[], tuple]) -> dict[str, Any]:
    """Medians of the calls that these make; the first is compiled."""
    tracing, lowering, compiling = [], [], None
    for call, arguments in (make() for make in makers):
        gc.collect()  # what calls before this one have left
        traced, seconds = timed(functools.partial(jax.jit(call).trace, *arguments))
        tracing.append(seconds)
        lowered, seconds = timed(traced.lower)
        lowering.append(seconds)
        if compiling is None:
            _, compiling = timed(lowered.compile)
    seconds = {"trace_s": statistics.median(tracing), "lower_s": statistics.median(lowering)}
    return {"call": name, **seconds, "compile_s": compiling, "slowest_lower_s": max(lowering)}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence (default 4096)")
    options = parser.parse_args()
    if options.length < 1:
        parser.error(f"--length must be at least 1, got {options.length}")
    report.begin("tracing, lowering and compiling the kernels of one shape")
    jax.config.update("jax_enable_compilation_cache", False)
    cases = [make_cases(options.length + LONGER * index) for index in range(LENGTHS)]
    measure("", functools.partial(paged, num_tokens=2, num_rows=2, context=64))  # imports
    calls = {name: functools.partial(measure, name, *(x[name] for x in cases)) for name in cases[0]}
    facts = report.device_facts() | {"length": options.length}
    rows = in_turn.measured(options.out, facts, calls, CASE_SECONDS, options.max_seconds)
    return in_turn.finish(options.out, facts, rows)


if __name__ == "__main__":
    sys.exit(main())
