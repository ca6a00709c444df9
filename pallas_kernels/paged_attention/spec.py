"""What one paged attention call computes: the static description and the arrays that variants receive."""

import dataclasses
from typing import Any, NamedTuple

from jaxtyping import Array, Float, Int, Num

from pallas_kernels.paged_attention.config import PagedConfig
from pallas_kernels.paged_attention.prefill_config import PrefillConfig


@dataclasses.dataclass(frozen=True)
class PagedSpec:
    """The static part of a call; hashable, so that equal calls share one trace."""

    scale: float
    window_left: int | None = None  # keys visible to the left of a query; None: all
    logits_soft_cap: float | None = None
    is_causal: bool = True  # False: every query sees all keys of its row
    config: PagedConfig | None = None
    prefill_config: PrefillConfig | None = None
    batch_invariant: bool = False  # cuts follow neither the numbers of rows and tokens nor tables' width


class PagedInputs(NamedTuple):
    """The arrays of a call."""

    query: Float[Array, "tokens N H"]
    k_pages: Num[Array, "L P K Z H"]  # or caches [R, S, K, H], where there are no block tables
    v_pages: Num[Array, "L P K Z H"]
    block_tables: Any  # i32[R, M]; None where there are caches
    kv_lengths: Int[Array, "R"]
    layer: Int[Array, ""]
    query_start: Int[Array, "R+1"] | None = None
    k_scale: Float[Array, "L P K Z"] | None = None
    v_scale: Float[Array, "L P K Z"] | None = None
    sinks: Float[Array, "N"] | None = None
    alibi_slopes: Float[Array, "N"] | None = None
    skipped_pages: Int[Array, "R"] | None = None  # of each table; lengths count what comes after
