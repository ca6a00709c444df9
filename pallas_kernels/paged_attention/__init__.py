"""paged_attention: attention over keys and values that live in pages; contiguous_attention: without pages."""

from pallas_kernels.paged_attention.cascade import cascade_attention
from pallas_kernels.paged_attention.config import PagedConfig
from pallas_kernels.paged_attention.contiguous import contiguous_attention
from pallas_kernels.paged_attention.op import paged_attention
from pallas_kernels.paged_attention.prefill_config import PrefillConfig

__all__ = ["PagedConfig", "PrefillConfig", "cascade_attention", "contiguous_attention", "paged_attention"]
