"""contiguous_attention: decode over caches without pages, by the same kernel and the same reference."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import checks
from pallas_kernels.device import is_hopper
from pallas_kernels.kv_pages import pool
from pallas_kernels.manual import jit_kernels, unsupported_layout
from pallas_kernels.paged_attention import decode_plan, decode_sm90, reference
from pallas_kernels.paged_attention.config import MIN_ROOM, PagedConfig
from pallas_kernels.paged_attention.op import Variant, check_heads, make_spec
from pallas_kernels.paged_attention.prefill_config import OCTET
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec
from pallas_kernels.variants import choose


def with_room(inputs: PagedInputs, config: PagedConfig | None = None) -> PagedInputs:
    """Caches of room for a tile or more: copies, where they have less or not whole octets."""
    room = inputs.k_pages.shape[1]
    least = max(MIN_ROOM, 0 if config is None else config.tile)
    more = max(least, room + -room % OCTET) - room
    if not more:
        return inputs
    k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) for x in (inputs.k_pages, inputs.v_pages))
    return inputs._replace(k_pages=k, v_pages=v, kv_lengths=jnp.minimum(inputs.kv_lengths, room))


def _decode(inputs: PagedInputs, spec: PagedSpec) -> tuple[jax.Array, jax.Array]:
    return decode_sm90.forward(with_room(inputs, spec.config), spec)


def _unsupported(inputs: PagedInputs, spec: PagedSpec) -> str | None:
    shapes = jax.eval_shape(functools.partial(with_room, config=spec.config), inputs)
    return decode_plan.unsupported_shapes(shapes) or unsupported_layout(inputs)


VARIANTS = {
    "sm90": Variant(_decode, _unsupported, is_hopper),
    "reference": Variant(reference.forward, lambda inputs, spec: None, lambda: True),
}


def contiguous_attention(
    query: Float[Array, "R N H"],
    k_cache: Float[Array, "R S K H"],
    v_cache: Float[Array, "R S K H"],
    kv_lengths: Int[Array, "R"],
    *,
    scale: float | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    alibi_slopes: Float[Array, "N"] | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    config: PagedConfig | None = None,
    implementation: str | None = None,
) -> Float[Array, "R N H"] | tuple[Float[Array, "R N H"], Float[Array, "R N"]]:
    """Computes attention of one query a row over caches in which every row has room for S tokens.

        out = softmax(mask(cap(scale Q K^T) - slope (position - j))) V,   cap(x) = c tanh(x / c)

    What paged_attention computes without query_start, for those who want no pages, and the measure of what
    pages cost. The query of a row stands at its last token, kv_length - 1.

    Arguments:
        query: [R, N, H]; bf16, fp16 or f32.
        k_cache, v_cache: [R, S, K, H], query's dtype. Beyond a row's length they may hold anything, NaN too.
        kv_lengths: tokens of each row; 0 for an empty row. More than S count as S.
        batch_invariant: as paged_attention's; caches of any room S then give a row the same bits.
        others: as those of paged_attention.

    Served by the kernel: what paged_attention's serve without query_start. The reference serves the rest. The
    kernel takes caches of S >= 128, and of config's tile, a multiple of 8; others are copied into such at
    every call.

    Raises ValueError for wrong arguments, NotImplementedError where the implementation named cannot serve.
    """
    checks.check_rank("query", query, "R N H")
    checks.check_dtype("query", query, pool.FLOATS)
    checks.check_rank("k_cache", k_cache, "R S K H")
    checks.check_shape("v_cache", v_cache, k_cache.shape, "R S K H")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.check_dtype(name, cache, (query.dtype,))
    num_rows, _, num_kv_heads, head_dim = k_cache.shape
    kv_lengths = pool.check_indices("kv_lengths", kv_lengths, (num_rows,), "R")
    inputs = PagedInputs(
        query, k_cache, v_cache, None, kv_lengths, jnp.int32(0), sinks=sinks, alibi_slopes=alibi_slopes
    )
    check_heads(inputs, num_kv_heads, head_dim, "R N H")
    checks.check_shape("query", query, (num_rows, *query.shape[1:]), "R N H")
    spec = make_spec(query, scale, local_window_size, logits_soft_cap, config, batch_invariant)
    variant = choose("contiguous_attention", VARIANTS, implementation, inputs, spec)
    out, lse = _forward(variant, spec, inputs)
    return (out, lse) if return_lse else out


@jit_kernels(2)
def _forward(implementation: str, spec: PagedSpec, inputs: PagedInputs) -> tuple[jax.Array, jax.Array]:
    return VARIANTS[implementation].forward(inputs, spec)
