"""The bytes that attention moves: FlashAttention's IO model (Dao et al., 2022, section 3.2).

Standard attention moves Theta(T H + T^2) elements between memory and the cores, FlashAttention
Theta(T^2 H^2 / M) with M the size of the fast memory: each tile of queries meets each tile of keys it sees
once, and the larger the tile that stays, the fewer times the other operand passes by. On a GPU that traffic
leaves the L2 cache for the SMs; of device memory only the compulsory bytes are left where L2 holds the K and
V (backward: the Q and dO) of the heads that run at one time.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention import backward_fused_sm90, one_query_sm90, sm90
from pallas_kernels.flash_attention.arguments import make_spec, shapes_of
from pallas_kernels.flash_attention.backward_fused_block import block_keys
from pallas_kernels.flash_attention.config import FlashConfig, padded
from pallas_kernels.flash_attention.forward_plan import FIRST, ForwardPlan
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.kv_tiles import kv_tiles

FP32_BYTES = 4


class Traffic(NamedTuple):
    """Bytes that kernels move."""

    l2_to_sm: int  # loads of tiles and row statistics into shared memory
    sm_to_l2: int  # stores of results, and sums added in global memory
    dram_read: int  # lower bound: each operand once
    dram_write: int  # lower bound: each result once

    def __add__(self, other: "Traffic") -> "Traffic":  # type: ignore[override]
        return Traffic(*(x + y for x, y in zip(self, other, strict=True)))


class IoBytes(NamedTuple):
    """Traffic of the forward kernel, and of those of the backward pass together."""

    forward: Traffic
    backward: Traffic


def io_bytes(
    query: Any,
    key: Any,
    value: Any = None,
    *,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    local_window_size: int | tuple[int | None, int | None] | None = None,
    deterministic: bool = False,
    config: FlashConfig | None = None,
) -> IoBytes:
    """Counts the bytes that flash_attention's Hopper kernels move for these arguments, which it shares.

    A thread block that owns rows r of Q loads them once, and streams the n(r) tiles of K and V that any of
    them sees; it stores its rows of the output and their log-sum-exp:

        L2 -> SMs = sum over blocks of  |r| H  +  n(r) tile_kv (H + Hv),      in elements

    The backward kernels likewise (see the functions below). n(r) is what the kernels' own index arithmetic
    gives, so causal and window ranges are exact to the tile. Rows and columns past the end of an array are
    not loaded. A single query that decode serves loads the K and V that it sees once for all heads that share
    them; what it moves to merge parts is not counted.

    Arguments:
        query, key, value: anything with shape [B, T, N, H], [B, S, K, H], [B, S, K, Hv] and a dtype; value is
            like key by default. Only shapes and dtypes are read.
        is_causal ... config: as flash_attention; default tiles where config is None.

    Not counted: what XLA does around the kernels (row sums of dO * O, casts). Raises ValueError for
    wrong arguments, NotImplementedError for float32 and what the Hopper kernels cannot serve.
    """
    inputs = shapes_of(query, key, value)
    spec = make_spec(
        inputs.query,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        local_window_size=local_window_size,
        deterministic=deterministic,
        config=config,
    )
    if reason := sm90.unsupported(inputs, spec):
        raise NotImplementedError(f"the Hopper kernels cannot serve this call: {reason}")
    forward = sm90.forward_plan_of(inputs, spec)
    plan = sm90.plan_of(inputs, spec)
    if plan.keeps_fp32:
        raise NotImplementedError("float32 is not counted: most of what it adds is XLA's, around the kernels")
    is_fused, sum_dim = backward_fused_sm90.serves(plan, inputs), plan.head_dim
    # Copies end there, sums of dQ do not.
    real = {"head_dim": inputs.query.shape[3], "value_dim": inputs.value.shape[3]}
    forward, plan = dataclasses.replace(forward, **real), dataclasses.replace(plan, **real)
    is_decode = one_query_sm90.serves(inputs, spec)
    return IoBytes(
        _decode(forward) if is_decode else _forward(forward),
        _fused_backward(plan, sum_dim) if is_fused else _backward(plan),
    )


def _forward(plan: ForwardPlan) -> Traffic:
    heads, spare, size = plan.batch * plan.num_heads, plan.num_spare_rows, _itemsize(plan)
    first_rows = np.array([plan.first_row(tile, FIRST) for tile in range(plan.num_row_tiles)])
    streamed = _streamed_rows(plan, plan.leading_rows, plan.config.tile_kv, first_rows=first_rows)
    streamed *= plan.token_bytes
    stored = plan.num_queries * size * plan.value_dim
    lse_rows = plan.num_row_tiles * plan.block_rows - spare
    return Traffic(
        # Idle warpgroups load rows too.
        l2_to_sm=heads * ((plan.num_queries + spare) * size * plan.head_dim + streamed),
        sm_to_l2=heads * (stored + FP32_BYTES * lse_rows),
        dram_read=heads * plan.num_queries * size * plan.head_dim + _kv_bytes(plan),
        dram_write=heads * (stored + FP32_BYTES * plan.num_queries),
    )


def _decode(plan: ForwardPlan) -> Traffic:
    heads, left = plan.batch * plan.num_heads, plan.reach[0] if plan.bottom_right else None
    seen = plan.num_keys if left is None else min(left + 1, plan.num_keys)
    loaded = heads * _itemsize(plan) * plan.head_dim + _kv_bytes(plan) * seen // plan.num_keys
    stored = heads * (_itemsize(plan) * plan.value_dim + FP32_BYTES)
    return Traffic(l2_to_sm=loaded, sm_to_l2=stored, dram_read=loaded, dram_write=stored)


def _backward(plan: AttentionPlan) -> Traffic:
    passes = [_dq(plan), *[_dkv(plan)] * plan.config.dkv_passes]
    total = sum(passes[1:], passes[0])
    outputs = plan.batch * plan.num_queries * plan.num_heads * plan.head_dim * _itemsize(plan) + _kv_bytes(
        plan
    )
    # K and V are written by one kernel each, whatever the number of passes.
    return total._replace(
        sm_to_l2=outputs, dram_write=outputs, dram_read=_kv_bytes(plan) + _q_bytes(plan, plan.num_queries)
    )


def _fused_backward(plan: AttentionPlan, sum_dim: int) -> Traffic:
    """Owns rows of K and V for each query head, streams what _dkv streams; adds fp32 rows of dQ for each tile
    that passes by, to zeros that are read from memory once.
    """
    block, tile = block_keys(plan), plan.fused.tile_q
    d_query = plan.batch * plan.num_heads * sum_dim * FP32_BYTES  # of one row of every head
    return Traffic(
        l2_to_sm=plan.group * _kv_bytes(plan) + _streamed_queries(plan, block, tile),
        sm_to_l2=plan.group * _kv_bytes(plan) + d_query * _streamed_rows(plan, block, tile, own_keys=True),
        dram_read=_kv_bytes(plan) + _q_bytes(plan, plan.num_queries) + d_query * plan.num_queries,
        dram_write=plan.group * _kv_bytes(plan) + d_query * plan.num_queries,
    )


def _dq(plan: AttentionPlan) -> Traffic:
    """Owns rows of Q and dO and their statistics, streams K and V."""
    config = plan.config.dq
    block, num_spare = config.own * config.warpgroups, plan.spare_rows(config.own, config.warpgroups)
    first_rows = np.arange(-num_spare, plan.num_queries, block)
    streamed = _streamed_rows(plan, block, config.other, first_rows=first_rows)
    streamed *= plan.batch * plan.num_heads * plan.token_bytes
    owned = _q_bytes(plan, padded(plan.num_queries, block), num_spare)
    return Traffic(owned + streamed, 0, 0, 0)


def _dkv(plan: AttentionPlan) -> Traffic:
    """Owns rows of K and V, streams Q, dO and their statistics, of every head of the group."""
    config = plan.config.dkv
    return Traffic(
        _kv_bytes(plan) + _streamed_queries(plan, config.own * config.warpgroups, config.other), 0, 0, 0
    )


def _streamed_queries(plan: AttentionPlan, block: int, tile: int) -> int:
    """Bytes of Q, dO and statistics that pass by the blocks of keys of all heads."""
    rows = _streamed_rows(plan, block, tile, own_keys=True)
    statistics = 2 * FP32_BYTES * _streamed_rows(plan, block, tile, own_keys=True, whole_tiles=True)
    return plan.batch * plan.num_heads * (rows * plan.token_bytes + statistics)


def _streamed_rows(
    plan: AttentionPlan,
    block: int,
    tile: int,
    own_keys: bool = False,
    whole_tiles: bool = False,
    first_rows: np.ndarray | None = None,
) -> int:
    """Rows of the other operand that the blocks of one head stream, those past its end not counted.

    Vectors have whole tiles and no end: whole_tiles counts those rows too. first_rows: where the blocks
    begin, if not at 0 and one after the other.
    """
    owned, other = plan.num_queries, plan.num_keys
    offset, reach = (plan.num_keys - plan.num_queries if plan.bottom_right else 0), plan.reach
    if own_keys:
        owned, other, offset, reach = other, owned, -offset, reach[::-1]
    if first_rows is None:
        first_rows = np.arange(0, owned, block)
    tiles = jax.vmap(
        lambda first: kv_tiles(first, block, offset, jnp.int32(owned), jnp.int32(other), reach, tile)
    )(jnp.asarray(first_rows, jnp.int32))
    start, stop = np.asarray(tiles.start, np.int64), np.asarray(tiles.stop, np.int64)
    end = stop * tile if whole_tiles else np.minimum(stop * tile, other)
    return int(np.maximum(end - start * tile, 0).sum())


def _q_bytes(plan: AttentionPlan, statistics_rows: int, num_spare: int = 0) -> int:
    """Of Q and dO, and of two statistics a row; idle warpgroups load rows too."""
    rows = (plan.num_queries + num_spare) * plan.token_bytes + 2 * FP32_BYTES * statistics_rows
    return plan.batch * plan.num_heads * rows


def _kv_bytes(plan: AttentionPlan) -> int:
    return plan.batch * plan.num_keys * plan.num_kv_heads * plan.token_bytes


def _itemsize(plan: AttentionPlan) -> int:
    return jnp.dtype(plan.dtype).itemsize
