"""The order of dimensions within a page, by measurement: [K, Z, H], heads first, or [Z, K, H], tokens first.

    python examples/benchmarks/page_layout.py --out page_layout.json

Heads first, a head's part of a page is one piece of Z x H numbers, and a token's K heads lie in K pieces of
H. Tokens first it is the other way round. Two kernels are measured in both orders: the read of decode
without its arithmetic (one persistent program a multiprocessor, K and V by a warpgroup each, one TMA copy
for each page and head, three tiles of 128 tokens on their way), and write_kv's (blocks of tokens to shared
memory, one TMA copy for each token). Pages lie scattered. Time is kernel time by CUPTI.
"""

import functools
import statistics
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import in_turn
import jax
import jax.numpy as jnp
import numpy as np
import report
from jax import lax
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels.mosaic import div, pl, plgpu

ORDERS = ("K, Z, H", "Z, K, H")
TILE, STAGES, PROGRAMS = 128, 3, 132
TOKENS_IN_CACHE = 16 * 16384
DECODE_TOKENS = 256
CASE_SECONDS = 120  # compiling included
SHAPES = [  # K, Z, H, dtype
    (8, 8, 128, "bfloat16"),
    (8, 16, 128, "bfloat16"),
    (8, 64, 128, "bfloat16"),
    (4, 16, 128, "bfloat16"),
    (16, 16, 64, "bfloat16"),
    (8, 16, 128, "int8"),
    (16, 16, 64, "int8"),
]


class Case(NamedTuple):
    """A page pool of one layer and what is done with it."""

    order: str
    num_kv_heads: int
    page_size: int
    head_dim: int
    dtype: str

    @property
    def num_pages(self) -> int:
        return TOKENS_IN_CACHE // self.page_size

    @property
    def pool_shape(self) -> tuple[int, ...]:
        page = (self.num_kv_heads, self.page_size)
        return (self.num_pages, *(page if self.order == ORDERS[0] else page[::-1]), self.head_dim)

    def head_of_page(self, pool, page, head):
        """The [Z, H] numbers of a head."""
        return pool.at[page, head] if self.order == ORDERS[0] else pool.at[page, :, head]

    def token_of_page(self, pool, page, offset):
        """The [K, H] numbers of a token."""
        return pool.at[page, :, offset] if self.order == ORDERS[0] else pool.at[page, offset]


