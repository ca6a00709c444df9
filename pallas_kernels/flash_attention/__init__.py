"""FlashAttention: exact attention with O(T) memory."""

from pallas_kernels.flash_attention.config import FlashConfig
from pallas_kernels.flash_attention.op import VARIANTS, flash_attention

__all__ = ["VARIANTS", "FlashConfig", "flash_attention"]
