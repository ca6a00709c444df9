"""How many pages the pool gets: as many as memory holds after the weights, and no more than rows can fill."""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxattn.page_pool import page_bytes
from serving.pages import num_pages_of

CPU_MEMORY_SHARE = 0.25  # of the memory that is available: other programs live here too
MAX_CPU_POOL_BYTES = 4 * 2**30
ACTIVATION_COPIES = 4  # arrays as wide as the widest layer that a step may hold at once


class PoolSize(NamedTuple):
    num_pages: int  # NULL_PAGE among them
    explanation: str  # the sum, for the user


def choose_pool_size(
    config: Any,
    *,
    page_size: int,
    dtype: Any,
    max_num_seqs: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    gpu_memory_utilization: float,
    num_pages: int | None = None,
) -> PoolSize:
    """Pages for `max_num_seqs` full rows if the free memory holds them, else as many as it holds.

    A page takes 2 (K and V) x L x K x Z x H x bytes of an element, and 4 a scale beside H 8-bit numbers.
    `num_pages` overrides the choice.
    """
    bytes_of_page = page_bytes(config, page_size, dtype)
    useful = max_num_seqs * num_pages_of(max_model_len, page_size) + 1
    if num_pages is not None:
        reason = "as asked for"
    else:
        workspace = _workspace_bytes(config, max_num_seqs, max_num_batched_tokens)
        free, source = _free_bytes(gpu_memory_utilization, workspace)
        num_pages = max(2, min(useful, int(free // bytes_of_page)))
        reason = f"all that {max_num_seqs} rows of {max_model_len} tokens can fill"
        if num_pages < useful:
            reason = f"{_size(free)} of {source}"
    itemsize = jnp.dtype(dtype).itemsize
    vector = f"{config.head_dim} head dim x {itemsize} bytes"
    if itemsize == 1:
        vector = f"({config.head_dim} head dim x 1 byte + 4 of a scale)"
    return PoolSize(
        num_pages,
        f"page pool: 2 x {config.num_layers} layers x {config.num_kv_heads} KV heads x {page_size} tokens x "
        f"{vector} = {bytes_of_page:,} bytes a page; "
        f"x {num_pages:,} pages = {_size(num_pages * bytes_of_page)} ({reason})",
    )


def _free_bytes(gpu_memory_utilization: float, workspace: int) -> tuple[float, str]:
    """Bytes the pool may take, and where they come from."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        available = _available_host_bytes()
        free = min(CPU_MEMORY_SHARE * available, MAX_CPU_POOL_BYTES)
        return free, f"{_size(available)} of available memory"
    stats = device.memory_stats() or {}
    limit, in_use = stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
    if limit is None:
        raise ValueError(f"num_pages: {device.device_kind} does not tell its free memory; set num_pages")
    free = gpu_memory_utilization * limit - in_use - workspace
    return free, (
        f"{gpu_memory_utilization} x {_size(limit)} less {_size(in_use)} in use and "
        f"{_size(workspace)} to work in"
    )


def _workspace_bytes(config: Any, max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """What a step's activations and logits may take, in float32."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    widest = max(heads, 2 * config.mlp_dim, config.embed_dim)
    activations = max_num_batched_tokens * widest
    logits = max_num_seqs * config.vocab_size
    return 4 * ACTIVATION_COPIES * (activations + logits)


def _available_host_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except OSError:  # not Linux: half of what is built in
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _size(num_bytes: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
