"""Who writes and moves pages in page_writes.py: ours, XLA's scatters and gathers, and plain copies.

PEERS[name](row) gives a Program. Pools are donated: a program of ours that copies one is an error. Layers are
traced; where there is more than one set of inputs, writes take the layers of the pool in turn.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from programs import Program, sets_in_turn
from timing import elapsed_milliseconds, milliseconds

from pallas_kernels import copy_pages, gather_pages, scatter_pages, write_kv

PAGE_SIZE = 16
OURS, XLA, COPY = "jaxattn", "XLA", "copy"
IMPLEMENTATIONS = {OURS: "sm90", XLA: "reference"}
WRITE, PAIRS, GATHER, SCATTER = "write_kv", "copy_pages", "gather_pages", "scatter_pages"


class Row(NamedTuple):
    """One call: how many tokens are written, or how many pages of so many layers are moved. `whole_pages`:
    tokens fill pages, as those of a prompt do; otherwise each has a page of its own, as in a decode step.
    """

    op: str
    model: str
    num_kv_heads: int
    head_dim: int
    num_items: int
    dtype: str = "bfloat16"
    num_layers: int = 1
    whole_pages: bool = True

    @property
    def label(self) -> str:
        layers = f" of {self.num_layers} layers" if self.num_layers > 1 else ""
        unit = {WRITE: "token", PAIRS: "pair"}.get(self.op, "page") + "s" * (self.num_items > 1)
        heads = f"{self.num_kv_heads} x {self.head_dim}"
        return f"{self.op}: {self.num_items} {unit}{layers}, {self.model} {heads}, {self.dtype}"

    @property
    def is_quantized(self) -> bool:
        return jnp.dtype(self.dtype).itemsize == 1

    @property
    def num_vectors(self) -> int:
        """Of K and V, [H] each."""
        tokens = self.num_items if self.op == WRITE else self.num_items * self.num_layers * PAGE_SIZE
        return 2 * tokens * self.num_kv_heads

    @property
    def written_bytes(self) -> int:
        """Vectors, and a scale for each of quantized pages."""
        return self.num_vectors * (self.head_dim * jnp.dtype(self.dtype).itemsize + 4 * self.is_quantized)

    @property
    def read_bytes(self) -> int:
        """Tokens come in bf16."""
        return self.num_vectors * self.head_dim * 2 if self.op == WRITE else self.written_bytes

    @property
    def copied_bytes(self) -> int:
        """Read and written by a plain copy; of a write to quantized pages, whose scales it leaves out, it
        writes half as many bytes as it reads."""
        return self.read_bytes + (self.read_bytes // 2 if self.is_narrowing else self.read_bytes)

    @property
    def is_narrowing(self) -> bool:
        return self.op == WRITE and self.is_quantized

    @property
    def num_sets(self) -> int:
        return sets_in_turn(self.read_bytes + self.written_bytes)

    def pool(self, num_layers: int, num_pages: int) -> tuple[Any, ...]:
        """k_pages, v_pages, and scales if quantized, as shapes; one page more, which is NULL_PAGE."""
        shape = (num_layers, num_pages + 1, self.num_kv_heads, PAGE_SIZE, self.head_dim)
        pages = jax.ShapeDtypeStruct(shape, jnp.dtype(self.dtype))
        scales = jax.ShapeDtypeStruct(shape[:4], jnp.float32)
        return (pages, pages, scales, scales) if self.is_quantized else (pages, pages)


def write(implementation: str, row: Row) -> Program:
    """write_kv to slots anywhere in the pool."""
    sets, rng = row.num_sets, np.random.default_rng(0)
    if row.whole_pages:
        num_pages = -(-row.num_items // PAGE_SIZE)
        slots = (1 + rng.permutation(num_pages))[:, None] * PAGE_SIZE + np.arange(PAGE_SIZE)
    else:
        num_pages = row.num_items
        slots = (1 + rng.permutation(num_pages)) * PAGE_SIZE + rng.integers(0, PAGE_SIZE, num_pages)
    slots = slots.reshape(-1)[: row.num_items].astype(np.int32)
    tokens = jax.ShapeDtypeStruct((row.num_items, row.num_kv_heads, row.head_dim), jnp.bfloat16)

    def call(index, pool, keys, values, slots, layers):
        k_pages, v_pages, options = _arguments(pool, implementation)
        options |= {"layer": layers[index]}
        return write_kv(k_pages, v_pages, keys[index], values[index], slots, **options)

    arrays = ((tokens,) * sets, (tokens,) * sets, slots, tuple(np.arange(sets, dtype=np.int32)))
    return Program(call, arrays, sets, row.pool(sets, num_pages), implementation == "sm90")


def copy(implementation: str, row: Row) -> Program:
    """copy_pages, each set of pairs from and to pages of its own."""
    num_pages = 2 * row.num_items * row.num_sets
    pairs = _page_ids(num_pages).reshape(row.num_sets, 2, row.num_items)

    def call(index, pool, pairs):
        k_pages, v_pages, options = _arguments(pool, implementation)
        return copy_pages(k_pages, v_pages, *pairs[index], **options)

    arrays = (tuple((src, dst) for src, dst in pairs),)
    state = row.pool(row.num_layers, num_pages)
    return Program(call, arrays, row.num_sets, state, implementation == "sm90")


def gather(implementation: str, row: Row) -> Program:
    num_pages = row.num_items * row.num_sets
    pages = tuple(_page_ids(num_pages).reshape(row.num_sets, row.num_items))

    def call(index, pool, pages):
        k_pages, v_pages, options = _arguments(pool, implementation)
        return gather_pages(k_pages, v_pages, pages[index], **options)

    return Program(call, (row.pool(row.num_layers, num_pages), pages), row.num_sets)


def scatter(implementation: str, row: Row) -> Program:
    """scatter_pages, each set from buffers of its own."""
    num_pages = row.num_items * row.num_sets
    pages = tuple(_page_ids(num_pages).reshape(row.num_sets, row.num_items))
    buffers = (row.pool(row.num_layers, row.num_items - 1),) * row.num_sets

    def call(index, pool, buffers, pages):
        k_pages, v_pages, options = _arguments(pool, implementation)
        return scatter_pages(k_pages, v_pages, buffers[index], pages[index], **options)

    state = row.pool(row.num_layers, num_pages)
    return Program(call, (buffers, pages), row.num_sets, state, implementation == "sm90")


def _page_ids(num_pages: int) -> np.ndarray:
    return (1 + np.random.default_rng(0).permutation(num_pages)).astype(np.int32)


def _arguments(pool: tuple[jax.Array, ...], implementation: str) -> tuple[Any, Any, dict[str, Any]]:
    """Pages of K and of V, and the options that all ops share."""
    k_pages, v_pages, *scales = pool
    names = dict(zip(("k_scale", "v_scale"), scales, strict=False))
    return k_pages, v_pages, {**names, "implementation": implementation}


def plain_copy(row: Row) -> Program:
    """What XLA makes of an elementwise operation."""
    numbers = jax.ShapeDtypeStruct((row.read_bytes // 2,), jnp.bfloat16)

    def call(index, arrays):
        if row.is_narrowing:
            return lax.bitcast_convert_type(arrays[index], jnp.uint16).astype(jnp.uint8)
        return -arrays[index]

    return Program(call, ((numbers,) * row.num_sets,), row.num_sets)


def by_op(name: str, row: Row) -> Program:
    programs = {WRITE: write, PAIRS: copy, GATHER: gather, SCATTER: scatter}
    return programs[row.op](IMPLEMENTATIONS[name], row)


PEERS: dict[str, Callable[[Row], Program]] = {
    OURS: functools.partial(by_op, OURS),
    XLA: functools.partial(by_op, XLA),
    COPY: plain_copy,
}


def ceiling(iterations: int, num_bytes: int = 1 << 30) -> dict[str, float]:
    """TB/s read and written of a large copy: by a kernel of XLA's, and by the driver."""
    numbers = jax.random.normal(jax.random.key(0), (num_bytes // 2,), jnp.bfloat16)
    by_kernel = milliseconds(jax.jit(jnp.negative), (numbers,), iterations)
    by_driver = elapsed_milliseconds(jax.jit(jnp.copy), (numbers,), iterations)
    rate = lambda time: 2 * num_bytes / time / 1e9
    return {"copy_kernel_tb_per_s": rate(by_kernel), "copy_driver_tb_per_s": rate(by_driver)}
