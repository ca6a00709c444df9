"""What quantized pages cost in quality: SmolLM2's loss on real text, read from pages of each dtype.

    python examples/benchmarks/quantized_pages.py --out quantized_pages.json

Rows of tokens, half of them State of the Union addresses and half Shakespeare, go through SmolLM2-135M in
fp32 (examples/requirements-data.txt). Every layer writes its K and V into a page pool and attends to what the
pool gives back. The loss is the mean negative log likelihood of the next token, in nats.
"""

import dataclasses
import functools
import sys
import time
from pathlib import Path
from typing import Any

import in_turn
import jax
import jax.numpy as jnp
import numpy as np
import report
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))
import assets

from jaxattn import load_model
from jaxattn.page_pool import PagePool, init_page_pool
from pallas_kernels import paged_attention, write_kv

PAGE_SIZE = 16
DTYPES = ("float32", "int8", "float8_e4m3fn")
CASE_SECONDS = 3600  # a CPU needs minutes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionOverPages:
    """The attention object of one pass over R whole rows of T tokens, side by side as R T query tokens."""

    pool: PagePool
    tables: jax.Array  # i32[R, M]
    slots: jax.Array  # i32[R T]

    def __call__(self, layer: Any, query: Any, key: Any, value: Any, *, dropout_key: Any = None):
        pool = PagePool(
            *write_kv(
                self.pool.k_pages, self.pool.v_pages, key, value, self.slots, layer=layer, **self.pool.scales
            )
        )
        num_rows, length = self.tables.shape[0], self.slots.size // self.tables.shape[0]
        attended = paged_attention(
            query,
            pool.k_pages,
            pool.v_pages,
            self.tables,
            jnp.full(num_rows, length),
            query_start=jnp.arange(num_rows + 1) * length,
            layer=layer,
            **pool.scales,
        )
        return attended, dataclasses.replace(self, pool=pool)


@functools.partial(jax.jit, static_argnums=(0, 3))
def losses(graphdef: Any, params: Any, tokens: jax.Array, dtype: str) -> jax.Array:
    """f32[R, T - 1]: the negative log likelihood of each next token."""
    model = nnx.merge(graphdef, params)
    num_rows, length = tokens.shape
    pages_a_row = -(-length // PAGE_SIZE)
    pool = init_page_pool(model.config, 1 + num_rows * pages_a_row, PAGE_SIZE, dtype)
    tables = 1 + jnp.arange(num_rows * pages_a_row).reshape(num_rows, pages_a_row)
    position = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    slots = tables[jnp.arange(num_rows)[:, None], position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
    attention = AttentionOverPages(pool, tables, slots.reshape(-1))
    hidden, _ = model(tokens.reshape(-1), position.reshape(-1), attention)

    def row_loss(row: jax.Array, targets: jax.Array) -> jax.Array:
        scores = jax.nn.log_softmax(model.logits(row[:-1]).astype(jnp.float32))
        return -jnp.take_along_axis(scores, targets[1:, None], axis=1)[:, 0]

    # Row by row: the logits of all rows at once would take gigabytes.
    return jax.lax.map(lambda args: row_loss(*args), (hidden.reshape(num_rows, length, -1), tokens))


def read_rows(tokenizer: Any, num_rows: int, length: int) -> np.ndarray:
    """i32[R, T]: the first tokens of an address each, and pieces of Shakespeare spread over the plays."""
    addresses = sorted(assets.state_of_the_union().glob("*.txt"))
    plays = assets.shakespeare().read_text(encoding="utf-8")
    texts = [path.read_text(encoding="utf-8") for path in addresses[:: -(-2 * len(addresses) // num_rows)]]
    texts = texts[: num_rows // 2]
    step = len(plays) // (num_rows - len(texts))
    texts += [plays[start : start + step] for start in range(0, step * (num_rows - len(texts)), step)]
    rows = [tokenizer.encode(text[: 8 * length])[:length] for text in texts]
    if min(map(len, rows)) < length:
        raise ValueError(f"the texts are too short for {num_rows} rows of {length} tokens")
    return np.array(rows, np.int32)


def measure(graphdef: Any, params: Any, tokens: jax.Array, dtype: str, of_tokens: dict) -> dict:
    """Against the first dtype; `of_tokens` keeps every token's loss."""
    start = time.perf_counter()
    of_tokens[dtype] = np.asarray(losses(graphdef, params, tokens, dtype), np.float64)
    difference = of_tokens[dtype] - of_tokens[DTYPES[0]]
    return {
        "pages": dtype,
        "loss": of_tokens[dtype].mean(),
        "moved": difference.mean(),
        "standard_error": difference.std() / difference.size**0.5,
        "largest_row": np.abs(difference.mean(axis=1)).max(),
        "seconds": time.perf_counter() - start,
    }


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    if options.rows < 2 or options.length < 2:
        parser.error(f"--rows and --length must be at least 2, got {options.rows} and {options.length}")
    report.begin("SmolLM2's loss over pages of each dtype", needs_gpu=False)
    try:
        loaded = load_model(str(assets.smollm2()))
        tokens = jnp.asarray(read_rows(loaded.tokenizer, options.rows, options.length))
    except (FileNotFoundError, ValueError) as error:
        report.refuse(str(error))
    graphdef, params = nnx.split(loaded.model)
    of_tokens: dict[str, np.ndarray] = {}
    cases = {
        dtype: functools.partial(measure, graphdef, params, tokens, dtype, of_tokens) for dtype in DTYPES
    }
    what = f"SmolLM2-135M-Instruct (Q4_1 weights), fp32, page size {PAGE_SIZE}"
    facts = {"model": what, "tokens": int(tokens.size)}
    rows = in_turn.measured(options.out, facts, cases, CASE_SECONDS, options.max_seconds)
    return in_turn.finish(options.out, facts, rows)


if __name__ == "__main__":
    sys.exit(main())
