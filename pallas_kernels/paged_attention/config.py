"""PagedConfig: how the decode kernel cuts its work."""

import dataclasses
from typing import Any

from pallas_kernels.mosaic import SMEM_BYTES

NUM_PROGRAMS = 132  # multiprocessors of an H100 or H200; a constant, so that results depend on shapes alone
TILES = (64, 128, 256)
MAX_BOX = 256  # elements that one TMA copy takes along a dimension
ROW_BLOCK = 8  # rows whose numbers are looked at together
MAX_ROWS = 4096
COUNTED_ROWS = 1024  # of more there is no room for the number of units of each
SPLITS = (256, 512, 1024, 2048, 4096, 8192)  # tokens, of the default cuts
MANY_UNITS_SPLIT = 4096  # where no split gives every multiprocessor one unit
FEW_KV_HEADS = 4
INVARIANT_SPLITS = (512, 1024)  # of so few, and of more: a row of 16384 has 128 units at K = 4 and at K = 8
MAX_STAGES = 8
MIN_ROOM = 128  # tokens of a cache: the default's tile for all dtypes that caches have
IN_FLIGHT = 112 << 10  # bytes of K and V that a multiprocessor waits for at a time


@dataclasses.dataclass(frozen=True)
class PagedConfig:
    """Cuts of the decode kernel; a row's result depends on them in its last bits, never on other rows.

    tile: tokens a compute step takes. split: tokens after which a row is cut, a multiple of the tile; one
    split a row where the block table is no longer. stages: tiles of K, and of V, that are on their way from
    memory. consumers: warpgroups that compute. dynamic: programs draw their work instead of taking every
    n-th piece.
    """

    tile: int = 128
    split: int = 2048
    stages: int = 3
    consumers: int = 1
    dynamic: bool = False

    def __post_init__(self):
        check_types(self)
        if self.tile not in TILES:
            raise ValueError(f"tile must be one of {TILES}, got {self.tile!r}")
        if self.split < self.tile or self.split % self.tile:
            raise ValueError(f"split must be a multiple of tile={self.tile}, got {self.split!r}")
        if not 2 <= self.stages <= MAX_STAGES:
            raise ValueError(f"stages must be one of 2..{MAX_STAGES}, got {self.stages!r}")
        if self.consumers not in (1, 2):
            raise ValueError(f"consumers must be one of (1, 2), got {self.consumers!r}")
        if self.stages % self.consumers:
            raise ValueError(f"stages must be a multiple of consumers={self.consumers}, got {self.stages!r}")


