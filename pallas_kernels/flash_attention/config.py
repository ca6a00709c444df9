"""Tile sizes of the flash kernels, and the choice for a call."""

import dataclasses

MAX_STAGES = 8
TILES = (64, 128, 192, 256)
STREAMED_TILES = (64, 128)


def _check(config, **tiles: tuple[int, ...]) -> None:
    for name, allowed in tiles.items():
        if (tile := getattr(config, name)) not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {tile}")
    if not 1 <= config.stages <= MAX_STAGES:
        raise ValueError(f"stages must lie in 1..{MAX_STAGES}, got {config.stages}")
    if config.warpgroups not in (1, 2, 3):
        raise ValueError(f"warpgroups must be 1, 2 or 3, got {config.warpgroups}")


@dataclasses.dataclass(frozen=True)
class GradientConfig:
    """Tiles of one backward kernel: each compute warpgroup holds `own` rows and streams tiles of `other`.

    The dq kernel owns queries and streams keys and values; the dk,dv kernel owns keys and values and streams
    queries.
    """

    own: int = 64
    other: int = 64
    stages: int = 2
    warpgroups: int = 2

    def __post_init__(self):
        _check(self, own=TILES, other=STREAMED_TILES)


@dataclasses.dataclass(frozen=True)
class FlashConfig:
    """Tile sizes and pipeline depth of the kernels of one call; validates itself.

    A thread block of the forward kernel is `warpgroups` compute warpgroups with tile_q queries each, and one
    that loads.
    """

    tile_q: int = 64
    tile_kv: int = 128  # keys (and values) loaded at a time
    stages: int = 2  # KV tiles in flight
    warpgroups: int = 2
    ping_pong: bool = True  # one warpgroup's softmax runs while the other's matmuls do
    dq: GradientConfig = GradientConfig()
    dkv: GradientConfig = GradientConfig()
    dkv_passes: int = 1  # 2: one kernel for dK, one for dV

    def __post_init__(self):
        _check(self, tile_q=TILES, tile_kv=TILES)
        if self.ping_pong and self.warpgroups != 2:
            raise ValueError(f"ping_pong takes two warpgroups, got warpgroups={self.warpgroups}")


def default_config(head_dim: int, crowded: bool = False) -> FlashConfig:
    """The tiles for a (padded) head dim; crowded: a window's left side or a soft cap need registers too.

    Measured on an H200: three warpgroups of 64 x 128 tiles beat two that take turns by 5 to 9% at H = 64 and
    128, but leave each thread 160 registers, which a crowded kernel would spill at H = 128. At H = 256 two
    hold the accumulators, and taking turns costs 10% of the causal speed.
    """
    if head_dim <= 64:
        gradient = GradientConfig(other=64 if crowded else 128)
        return FlashConfig(tile_kv=128, stages=3, warpgroups=3, ping_pong=False, dq=gradient, dkv=gradient)
    if head_dim <= 128 and crowded:
        return FlashConfig(tile_kv=128, stages=2)
    if head_dim <= 128:
        return FlashConfig(
            tile_kv=128, stages=2, warpgroups=3, ping_pong=False, dq=GradientConfig(warpgroups=3)
        )
    single = GradientConfig(stages=1)
    return FlashConfig(tile_kv=64, stages=2, ping_pong=False, dq=single, dkv=single, dkv_passes=2)
