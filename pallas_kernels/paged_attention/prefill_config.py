"""PrefillConfig: how the prefill kernel cuts its work."""

import dataclasses
import math

from pallas_kernels.paged_attention.config import MAX_STAGES, NUM_PROGRAMS, check_types

OCTET = 8  # tokens: what TMA moves at least of a swizzled tile
WARPGROUP_ROWS = 64  # of a wgmma
MIN_SPLIT_TILES = 4  # KV tiles that are worth a unit of their own, and its merge
MAX_SPLITS = 16
SPLIT_BYTES = 64 << 20  # what the parts of the results may take


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """Cuts of the prefill kernel.

    warpgroups: of 64 rows (tokens x query heads of a group) each; at most two for quantized pages. tile_kv:
    keys a step takes. stages: tiles of K, and of V, in flight. splits: parts that a row's keys are cut into
    at most, where there are too few rows to fill the GPU. overlap: a tile's softmax runs while its
    warpgroup's matmul of the tile before does; not for quantized pages. packs: a tile begins and ends
    anywhere among the heads of eight tokens, where whole tokens would leave rows of no head; not where
    results are parts.
    """

    warpgroups: int = 3
    tile_kv: int = 128
    stages: int = 2
    splits: int = 1
    overlap: bool = False
    packs: bool = False

    def __post_init__(self):
        check_types(self)
        for name, allowed in {"warpgroups": (1, 2, 3), "tile_kv": (64, 128)}.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        if not 2 <= self.stages <= MAX_STAGES:
            raise ValueError(f"stages must be one of 2..{MAX_STAGES}, got {self.stages!r}")
        if self.splits < 1:
            raise ValueError(f"splits must be at least 1, got {self.splits!r}")


def fewest_warpgroups(head_dim: int, has_slopes: bool, is_quantized: bool) -> int:
    """Of a default tile."""
    return 1 if head_dim > 128 and (has_slopes or is_quantized) else 2


def max_tiles(num_tokens: int, num_rows: int, tile_size: int, group: int = 1) -> int:
    """Query tiles that any division of the tokens into rows can need, tiles that start at octets.

    The tokens before the first row and after the last count as rows. group: heads of a token, of which a tile
    takes tile_size.
    """
    num_segments = min(num_rows + 2, num_tokens)
    return (num_tokens * group + num_segments * ((OCTET - 1) * group + tile_size - 1)) // tile_size


def default_config(
    num_tokens: int,
    num_rows: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    crowded: bool,
    capacity: int,
    has_slopes: bool = False,
    is_quantized: bool = False,
    batch_invariant: bool = False,
) -> PrefillConfig:
    """Chooses tiles for a call; crowded: a window's left side or a soft cap need registers too.

    Three warpgroups leave a thread 160 registers: enough for accumulators of 64 x 128, not for a crowded
    kernel's, for overlap beside them, for slopes (252 bytes of spills at H = 64) or for H = 256. With slopes
    two spill 8 to 32 bytes where tiles have 128 keys, and 44 at H = 256. Two that overlap spill no more at H
    = 256 than in order, nothing in the loop over full tiles. At H = 64 two take a fifth longer for a row of a
    tile, but leave less of a last tile empty: chunks of 256 tokens 62 us instead of 69, of 1,024 136 instead
    of 127 (GPT-2 medium, an H100). Few tokens a row are taken for a batch of prompts and decodes, whose
    prompts are of any length. Two also where all their tiles fit the GPU at once: a call then takes as long
    as the tile that sees most keys, which is smaller (1 x 512 of 32/8 heads of 128: 15.0 us, three 18.8).
    Quantized pages take a warpgroup that widens them, registers for scales, and shared memory for codes and
    for what becomes of them. packs: unpacked, groups of 16, 7 and 5 leave 8, 3 and 4 of 24 octets idle (H =
    128, an H200: 66%, 81% and 83% of the dense kernel's rate; packed 97%, 91% and 93%); at H = 256 it spills
    136 bytes. splits: as many as give every multiprocessor a unit if the tokens were one row's of
    `capacity` keys, and as SPLIT_BYTES hold. Where a row's keys are then cut follows from which of its
    queries share a tile, and so from where it begins among the tokens. batch_invariant: one split, and tiles
    that follow from heads alone.
    """
    tile_kv = 128 if head_dim <= 128 and not (has_slopes or is_quantized) else 64
    tile_rows = 2 * WARPGROUP_ROWS
    tiles = math.ceil(num_tokens * group / tile_rows)
    tile_bytes = max_tiles(num_tokens, num_rows, tile_rows // group) * num_kv_heads * tile_rows * head_dim * 4
    splits = min(
        MAX_SPLITS,
        NUM_PROGRAMS // (tiles * num_kv_heads),
        capacity // (MIN_SPLIT_TILES * tile_kv),
        SPLIT_BYTES // tile_bytes,
    )
    if batch_invariant:
        splits = 1
    warpgroups = fewest_warpgroups(head_dim, has_slopes, is_quantized)
    if is_quantized:
        return PrefillConfig(warpgroups, tile_kv, 3, max(splits, 1), packs=head_dim <= 128)
    if splits > 1:
        return PrefillConfig(warpgroups, tile_kv, 2, splits)
    overlap = not (crowded or has_slopes)
    one_wave = tiles * num_kv_heads <= NUM_PROGRAMS and not batch_invariant
    if head_dim <= 64:
        rows = 0 if batch_invariant else num_tokens * group / num_rows
        in_pairs, in_threes = (math.ceil(rows / size) * size for size in (tile_rows, 3 * WARPGROUP_ROWS))
        pairs = has_slopes or one_wave or (rows >= WARPGROUP_ROWS and 1.2 * in_pairs < in_threes)
        return PrefillConfig(2 if pairs else 3, tile_kv, 3, overlap=overlap, packs=True)
    if head_dim <= 128:
        pairs = one_wave or not overlap
        return PrefillConfig(
            2 if pairs else 3, tile_kv, 256 // tile_kv, overlap=pairs and overlap, packs=True
        )
    return PrefillConfig(warpgroups, 64, 2, overlap=overlap)
