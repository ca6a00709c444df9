"""Who computes attention in paged_prefill.py: ours over pages, and over dense K and V; cuDNN.

PEERS[name](batch) gives a Program, or raises NotImplementedError with why it cannot do that batch.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from attention_worker import matmul_tflops
from programs import Program, scattered_tables, sets_in_turn

from pallas_kernels import flash_attention, paged_attention

KERNELS = "sm90"  # the implementation that is measured
BYTES = 2  # of bf16
PAGE_16, PAGE_128, DENSE, CUDNN = "page 16", "page 128", "flash_attention", "cuDNN"
INVARIANT = "batch-invariant, page 16"
ONE_CALL, PREFILL, DECODE = "one call", "prefill alone", "decode alone"


class Row(NamedTuple):
    """A batch: heads of a model, and each of its rows' new tokens and their length with what is cached."""

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    queries: tuple[int, ...]
    lengths: tuple[int, ...]
    note: str
    names: tuple[str, ...] = (PAGE_16, PAGE_128, DENSE, CUDNN)

    @property
    def label(self) -> str:
        return f"{self.model} {self.num_heads}/{self.num_kv_heads}, {self.head_dim}; {self.note}"

    @property
    def num_tokens(self) -> int:
        return sum(self.queries)

    @property
    def flops(self) -> float:
        """4 H for each pair of a query and a key it sees: two matrix products. Query i of t sees
        length - t + i + 1 keys."""
        rows = zip(self.queries, self.lengths, strict=True)
        pairs = sum(t * length - t * (t - 1) // 2 for t, length in rows)
        return 4 * self.head_dim * self.num_heads * pairs

    @property
    def num_bytes(self) -> int:
        """Q, K, V and the results, each once."""
        vectors = 2 * self.num_tokens * self.num_heads + 2 * sum(self.lengths) * self.num_kv_heads
        return BYTES * self.head_dim * vectors

    @property
    def num_sets(self) -> int:
        return sets_in_turn(self.num_bytes)

    def part(self, is_decode: bool) -> "Row":
        """Only the rows of one query, or only those of more."""
        rows = [row for row in zip(self.queries, self.lengths, strict=True) if (row[0] == 1) == is_decode]
        if not rows:
            raise NotImplementedError(f"no row has {'one query' if is_decode else 'more than one query'}")
        queries, lengths = zip(*rows, strict=True)
        return self._replace(queries=queries, lengths=lengths)


def over_pages(page_size: int, batch: Row, is_ragged: bool = True, batch_invariant: bool = False) -> Program:
    """paged_attention; K and V of the sets are layers of one pool. Not ragged: a decode step."""
    tables = scattered_tables(batch.lengths, page_size)
    shape = (batch.num_sets, int(tables.max()) + 1, batch.num_kv_heads, page_size, batch.head_dim)
    pages = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    query = jax.ShapeDtypeStruct((batch.num_tokens, batch.num_heads, batch.head_dim), jnp.bfloat16)
    start = np.array([0, *itertools.accumulate(batch.queries)], np.int32) if is_ragged else None

    def attend(index, queries, k_pages, v_pages, tables, lengths, start):
        options = {"query_start": start, "layer": jnp.int32(index), "implementation": KERNELS}
        options["batch_invariant"] = batch_invariant
        return paged_attention(queries[index], k_pages, v_pages, tables, lengths, **options)

    lengths = np.asarray(batch.lengths, np.int32)
    arrays = ((query,) * batch.num_sets, pages, pages, tables, lengths, start)
    return Program(attend, arrays, batch.num_sets)


def prefill_alone(page_size: int, batch: Row) -> Program:
    return over_pages(page_size, batch.part(is_decode=False))


def decode_alone(page_size: int, batch: Row) -> Program:
    return over_pages(page_size, batch.part(is_decode=True), is_ragged=False)


def over_dense(attend: Callable[..., Any], batch: Row) -> Program:
    """attend(query, key, value) of contiguous arrays, for rows that are all alike."""
    if len({*batch.queries}) > 1 or len({*batch.lengths}) > 1:
        raise NotImplementedError("the rows differ")
    num_rows, num_queries, length = len(batch.queries), batch.queries[0], batch.lengths[0]
    query = jax.ShapeDtypeStruct((num_rows, num_queries, batch.num_heads, batch.head_dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((num_rows, length, batch.num_kv_heads, batch.head_dim), jnp.bfloat16)
    sets = ((query, key, key),) * batch.num_sets
    return Program(lambda index, sets: attend(*sets[index]), (sets,), batch.num_sets)


def dense(batch: Row) -> Program:
    """Our own flash_attention; the last query sees the last key."""
    attend = functools.partial(flash_attention, is_causal=True, causal_alignment="bottom_right")
    return over_dense(functools.partial(attend, implementation=KERNELS), batch)


def cudnn(batch: Row) -> Program:
    """cuDNN through jax.nn.dot_product_attention, whose first query sees the first key only."""
    if batch.queries != batch.lengths:
        raise NotImplementedError("its causal mask begins at the top left")
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return over_dense(attend, batch)


PEERS: dict[str, Callable[[Row], Program]] = {
    PAGE_16: functools.partial(over_pages, 16),
    INVARIANT: functools.partial(over_pages, 16, batch_invariant=True),
    PAGE_128: functools.partial(over_pages, 128),
    DENSE: dense,
    CUDNN: cudnn,
    ONE_CALL: functools.partial(over_pages, 16),
    PREFILL: functools.partial(prefill_alone, 16),
    DECODE: functools.partial(decode_alone, 16),
}


def ceiling(iterations: int) -> dict[str, float]:
    """A large matrix product in bf16."""
    return {"matmul_tflops": matmul_tflops()}
