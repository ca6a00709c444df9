"""Tile sizes of the flash kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class FlashConfig:
    """Tile sizes and pipeline depth of one kernel call; validates itself."""

    tile_q: int = 64  # queries a compute warpgroup holds
    tile_kv: int = 128  # keys and values loaded at a time
    stages: int = 2  # KV tiles in flight
