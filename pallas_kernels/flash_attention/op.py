"""flash_attention: validation, the table of variants, and the gradient rule."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Integer

from pallas_kernels import checks, device
from pallas_kernels.flash_attention import mapped, reference, sm90
from pallas_kernels.flash_attention.arguments import check_arrays, clip_lengths, known_ids, make_spec
from pallas_kernels.flash_attention.block_tiles import BlockTiles
from pallas_kernels.flash_attention.config import FlashConfig
from pallas_kernels.flash_attention.dropout import dropout_seed
from pallas_kernels.flash_attention.spec import AttentionGradients, AttentionInputs, AttentionSpec
from pallas_kernels.manual import in_32_bits, vary
from pallas_kernels.variants import choose

SAVED_NAMES = ("attention_out", "attention_lse")  # what the backward pass takes from the forward pass


class Variant(NamedTuple):
    """One way to compute the op: forward -> (out [B, T, N, Hv], lse f32[B, N, T]), backward -> gradients.

    `unsupported` says why it cannot serve a call, or None if it can.
    """

    forward: Callable[[AttentionInputs, AttentionSpec], tuple[jax.Array, jax.Array]]
    backward: Callable[..., AttentionGradients]
    unsupported: Callable[[AttentionInputs, AttentionSpec], str | None]
    is_available: Callable[[], bool]


VARIANTS = {
    "sm90": Variant(sm90.forward, sm90.backward, sm90.unsupported, device.is_hopper),
    "reference": Variant(reference.forward, reference.backward, lambda inputs, spec: None, lambda: True),
}


def flash_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    alibi_slopes: Float[Array, "N"] | Float[Array, "B N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    q_segment_ids: Integer[Array, "B T"] | None = None,
    kv_segment_ids: Integer[Array, "B S"] | None = None,
    q_lengths: Int[Array, "B"] | None = None,
    kv_lengths: Int[Array, "B"] | None = None,
    block_mask: BlockTiles | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    local_window_size: int | tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    config: FlashConfig | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"] | tuple[Float[Array, "B T N Hv"], Float[Array, "B T N"]]:
    """Computes exact attention without storing the T x S weights.

        out = dropout(softmax(mask(cap(scale Q K^T) + bias - slope |position - key|))) V
        cap(x) = c tanh(x / c)

    Query head n reads KV head n // (N/K). Query i stands at position i ("top_left") or at
    i + kv_length - q_length ("bottom_right"; S and T where no lengths are given); it sees key j where
    j <= position (causal), position - left <= j <= position + right (window), segment ids are equal, and i
    and j lie within the lengths. Rows that see no key give zeros, a log-sum-exp of -inf and zero gradients.

    Arguments:
        query, key, value: [B, T, N, H], [B, S, K, H], [B, S, K, Hv]; all bf16, fp16 or f32; H, Hv <= 256.
            At JAX's default precision of matmuls the kernels multiply f32 with TF32's precision (scaling.py);
            under "high", "highest" or "float32", and without a Hopper GPU, XLA computes it in chunks of
            queries, exact to fp32.
        bias: added to the logits; each dimension of [B, N, T, S] may be 1. Its gradient is computed. What is
            below -1e30 hides a key.
        alibi_slopes: a slope for each head, [N] or [B, N]: linear biases (Press et al., 2022) that are never
            stored. They are constants of a model: no gradient flows to them.
        sinks: a logit for each head, f32[N], that takes its share of every row's softmax and has no value. It
            counts in the log-sum-exp: that of a row that sees no key is the sink, but past a length -inf. A
            sink of -inf is none.
        q_segment_ids, kv_segment_ids: packed documents; both or neither.
        q_lengths, kv_lengths: tokens in use of each batch row, at most T and S (more count as these). Query,
            key and value may hold anything beyond. Keys and values that a bias, positions, segment ids or a
            block mask hide must be finite: their weights are 0, but 0 x NaN is NaN.
        block_mask: the tiles of keys that a tile of queries visits, and which elements of them are visible;
            the same for all batch rows and query heads, or for each.
        local_window_size: keys visible left and right of a query: an int for both sides, or a pair in which
            None means no limit.
        scale: multiplies Q K^T; 1 / sqrt(H) by default.
        dropout_rate, dropout_key: drops weights by a hash of (key, batch, head, query, key index), the same
            bits in any variant and tile size, forward and backward.
        return_lse: also return the natural log-sum-exp of each row's logits, f32[B, T, N], with its gradient.
        deterministic: the same call gives the same gradient bits on GPUs with as many multiprocessors (the
            forward pass always does, on any).
        config: tile sizes, instead of default_config's.
        implementation: a name of VARIANTS. By default the first variant that can serve the call.

    Raises ValueError for wrong arguments, NotImplementedError where the named variant cannot.
    From: Dao et al., FlashAttention (2022), algorithms 1 and 4; FlashAttention-2 (2023), algorithm 1.
    """
    if alibi_slopes is not None and getattr(alibi_slopes, "ndim", None) == 1:
        alibi_slopes = alibi_slopes[None]
    inputs = AttentionInputs(
        query,
        key,
        value,
        bias,
        sinks,
        alibi_slopes,
        known_ids("q_segment_ids", q_segment_ids),
        known_ids("kv_segment_ids", kv_segment_ids),
        q_lengths,
        kv_lengths,
        block_mask=block_mask,
    )
    check_arrays(inputs)
    spec = make_spec(
        query,
        scale=scale,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        deterministic=deterministic,
        config=config,
    )
    checks.check_bool("return_lse", return_lse)
    inputs = inputs._replace(
        q_lengths=clip_lengths(q_lengths, query.shape[1]), kv_lengths=clip_lengths(kv_lengths, key.shape[1])
    )
    if spec.dropout_rate > 0:
        assert dropout_key is not None
        inputs = inputs._replace(dropout_seed=dropout_seed(dropout_key))
    variant = choose("flash_attention", VARIANTS, implementation, inputs, spec)
    results: Any = _attend(variant, spec, vary(inputs))
    out, lse = results
    return (out, lse.swapaxes(1, 2)) if return_lse else out


def flash_attention_gradients(
    query: Float[Array, "B T N H"],
    out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B T N"],
    out_grad: Float[Array, "B T N Hv"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K Hv"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]]:
    """Computes what some keys and values have part in the gradients of attention over more of them.

    `out` and `lse`, the output and the log-sum-exp of each row, are those over all its keys: the sum of the
    query's gradients over all blocks of keys is its gradient, and those of a block of keys and values are
    complete. From: Dao et al., FlashAttention (2022), algorithm 4. Arguments as of flash_attention.
    """
    inputs = AttentionInputs(query, key, value)
    check_arrays(inputs)
    checks.check_shape("out", out, (*query.shape[:3], value.shape[3]), "B T N Hv")
    checks.check_shape("lse", lse, query.shape[:3], "B T N")
    spec = make_spec(
        query,
        scale=scale,
        is_causal=is_causal,
        logits_soft_cap=logits_soft_cap,
        deterministic=deterministic,
    )
    implementation = choose("flash_attention_gradients", VARIANTS, implementation, inputs, spec)
    inputs, out, lse, out_grad = vary((inputs, out, lse.swapaxes(1, 2), out_grad))
    gradients = _backward(implementation, spec, inputs, out, lse, out_grad, jnp.zeros_like(lse))
    return gradients.query, gradients.key, gradients.value


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(implementation: str, spec: AttentionSpec, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    return _forward(implementation, spec, inputs)


def _without_derivative(function: Callable) -> Callable:
    """function(implementation, spec, *arrays), whose derivative is an error that says what has one: JAX's own
    would name what is inside.
    """
    call = jax.custom_jvp(function, nondiff_argnums=(0, 1))

    @call.defjvp
    def refuse(*arguments):
        raise NotImplementedError(
            "flash_attention has no second derivative; jaxattn.dot_product_attention has one, of "
            "implementation='xla'"
        )

    return call


# Jitted, so that the layers of an unrolled model share one trace and one lowered kernel.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(implementation: str, spec: AttentionSpec, inputs: AttentionInputs):
    return mapped.forward(in_32_bits(lambda inputs: VARIANTS[implementation].forward(inputs, spec)), inputs)


_first_forward = _without_derivative(_forward)  # of a gradient


@_without_derivative
@functools.partial(jax.jit, static_argnums=(0, 1))
def _backward(
    implementation: str, spec: AttentionSpec, inputs: AttentionInputs, out, lse, out_grad, lse_grad
):
    function = lambda inputs, *arrays: VARIANTS[implementation].backward(inputs, spec, *arrays)
    return mapped.backward(in_32_bits(function), inputs, (out, lse), (out_grad, lse_grad))


def _attend_forward(implementation: str, spec: AttentionSpec, inputs: AttentionInputs):
    out, lse = map(checkpoint_name, _first_forward(implementation, spec, inputs), SAVED_NAMES)
    return (out, lse), (inputs, out, lse)


def _attend_backward(implementation: str, spec: AttentionSpec, residuals, cotangents):
    gradients = _backward(implementation, spec, *residuals, *cotangents)
    no_gradients = (None,) * (len(AttentionInputs._fields) - len(gradients))
    return (AttentionInputs(*gradients, *no_gradients),)


_attend.defvjp(_attend_forward, _attend_backward)
