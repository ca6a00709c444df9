"""Who decodes in paged_attention.py: ours over pages and over contiguous caches, and peers.

PEERS[name](row) gives a Program, or raises NotImplementedError with why it cannot do that row.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from programs import Program, scattered_tables, sets_in_turn
from timing import milliseconds

from pallas_kernels import PagedConfig, cascade_attention, contiguous_attention, paged_attention
from pallas_kernels.paged_attention.config import default_config
from pallas_kernels.paged_attention.decode_plan import padded_group


class Row(NamedTuple):
    """Heads of a model and the lengths of a batch; `dtype` of the cache."""

    model: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]
    note: str = ""
    dtype: str = "bfloat16"
    capacity: int = 0  # tokens a row has room for; by default the longest length
    prefix: int = 0  # leading tokens whose pages all rows share
    layers: int = 0  # of one step, whose time is divided by them: what follows from tables is computed once
    names: tuple[str, ...] = ()  # of PEERS, if only these are to compute it

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    @property
    def room(self) -> int:
        return self.capacity or max(self.lengths)

    @property
    def cache_bytes(self) -> int:
        """K and V of all rows, and the scales of quantized ones; a shared prefix counts once for each row."""
        vector = self.head_dim * jnp.dtype(self.dtype).itemsize + 4 * self.is_quantized
        return 2 * sum(self.lengths) * self.num_kv_heads * vector

    @property
    def is_quantized(self) -> bool:
        return jnp.dtype(self.dtype).itemsize == 1

    @property
    def is_uniform(self) -> bool:
        return set(self.lengths) == {self.room}

    @property
    def num_caches(self) -> int:
        """Caches to take in turn."""
        return self.layers or sets_in_turn(self.cache_bytes)

    @property
    def label(self) -> str:
        shape = f"{self.num_rows} x {self.room}" if self.is_uniform else f"{self.num_rows} rows"
        heads = f"{self.num_heads}/{self.num_kv_heads}, {self.head_dim}"
        return f"{self.model} {heads}; {self.note or shape}"


def _query(row: Row) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((row.num_rows, row.num_heads, row.head_dim), jnp.bfloat16)


def _tables(row: Row, page_size: int) -> np.ndarray:
    tables = scattered_tables(row.lengths, page_size, row.room)
    tables[:, : row.prefix // page_size] = tables[0, : row.prefix // page_size]
    return tables


def config_of(row: Row, page_size: int, changes: Mapping[str, Any]) -> PagedConfig:
    """The default config with some fields changed; NotImplementedError where they do not go together."""
    group, itemsize = padded_group(row.num_heads // row.num_kv_heads), jnp.dtype(row.dtype).itemsize
    cuts = row.num_rows, row.num_kv_heads, row.head_dim, group, row.room, itemsize, page_size
    try:
        return dataclasses.replace(default_config(*cuts), **changes)
    except ValueError as error:
        raise NotImplementedError(str(error)) from None


def over_pages(
    page_size: int,
    row: Row,
    is_cascade: bool = False,
    changes: Mapping[str, Any] | None = None,
    batch_invariant: bool = False,
) -> Program:
    """Our paged_attention, or cascade_attention, with changes to its config; the caches are layers of one
    pool."""
    config = config_of(row, page_size, changes) if changes else None
    if is_cascade and not row.prefix:
        raise NotImplementedError("no prefix is shared")
    tables = _tables(row, page_size)
    shape = (row.num_caches, int(tables.max()) + 1, row.num_kv_heads, page_size, row.head_dim)
    pages = jax.ShapeDtypeStruct(shape, jnp.dtype(row.dtype))
    scales = (jax.ShapeDtypeStruct(shape[:4], jnp.float32),) * 2 if row.is_quantized else ()

    def attend(index, query, k_pages, v_pages, scales, tables, lengths):
        options = dict(zip(("k_scale", "v_scale"), scales, strict=False))
        options |= {"layer": jnp.int32(index), "implementation": "sm90"}
        options["config"] = config
        if is_cascade:
            group = jnp.array([row.prefix]), jnp.zeros(row.num_rows, jnp.int32)
            return cascade_attention(query, k_pages, v_pages, tables, lengths, *group, **options)
        options["batch_invariant"] = batch_invariant
        return paged_attention(query, k_pages, v_pages, tables, lengths, **options)

    lengths = np.asarray(row.lengths, np.int32)
    return Program(attend, (_query(row), pages, pages, scales, tables, lengths), row.num_caches)


def _caches(row: Row) -> tuple[tuple[jax.ShapeDtypeStruct, ...], ...]:
    if row.is_quantized:
        raise NotImplementedError("no quantized caches")
    cache = jax.ShapeDtypeStruct((row.num_rows, row.room, row.num_kv_heads, row.head_dim), jnp.bfloat16)
    return ((cache, cache),) * row.num_caches


def contiguous(row: Row) -> Program:
    """Our kernel where every row's cache is one piece."""

    def attend(index, query, caches, lengths):
        return contiguous_attention(query, *caches[index], lengths, implementation="sm90")

    arrays = (_query(row), _caches(row), np.asarray(row.lengths, np.int32))
    return Program(attend, arrays, row.num_caches)


def cudnn(row: Row) -> Program:
    """cuDNN's decode over contiguous caches, through jax.nn.dot_product_attention."""

    def attend(index, query, caches, lengths):
        options = {} if row.is_uniform else {"key_value_seq_lengths": lengths}
        return jax.nn.dot_product_attention(query[:, None], *caches[index], implementation="cudnn", **options)

    arrays = (_query(row), _caches(row), np.asarray(row.lengths, np.int32))
    return Program(attend, arrays, row.num_caches)


def triton(page_size: int, row: Row) -> Program:
    """JAX's own op, deprecated, in Pallas Triton."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as attend_in_triton
    if row.is_quantized or not row.is_uniform:
        raise NotImplementedError("measured for uniform rows in bf16 only")
    tables = _tables(row, page_size)
    shape = (row.num_kv_heads, int(tables.max()) + 1, page_size, row.head_dim)
    pages = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    # Its best of 4 and 16 splits: 16 where the rows alone do not fill the chip.
    splits = 16 if row.num_rows * row.num_kv_heads < 128 else 4
    block = math.gcd(64 // page_size, tables.shape[1])

    def attend(index, query, caches, tables, lengths):
        return attend_in_triton(
            query, *caches[index], tables, lengths, k_splits=splits, pages_per_compute_block=block
        )

    arrays = (_query(row), ((pages, pages),) * row.num_caches, tables, np.asarray(row.lengths, np.int32))
    return Program(attend, arrays, row.num_caches)


PEERS: dict[str, Callable[[Row], Program]] = {
    **{f"page {size}": functools.partial(over_pages, size) for size in (8, 16, 32, 64, 128, 256)},
    "batch-invariant, page 16": functools.partial(over_pages, 16, batch_invariant=True),
    "cascade, page 16": functools.partial(over_pages, 16, is_cascade=True),
    "contiguous": contiguous,
    "cuDNN contiguous": cudnn,
    "JAX Triton page 16": functools.partial(triton, 16),
}


def ceiling(iterations: int) -> dict[str, float]:
    """TB/s of a reduction over 2 GB."""
    array = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.bfloat16)
    total = jax.jit(lambda x: x.astype(jnp.float32).sum())
    return {"read_ceiling_tb_per_s": array.nbytes / milliseconds(total, (array,), iterations) / 1e9}
