"""FlashAttention and PagedAttention for JAX on NVIDIA GPUs: attention, models, weights.

Importing it touches no device; what needs flax or a file format is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxattn.attention import SAVE_ATTENTION, dot_product_attention
from jaxattn.block_mask import BlockMask
from jaxattn.ring_attention import from_zigzag, ring_attention, to_zigzag, zigzag_positions
from pallas_kernels import paged_attention

if TYPE_CHECKING:
    from jaxattn import models
    from jaxattn.nnx_adapter import nnx_attention
    from jaxattn.sampling import SamplingParams
    from jaxattn.tokenizer_files import get_tokenizer
    from jaxattn.weights import LoadedModel, load_model, save_hf

__all__ = [
    "SAVE_ATTENTION",
    "BlockMask",
    "LoadedModel",
    "SamplingParams",
    "dot_product_attention",
    "from_zigzag",
    "get_tokenizer",
    "load_model",
    "models",
    "nnx_attention",
    "paged_attention",
    "ring_attention",
    "save_hf",
    "to_zigzag",
    "zigzag_positions",
]

_LAZY = {
    "LoadedModel": "jaxattn.weights",
    "SamplingParams": "jaxattn.sampling",
    "get_tokenizer": "jaxattn.tokenizer_files",
    "load_model": "jaxattn.weights",
    "nnx_attention": "jaxattn.nnx_adapter",
    "save_hf": "jaxattn.weights",
}


def __getattr__(name: str) -> Any:
    if name == "models":
        return importlib.import_module("jaxattn.models")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'jaxattn' has no attribute {name!r}")
