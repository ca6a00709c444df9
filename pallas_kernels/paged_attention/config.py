"""PagedConfig: how the decode kernel cuts its work."""

import dataclasses

from pallas_kernels.mosaic import SMEM_BYTES

NUM_PROGRAMS = 132  # multiprocessors of an H100 or H200; a constant, so that results depend on shapes alone
TILES = (64, 128, 256)


@dataclasses.dataclass(frozen=True)
class PagedConfig:
    """Cuts of the decode kernel; results depend on them in their last bits, never on the batch.

    tile: tokens a compute step takes. split: tokens after which a row is cut, a multiple of the tile; one
    split a row where the block table is no longer. stages: tiles of K, and of V, that are on their way from
    memory.
    """

    tile: int = 128
    split: int = 2048
    stages: int = 3

    def __post_init__(self):
        if self.tile not in TILES:
            raise ValueError(f"tile must be one of {TILES}, got {self.tile!r}")
        if self.split < self.tile or self.split % self.tile:
            raise ValueError(f"split must be a multiple of tile={self.tile}, got {self.split!r}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages!r}")


def fixed_bytes(head_dim: int, columns: int, tile: int) -> int:
    """Shared memory beside the stages: queries twice, weights, fp32 results, and a margin for page ids,
    barriers and the scratch of reductions."""
    return 2 * columns * head_dim * 2 + columns * tile * 2 + columns * head_dim * 4 + 12288


def default_config(
    num_rows: int, num_kv_heads: int, head_dim: int, columns: int, capacity: int
) -> PagedConfig:
    """Chooses cuts for R rows of at most `capacity` tokens, K heads of H, `columns` queries a head (padded).

    tile: 128, because a step costs about 0.6 us however few its tokens; 64 where two stages of 128 do not
    fit. split: a unit a multiprocessor if the rows fill them all just once, 4096 tokens at most: long units
    cost less to begin and to merge, short ones balance rows of uneven length (H200, page size 16: 16 rows x
    16384 of Yi-6B take 135, 132, 130, 127 us at 1024, 2048, 4096, 8192). stages: as many as fit, up to 8.
    """
    for tile in (128, 64):
        stages = (SMEM_BYTES - fixed_bytes(head_dim, columns, tile)) // (2 * tile * head_dim * 2)
        if stages >= 2:
            break
    tokens_a_program = num_rows * num_kv_heads * capacity / NUM_PROGRAMS
    split = next((size for size in (256, 512, 1024, 2048) if size >= tokens_a_program), 4096)
    return PagedConfig(tile=tile, split=split, stages=min(8, stages))
