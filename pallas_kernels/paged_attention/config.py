"""PagedConfig: how the decode kernel cuts its work."""

import dataclasses

TILES = (32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class PagedConfig:
    """Cuts of the decode kernel; results depend on `split` in their last bits, never on the batch.

    tile: tokens a compute step takes; split: tokens after which a row is cut, a multiple of the tile; stages: tiles
    of K and of V in flight from memory; programs_per_sm: persistent programs that share a multiprocessor.
    """

    tile: int = 128
    split: int = 1024
    stages: int = 4
    programs_per_sm: int = 1

    def __post_init__(self):
        if self.tile not in TILES:
            raise ValueError(f"tile must be one of {TILES}, got {self.tile!r}")
        if self.split < self.tile or self.split % self.tile:
            raise ValueError(f"split must be a multiple of tile={self.tile}, got {self.split!r}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages!r}")
        if self.programs_per_sm not in (1, 2, 3, 4):
            raise ValueError(f"programs_per_sm must be 1 to 4, got {self.programs_per_sm!r}")