def read(case: Case, k_pages, v_pages):
    """Streams every head of every page through shared memory, as decode does."""
    ring = plgpu.SMEM((STAGES, TILE, case.head_dim), jnp.dtype(case.dtype))
    loaded = plgpu.Barrier(num_barriers=STAGES, num_arrivals=max(1, TILE // case.page_size))
    return plgpu.kernel(
        functools.partial(_read_kernel, case),
        out_type=jax.ShapeDtypeStruct((PROGRAMS, 2, TILE, case.head_dim), jnp.dtype(case.dtype)),
        grid=(PROGRAMS,),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[ring, ring, loaded, loaded],
    )(k_pages, v_pages)


def _read_kernel(case: Case, k_pages, v_pages, out, k_ring, v_ring, k_loaded, v_loaded):
    for which, (pool, ring, loaded) in enumerate(((k_pages, k_ring, k_loaded), (v_pages, v_ring, v_loaded))):

        @pl.when(lax.axis_index("warpgroup") == which)
        def _(pool=pool, ring=ring, loaded=loaded, which=which):
            _stream(case, pool, ring, loaded)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(ring.at[0], out.at[lax.axis_index("program"), which])
            plgpu.wait_smem_to_gmem(0)


def _stream(case: Case, pool, ring, loaded):
    """Units of 2048 tokens of a head go round the programs, heads of the same tokens side by side."""
    program, tiles_a_unit = lax.axis_index("program"), 2048 // TILE
    num_units = TOKENS_IN_CACHE // 2048 * case.num_kv_heads
    total = div(num_units - program + PROGRAMS - 1, PROGRAMS) * tiles_a_unit
    copies = max(1, TILE // case.page_size)

    def fetch(tile):
        unit, within = program + div(tile, tiles_a_unit) * PROGRAMS, lax.rem(tile, jnp.int32(tiles_a_unit))
        first = (div(unit, case.num_kv_heads) * tiles_a_unit + within) * copies
        head, slot = lax.rem(unit, jnp.int32(case.num_kv_heads)), lax.rem(tile, jnp.int32(STAGES))
        for copy in range(copies):
            page = lax.rem((first + copy) * 7919, jnp.int32(case.num_pages))  # scattered: 7919 is prime
            rows = pl.ds(copy * case.page_size, case.page_size)
            plgpu.copy_gmem_to_smem(case.head_of_page(pool, page, head), ring.at[slot, rows], loaded.at[slot])

    def step(tile, _):
        plgpu.barrier_wait(loaded.at[lax.rem(tile, jnp.int32(STAGES))])

        @pl.when(tile + STAGES < total)
        def _():
            fetch(tile + STAGES)

    lax.fori_loop(0, STAGES, lambda tile, _: fetch(tile), None)
    lax.fori_loop(0, total, step, None)


def write(case: Case, num_tokens: int, key, value, slots):
    """write_kv's kernel, into a pool of zeros; returns some of it."""
    block = max(1, -(-num_tokens // (PROGRAMS * 4)))
    refs = [jax.new_ref(jnp.zeros(case.pool_shape, key.dtype)) for _ in range(2)]
    tokens = plgpu.SMEM((block, case.num_kv_heads, case.head_dim), key.dtype)
    plgpu.kernel(
        functools.partial(_write_kernel, case, block, num_tokens),
        out_type=(),
        grid=(-(-num_tokens // block),),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        scratch_types=[tokens, tokens, plgpu.Barrier(num_arrivals=2)],
    )(*refs, key, value, slots)
    return [jax.freeze(ref)[0] for ref in refs]


def _write_kernel(
    case: Case, block: int, num_tokens: int, k_pages, v_pages, key, value, slots, k_smem, v_smem, loaded
):
    first = lax.axis_index("block") * block
    plgpu.copy_gmem_to_smem(key.at[pl.ds(first, block)], k_smem, loaded)
    plgpu.copy_gmem_to_smem(value.at[pl.ds(first, block)], v_smem, loaded)
    plgpu.barrier_wait(loaded)

    def store(index, _):
        @pl.when(first + index < num_tokens)
        def _():
            slot = slots[jnp.minimum(first + index, num_tokens - 1)]
            page, offset = div(slot, case.page_size), lax.rem(slot, jnp.int32(case.page_size))
            for smem, pool in ((k_smem, k_pages), (v_smem, v_pages)):
                plgpu.copy_smem_to_gmem(smem.at[index], case.token_of_page(pool, page, offset))

    lax.fori_loop(0, block, store, None)
    plgpu.wait_smem_to_gmem(0)


def microseconds(compiled, arguments) -> float:
    """Median time of the Mosaic kernels of a call."""
    _, runs = profiler.measure(compiled, aggregate=False, iterations=8)(*arguments)
    if runs is None:
        raise RuntimeError("no kernel ran")
    return 1e3 * statistics.median(sum(time for name, time in run if "mosaic" in name) for run in runs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def random(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    numbers = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    return (numbers * 40).astype(dtype)


def start_compiling(pool: ThreadPoolExecutor, case: Case, prefill_tokens: int) -> list[Future]:
    """The read, and the writes of 256 and of prefill_tokens tokens."""
    dtype = jnp.dtype(case.dtype)
    pages = jax.ShapeDtypeStruct(case.pool_shape, dtype)
    programs: list[tuple] = [(functools.partial(read, case), pages, pages)]
    for num_tokens in (DECODE_TOKENS, prefill_tokens):
        token = jax.ShapeDtypeStruct((num_tokens, case.num_kv_heads, case.head_dim), dtype)
        slots = jax.ShapeDtypeStruct((num_tokens,), jnp.int32)
        programs.append((functools.partial(write, case, num_tokens), token, token, slots))
    # Lowered here, in the thread that may: only XLA's compiler may run in several.
    return [pool.submit(jax.jit(call).lower(*specs).compile) for call, *specs in programs]


def measure(case: Case, jobs: list[Future], prefill_tokens: int) -> dict:
    reader, *writers = (job.result() for job in jobs)
    arrays = [random(i, case.pool_shape, case.dtype) for i in range(2)]
    read_time = microseconds(reader, arrays)
    row = case._asdict() | {"read_us": read_time, "read_tb_per_s": 2 * arrays[0].nbytes / read_time / 1e6}
    for num_tokens, writer in zip((DECODE_TOKENS, prefill_tokens), writers, strict=True):
        tokens = [x.reshape(-1, case.num_kv_heads, case.head_dim)[:num_tokens] for x in arrays]
        # Decode: rows anywhere. Prefill: prompts of whole pages, each page anywhere.
        unit = case.page_size if num_tokens == prefill_tokens else 1
        starts = np.random.default_rng(0).permutation(TOKENS_IN_CACHE // unit)[: num_tokens // unit]
        slots = (starts[:, None] * unit + np.arange(unit)).reshape(-1).astype(np.int32)
        row[f"write_{num_tokens}_us"] = microseconds(writer, (*tokens, jnp.asarray(slots)))
    return row


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--prefill-tokens", type=int, default=16384, help="a multiple of 256")
    options = parser.parse_args()
    if options.prefill_tokens % 256 or not 256 < options.prefill_tokens <= TOKENS_IN_CACHE:
        parser.error(f"--prefill-tokens must be a multiple of 256 beyond it, got {options.prefill_tokens}")
    report.begin("Reads and writes of pages in two orders")
    pool = ThreadPoolExecutor()
    cases = {}
    for case in (Case(order, *shape) for shape in SHAPES for order in ORDERS):
        jobs = start_compiling(pool, case, options.prefill_tokens)
        cases[str(tuple(case))] = functools.partial(measure, case, jobs, options.prefill_tokens)
    facts = {"cache_tokens": TOKENS_IN_CACHE}
    rows = in_turn.measured(options.out, facts, cases, CASE_SECONDS, options.max_seconds)
    pool.shutdown(wait=False, cancel_futures=True)
    return in_turn.finish(options.out, facts, rows)


if __name__ == "__main__":
    sys.exit(main())
