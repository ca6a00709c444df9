"""The page pool and attention over it: the only caller of the paged kernels, and the only place above
`pallas_kernels` that knows the order of the pool's dimensions."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxattn.attention import dot_product_attention
from pallas_kernels import PAGE_SIZES, gather_pages, paged_attention, scatter_pages, write_kv
from pallas_kernels import copy_pages as _copy_pages

__all__ = [
    "PagePool",
    "PagedAttention",
    "PagedBatch",
    "copy_pages",
    "init_page_pool",
    "page_bytes",
    "swap_in",
    "swap_out",
]

QUANTIZED = ("int8", "float8_e4m3fn")  # dtypes of pages that hold codes, with a scale for each slot and head
DTYPES = ("float32", "bfloat16", "float16", *QUANTIZED)


class PagePool(NamedTuple):
    """Keys and values of every layer, page by page. Page 0 is NULL_PAGE: never allocated."""

    k_pages: Num[Array, "L P K Z H"]
    v_pages: Num[Array, "L P K Z H"]
    k_scale: Float[Array, "L P K Z"] | None = None  # of quantized pages
    v_scale: Float[Array, "L P K Z"] | None = None

    @property
    def scales(self) -> dict[str, Any]:
        """The scales, by the names that the ops give them."""
        return {"k_scale": self.k_scale, "v_scale": self.v_scale}

    @property
    def num_pages(self) -> int:
        return self.k_pages.shape[1]

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[3]


def init_page_pool(config: Any, num_pages: int, page_size: int, dtype: Any) -> PagePool:
    """An empty pool of `num_pages` pages (page 0 among them) of `page_size` tokens for a model's config.

    A dtype of int8 or float8_e4m3fn makes a quantized pool: half the bytes of bf16, and 4 bytes a slot, head.
    """
    if num_pages < 1:
        raise ValueError(f"num_pages={num_pages}: must be at least 1")
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size={page_size}: must be one of {PAGE_SIZES}")
    is_quantized = _is_quantized(dtype)
    shape = (config.num_layers, num_pages, config.num_kv_heads, page_size, config.head_dim)
    pages = [jnp.zeros(shape, dtype) for _ in range(2)]
    scales = [jnp.zeros(shape[:4], jnp.float32) for _ in range(2)] if is_quantized else []
    return PagePool(*pages, *scales)


def page_bytes(config: Any, page_size: int, dtype: Any) -> int:
    """Bytes of one page: 2 (keys and values) x L x K x Z x (H x bytes of an element, + 4 if quantized)."""
    is_quantized = _is_quantized(dtype)
    vector_bytes = config.head_dim * jnp.dtype(dtype).itemsize + 4 * is_quantized
    return 2 * config.num_layers * config.num_kv_heads * page_size * vector_bytes


def _is_quantized(dtype: Any) -> bool:
    """Of a dtype that the ops take; any other is refused."""
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = None
    if name not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    return name in QUANTIZED


def copy_pages(pool: PagePool, src_pages: Int[Array, "C"], dst_pages: Int[Array, "C"]) -> PagePool:
    """Copies page src_pages[i] to dst_pages[i] in every layer; a source of NULL_PAGE copies nothing."""
    return PagePool(*_copy_pages(pool.k_pages, pool.v_pages, src_pages, dst_pages, **pool.scales))


def swap_out(pool: PagePool, pages: Int[Array, "C"]) -> PagePool:
    """Copies pages of every layer to pinned host memory: buffers [L, C, ...] there; NULL_PAGE pads."""
    buffers = PagePool(*gather_pages(pool.k_pages, pool.v_pages, pages, **pool.scales))
    return jax.device_put(buffers, jax.memory.Space.Host)


def swap_in(pool: PagePool, buffers: PagePool, pages: Int[Array, "C"]) -> PagePool:
    """Copies what swap_out returned into pages of the pool, the same or others; NULL_PAGE: nowhere."""
    on_device = jax.device_put(buffers, jax.memory.Space.Device)
    arrays = [array for array in on_device if array is not None]
    return PagePool(*scatter_pages(pool.k_pages, pool.v_pages, arrays, pages, **pool.scales))


class PagedBatch(NamedTuple):
    """What one step needs to know about its rows; the same for every layer."""

    block_tables: Int[Array, "R M"]  # page ids
    kv_lengths: Int[Array, "R"]  # tokens of each row, this step's included; 0 for an idle row
    slots: Int[Array, "R *T"]  # where each token's K and V go, page * Z + offset; negative, page 0: nowhere


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedAttention:
    """The attention object of serving: writes a step's K and V into the pool and attends through the block
    tables.

    `attention(layer, q, k, v)` -> (y, attention with the pool written).
    Decode: q [R, N, H], one token a row. Prefill: q [R, T, N, H], whole prompts from position 0 on, padded
    to T; K and V of padding have negative slots and are not written. A prompt attends to its own K and V as
    computed, decode to what the pool holds of them: rounded to its dtype, or quantized.
    batch_invariant: paged_attention's, of decode.
    """

    pool: PagePool
    batch: PagedBatch
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})
    batch_invariant: bool = dataclasses.field(default=False, metadata={"static": True})

    def __call__(
        self,
        layer: jax.Array | int,
        query: Float[Array, "R *T N H"],
        key: Float[Array, "R *T K H"],
        value: Float[Array, "R *T K H"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "R *T N H"], "PagedAttention"]:
        if dropout_key is not None:
            raise ValueError("dropout_key: attention over pages has no dropout, got a key")
        pool = self._write(layer, key, value)
        attend = self._decode if query.ndim == 3 else self._prefill
        return attend(pool, layer, query, key, value), dataclasses.replace(self, pool=pool)

    def _write(self, layer: jax.Array | int, key: jax.Array, value: jax.Array) -> PagePool:
        heads_and_dim = key.shape[-2:]
        written = write_kv(
            self.pool.k_pages,
            self.pool.v_pages,
            key.reshape(-1, *heads_and_dim),
            value.reshape(-1, *heads_and_dim),
            self.batch.slots.reshape(-1),
            layer=layer,
            implementation=self.implementation,
            **self.pool.scales,
        )
        return PagePool(*written)

    def _decode(self, pool: PagePool, layer: jax.Array | int, query: jax.Array, *_: jax.Array) -> Any:
        return paged_attention(
            query,
            pool.k_pages,
            pool.v_pages,
            self.batch.block_tables,
            self.batch.kv_lengths,
            layer=layer,
            implementation=self.implementation,
            batch_invariant=self.batch_invariant,
            **pool.scales,
        )

    def _prefill(
        self, pool: PagePool, layer: jax.Array | int, query: jax.Array, key: jax.Array, value: jax.Array
    ) -> jax.Array:
        return dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            query_seq_lengths=self.batch.kv_lengths,
            key_value_seq_lengths=self.batch.kv_lengths,
            implementation=self.implementation,
        )