def check_types(config: Any) -> None:
    """Holds the fields of a config to the types of their defaults."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), type(field.default)
        if type(value) is not kind:
            raise ValueError(f"{field.name} must be of type {kind.__name__}, got {value!r}")


def numbers_size(num_rows: int) -> int:
    """Room for a number of every row and of those that are looked at together with the last, in whole copies,
    of which every thread of a warpgroup takes as many."""
    size = -(-(num_rows + ROW_BLOCK) // 128) * 128
    return size if size <= MAX_BOX else -(-size // MAX_BOX) * MAX_BOX


def block_columns(head_dim: int, itemsize: int) -> int:
    """Columns of a block of K, V and queries in shared memory: all, or, if H is no multiple of 64, those of
    128 bytes, the last not filled: of the rows of 32 or 64 bytes that divide such an H the copy engine moves
    fewer bytes in the same time.
    """
    return 128 // itemsize if head_dim % 64 else head_dim


def fixed_bytes(
    num_rows: int,
    head_dim: int,
    columns: int,
    tile: int,
    consumers: int,
    split: int,
    page_size: int | None,
    is_ragged: bool = False,
) -> int:
    """Shared memory beside the stages: rows' numbers, page ids, queries twice, weights of each consumer, fp32
    results, the scratch of a second consumer's reductions, and a margin for the first one's and barriers."""
    rows = -(-head_dim // 64) * 64
    workspace = columns * tile * 2
    ids = 16 * (split // page_size + 32) if page_size else 0
    results = consumers * (workspace + columns * rows * 4) + (consumers - 1) * 2048
    numbers = numbers_size(num_rows) * (1 + is_ragged + (num_rows <= COUNTED_ROWS))
    return 4 * numbers + ids + 4 * columns * head_dim + results + 7168


def default_config(
    num_rows: int,
    num_kv_heads: int,
    head_dim: int,
    columns: int,
    capacity: int,
    itemsize: int = 2,
    page_size: int | None = 8,
    is_ragged: bool = False,
    batch_invariant: bool = False,
) -> PagedConfig:
    """Chooses cuts for R rows of at most `capacity` tokens, K heads of H, `columns` queries a head (padded).

    batch_invariant: tile, split and consumers, which order the sums, follow neither R nor capacity.

    tile: 128, because a step costs about 0.6 us however few its tokens; 64 where two stages of 128 do not
    fit; 256 of codes at H = 64 (GPT-2 medium 256 x 1024, int8: 158 us instead of 170), of up to 8 queries a
    head: of 16 it spills 208 to 316 bytes.
    split: a unit a multiprocessor if the rows fill them all just once, else 4096 tokens: long units cost less
    to begin and to merge, short ones balance rows of uneven length (H200, page size 16: 16 rows x 16384 of
    Yi-6B take 132, 129, 127, 125 us at 1024, 2048, 4096, 8192, of Llama-3-8B 248, 244, 242, 244).
    stages: of 16-bit pages what IN_FLIGHT bytes hold: more only wait longer in memory's queue (H100:
    Llama-3-8B 128 x 2048 354.7 us with two stages, 358.5 with three; GPT-2 medium 256 x 1024 354.2 with two
    and three, 355.5 with four, 356.4 with six); of codes as many as fit, up to 8.
    consumers: two where codes become fp16 (int8, Llama-3-8B 16 x 16384: 140.5 us, with one 140.8; 128 x
    2048: 139 and 142), and at H = 64, where a tile is soon there (16/16 heads, 256 rows of 16 to 640
    tokens: 90 us, with one 103; of 1024: 238 and 239; 32/8 heads, 256 rows of 16 to 640: 50 and 56).
    dynamic: where every program has a few units (GPT-2 medium 256 x 1024 238 us instead of 243, Llama-3-8B
    16 x 16384 243 instead of 247, rows of uneven length 263 instead of 268; 16 x 16384 of Yi-6B, two units
    a program, 128 both).
    """
    is_quantized = itemsize == 1
    block = block_columns(head_dim, itemsize)
    padded = -(-head_dim // block) * block
    split = choose_split(num_rows, num_kv_heads, capacity, batch_invariant)
    most_rows = MAX_ROWS if batch_invariant else num_rows

    def stages_that_fit(tile: int, consumers: int, num_rows: int, is_ragged: bool) -> int:
        fixed = fixed_bytes(num_rows, padded, columns, tile, consumers, split, page_size, is_ragged)
        return max(0, SMEM_BYTES - fixed) // (2 * tile * (padded * itemsize + 4 * is_quantized))

    for tile in (256, 128, 64):
        consumers = 2 if tile < 256 and (is_quantized or head_dim <= 64) else 1
        is_long = batch_invariant or capacity >= 256
        if tile == 256 and not (is_quantized and head_dim <= 64 and columns <= 8 and is_long):
            continue
        if is_quantized and tile * head_dim > 128 * 128:
            continue  # values are in registers
        if stages_that_fit(tile, consumers, most_rows, is_ragged or batch_invariant) >= 2 * consumers:
            break
    stages = stages_that_fit(tile, consumers, num_rows, is_ragged)
    in_flight = MAX_STAGES if is_quantized else max(2, IN_FLIGHT // (2 * tile * head_dim * itemsize))
    stages = min(MAX_STAGES, *(x // consumers * consumers for x in (in_flight + consumers - 1, stages)))
    units = num_rows * num_kv_heads * -(-capacity // split)
    dynamic = units >= 3 * NUM_PROGRAMS and not is_quantized
    return PagedConfig(tile=tile, split=split, stages=stages, consumers=consumers, dynamic=dynamic)


def choose_split(num_rows: int, num_kv_heads: int, capacity: int, batch_invariant: bool) -> int:
    """Tokens after which default_config cuts a row."""
    if batch_invariant:
        return INVARIANT_SPLITS[num_kv_heads > FEW_KV_HEADS]
    tokens_a_program = num_rows * num_kv_heads * capacity / NUM_PROGRAMS
    return next((size for size in SPLITS if size >= tokens_a_program), MANY_UNITS_SPLIT)
