"""kv_pages: writes to the page pool, copies within it, and pages out of it and back."""

from pallas_kernels.kv_pages.op import copy_pages, gather_pages, scatter_pages, write_kv
from pallas_kernels.kv_pages.pool import NULL_PAGE, PAGE_SIZES

__all__ = ["NULL_PAGE", "PAGE_SIZES", "copy_pages", "gather_pages", "scatter_pages", "write_kv"]
