"""Random calls of paged_attention: rows of tables.py, and what tests/gpu/test_paged_random.py draws from.

JAXATTN_INTERPRETED_CASES sets how many are interpreted (draws.py: from where on, and how often).
"""

import functools
import os
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels import PAGE_SIZES, PagedConfig, PrefillConfig
from pallas_kernels.kv_pages.pool import QUANTIZED
from tests.pallas_kernels.draws import FIRST, NUM_INTERPRETED, check_draws, poison_of
from tests.pallas_kernels.paged_cases import check_decode
from tests.pallas_kernels.prefill_cases import check_prefill
from tests.pallas_kernels.tables import CompileCase

CASES = range(FIRST, FIRST + int(os.environ.get("JAXATTN_INTERPRETED_CASES", "2")))


class Call(NamedTuple):
    """One call; half of the features are absent from most of them."""

    shapes: dict[str, Any]  # of make_case
    pages: Any  # the dtype of quantized ones
    dtype: Any
    features: dict[str, Any]  # of paged_attention; per head: None
    decode: PagedConfig
    prefill: PrefillConfig | None  # None: one query a row
    padding: int  # tokens behind the last row's


def draw(seed: int, max_rows: int, max_keys: int, max_queries: int) -> Call:
    """A call with at most so many rows, keys in all of them, and queries in all of them."""
    rng = np.random.default_rng(seed)
    has = lambda probability=0.3: bool(rng.random() < probability)
    is_ragged = has(0.6)
    pages = QUANTIZED[rng.integers(len(QUANTIZED))] if has(0.4) else None
    head_dim = int(rng.choice([64, 96, 128, 160] if pages else [64, 80, 96, 128, 176]))
    kv_heads, group = int(rng.integers(1, 3)), int(rng.choice([1, 2, 3, 4, 7, 8]))
    rows, page_size = int(rng.integers(1, max_rows + 1)), int(rng.choice(PAGE_SIZES))
    lengths = rng.integers(0, max_keys // rows + 1, rows)
    lengths[rng.random(rows) < 0.1] = 0
    queries = None
    if is_ragged:
        longest = max(1, max_queries // rows)
        kinds = rng.integers(0, 4, rows)
        queries = np.choose(kinds, [0, 1, np.minimum(lengths, longest), rng.integers(1, longest + 1, rows)])
        queries[rng.integers(rows)] = longest  # one token at least
    shapes = {
        "seed": seed,
        "rows": rows,
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "page_size": page_size,
        "width": max(1, -(-int(lengths.max()) // page_size)) + int(rng.integers(3)),
        "lengths": lengths,
        "query_lengths": queries,
        "shared": int(rng.integers(4)) if has() else 0,
        "num_pages": int((-(-lengths // page_size)).sum()) + 3,
    }
    features: dict[str, Any] = {name: None for name in ("sinks", "alibi_slopes") if has()}
    if has():
        features["local_window_size"] = int(rng.integers(0, max_keys))
    elif is_ragged and has():
        features["is_causal"] = False
    if has():
        features["logits_soft_cap"] = float(rng.uniform(2, 20))
    decode = PagedConfig(64, 64 * int(rng.integers(1, 5)), 2, 2 if pages else 1, dynamic=has(0.5))
    splits = int(rng.choice([1, 1, 2, 3]))
    warpgroups = 1 if head_dim > 128 else int(rng.integers(1, 3))
    prefill = PrefillConfig(warpgroups, 64, 2, splits, packs=seed % 2 > 0)
    dtype = jnp.float16 if pages is None and has() else jnp.bfloat16
    return Call(shapes, pages, dtype, features, decode, prefill if is_ragged else None, int(rng.integers(9)))


def redraw(call: Call, number: int) -> Call:
    """Another draw of a call, of the same shapes: its pages and tokens are dealt to rows anew, often up to an
    edge. Draw 0 is the call itself.
    """
    if number == 0:
        return call
    shapes = call.shapes
    rng = np.random.default_rng([shapes["seed"], number])
    rows, page_size, width = (shapes[name] for name in ("rows", "page_size", "width"))
    room, border = width * page_size, page_size * rng.integers(1, width + 1, rows)
    kinds, some = rng.integers(0, 8, rows), rng.integers(0, room + 1, rows)
    lengths = np.choose(kinds, [0, 1, room, border - 1, border, np.minimum(border + 1, room), some, some])
    divided, queries = shapes["query_lengths"], np.zeros(rows, int)
    pages, tokens = shapes["num_pages"] - 1, 0 if divided is None else int(divided.sum()) + call.padding
    for row in rng.permutation(rows):  # each takes of what is left
        lengths[row] = min(lengths[row], pages * page_size)
        pages -= -(-int(lengths[row]) // page_size)
        queries[row] = min(
            tokens, rng.choice([0, 1, int(lengths[row]), tokens, int(rng.integers(tokens + 1))])
        )
        tokens -= int(queries[row])
    drawn = {
        "seed": [shapes["seed"], number],
        "lengths": lengths,
        "query_lengths": None if divided is None else queries,
        "shared": int(rng.choice([0, 1, 3, width])),
        "poison_with": poison_of(number),
    }
    return call._replace(shapes=shapes | drawn, padding=tokens)


def check(seed: int) -> None:
    """An interpreted call, small enough for that."""
    first = draw(seed, max_rows=2, max_keys=200, max_queries=16)
    check_draws(seed, NUM_INTERPRETED, lambda number: check_call(redraw(first, number)))


def check_call(call: Call) -> None:
    arguments = {"dtype": call.dtype, "pages": call.pages, "call": call.features, **call.shapes}
    if call.prefill is None:
        check_decode(config=call.decode, **arguments)
    else:
        arguments["call"] = {**call.features, "config": call.decode}
        check_prefill(config=call.prefill, padding=call.padding, **arguments)


INTERPRET = {f"paged_attention:random {seed}": functools.partial(check, seed) for seed in CASES}
COMPILE: dict[str, CompileCase] = {}
