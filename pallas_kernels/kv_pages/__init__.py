"""kv_pages: writes to and copies within the page pool."""

from pallas_kernels.kv_pages.op import copy_pages, write_kv
from pallas_kernels.kv_pages.pool import NULL_PAGE, PAGE_SIZES

__all__ = ["NULL_PAGE", "PAGE_SIZES", "copy_pages", "write_kv"]
