"""The Hopper variant of flash_attention: what it can serve, and the shapes and padding its kernels want."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.device import num_multiprocessors
from pallas_kernels.flash_attention import (
    backward_fused_sm90,
    backward_sm90,
    bias_gradient_sm90,
    forward_sm90,
    one_query_sm90,
    reference,
    scaling,
)
from pallas_kernels.flash_attention.config import (
    PAIR_COST,
    UNEVEN_PAIR_COST,
    Call,
    FlashConfig,
    default_config,
    default_fused,
)
from pallas_kernels.flash_attention.forward_plan import ForwardPlan
from pallas_kernels.flash_attention.plan import LOGITS_EXPONENT, WEIGHTS_EXPONENT, AttentionPlan
from pallas_kernels.flash_attention.spec import AttentionGradients, AttentionInputs, AttentionSpec
from pallas_kernels.flash_attention.tiles import span
from pallas_kernels.mosaic import LOG2_E, SMEM_BYTES
from pallas_kernels.mosaic_copy import OCTET

COLUMN_MULTIPLE = 8  # in global memory: 16 bytes, as TMA counts the steps between rows and heads
HEAD_MULTIPLE = 32  # columns in shared memory: 64 bytes, the narrower of the swizzles that cost no speed
# Where rows begin within the 32 bytes that memory moves at a time, each block costs one move more: as few as
# can be. In us, forward, an H200, full T = 1,024, 2,048, blocks of 32 and of 64: H = 72 131, 113; 136 211,
# 161; 200 281, 215; of 80, which begin with them, 102, 99; 144 134, 140.
WIDE_BLOCK, SECTOR_COLUMNS = 64, 16
# jax.default_matmul_precision of calls that may multiply float32 as TF32 does, or as bfloat16: None is JAX's
# own default, which does on a GPU.
TF32_PRECISIONS = (None, "default", "tensorfloat32", "bfloat16", "TF32_TF32_F32", "BF16_BF16_F32")
WAVES_COUNTED = 6  # of thread blocks; of more, what the last one leaves idle counts little
WIDE_MULTIPLE = 64  # of wide heads in the backward pass, whose dQ is multiplied 64 columns at a time


def unsupported(inputs: AttentionInputs, spec: AttentionSpec) -> str | None:
    """Why the kernels cannot serve this call, or None."""
    dtype, precision = inputs.query.dtype, jax.config.jax_default_matmul_precision
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 and float32, got {dtype}"
    if dtype == jnp.float32 and precision not in TF32_PRECISIONS:
        return f"it takes float32 only at a matmul precision in {TF32_PRECISIONS}, got {precision!r}"
    if spec.scale <= 0:
        return f"it takes a positive scale, got {spec.scale}"
    if inputs.block_mask is not None:
        return _why_not_block_mask(inputs, plan_of(inputs, spec).config)
    return None


def _why_not_block_mask(inputs: AttentionInputs, config: FlashConfig) -> str | None:
    """Why the kernels cannot follow a block mask; its tiles must be made of whole ones of theirs."""
    assert inputs.block_mask is not None
    tile_q, tile_kv = inputs.block_mask.tile
    dq, dkv = config.dq, config.dkv
    rows = math.lcm(config.tile_q * config.warpgroups, dq.own * dq.warpgroups, dkv.other)
    columns = math.lcm(config.tile_kv, dq.other, dkv.own * dkv.warpgroups)
    if tile_q % rows or tile_kv % columns:
        return f"it takes block masks with tiles in multiples of {rows} x {columns}, got {tile_q} x {tile_kv}"
    return None


def forward(inputs: AttentionInputs, spec: AttentionSpec) -> tuple[jax.Array, jax.Array]:
    """The output [B, T, N, Hv] and the log-sum-exp f32[B, N, T]."""
    if one_query_sm90.serves(inputs, spec):
        return one_query_sm90.forward(inputs, spec)
    plan = forward_plan_of(inputs, spec)
    if plan.tile_bytes > SMEM_BYTES:
        limit = f"config must fit {SMEM_BYTES:,} bytes of shared memory"
        raise ValueError(f"{limit}, got {plan.config}: {plan.tile_bytes:,}")
    num_queries, value_dim = inputs.query.shape[1], inputs.value.shape[-1]
    exponents, arrays = scaling.scale_operands(inputs) if plan.keeps_fp32 else (None, inputs[:3])
    out, lse = forward_sm90.launch(plan, inputs, *(_pad(plan, x, is_forward=True) for x in arrays))
    out, lse = out[:, :num_queries, :, :value_dim], lse[:, :, :num_queries]
    return out if exponents is None else scaling.times_power(out, -exponents.value), lse


def backward(
    inputs: AttentionInputs,
    spec: AttentionSpec,
    out: jax.Array,
    lse: jax.Array,
    out_grad: jax.Array,
    lse_grad: jax.Array,
) -> AttentionGradients:
    """Gradients of query, key and value."""
    plan = plan_of(inputs, spec)
    lse2 = jnp.where(jnp.isneginf(lse), jnp.inf, lse * LOG2_E)  # exp2(logits - inf) = 0
    if plan.keeps_fp32:
        scaled = scaling.scale_all(plan, inputs, out, lse, out_grad, lse_grad)
        arrays, delta, kernel_delta = scaled.arrays, scaled.delta, scaled.kernel_delta
        lse2 -= WEIGHTS_EXPONENT
    else:
        scaled, arrays = None, (*inputs[:3], out_grad)
        delta = kernel_delta = reference.row_terms(out, lse, out_grad, lse_grad)
    arrays = [_pad(plan, x, is_forward=False) for x in arrays]
    kernels = backward_fused_sm90 if backward_fused_sm90.serves(plan, inputs) else backward_sm90
    tile = math.lcm(kernels.statistics_multiple(plan), backward_sm90.statistics_multiple(plan))
    if inputs.block_mask is not None:  # whole tiles of it are visited, beyond the end too
        tile = math.lcm(tile, inputs.block_mask.tile[0])
    statistics = [_pad_axis(lse2, 2, tile, jnp.inf), _pad_axis(kernel_delta, 2, tile)]
    gradients = kernels.launch(plan, inputs, *arrays, *statistics)
    d_bias = None
    if inputs.bias is not None:
        lengths = inputs.q_lengths, inputs.kv_lengths, inputs.kv_lengths, inputs.q_lengths
        arrays = [reference.zero_beyond(x, n) for x, n in zip(arrays, lengths, strict=True)]
        d_bias = bias_gradient_sm90.launch(plan, inputs, *arrays, *statistics)
    d_query, d_key, d_value = (
        g[:, : x.shape[1], :, : x.shape[3]] for g, x in zip(gradients, inputs[:3], strict=True)
    )
    gradients = AttentionGradients(
        d_query, d_key, d_value, d_bias, reference.sink_gradient(inputs, lse, delta)
    )
    return gradients if scaled is None else scaled.restore(plan, inputs, gradients)


def forward_plan_of(inputs: AttentionInputs, spec: AttentionSpec) -> ForwardPlan:
    """What the forward kernel of a call is built from; reads only the shapes and dtypes of the inputs."""
    fields = _plan_fields(inputs, spec, is_forward=True)
    columns = {}
    for name, dim, x in (("key", "head_dim", inputs.query), ("value", "value_dim", inputs.value)):
        own = x.shape[3] + -x.shape[3] % COLUMN_MULTIPLE
        columns[f"{name}_columns"] = fields[dim] if fields["keeps_fp32"] else own
    return ForwardPlan(**fields, **columns)


def plan_of(inputs: AttentionInputs, spec: AttentionSpec) -> AttentionPlan:
    """The same of the kernels of the backward pass."""
    return AttentionPlan(**_plan_fields(inputs, spec, is_forward=False))


def _plan_fields(inputs: AttentionInputs, spec: AttentionSpec, is_forward: bool) -> dict[str, Any]:
    batch, num_queries, num_heads, _ = inputs.query.shape
    keeps_fp32 = inputs.query.dtype == jnp.float32
    head_dim, value_dim = (_padded(x.shape[3], is_forward, keeps_fp32) for x in (inputs.query, inputs.value))
    return {
        "batch": batch,
        "num_queries": num_queries,
        "num_keys": inputs.key.shape[1],
        "num_heads": num_heads,
        "num_kv_heads": inputs.key.shape[2],
        "head_dim": head_dim,
        "value_dim": value_dim,
        "dtype": jnp.dtype(jnp.float16) if keeps_fp32 else inputs.query.dtype,
        "scale": spec.scale * 2.0**-LOGITS_EXPONENT if keeps_fp32 else spec.scale,
        "keeps_fp32": keeps_fp32,
        "reach": spec.reach,
        "bottom_right": spec.bottom_right,
        "logits_soft_cap": spec.logits_soft_cap,
        "has_q_lengths": inputs.q_lengths is not None,
        "has_kv_lengths": inputs.kv_lengths is not None,
        "config": spec.config or _config(inputs, spec, head_dim, value_dim),
        "has_block_mask": inputs.block_mask is not None,
        "has_segments": inputs.q_segment_ids is not None,
        "dropout_rate": spec.dropout_rate,
        "is_deterministic": spec.deterministic and not is_forward,
    }


def _config(inputs: AttentionInputs, spec: AttentionSpec, head_dim: int, value_dim: int) -> FlashConfig:
    """The default for a call, of these padded head dims."""
    batch, num_queries, num_heads, _ = inputs.query.shape
    _, num_keys, num_kv_heads, _ = inputs.key.shape
    features = _features(inputs, spec)
    busy = len(features & {"bias", "dropout", "segments"})
    masks = features & {"block_mask", "lengths", "segments", "window"}
    has_bias_rows = inputs.bias is not None and inputs.bias.shape[2] > 1
    left, right = spec.reach
    group = num_heads // num_kv_heads
    # The loop over a group's heads, with an element mask and a diagonal in every tile: dK and dV spill.
    masks_groups = "block_mask" in features and right is not None and group > 1
    blocks = lambda rows: batch * num_heads * math.ceil(num_queries / rows)
    workers = num_multiprocessors()
    call = Call(
        num_queries,
        num_keys,
        crowded=bool(busy or features & {"slopes", "soft_cap"} or left is not None or masks_groups),
        in_blocks="block_mask" in features or has_bias_rows,
        busy=busy,
        hashes="dropout" in features,
        has_lengths="lengths" in features,
        few=blocks(64) <= workers,
        one_wave=blocks(128) <= workers,
        ends_first_in_pairs=left is None and not masks and _ends_first_in_pairs(inputs, spec),
        sees_all=not (spec.is_causal or masks),
        ends_within=inputs.query.shape[3] < head_dim,
        starts_light=left is None and right is not None and not masks - {"window"},
    )
    widest = max(head_dim, value_dim)
    leaves_idle = batch * num_kv_heads * math.ceil(num_keys / 128) < 1.5 * workers
    fused = default_fused(widest, call, spec.is_causal, group, features, spec.deterministic, leaves_idle)
    config = dataclasses.replace(default_config(widest, call), fused=fused)
    if head_dim != value_dim:  # the output cannot take the queries' place, but takes that of the next queries
        tile_kv = 64 if config.splits_rows else config.tile_kv
        config = dataclasses.replace(config, tile_kv=tile_kv, q_stages=1, value_stages=None)
    if inputs.alibi_slopes is not None:
        config = dataclasses.replace(config, dkv_passes=2)
    return config


def _ends_first_in_pairs(inputs: AttentionInputs, spec: AttentionSpec) -> bool:
    """Whether few blocks of queries would end sooner in pairs of warpgroups than in threes."""
    batch, num_queries, num_heads, _ = inputs.query.shape
    num_keys, (_, right), workers = inputs.key.shape[1], spec.reach, num_multiprocessors()
    if batch * num_heads * math.ceil(num_queries / 128) > WAVES_COUNTED * workers:
        return False
    cost = PAIR_COST if right is None else UNEVEN_PAIR_COST
    if right is not None and spec.bottom_right:
        right += num_keys - num_queries
    pairs, threes = (
        span(rows, num_queries, num_keys, batch * num_heads, right, workers) for rows in (128, 192)
    )
    return cost * pairs < threes


def _features(inputs: AttentionInputs, spec: AttentionSpec) -> set[str]:
    has = {
        "bias": inputs.bias is not None,
        "block_mask": inputs.block_mask is not None,
        "dropout": spec.dropout_rate > 0,
        "lengths": inputs.q_lengths is not None or inputs.kv_lengths is not None,
        "segments": inputs.q_segment_ids is not None,
        "slopes": inputs.alibi_slopes is not None,
        "soft_cap": spec.logits_soft_cap is not None,
        "window": spec.window != (None, None),
    }
    return {name for name, is_there in has.items() if is_there}


def _padded(head_dim: int, is_forward: bool, is_fp32: bool = False) -> int:
    """Columns of a head in shared memory; of float32 in global memory too."""
    multiple = HEAD_MULTIPLE if is_forward or head_dim <= 128 else WIDE_MULTIPLE
    ends_within = head_dim % HEAD_MULTIPLE and (head_dim % SECTOR_COLUMNS or head_dim <= 128)
    if is_forward and ends_within and not is_fp32:
        multiple = WIDE_BLOCK
    return head_dim + -head_dim % multiple


def _pad(plan: AttentionPlan, x: jax.Array, is_forward: bool) -> jax.Array:
    """[B, T, N, H] as the kernels copy it: vectors of whole 16 bytes; of float32 whole tiles of rows and
    columns, as which the halves of its results are stored.
    """
    if not plan.keeps_fp32:
        return _pad_axis(x, 3, COLUMN_MULTIPLE)
    x, more = _pad_axis(x, 1, OCTET), _padded(x.shape[3], is_forward, is_fp32=True) - x.shape[3]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more))) if more else x


def _pad_axis(x: jax.Array, axis: int, multiple: int, value: float = 0.0) -> jax.Array:
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, padding, constant_values=value) if padding[axis][1] else x
