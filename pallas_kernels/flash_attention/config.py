"""Tile sizes of the flash kernels, and the choice for a call."""

import dataclasses

MAX_STAGES = 8


@dataclasses.dataclass(frozen=True)
class FlashConfig:
    """Tile sizes and pipeline depth of the kernels of one call; validates itself.

    A thread block is `warpgroups` compute warpgroups, each with tile_q queries, and one that loads.
    """

    tile_q: int = 64
    tile_kv: int = 128  # keys (and values) loaded at a time
    stages: int = 2  # KV tiles in flight
    warpgroups: int = 2
    ping_pong: bool = True  # one warpgroup's softmax runs while the other's matmuls do

    def __post_init__(self):
        for name in ("tile_q", "tile_kv"):
            if (tile := getattr(self, name)) not in (64, 128, 192, 256):
                raise ValueError(f"{name} must be 64, 128, 192 or 256, got {tile}")
        if not 1 <= self.stages <= MAX_STAGES:
            raise ValueError(f"stages must lie in 1..{MAX_STAGES}, got {self.stages}")
        if self.warpgroups not in (1, 2, 3):
            raise ValueError(f"warpgroups must be 1, 2 or 3, got {self.warpgroups}")
        if self.ping_pong and self.warpgroups != 2:
            raise ValueError(f"ping_pong takes two warpgroups, got warpgroups={self.warpgroups}")


def default_config(head_dim: int) -> FlashConfig:
    """The forward kernel's tiles for a (padded) head dim."""
    if head_dim <= 64:
        return FlashConfig(tile_q=64, tile_kv=128, stages=3)
    if head_dim <= 128:
        return FlashConfig(tile_q=64, tile_kv=128, stages=2)
    return FlashConfig(tile_q=64, tile_kv=64, stages=2)
