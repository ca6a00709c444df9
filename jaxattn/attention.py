"""Attention over whole sequences, and the choice of who computes it.

`dot_product_attention` takes what `jax.nn.dot_product_attention` takes, but for what it lists, and more.
Where there is a Hopper GPU it runs the Pallas kernel, on other NVIDIA GPUs cuDNN or XLA, on a CPU the chunked
reference.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxattn.block_mask import BlockMask
from jaxattn.implementations import IMPLEMENTATIONS, AttentionCall
from pallas_kernels import checks
from pallas_kernels.device import default_device, device_name, is_hopper
from pallas_kernels.flash_attention import SAVED_NAMES
from pallas_kernels.flash_attention.arguments import check_arrays, clip_lengths, known_ids, make_spec
from pallas_kernels.flash_attention.reference import zero_beyond
from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.variants import Unsupported, announce

__all__ = ["IMPLEMENTATIONS", "SAVE_ATTENTION", "FlashAttention", "dot_product_attention"]

logger = logging.getLogger("jaxattn")

# A policy for jax.checkpoint: the output and the log-sum-exp are kept, the kernel is not run twice. What
# cuDNN or XLA computes has neither of these names: it is computed again.
SAVE_ATTENTION = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
OUR_NAMES = {
    "q_segment_ids": "query_segment_ids",
    "kv_segment_ids": "key_value_segment_ids",
    "q_lengths": "query_seq_lengths",
    "kv_lengths": "key_value_seq_lengths",
}
MOST_LOGITS_BYTES = 4 << 30  # that XLA may store, unless it is asked for by name; the reference stores none


def dot_product_attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K Hv"],
    bias: Float[Array, "#B #N #T #S"] | None = None,
    mask: Bool[Array, "#B #N #T #S"] | None = None,
    *,
    scale: float | Float[Array, ""] | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, "B"] | None = None,
    key_value_seq_lengths: Int[Array, "B"] | None = None,
    local_window_size: int | Sequence[int | None] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    query_segment_ids: Int[Array, "*B T"] | None = None,
    key_value_segment_ids: Int[Array, "*B S"] | None = None,
    block_mask: BlockMask | None = None,
    alibi_slopes: Float[Array, "N"] | Float[Array, "B N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
    causal_alignment: str = "top_left",
    logits_soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    deterministic: bool = False,
) -> Any:
    """Scaled dot-product attention; the arguments of `jax.nn.dot_product_attention`, and ours after them.

        out = dropout(softmax(mask(cap(scale Q K^T) + bias))) V,   cap(x) = c tanh(x / c)

    Rows that see no key give zeros and a log-sum-exp of -inf (jax.nn gives the mean of all values there).

    Arguments:
        query, key, value: BTNH, BSKH, BSKHv, or TNH, SKH, SKHv; float32, bfloat16 or float16, one dtype. N is
            a multiple of K: query head n reads KV head n // (N/K). On a GPU float32 is multiplied with the
            precision of TF32, as in JAX, unless `jax.default_matmul_precision` asks for more.
        bias: added to the logits, broadcastable to BNTS; integers and float64 are taken as float32.
        mask: boolean, True where a key takes part.
        scale: 1 / sqrt(H) by default. A jax.Array of one number, traced or learned, multiplies the query in
            float32, which is then rounded to its dtype.
        is_causal: query i sees keys 0..i ("top_left"), or keys 0..i + S - T ("bottom_right", the lengths in
            the place of S and T where they are given).
        query_seq_lengths, key_value_seq_lengths: tokens in use of each batch row, at most T and S (more count
            as these). Query, key and value may hold anything beyond. What a mask, a bias, positions or
            segment ids hide must be finite: its weights are 0, but 0 x NaN is NaN.
        local_window_size: keys visible left and right of a query; an int means both sides, None no limit.
        implementation: a name of IMPLEMENTATIONS ("sm90", "cudnn", "xla", "reference"); by default the first
            that the device has and that can do all that is asked.
        return_residual: also return the log-sum-exp of each row's logits, f32 BTN or TN.
        query_segment_ids, key_value_segment_ids: packed documents; a query sees the keys of its own id only.
            Ids are int32.
        block_mask: a block-sparse mask; the kernel skips the tiles in which it shows nothing.
        alibi_slopes: a slope for each head: -slope |position - key index| is added to the logits and never
            stored; no gradient flows to the slopes.
        sinks: a logit for each head that takes its share of every row's softmax and has no value; -inf: none.
        dropout_rate, dropout_key: drops attention weights; a rate above 0 needs a key.
        deterministic: the same inputs give the same gradient bits (the forward always does).

    Under vmap, and in a jit over arrays sharded by batch rows and heads, nothing is gathered and the same
    weights are dropped as on one device. Of both together the mapped axis, or heads, may be sharded: batch
    rows that are sharded inside a vmap are gathered, and refused on an explicit mesh. Where query heads lie
    on more devices than there are KV heads, each has all of these and takes the one it needs. Heads are
    gathered where neither of the two numbers divides the other, and all is in a shard_map that is manual
    along other axes alone. Inside shard_map each device needs a dropout_key of its own.

    `jax.checkpoint(f, policy=jaxattn.SAVE_ATTENTION)` does not compute attention a second time; where
    cuDNN or XLA computes it, it saves nothing.

    What jax.nn takes and this does not: operands of float64, complex numbers or integers, empty axes, head
    dims above 256; and what needs implementation="xla": gradients of gradients, forward mode (jvp), symbolic
    shapes of jax.export.

    Raises ValueError for wrong arguments and NotImplementedError where the implementation named cannot do
    what is asked. From: Dao et al., FlashAttention (2022), FlashAttention-2 (2023).
    """
    checks.check_bool("return_residual", return_residual)
    query, key, value = as_array("query", query), as_array("key", key), as_array("value", value)
    if query.ndim not in (3, 4):
        raise ValueError(f"query must have the dimensions [B T N H] or [T N H], got shape {query.shape}")
    is_batched = query.ndim == 4
    checks.check_rank("query", query, "B T N H" if is_batched else "T N H")
    batch = query.shape[0] if is_batched else 1
    spec = make_spec(
        query,
        scale=None if isinstance(scale, jax.Array) else scale,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        deterministic=deterministic,
    )
    call = AttentionCall(
        *(x if is_batched else x[None] for x in (query, key, value)),
        bias=_rank_4("bias", _float32("bias", bias)),
        alibi_slopes=_slopes(alibi_slopes),
        sinks=_float32("sinks", sinks),
        mask=_rank_4("mask", mask),
        q_segment_ids=_ids("query_segment_ids", query_segment_ids, is_batched),
        kv_segment_ids=_ids("key_value_segment_ids", key_value_segment_ids, is_batched),
        q_lengths=_lengths("query_seq_lengths", query_seq_lengths, batch),
        kv_lengths=_lengths("key_value_seq_lengths", key_value_seq_lengths, batch),
        dropout_key=dropout_key,
        block_mask=block_mask,
        is_causal=spec.is_causal,
        causal_alignment=causal_alignment,
        window=spec.window,
        scale=spec.scale,
        logits_soft_cap=spec.logits_soft_cap,
        dropout_rate=spec.dropout_rate,
        return_residual=return_residual,
        deterministic=spec.deterministic,
    )
    _check_arrays(call)
    if isinstance(scale, jax.Array):
        call = _scale_query(call, scale)
    out, residual = _choose(call, implementation)(call)
    out = out if is_batched else out[0]
    if not return_residual:
        return out
    assert residual is not None  # an implementation that cannot return it has refused
    return out, residual if is_batched else residual[0]


def as_array(name: str, x: Any, convert: Callable = jnp.asarray) -> Any:
    """An argument as an array."""
    try:
        return convert(np.asarray(x) if isinstance(x, str) else x)  # JAX would read a number in a string
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be an array, got {checks.describe(x)}") from error


def _rank_4(name: str, x: Any) -> jax.Array | None:
    if x is None:
        return None
    x = as_array(name, x)
    if x.ndim > 4:
        raise ValueError(f"{name} must be broadcastable to [B, N, T, S], got shape {x.shape}")
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


def _float32(name: str, x: Any) -> jax.Array | None:
    """Terms of the logits; of the dtypes that kernels do not read, those whose numbers float32 rounds."""
    if x is None:
        return None
    x = as_array(name, x)
    is_rounded = x.dtype == jnp.float64 or jnp.issubdtype(x.dtype, jnp.integer)
    return x.astype(jnp.float32) if is_rounded else x


def _slopes(x: Any) -> jax.Array | None:
    x = _float32("alibi_slopes", x)
    return x[None] if x is not None and x.ndim == 1 else x


def _ids(name: str, x: Any, is_batched: bool) -> Any:
    x = known_ids(name, _whole_numbers(name, x))
    return x if x is None or is_batched else x[None]


def _lengths(name: str, x: Any, batch: int) -> Any:
    x = _whole_numbers(name, x)
    return x[None] if x is not None and x.ndim == 0 and batch == 1 else x


def _whole_numbers(name: str, x: Any) -> Any:
    """With all 64 bits of what JAX would cut to 32."""
    if x is None:
        return None
    is_jax = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))
    return as_array(name, x, jnp.asarray if is_jax else np.asarray)


def _scale_query(call: AttentionCall, scale: jax.Array) -> AttentionCall:
    """The call with its scale, a static number to kernels, in the query."""
    if scale.size != 1 or not jnp.isrealobj(scale):
        raise ValueError(f"scale must be a number, or an array of one, got {checks.describe(scale)}")
    # What lies beyond a length may be NaN, and would be in the gradient of the scale.
    query = zero_beyond(call.query, clip_lengths(call.q_lengths, call.query.shape[1]))
    query = query.astype(jnp.float32) * scale.astype(jnp.float32).reshape(())
    return call._replace(query=query.astype(call.query.dtype), scale=1.0)


def _check_arrays(call: AttentionCall) -> None:
    """The same of every implementation: what `flash_attention` asks of its arrays, and of masks."""
    inputs = AttentionInputs(
        call.query,
        call.key,
        call.value,
        call.bias,
        call.sinks,
        call.alibi_slopes,
        call.q_segment_ids,
        call.kv_segment_ids,
        call.q_lengths,
        call.kv_lengths,
    )
    check_arrays(inputs, OUR_NAMES)
    batch, num_queries, num_heads, _ = call.query.shape
    num_keys = call.key.shape[1]
    if call.mask is not None:
        sizes = [(1, size) for size in (batch, num_heads, num_queries, num_keys)]
        checks.check_shape("mask", call.mask, sizes, "B|1 N|1 T|1 S|1")
        checks.check_dtype("mask", call.mask, (jnp.bool_,))
    if call.block_mask is not None:
        if not isinstance(call.block_mask, BlockMask):
            raise ValueError(f"block_mask: must be a BlockMask, got {type(call.block_mask).__name__}")
        if (shape := call.block_mask.shape) != (num_queries, num_keys):
            raise ValueError(f"block_mask: must be [T, S] = {(num_queries, num_keys)}, got {shape}")


# --- the choice ---------------------------------------------------------------------------------------------


def _choose(
    call: AttentionCall, implementation: str | None
) -> Callable[[AttentionCall], tuple[jax.Array, jax.Array | None]]:
    if implementation is not None:
        checks.check_choice("implementation", implementation, IMPLEMENTATIONS)
        return IMPLEMENTATIONS[implementation]
    return functools.partial(_first_that_can, names=_candidates())


def _first_that_can(call: AttentionCall, *, names: tuple[str, ...]) -> tuple[jax.Array, jax.Array | None]:
    refusals = []
    logits_bytes = 4 * call.query.size // call.query.shape[3] * call.key.shape[1]
    for name in names:
        if name == "xla" and logits_bytes > MOST_LOGITS_BYTES and name != names[-1]:
            refusals.append(f"'xla' would store {logits_bytes / 2**30:.1f} GiB of logits")
            continue
        try:
            result = IMPLEMENTATIONS[name](call)
        except Unsupported as refusal:
            refusals.append(str(refusal))
            continue
        announce(logger, "attention", name, device_name(), "; ".join(refusals))
        return result
    raise Unsupported(f"no implementation on {device_name()} serves this call: {'; '.join(refusals)}")


def _candidates() -> tuple[str, ...]:
    """What the default device can run, best first. Asking touches the backend."""
    if is_hopper():
        return ("sm90", "cudnn", "xla", "reference")
    device = default_device()
    if device.platform == "gpu" and hasattr(device, "compute_capability"):
        return ("cudnn", "xla", "reference")
    return ("reference",) if device.platform == "cpu" else ("xla", "reference")


# --- for models ---------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FlashAttention:
    """The attention object of a full-sequence forward: models call it once a layer.

    `attention(layer, q[B, T, N, H], k[B, T, K, H], v, dropout_key=None)` -> (y[B, T, N, H], attention).
    Attention weights are dropped at `dropout_rate` in forwards that are given a dropout key.
    """

    segment_ids: Int[Array, "B T"] | None = None  # packed documents: tokens see their own document only
    lengths: Int[Array, "B"] | None = None  # tokens in use of each batch row
    is_causal: bool = dataclasses.field(default=True, metadata={"static": True})
    dropout_rate: float = dataclasses.field(default=0.0, metadata={"static": True})
    implementation: str | None = dataclasses.field(default=None, metadata={"static": True})

    def __call__(
        self,
        layer: jax.Array | int,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B T K H"],
        value: Float[Array, "B T K H"],
        *,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B T N H"], "FlashAttention"]:
        out = dot_product_attention(
            query,
            key,
            value,
            is_causal=self.is_causal,
            query_seq_lengths=self.lengths,
            key_value_seq_lengths=self.lengths,
            query_segment_ids=self.segment_ids,
            key_value_segment_ids=self.segment_ids,
            dropout_rate=self.dropout_rate if dropout_key is not None else 0.0,
            dropout_key=dropout_key,
            implementation=self.implementation,
        )
        return out, self
