"""What flash_attention takes: its checks, for callers that know the arguments by other names too."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Integer

from pallas_kernels import checks
from pallas_kernels.flash_attention.block_tiles import check_block_tiles
from pallas_kernels.flash_attention.config import FlashConfig
from pallas_kernels.flash_attention.spec import AttentionInputs, AttentionSpec

ALIGNMENTS = ("top_left", "bottom_right")
MAX_HEAD_DIM = 256
FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)


def check_arrays(inputs: AttentionInputs, names: Mapping[str, str] | None = None) -> None:
    """Holds the arrays of a call to each other's shapes and dtypes; names: of fields that a caller knows by
    others.
    """
    query, key, value = inputs.query, inputs.key, inputs.value

    def name_of(field: str) -> str:
        return field if names is None else names.get(field, field)

    checks.check_rank("query", query, "B T N H")
    checks.check_rank("key", key, "B S K H")
    checks.check_rank("value", value, "B S K Hv")
    batch, num_queries, num_heads, head_dim = query.shape
    _, num_keys, num_kv_heads, _ = key.shape
    checks.check_shape("key", key, (batch, num_keys, num_kv_heads, head_dim), "B S K H")
    checks.check_shape("value", value, (batch, num_keys, num_kv_heads, value.shape[-1]), "B S K Hv")
    checks.check_head_groups(num_heads, num_kv_heads)
    checks.check_dtype("query", query, FLOATS)
    for name, array in (("key", key), ("value", value)):
        checks.check_dtype(name, array, (query.dtype,))
    for name, size in (("query", head_dim), ("value", value.shape[-1])):
        if size > MAX_HEAD_DIM:
            raise ValueError(f"the head dim of {name} must be at most {MAX_HEAD_DIM}, got {size}")
    sizes = (batch, num_heads, num_queries, num_keys)
    for name, array, shape, letters in (
        ("bias", inputs.bias, [(1, size) for size in sizes], "B|1 N|1 T|1 S|1"),
        ("alibi_slopes", inputs.alibi_slopes, ((1, batch), num_heads), "N] or [B N"),
        ("sinks", inputs.sinks, (num_heads,), "N"),
    ):
        if array is not None:
            checks.check_shape(name, array, shape, letters)
            checks.check_dtype(name, array, FLOATS)
    if (inputs.q_segment_ids is None) != (inputs.kv_segment_ids is None):
        both = f"{name_of('q_segment_ids')} and {name_of('kv_segment_ids')}"
        raise ValueError(f"{both} must be given together, got one of them")
    for field, shape, letters in (
        ("q_segment_ids", (batch, num_queries), "B T"),
        ("kv_segment_ids", (batch, num_keys), "B S"),
        ("q_lengths", (batch,), "B"),
        ("kv_lengths", (batch,), "B"),
    ):
        if (array := getattr(inputs, field)) is not None:
            checks.check_shape(name_of(field), array, shape, letters)
            checks.check_integers(name_of(field), array)
    if inputs.block_mask is not None:
        check_block_tiles(inputs.block_mask, batch, num_heads, num_queries, num_keys)


def shapes_of(query: Any, key: Any, value: Any = None) -> AttentionInputs:
    """Of anything with a shape and a dtype, held to each other; value is like key by default."""
    arrays: list[Any] = [query, key, key if value is None else value]
    for name, x in zip(("query", "key", "value"), arrays, strict=True):
        checks.check_array(name, x)
    shapes: list[Any] = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    inputs = AttentionInputs(*shapes)
    check_arrays(inputs)
    return inputs


def make_spec(
    query: Array,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    local_window_size: int | Sequence[int | None] | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    deterministic: bool = False,
    config: FlashConfig | None = None,
) -> AttentionSpec:
    """The static part of a call, checked."""
    checks.check_choice("causal_alignment", causal_alignment, ALIGNMENTS)
    if not isinstance(config, FlashConfig | None):
        raise ValueError(f"config must be a FlashConfig (or None), got {config!r}")
    return AttentionSpec(
        scale=default_scale(query) if scale is None else checks.check_number("scale", scale),
        is_causal=checks.check_bool("is_causal", is_causal),
        bottom_right=causal_alignment == "bottom_right",
        window=checks.normalize_window(local_window_size),
        logits_soft_cap=checks.check_soft_cap(logits_soft_cap),
        dropout_rate=_check_dropout(dropout_rate, dropout_key),
        deterministic=checks.check_bool("deterministic", deterministic),
        config=config,
    )


def default_scale(query: Array) -> float:
    """1 / sqrt(H)."""
    return 1 / math.sqrt(query.shape[-1])


def clip_lengths(lengths: Integer[Array, "B"] | None, limit: int) -> Int32[Array, "B"] | None:
    """Lengths as i32 in 0..limit: what lies beyond is not there."""
    if lengths is None:
        return None
    return jnp.clip(checks.as_int32(lengths), 0, limit)


def known_ids(name: str, ids: Any) -> Any:
    """Ids as i32, where the host knows them: cut to 32 bits, two that differ could be one."""
    if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
        return ids
    int32 = np.iinfo(np.int32)
    outside = ids[(ids < int32.min) | (ids > int32.max)]
    if outside.size:
        raise ValueError(f"{name} must lie in {int32.min}..{int32.max} (int32), got {outside[0]}")
    return jnp.asarray(ids, jnp.int32)


def _check_dropout(rate: float, key: jax.Array | None) -> float:
    rate = checks.check_number("dropout_rate", rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must lie in [0, 1), got {rate!r}")
    if rate > 0 and key is None:
        raise ValueError(f"dropout_key must be given when dropout_rate > 0, got None with rate {rate!r}")
    if rate > 0 and not _is_one_key(key):
        raise ValueError(f"dropout_key must be one key, as of jax.random.key, got {checks.describe(key)}")
    return rate


def _is_one_key(key: Any) -> bool:
    """Of the new kind, or its words alone, u32[W]."""
    dtype = getattr(key, "dtype", None)
    if dtype is None:
        return False
    is_typed = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if is_typed or dtype != jnp.uint32 or key.ndim != 1:
        return is_typed and key.ndim == 0
    try:
        jax.eval_shape(jax.random.wrap_key_data, jax.ShapeDtypeStruct(key.shape, dtype))
    except TypeError:  # not as many words as a key has
        return False
    return True
