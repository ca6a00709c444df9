"""Random page pools, tables and lengths for the tests of paged kernels, and a plain NumPy oracle."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

GARBAGE = -(2**30)  # a table entry that must never be read as a page


class Case(NamedTuple):
    """Arguments of paged_attention, as NumPy arrays; all outside the rows' lengths is NaN or garbage."""

    query: np.ndarray  # [tokens, N, H]
    k_pages: np.ndarray  # [L, P, K, Z, H]
    v_pages: np.ndarray
    block_tables: np.ndarray  # i32[R, M]
    kv_lengths: np.ndarray  # i32[R]
    query_start: np.ndarray  # i32[R + 1]
    layer: int


def make_case(
    seed=0,
    rows=3,
    heads=4,
    kv_heads=2,
    head_dim=16,
    page_size=8,
    width=6,
    lengths=None,
    query_lengths=None,
    layers=2,
    shared=0,
    num_pages=None,
    poison_with=np.nan,
) -> Case:
    """Draws a case in fp32. Rows own distinct pages, shuffled; without query_lengths one query a row.

    shared: leading pages, full ones, that rows have in common with the first. num_pages: of the pool; page 0
    and those that no row needs, two by default, are free. poison_with: what free slots hold.
    """
    rng = np.random.default_rng(seed)
    if lengths is None:
        lengths = rng.integers(0, width * page_size + 1, rows)
    lengths = np.asarray(lengths, np.int32)
    counts = -(-lengths // page_size)
    num_pages = num_pages or int(counts.sum()) + 3
    pages = rng.permutation(np.arange(1, num_pages))
    tables = np.full((rows, width), GARBAGE, np.int32)
    shape = (layers, num_pages, kv_heads, page_size, head_dim)
    k_pages, v_pages = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    is_used = np.zeros((num_pages, page_size), bool)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tables[row, :count], pages = pages[:count], pages[count:]
        is_used[tables[row, :count]] = np.arange(count * page_size).reshape(count, page_size) < length
    for row in range(rows):
        common = min(shared, lengths[0] // page_size, lengths[row] // page_size)
        tables[row, :common] = tables[0, :common]
    for array in (k_pages, v_pages):
        np.moveaxis(array, 2, 3)[:, ~is_used] = poison_with
    query_lengths = np.ones(rows, int) if query_lengths is None else np.asarray(query_lengths)
    query_start = np.concatenate([[0], np.cumsum(query_lengths)]).astype(np.int32)
    query = rng.standard_normal((query_start[-1], heads, head_dim)).astype(np.float32)
    return Case(query, k_pages, v_pages, tables, lengths, query_start, layers - 1)


def cast(case: Case, dtype) -> Case:
    """The case in a lower precision, still as NumPy arrays."""
    arrays = {
        name: np.asarray(jnp.asarray(getattr(case, name), dtype)) for name in ("query", "k_pages", "v_pages")
    }
    return case._replace(**arrays)


class Quantized(NamedTuple):
    """Codes and scales of both pools; where the case holds NaN, scales are NaN and codes anything."""

    k_pages: np.ndarray
    v_pages: np.ndarray
    k_scale: np.ndarray  # f32[L, P, K, Z]
    v_scale: np.ndarray


def quantize(case: Case, dtype) -> Quantized:
    """Codes of a case's pages with a scale for each slot and head: max |x| becomes the largest code."""
    largest = 127 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    codes, scales = [], []
    for pages in (case.k_pages, case.v_pages):
        scale = np.abs(pages.astype(np.float32)).max(-1) / largest
        code = pages.astype(np.float32) / scale[..., None]
        if dtype == jnp.int8:
            code = np.where(np.isnan(code), -128, np.rint(code))
        codes.append(code.astype(dtype))
        scales.append(scale)
    return Quantized(*codes, *scales)


def contiguous(case: Case, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the case's layer as caches [R, max_length, K, H], NaN beyond the lengths."""
    num_rows, (_, _, num_kv_heads, page_size, head_dim) = len(case.kv_lengths), case.k_pages.shape
    caches = np.full((2, num_rows, max_length, num_kv_heads, head_dim), np.nan, case.k_pages.dtype)
    for row, length in enumerate(case.kv_lengths):
        tokens = np.arange(length)
        pages = case.block_tables[row, tokens // page_size]
        for cache, pool in zip(caches, (case.k_pages, case.v_pages), strict=True):
            cache[row, :length] = pool[case.layer, pages, :, tokens % page_size]
    return caches[0], caches[1]


def oracle(
    case: Case, window_left=None, soft_cap=None, scale=None, sinks=None, slopes=None
) -> tuple[np.ndarray, np.ndarray]:
    """Attention one query and one head at a time, in float64: out [tokens, N, H] and lse [tokens, N]."""
    num_tokens, num_heads, head_dim = case.query.shape
    page_size = case.k_pages.shape[3]
    group = num_heads // case.k_pages.shape[2]
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    out, lse = np.zeros(case.query.shape), np.full((num_tokens, num_heads), -np.inf)
    for row, length in enumerate(case.kv_lengths):
        first, stop = case.query_start[row : row + 2]
        for token in range(first, stop):
            position = length - stop + token
            keys = np.arange(0 if window_left is None else max(0, position - window_left), position + 1)
            if not len(keys):
                lse[token] = -np.inf if sinks is None else sinks
                continue
            slots = case.block_tables[row, keys // page_size], keys % page_size
            for head in range(num_heads):
                k, v = (
                    pages[case.layer, slots[0], head // group, slots[1]].astype(np.float64)
                    for pages in (case.k_pages, case.v_pages)
                )
                logits = k @ case.query[token, head].astype(np.float64) * scale
                if soft_cap is not None:
                    logits = soft_cap * np.tanh(logits / soft_cap)
                if slopes is not None:
                    logits = logits - slopes[head] * (position - keys)
                weights = np.exp(logits - logits.max())
                total = weights.sum() + (0 if sinks is None else np.exp(sinks[head] - logits.max()))
                out[token, head] = weights @ v / total
                lse[token, head] = logits.max() + np.log(total)
    return out, lse
