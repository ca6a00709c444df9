"""The kernels under test, as tables; test_tiers.py runs every row.

To add a kernel: write `<op>_cases.py` beside this file with two dicts and add its name to MODULES.

    INTERPRET: dict[str, Callable[[], None]]
        Runs the kernel on small arrays inside `with interpreted():` (interpreter.py), compares with the
        reference, raises where they differ. Under 64 (thread block, KV tile) steps: each costs about 0.06 s.
        Reductions in global memory, plgpu.mma, atomics and semaphores cannot be interpreted: such a kernel
        has rows in COMPILE only.
    COMPILE: dict[str, CompileCase]
        The kernel at a size and config that ships. It is lowered for CUDA in every environment (shared memory
        that overflows, shapes that wgmma does not have), and compiled to sm_90a where .venv-hopper is
        installed: no spills, no assembler warning, temporary memory within the bound.

Names are `op:what-is-special`; they are the pytest ids.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

MODULES = (
    "cascade_cases",
    "flash_cases",
    "flash_compile_cases",
    "flash_float32_cases",
    "flash_fused_cases",
    "flash_random",
    "invariance_cases",
    "kv_pages_cases",
    "nan_cases",
    "one_query_cases",
    "paged_cases",
    "paged_random",
    "prefill_cases",
)

# Rows that only make test-all runs: each is like another, of another head dim or with other features, and
# together they take minutes on 2 cores. A module may have more, in a set SLOW of its own.
_SLOW = {
    *(
        f"flash_attention:backward fused, head dim {rest}"
        for rest in (
            "24, window",
            "256, lengths",
            "256, block mask, causal, dropout",
            "192, one stage, fp16, window",
            "256, segments, dropout",
            "256, soft cap, slopes",
        )
    ),
    *(
        f"flash_attention:backward fused {rest}"
        for rest in (
            "H=64 full",
            "H=128 full",
            "H=256 full",
            "H=192 wide, causal, window",
            "H=128 window, grouped heads",
            "H=128 lengths, grouped heads",
            "H=256 wide, dropout",
            "H=256 wide, slopes",
            "H=256 wide, block mask, segments",
        )
    ),
    *(f"flash_attention:backward H={head_dim} full" for head_dim in (64, 128, 256)),
    *(
        f"flash_attention:backward {rest}"
        for rest in ("plain", "causal", "lengths", "segments", "block mask")
    ),
    *(
        f"flash_attention:{direction} block mask{rest}"
        for direction in ("forward", "backward")
        for rest in (", bias", " of each head, slopes")
    ),
    "flash_attention:backward H=128 block mask of each head, grouped heads",
    "flash_attention:backward H=256 block mask, bias",
    "cascade_attention:head dim 96, group 5, no splits",
    "cascade_attention:int8 pages, soft cap",
    "cascade_attention:many rows",
    "cascade_attention:H=96, fp8 pages",
    "paged_attention:decode int8 pages, group 16",
    "paged_attention:decode int8 pages, H=96",
    "paged_attention:decode int8 pages, GPT-2 medium",
    "paged_attention:prefill H=256, group 8",
    "paged_attention:prefill softmax a tile ahead, H=256, group 5 of 15 octets",
}


class CompileCase(NamedTuple):
    """A function of arrays with these specs; it must use at most max_temp_bytes beside its arguments and
    results.
    """

    function: Callable[..., Any]
    specs: tuple[Any, ...]
    donate: tuple[int, ...] = ()
    max_temp_bytes: int | None = None
    max_spill_bytes: int = 0
    min_alias_bytes: int = 0
    keep_hlo: bool = False
    pads_nothing: bool = False  # of 16 bits no array is copied to be longer, in a launch of XLA's
    num_devices: int = 1  # arrays are divided over a mesh axis "devices", and must stay where they are
    partition: tuple[str | None, ...] = ()


@functools.cache
def _modules() -> tuple[Any, ...]:
    names = [f"{__package__}.{module}" for module in MODULES]
    return tuple(importlib.import_module(name) for name in names if importlib.util.find_spec(name))


@functools.cache
def _merge(table: str) -> dict[str, Any]:
    return {name: row for module in _modules() for name, row in getattr(module, table).items()}


def __getattr__(name: str) -> Any:
    """INTERPRET, COMPILE and SLOW, merged when asked for: the case modules import this one."""
    if name in ("INTERPRET", "COMPILE"):
        return _merge(name)
    if name == "SLOW":
        return _SLOW.union(*(getattr(module, "SLOW", ()) for module in _modules()))
    raise AttributeError(name)
