"""Floating-point operations of a training step, and the device's peak: what MFU is made of."""

from typing import Any

import jax
import numpy as np

from training.data.batches import NO_TARGET, Batch

# Dense matmul peaks in FLOP/s by `device_kind`, without sparsity, from the vendor's data sheets. fp32 is
# TF32's rate: JAX's default precision may use it, so no fp32 run can come out above 100%.
PEAK_FLOPS = {
    "NVIDIA H200": {"bfloat16": 989e12, "float32": 494e12},
    "NVIDIA H100 80GB HBM3": {"bfloat16": 989e12, "float32": 494e12},
    "NVIDIA H100 PCIe": {"bfloat16": 756e12, "float32": 378e12},
    "NVIDIA A100-SXM4-80GB": {"bfloat16": 312e12, "float32": 156e12},
    "NVIDIA A100-SXM4-40GB": {"bfloat16": 312e12, "float32": 156e12},
}


def peak_flops(device: Any, dtype: str) -> float | None:
    """FLOP/s of a `jax.Device`; None where the table does not know it."""
    return PEAK_FLOPS.get(device.device_kind, {}).get(dtype)


def matmul_parameters(params: Any, config: Any) -> int:
    """Parameters that a token is multiplied by: matrices and the output head (tied or not), no look-ups.

    Those with two or more dimensions, less the tables of the input embedding [V, D] and of the positions.
    """
    total = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim >= 2)
    if not config.tie_embeddings:
        total -= config.vocab_size * config.embed_dim
    if config.model_type == "gpt2":
        total -= config.max_positions * config.embed_dim
    return total


def step_flops(batch: Batch, num_matmul_parameters: int, config: Any) -> float:
    """FLOPs that forward and backward need for a batch; recomputation and padding do not count.

    6 for each matmul parameter and token, and 12 L N H for each pair of a query and a key that it sees. Pairs
    are counted exactly (causal, within documents), so a kernel that skips the rest cannot show more than
    100%. Chowdhery et al., "PaLM", 2022, appendix B, which counts all T^2 pairs.
    """
    is_used = batch.targets != NO_TARGET
    num_pairs = float(np.sum(batch.positions[is_used] + 1, dtype=np.int64))
    attention = 12.0 * config.num_layers * config.num_heads * config.head_dim * num_pairs
    return 6.0 * num_matmul_parameters * float(np.sum(is_used)) + attention
