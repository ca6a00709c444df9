"""jaxattn's attention inside flax.nnx: `nnx.MultiHeadAttention(..., attention_fn=jaxattn.nnx_attention)`."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxattn.attention import as_array, dot_product_attention

EXACT_PRECISIONS = (
    *("high", "highest", "float32", "tensorfloat32"),
    # Of jax.lax.DotAlgorithmPreset, those that lose less than TF32.
    *("f32_f32_f32", "f64_f64_f64", "tf32_tf32_f32_x3", "bf16_bf16_f32_x6", "bf16_bf16_f32_x9"),
)


def nnx_attention(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K H"],
    bias: Float[Array, "#*batch #N #T #S"] | None = None,
    mask: Bool[Array, "#*batch #N #T #S"] | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
) -> Float[Array, "*batch T N H"]:
    """`flax.nnx.dot_product_attention`'s arguments and answer, computed by `jaxattn.dot_product_attention`.

    Any number of batch dimensions, none too. Differences: rows whose mask hides every key give zeros (nnx:
    the mean of the values); dropped weights differ between rows and heads also with broadcast_dropout, whose
    point, to save memory, is moot where the mask is never stored. A precision above the default is honoured
    by the reference, exact to float32; at the default a GPU multiplies float32 as elsewhere in JAX, in TF32.
    With sow_weights nnx passes its module and wants the weights themselves, which attention in tiles
    never has: those calls are nnx's own.
    """
    if module is not None:
        return _flax_attention(
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            broadcast_dropout=broadcast_dropout,
            dropout_rng=dropout_rng,
            dropout_rate=dropout_rate,
            deterministic=deterministic,
            dtype=dtype,
            precision=precision,
            module=module,
            is_causal=is_causal,
            **({} if promote_dtype is None else {"promote_dtype": promote_dtype}),
        )
    operands = tuple(map(_operand, ("query", "key", "value"), (query, key, value)))
    query, key, value = _promote(operands, dtype, promote_dtype)
    batch = query.shape[:-3]
    is_dropping = dropout_rate > 0 and not deterministic
    out = dot_product_attention(
        *(_one_batch_dim(x, batch) for x in (query, key, value)),
        bias=_one_batch_dim(bias, batch),
        mask=None if mask is None else _one_batch_dim(jnp.asarray(mask, jnp.bool_), batch),
        is_causal=is_causal,
        dropout_rate=dropout_rate if is_dropping else 0.0,
        dropout_key=dropout_rng if is_dropping else None,
        implementation="reference" if _is_exact(precision) else None,
    )
    return out.reshape(*batch, *out.shape[-3:])


def _flax_attention(*args: Any, **options: Any) -> jax.Array:
    from flax import nnx

    return nnx.dot_product_attention(*args, **options)


def _promote(arrays: tuple[jax.Array, ...], dtype: Any, promote_dtype: Callable[..., Any] | None) -> Any:
    if promote_dtype is not None:
        return promote_dtype(arrays, dtype=dtype)
    dtype = jnp.result_type(*arrays) if dtype is None else dtype
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def _operand(name: str, x: Any) -> jax.Array:
    x = as_array(name, x)
    if x.ndim < 3 or 0 in x.shape:
        raise ValueError(f"{name} must have the dimensions [*batch T N H], each >= 1, got shape {x.shape}")
    return x


def _one_batch_dim(x: jax.Array | None, batch: tuple[int, ...]) -> Any:
    """x broadcastable to [*batch, a, b, c] as [B|1, a|1, b|1, c|1]."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.ndim < 3:
        x = x.reshape((1,) * (3 - x.ndim) + x.shape)
    own = x.shape[:-3]
    if math.prod(own) == 1:
        return x.reshape(1, *x.shape[-3:])
    return jnp.broadcast_to(x, (*batch, *x.shape[-3:])).reshape(-1, *x.shape[-3:])


def _is_exact(precision: Any) -> bool:
    """jax.lax.Precision or DotAlgorithmPreset, its name, or a pair of them (one for each operand)."""
    given = precision if isinstance(precision, tuple) else (precision,)
    return any(getattr(p, "name", str(p)).lower() in EXACT_PRECISIONS for p in given if p is not None)
