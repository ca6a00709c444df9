"""The parts models are made of. They compute in the dtype of their parameters; statistics are float32."""

from jaxattn.layers.attention import SelfAttention
from jaxattn.layers.block import PreNormBlock, run_blocks
from jaxattn.layers.dropout import dropout
from jaxattn.layers.embedding import Embedding
from jaxattn.layers.mlp import MLP, GatedMLP
from jaxattn.layers.norm import LayerNorm, RMSNorm
from jaxattn.layers.rope import apply_rope, rope_angles, rope_frequencies

__all__ = [
    "MLP",
    "Embedding",
    "GatedMLP",
    "LayerNorm",
    "PreNormBlock",
    "RMSNorm",
    "SelfAttention",
    "apply_rope",
    "dropout",
    "rope_angles",
    "rope_frequencies",
    "run_blocks",
]
