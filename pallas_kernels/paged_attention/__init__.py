"""paged_attention: attention over keys and values that live in pages."""

from pallas_kernels.paged_attention.config import PagedConfig
from pallas_kernels.paged_attention.op import paged_attention

__all__ = ["PagedConfig", "paged_attention"]
