"""float32 on kernels of 16 bits: operands are scaled by powers of two into the range of fp16.

On a GPU JAX multiplies float32 in TF32 unless told otherwise: 10 explicit bits of mantissa. fp16 has as many,
and less range. Each batch row and KV head has its own exponents, found from the longest of its rows (of
finite numbers that lie within the lengths); all have the same where a bias sums their gradients:

    Q' = 2^q Q,  K' = 2^k K,  V' = 2^v V,  dO' = 2^o dO,  in fp16
    S = scale Q K^T = 2^-LOGITS scale Q' K'^T,  q + k = LOGITS,  max ||Q'|| ~ max ||K'||
    O = 2^-v P V'
    P' = 2^WEIGHTS P,  dP' = dO' V'^T,  delta' = 2^(o + v - r) delta
    dS' = P' * (2^-r dP' - delta') = 2^s dS,  s = WEIGHTS + o + v - r
    dQ = 2^-s scale dS' K,  dK = 2^-s scale dS'^T Q,  dV = 2^-(WEIGHTS + o) P'^T dO'

||V'||, ||dO'|| < 2^NORM and |dP'| < 2^(2 NORM) = 2^r: |dS'| < 2^15 whatever the data are, with a v that
leaves |delta'| < 1. The kernels' sums are fp32, and leave them so (halves.py).

Operands, P and dS are rounded to 11 significant bits, as in TF32. But numbers that are far smaller than the
largest of their head have an absolute error: of 2^-38 times max ||V||, max ||dO||, P = 1 and, of dS, of max
||V|| max ||dO||; of Q and K of 2^(-28 - p/2) times the longest, with max ||Q|| max ||K|| = 2^p. Where p > 22
the largest of Q and K may be cut to what fp16 holds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention.plan import (
    LOGITS_EXPONENT,
    NORM_EXPONENT,
    WEIGHTS_EXPONENT,
    AttentionPlan,
)
from pallas_kernels.flash_attention.spec import AttentionGradients, AttentionInputs

MAX_EXPONENT = 126  # of a power that is a normal number, as is its inverse
ZERO_EXPONENT = -127  # what exponent_of says of zeros, and of what is not normal


class Exponents(NamedTuple):
    """What an operand is multiplied by is 2^this: i32[B, K] each."""

    query: jax.Array
    key: jax.Array
    value: jax.Array


def scale_operands(
    inputs: AttentionInputs, value_limit: jax.Array | None = None
) -> tuple[Exponents, list[jax.Array]]:
    """(exponents, [Q', K', V']); value_limit: what v may be at most, i32[B, K]."""
    lengths = inputs.q_lengths, inputs.kv_lengths, inputs.kv_lengths
    query, key, value = (
        _exponent_of(inputs, reference.zero_beyond(x, n)) for x, n in zip(inputs[:3], lengths, strict=True)
    )
    value = _clip(NORM_EXPONENT - 1 - value)
    if value_limit is not None:
        value = _clip(jnp.minimum(value, value_limit))
    exponents = Exponents(*_balance(query, key), value)
    return exponents, [_to_fp16(x, e) for x, e in zip(inputs[:3], exponents, strict=True)]


class Scaled(NamedTuple):
    """What the backward kernels read, and how their results are scaled back."""

    arrays: list[jax.Array]  # Q', K', V', dO'
    kernel_delta: jax.Array  # delta', f32[B, N, T]
    delta: jax.Array  # f32[B, N, T]
    exponents: Exponents
    out_grad_exponent: jax.Array  # o, i32[B, K]

    def restore(
        self, plan: AttentionPlan, inputs: AttentionInputs, gradients: AttentionGradients
    ) -> AttentionGradients:
        """The gradients from those of the kernels: of Q', K' and V', and of the logits."""
        query, key, value = self.exponents
        logits = WEIGHTS_EXPONENT + self.out_grad_exponent + value - plan.d_weights_exponent  # s
        d_bias = gradients.bias
        if d_bias is not None:
            assert inputs.bias is not None
            d_bias = times_power(d_bias, -logits[:1, :1]).astype(inputs.bias.dtype)
        # scale K = 2^q (2^-LOGITS scale) K', and likewise of Q.
        return gradients._replace(
            query=times_power(gradients.query, query - logits),
            key=times_power(gradients.key, key - logits),
            value=times_power(gradients.value, -WEIGHTS_EXPONENT - self.out_grad_exponent),
            bias=d_bias,
        )


def scale_all(plan: AttentionPlan, inputs: AttentionInputs, out, lse, out_grad, lse_grad) -> Scaled:
    out_grad = out_grad.astype(jnp.float32)
    longest = _exponent_of(inputs, reference.zero_beyond(out_grad, inputs.q_lengths))
    exponent = _clip(NORM_EXPONENT - 1 - longest)
    # Of the rounded cotangents, as dP is: where a row sees one key, dP - delta is nothing. The barrier keeps
    # XLA from leaving out the rounding.
    scaled = lax.optimization_barrier(_to_fp16(out_grad, exponent))
    rounded = times_power(scaled.astype(jnp.float32), -exponent)
    delta = reference.row_terms(out, lse, rounded, lse_grad)
    by_row = delta.swapaxes(1, 2)[..., None]
    limit = plan.d_weights_exponent - exponent  # of v where 2^(o + v - r) |delta| < 1
    exponents, operands = scale_operands(inputs, limit - 1 - _exponent_of(inputs, by_row))
    kernel_delta = times_power(by_row, exponents.value - limit)[..., 0].swapaxes(1, 2)
    return Scaled([*operands, scaled], kernel_delta, delta, exponents, exponent)


def _exponent_of(inputs: AttentionInputs, x: jax.Array) -> jax.Array:
    """exponent_of x, of all heads and batch rows where the sums of a bias's gradient go over them."""
    exponent = exponent_of(x, inputs.key.shape[2])
    return exponent if inputs.bias is None else jnp.broadcast_to(exponent.max(), exponent.shape)


def exponent_of(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """n, i32[B, K]: the finite numbers of x [B, T, N, H] have ||row|| < 2^(n + 1) in a batch row and KV head.

    The bound is sqrt(sum |x| max |x|), which neither overflows nor underflows where squares do.
    """
    size = jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0)
    norm = jnp.sqrt(jnp.sum(size, axis=3)) * jnp.sqrt(jnp.max(size, axis=3, initial=0.0))
    norm = jnp.max(norm, axis=1, initial=0.0).reshape(x.shape[0], num_kv_heads, -1).max(axis=2)
    return (lax.bitcast_convert_type(norm, jnp.int32) >> 23) + ZERO_EXPONENT


def times_power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """2^exponent x, exactly but where the result is subnormal; x f32[B, T, N, H], |exponent| <= 252."""
    exponent = jnp.repeat(exponent, x.shape[2] // exponent.shape[1], axis=1)[:, None, :, None]
    half = exponent // 2
    return x * _power(half) * _power(exponent - half)


def _power(exponent: jax.Array) -> jax.Array:
    """2^exponent, within the normal numbers."""
    return lax.bitcast_convert_type((_clip(exponent) - ZERO_EXPONENT) << 23, jnp.float32)


def _clip(exponent: jax.Array) -> jax.Array:
    return jnp.clip(exponent, -MAX_EXPONENT, MAX_EXPONENT)


def _balance(query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What Q and K are multiplied by, from the exponents of their longest rows; of zeros it follows from the
    other's.
    """
    query, key = (jnp.where(one == ZERO_EXPONENT, -other, one) for one, other in ((query, key), (key, query)))
    exponent = LOGITS_EXPONENT // 2 + (key - query) // 2
    return exponent, LOGITS_EXPONENT - exponent


def _to_fp16(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """2^exponent x; finite numbers stay finite."""
    scaled, limit = times_power(x, exponent), float(jnp.finfo(jnp.float16).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(scaled, -limit, limit), scaled).astype(jnp.float16)
