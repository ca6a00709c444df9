"""Attention over sequences that devices share: K and V go round a ring, each device keeps its queries.

For causal masks the tokens lie in zig-zag order: of 2D chunks of the sequence, device d of D holds chunks d
and 2D - 1 - d. Each step of the ring then is, on every device, two pairs of a chunk of queries and a chunk of
keys that all see each other: no step waits for a device with more to do, and no kernel needs a mask.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from pallas_kernels import checks, flash_attention
from pallas_kernels.flash_attention import SAVED_NAMES, flash_attention_gradients
from pallas_kernels.flash_attention.arguments import check_arrays, make_spec
from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.manual import vary

__all__ = ["from_zigzag", "ring_attention", "to_zigzag", "zigzag_positions"]


class _Ring(NamedTuple):
    """The static part of a call."""

    axis_name: str
    num_devices: int
    is_causal: bool
    scale: float | None
    logits_soft_cap: float | None
    deterministic: bool
    implementation: str | None

    @property
    def options(self) -> dict[str, Any]:
        """Of the calls of the kernel."""
        names = ("scale", "logits_soft_cap", "deterministic", "implementation")
        return {name: getattr(self, name) for name in names}

    def pass_on(self, *arrays: jax.Array | None) -> list[Any]:
        """To the next device; returns what the one before this held.

        One message for all, as words of 32 bits: XLA keeps one copy at a time in flight beside the kernels.
        """
        given = [x for x in arrays if x is not None]
        if not given:
            return [None] * len(arrays)
        steps = [(i, (i + 1) % self.num_devices) for i in range(self.num_devices)]
        words = [_to_words(x) for x in given]
        message = lax.ppermute(jnp.concatenate(words, axis=-1), self.axis_name, steps)
        parts = jnp.split(message, np.cumsum([x.shape[-1] for x in words])[:-1], axis=-1)
        moved = map(_from_words, parts, given)
        return [None if x is None else next(moved) for x in arrays]


def _to_words(x: jax.Array) -> jax.Array:
    """[..., W] of 16 or 32 bits as u32[..., W / 2] or u32[..., W]."""
    pairs = x.reshape(*x.shape[:-1], -1, 2) if x.dtype.itemsize == 2 else x
    return lax.bitcast_convert_type(pairs, jnp.uint32)


def _from_words(words: jax.Array, like: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(words, like.dtype).reshape(like.shape)


def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K Hv"],
    *,
    axis_name: str = "context",
    is_causal: bool = False,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    deterministic: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
    """Attention of all tokens on a mesh axis; called inside `jax.shard_map`, with each device's own tokens.

        attend = functools.partial(jaxattn.ring_attention, is_causal=True)
        spec = P("data", "context", "tensor")
        attend = jax.shard_map(attend, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
        out = from_zigzag(attend(*(to_zigzag(x, num_devices) for x in (q, k, v))), num_devices)

    A model keeps its tokens in zig-zag order throughout (`zigzag_positions` for its positions); without
    is_causal any order will do. Each device holds O(T) of its own tokens, forward and backward: the backward
    pass sends K and V round again, with their gradients. Partial results are summed in float32.

    Arguments: as `dot_product_attention`; T is the number of tokens of one device, the same for queries and
    keys, even where is_causal. Raises ValueError for wrong arguments.
    From: Liu et al., Ring Attention with Blockwise Transformers (2023), section 3.
    """
    try:
        num_devices = lax.axis_size(axis_name)
    except NameError:
        raise ValueError(f"axis_name must be an axis of a surrounding shard_map, got {axis_name!r}") from None
    check_arrays(AttentionInputs(query, key, value))
    make_spec(
        query,
        scale=scale,
        is_causal=is_causal,
        logits_soft_cap=logits_soft_cap,
        deterministic=deterministic,
    )
    num_tokens = query.shape[1]
    if key.shape[1] != num_tokens:
        raise ValueError(f"key must have as many tokens as query, {num_tokens}, got {key.shape[1]}")
    if is_causal and num_devices > 1 and num_tokens % 2:
        raise ValueError(f"query must have an even number of tokens, two chunks, got {num_tokens}")
    if query.dtype.itemsize == 2 and (key.shape[-1] + value.shape[-1]) % 2:
        raise ValueError(f"head dims of key and value must be even, got {key.shape[-1]}, {value.shape[-1]}")
    ring = _Ring(axis_name, num_devices, is_causal, scale, logits_soft_cap, deterministic, implementation)
    return _attend(ring, *vary((query, key, value)))


# --- the order of tokens ------------------------------------------------------------------------------------


def zigzag_positions(num_tokens: int, num_devices: int) -> Int[np.ndarray, "T"]:
    """The positions of a sequence's tokens in zig-zag order: device d's are the d-th part of them."""
    for name, number in (("num_tokens", num_tokens), ("num_devices", num_devices)):
        if not checks.is_int(number) or number < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {number!r}")
    if num_tokens % (2 * num_devices):
        raise ValueError(f"num_tokens must be a multiple of 2 x {num_devices} devices, got {num_tokens}")
    chunks = np.arange(num_tokens).reshape(2 * num_devices, -1)
    order = [chunk for d in range(num_devices) for chunk in (d, 2 * num_devices - 1 - d)]
    return chunks[order].reshape(-1)


def to_zigzag(x: Array, num_devices: int, *, axis: int = 1) -> Array:
    """An array of tokens in order, along `axis`, in zig-zag order; on an explicit mesh it lies as x does."""
    return _take(x, zigzag_positions(x.shape[axis], num_devices), axis)


def from_zigzag(x: Array, num_devices: int, *, axis: int = 1) -> Array:
    """The inverse of `to_zigzag`."""
    return _take(x, zigzag_positions(x.shape[axis], num_devices).argsort(), axis)


def _take(x: Array, order: Int[np.ndarray, "T"], axis: int) -> Array:
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return jnp.take(x, order, axis=axis)
    # On axes of an explicit mesh the sharding is part of the type, and to be named.
    index = (slice(None),) * (axis % x.ndim)
    return x.at[(*index, order)].get(out_sharding=sharding)


# --- who sees whom in one step ------------------------------------------------------------------------------


class _Whole(NamedTuple):
    """All queries of this device and all keys at hand: the first step, and every step without a mask."""

    is_causal: bool

    def queries(self, x):
        """[B, T, ...] as the kernel takes them."""
        return x

    def keys(self, x):
        """[B, T, ...] as the kernel takes them."""
        return x

    def to_queries(self, x, combine=jnp.add, nothing=0.0):
        """The transpose of `queries`: puts results back to where the queries lie, [B, T, ...]."""
        return x

    def to_keys(self, x):
        """The transpose of `keys`: puts gradients back to where the keys lie, [B, T, ...]."""
        return x


class _Pairs(NamedTuple):
    """Two pairs of chunks side by side in the batch: [B, T, ...] becomes [2B, T/2, ...].

    The late queries meet the early keys, whichever device these come from. Where that is an earlier one, the
    early queries meet the early keys too, else the late queries the late keys.
    """

    is_earlier: jax.Array
    is_causal: bool = False

    def queries(self, x):
        early, late = jnp.split(x, 2, axis=1)
        return jnp.concatenate([late, jnp.where(self.is_earlier, early, late)])

    def keys(self, x):
        early, late = jnp.split(x, 2, axis=1)
        return jnp.concatenate([early, jnp.where(self.is_earlier, early, late)])

    def to_queries(self, x, combine=jnp.add, nothing=0.0):
        first, second = jnp.split(x, 2)
        early = jnp.where(self.is_earlier, second, nothing)
        late = combine(first, jnp.where(self.is_earlier, nothing, second))
        return jnp.concatenate([early, late], axis=1)

    def to_keys(self, x):
        first, second = jnp.split(x, 2)
        early = first + jnp.where(self.is_earlier, second, 0)
        return jnp.concatenate([early, jnp.where(self.is_earlier, 0, second)], axis=1)


def _block(ring: _Ring, step: int) -> _Whole | _Pairs:
    """At step s device d holds the keys of device d - s."""
    if step == 0 or not ring.is_causal:
        return _Whole(ring.is_causal)
    return _Pairs(lax.axis_index(ring.axis_name) >= step)


# --- forward and backward -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: _Ring, query, key, value):
    return _attend_forward(ring, query, key, value)[0]


def _attend_forward(ring: _Ring, query, key, value):
    pair: Any = jnp.concatenate([key, value], axis=-1)
    out: Any = None
    lse: Any = None
    for step in range(ring.num_devices):
        # Sent on before the kernel that reads it, so that the copy runs beside it; but not before the last
        # step is done: all copies at once would hold all keys.
        pair, out, lse = lax.optimization_barrier((pair, out, lse))
        is_last = step + 1 == ring.num_devices
        (coming,) = ring.pass_on(None if is_last else pair)
        block = _block(ring, step)
        operands = (block.queries(query), *_unpack(block.keys(pair), key))
        part, part_lse = flash_attention(
            *operands, is_causal=block.is_causal, return_lse=True, **ring.options
        )
        part = part.astype(jnp.float32)
        out, lse = (part, part_lse) if out is None else _merge(block, out, lse, part, part_lse)
        pair = coming
    out, lse = map(checkpoint_name, (out.astype(query.dtype), lse), SAVED_NAMES)
    return out, (query, key, value, out, lse)


def _unpack(pair, key):
    return pair[..., : key.shape[-1]], pair[..., key.shape[-1] :]


def _merge(block: _Whole | _Pairs, out, lse, part, part_lse):
    """Softmax over the keys of both: outputs weighted by their share of the row's exponentials."""
    total = jnp.logaddexp(lse, block.to_queries(part_lse, jnp.logaddexp, -jnp.inf))
    share = lambda lse, total: jnp.exp(lse - total)[..., None]
    weighted = block.to_queries(part * share(part_lse, block.queries(total)))
    return out * share(lse, total) + weighted, total


def _attend_backward(ring: _Ring, residuals, out_grad):
    """Each block's gradients follow from the log-sum-exp of whole rows; those of K and V travel with them."""
    query, key, value, out, lse = residuals
    pair: Any = jnp.concatenate([key, value], axis=-1)
    query_grad: Any = None
    pair_grad: Any = None
    for step in range(ring.num_devices):
        pair, query_grad, pair_grad = lax.optimization_barrier((pair, query_grad, pair_grad))
        is_last = step + 1 == ring.num_devices
        coming, arriving = ring.pass_on(None if is_last else pair, pair_grad)
        block = _block(ring, step)
        rows = [block.queries(x) for x in (query, out, lse, out_grad)]
        operands: Any = (*rows, *_unpack(block.keys(pair), key))
        own_query_grad, *own = flash_attention_gradients(*operands, is_causal=block.is_causal, **ring.options)
        own_query_grad = block.to_queries(own_query_grad.astype(jnp.float32))
        own = block.to_keys(jnp.concatenate(own, axis=-1).astype(jnp.float32))
        query_grad = own_query_grad if query_grad is None else query_grad + own_query_grad
        pair_grad = own if arriving is None else arriving + own
        pair = coming
    (pair_grad,) = ring.pass_on(pair_grad)  # which was one device short of home
    key_grad, value_grad = _unpack(pair_grad, key)
    return query_grad.astype(query.dtype), key_grad.astype(key.dtype), value_grad.astype(value.dtype)


_attend.defvjp(_attend_forward, _attend_backward)
