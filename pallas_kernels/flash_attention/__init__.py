"""FlashAttention: exact attention with O(T) memory."""

from pallas_kernels.flash_attention.block_tiles import BlockTiles
from pallas_kernels.flash_attention.config import FlashConfig
from pallas_kernels.flash_attention.io_model import IoBytes, Traffic, io_bytes
from pallas_kernels.flash_attention.op import (
    SAVED_NAMES,
    VARIANTS,
    flash_attention,
    flash_attention_gradients,
)
from pallas_kernels.flash_attention.tuned import tuned_config

__all__ = [
    "SAVED_NAMES",
    "VARIANTS",
    "BlockTiles",
    "FlashConfig",
    "IoBytes",
    "Traffic",
    "flash_attention",
    "flash_attention_gradients",
    "io_bytes",
    "tuned_config",
]
