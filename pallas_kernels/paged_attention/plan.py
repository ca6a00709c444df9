"""The static facts that the launches of paged decode and of paged prefill share."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.kv_pages.pool import QUANTIZED
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """What is known of a call before it runs."""

    spec: PagedSpec
    query_dtype: Any
    page_dtype: Any
    num_rows: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_pages: int  # 0: caches instead of pages
    has_sinks: bool = False
    has_slopes: bool = False

    @property
    def is_quantized(self) -> bool:
        return self.page_dtype in QUANTIZED

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def width(self) -> int:
        """Columns of parts in fp32, and rows of decode's transposed values, which wgmma takes by 64. Nobody
        reads what lies beyond H."""
        return -(-self.head_dim // 64) * 64


class Counters(NamedTuple):
    """Of the units that programs draw, zero at first: i32[2] or more, each for one launch."""

    decode: Any  # the second: 1 if it is known that no row is decode's
    prefill: Any

    @classmethod
    def zeros(cls) -> "Counters":
        return cls(*(jnp.zeros(2, jnp.int32) for _ in cls._fields))


def is_single(start, stop, num_tokens: int):
    """Whether a row of a ragged batch has one query. What lies beyond the tokens is no query."""
    return (lax.min(stop, num_tokens) - start == 1) & (start >= 0)


def facts_of(inputs: PagedInputs, spec: PagedSpec) -> dict[str, Any]:
    """The fields of a LaunchPlan."""
    _, num_heads, head_dim = inputs.query.shape
    return {
        "spec": spec,
        "query_dtype": inputs.query.dtype,
        "page_dtype": inputs.k_pages.dtype,
        "num_rows": inputs.kv_lengths.shape[0],
        "num_heads": num_heads,
        "num_kv_heads": inputs.k_pages.shape[2],
        "head_dim": head_dim,
        "num_pages": 0 if inputs.block_tables is None else inputs.k_pages.shape[1],
        "has_sinks": inputs.sinks is not None,
        "has_slopes": inputs.alibi_slopes is not None,
    }
