"""GPU kernels of jaxattn: FlashAttention and PagedAttention, each an op with one reference and one file per
architecture.

The letters of every shape, those of jax.nn.dot_product_attention and a few more:
    B  batch                 T  query length          S  key length
    N  query heads           K  KV heads              G  N / K, query heads a KV head serves
    H  head dim              Hv head dim of the values
    R  rows: sequences served together                M  block-table width, in pages
    P  pages of the pool     Z  page size, in tokens  L  layers
"""

from pallas_kernels.flash_attention import FlashConfig, flash_attention, io_bytes, tuned_config
from pallas_kernels.kv_pages import (
    NULL_PAGE,
    PAGE_SIZES,
    copy_pages,
    gather_pages,
    scatter_pages,
    write_kv,
)
from pallas_kernels.paged_attention import (
    PagedConfig,
    PrefillConfig,
    cascade_attention,
    contiguous_attention,
    paged_attention,
)

__all__ = [
    "NULL_PAGE",
    "PAGE_SIZES",
    "FlashConfig",
    "PagedConfig",
    "PrefillConfig",
    "cascade_attention",
    "contiguous_attention",
    "copy_pages",
    "flash_attention",
    "gather_pages",
    "io_bytes",
    "paged_attention",
    "scatter_pages",
    "tuned_config",
    "write_kv",
]
