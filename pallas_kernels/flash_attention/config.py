"""Tile sizes of the flash kernels, and the choice for a call."""

import dataclasses
import math
from collections.abc import Collection
from typing import NamedTuple

from pallas_kernels import checks

MAX_STAGES = 8
TILES = (64, 128, 192, 256)
# Of the forward kernel. Of wide heads what wgmma reads from shared memory is the limit, 128 bytes a clock: of
# 64 keys it reads 4 KB in the 32 clocks that it takes, of 80 4.5 KB in 40, of 112 5.5 KB in 56.
KV_TILES = (*TILES, 80, 96, 112)
STREAMED_TILES = (64, 128)
WARPGROUPS = (1, 2, 3)
SHORT = 1024  # queries
# What a query costs in blocks of two warpgroups, over what it costs in blocks of three, where all blocks see
# alike (full T = 4,096, 10 heads of 128, for which both take waves of 384 rows together: 151 and 143 us), and
# where they do not: 1.12 to 1.25 (H = 64 and 128, causal, T = 768 to 4,096).
PAIR_COST, UNEVEN_PAIR_COST = 1.05, 1.25
IN_ORDER = 4096  # keys from which the fused backward is the faster deterministic one


def _check(config, **choices: tuple[int, ...]) -> None:
    """Holds fields to the numbers that each may be, and numbers of stages to 1..MAX_STAGES."""
    for name, allowed in choices.items():
        if not checks.is_int(number := getattr(config, name)) or number not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {number!r}")
    stages = {"stages": config.stages}
    if getattr(config, "value_stages", None) is not None:
        stages["value_stages"] = config.value_stages
    for name, number in stages.items():
        if not checks.is_int(number) or not 1 <= number <= MAX_STAGES:
            raise ValueError(f"{name} must lie in 1..{MAX_STAGES}, got {number!r}")


def _check_kinds(config, **kinds: type) -> None:
    for name, kind in kinds.items():
        if not isinstance(value := getattr(config, name), kind):
            raise ValueError(f"{name} must be a {kind.__name__}, got {value!r}")


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
        _check(self, own=TILES, other=STREAMED_TILES, warpgroups=WARPGROUPS)


@dataclasses.dataclass(frozen=True)
class FusedConfig:
    """Tiles of the fused backward kernel: a thread block owns 128 keys, or 64 of wide heads, and streams
    tile_q queries at a time.

    tile_q is 64 at H = 96, 128, 192 and 256, and 128 at H = 32 and 64, where half of dQ's columns would be
    too few for a warpgroup; what backward_fused_sm90.serves refuses takes the two kernels. stages: of
    queries and output cotangents; of queries alone, and one of the others, where heads are wide.
    """

    tile_q: int = 64
    stages: int = 2

    def __post_init__(self):
        _check(self, tile_q=STREAMED_TILES)


@dataclasses.dataclass(frozen=True)
class FlashConfig:
    """Tile sizes and pipeline depth of the kernels of one call; validates itself.

    A thread block of the forward kernel is `warpgroups` compute warpgroups with tile_q queries each, and one
    that loads.
    """

    tile_q: int = 64
    tile_kv: int = 128  # keys (and values) loaded at a time
    stages: int = 2  # KV tiles in flight
    value_stages: int | None = None  # of V, where they are not as many
    warpgroups: int = 2
    q_stages: int = 1  # 2: the next item's queries are loaded while this one's are used
    folds: bool = False  # a block takes queries of either end, where later ones see more; else no effect
    overlap: bool = False  # a tile's softmax runs while its warpgroup's matmul of the tile before does
    ping_pong: bool = True  # one warpgroup's softmax runs while the other's matmuls do
    dq: GradientConfig = GradientConfig()
    dkv: GradientConfig = GradientConfig()
    dkv_passes: int = 1  # 2: one kernel for dK, one for dV
    fused: FusedConfig | None = None  # None: always the two kernels

    @property
    def splits_rows(self) -> bool:
        """Whether a tile of values has no multiple of 64 rows, as plgpu.wgmma takes them."""
        return self.tile_kv % 64 > 0

    def __post_init__(self):
        numbers = {"warpgroups": WARPGROUPS, "q_stages": (1, 2), "dkv_passes": (1, 2)}
        _check(self, tile_q=TILES, tile_kv=KV_TILES, **numbers)
        _check_kinds(self, folds=bool, overlap=bool, ping_pong=bool)
        _check_kinds(self, dq=GradientConfig, dkv=GradientConfig)
        if self.fused is not None:
            _check_kinds(self, fused=FusedConfig)
        if self.overlap and (self.value_stages or self.stages) < 2:  # it waits for V of two tiles at a time
            raise ValueError(
                f"overlap takes two tiles of V, got stages={self.stages}, value_stages={self.value_stages}"
            )
        for name in ("ping_pong", "folds"):
            if getattr(self, name) and self.warpgroups != 2:
                raise ValueError(f"{name} takes two warpgroups, got warpgroups={self.warpgroups}")


def default_fused(
    head_dim: int,
    call: "Call",
    is_causal: bool,
    group: int,
    features: Collection[str],
    is_deterministic: bool = False,
    leaves_idle: bool = False,
) -> FusedConfig | None:
    """The fused backward kernel where it was measured to be the faster one, else None.

    group: query heads of a KV head. features: those of the call, of bias, block_mask, dropout, lengths,
    segments, slopes, soft_cap, window. leaves_idle: blocks that own keys of KV heads, and go through all
    queries of a group, would be fewer than 1.5 a multiprocessor.

    It pays for sums of dQ in fp32 in global memory, and for dK and dV of every query head, and has few
    registers left. Its time over that of the other kernels, forward included, on an H200 with 16,384 tokens,
    before it was persistent and before the present order of work:

    H = 64: causal 0.99 at T = 1,024 and 0.91 at 4,096, full 0.93 and 0.89, slopes 0.70, dropout 0.84, soft
    cap 0.90, window 0.98, lengths 0.97, segments 0.98 (1.11 at T = 1,024), half of all tiles 0.92, an eighth
    0.99; groups of 4 and 8 0.95 and 0.96, 1.12 at T = 1,024.
    H = 128: causal 1.06 at T = 1,024, 1.03 at 2,048, 0.99 at 4,096; full 0.98, 0.95, 0.92; T = 512 on
    S = 8,192 0.93; slopes 0.79, soft cap 0.92, block masks 0.88 (all tiles) to 0.99 (an eighth of them);
    window, lengths and segments 1.01 to 1.02 (1.11 at T = 1,024); causal groups of 4, 8 and 16 1.02, 0.93 and
    0.72, of 4 at T = 16,384 0.96, full 0.92; groups of 4 at T = 1,024 1.09 to 1.20.
    H = 256: causal 0.86 at T = 1,024, 0.79 at 4,096, 0.68 at 16,384, full 0.79, 0.74, 0.69, T = 512 0.95;
    groups of 4 and 8 0.67 and 0.53; window, dropout, slopes, soft cap, block masks 0.75 to 0.79, lengths
    0.87, segments 0.76 (0.95 at T = 1,024). H = 192: 0.79.
    H = 96, on an H100: causal 0.99 at T = 1,024 and 2,048 and 0.98 at 4,096, full 1.00, 0.95, 0.95. H = 32,
    T = 4,096, on an H100: causal 0.84, full 0.83.
    Persistent and in the present order, on an H100: H = 128 causal 1.08 at T = 1,024, 1.02 at 2,048, 0.96 at
    4,096, full 0.96 at 1,024, 1.03 at 512; causal groups of 4 1.18, 1.07, 0.97 at 1,024 to 4,096, of 8 0.98
    at 4,096; lengths 1.06, window 1.04. H = 64, T = 512: full 0.92, causal 1.05, lengths 1.01; groups of 4
    1.11 at T = 1,024; segments 1.07 at 1,024, 1.04 at 2,048. H = 96 at T = 512 1.20. H = 256: 1.00 at T = 512
    1.05 at 256.
    Where those blocks leave multiprocessors idle, causal, in us with the forward, an H200, and how many of
    them there are: T = 1,024, one row of 32/8 heads of 128 99 instead of 153 (64); T = 2,048, 8 heads 109
    instead of 126 (128), four rows of 32/1 heads 1,018 instead of 2,054 (64), of 32/4 1,070 instead of 970
    (256). H = 64, T = 2,048: 32/8 178 instead of 227 (128), four rows of 9/3 196 instead of 207 (192).
    Short rows at H = 64, full, in us without the forward, an H200: T = 128, 197, 256, 384, 512 133, 152, 169,
    148, 223, the two kernels of two warpgroups 133, 168, 172, 159, 235, of three at 257, 384, 512 147 (fused
    172), 144, 229.
    Deterministic, H = 128, an H200, in ms with the forward: full T = 1,024, 4,096, 8,192 1.06, 3.42, 6.83,
    the two kernels 1.01, 3.47, 6.90; other head dims and groups were not measured, and take the two.
    Taken to be like these without a measurement: fp16, several features at a time.
    """
    num_keys = call.num_keys
    if is_deterministic and (num_keys < IN_ORDER or head_dim <= 96 or group > 1):
        return None
    shortest = 512 if head_dim > 128 or (head_dim <= 64 and not is_causal) else 1024
    if head_dim <= 64 and call.sees_all and not (call.few or call.differentiates_in_threes):
        shortest = 128
    if num_keys < shortest or "bias" in features:
        return None
    if head_dim > 128:
        return FusedConfig(tile_q=64)
    if num_keys <= 2048 and ((group > 1 and not leaves_idle) or "segments" in features):
        return None
    if head_dim <= 64:
        return FusedConfig(tile_q=128)
    if {"lengths", "segments", "window"} & set(features):
        return None
    is_rich = bool({"slopes", "soft_cap", "block_mask"} & set(features))
    is_worth_it = is_rich or not is_causal or num_keys > 2048
    is_worth_it |= leaves_idle and (group > 1 or num_keys > 1024)
    return FusedConfig(tile_q=64) if is_worth_it else None


class Call(NamedTuple):
    """What tiles are chosen by, beside the head dim."""

    num_queries: int | None = None
    num_keys: int = 0
    crowded: bool = False  # more than products and a causal mask needs registers too
    in_blocks: bool = False  # thread blocks that divide the 128 x 128 of a block mask, or of a bias
    busy: int = 0  # of dropout, segment ids and a bias: they take the registers that overlap needs
    hashes: bool = False  # dropout is among them, which needs the most
    has_lengths: bool = False
    sees_all: bool = False  # no mask but the end of the keys
    ends_within: bool = False  # heads end within the columns of a tile
    starts_light: bool = False  # the first queries see the fewest keys (spare_rows of AttentionPlan)
    few: bool = False  # there is a multiprocessor for every 64 queries of a head
    one_wave: bool = False  # or for every 128
    ends_first_in_pairs: bool = False  # blocks of 128 queries end sooner than those of 192

    def is_short(self, longest: int) -> bool:
        return self.num_queries is not None and self.num_queries <= longest

    @property
    def all_visible(self) -> bool:
        """Whether nothing is masked, in tiles of 64 keys."""
        return self.sees_all and self.num_keys % 64 == 0

    @property
    def fills_threes(self) -> bool:
        """Whether blocks of 192 queries, of short rows that see all, leave no more of them empty than those
        of 128 (T = 384 on an H200: H = 128 36.9 us instead of 41.1, H = 96 59.3 instead of 68.9)."""
        in_pairs = self.one_wave or self.ends_first_in_pairs
        return self.sees_all and not in_pairs and self.is_short(SHORT) and fits_threes(self.num_queries)

    @property
    def differentiates_in_threes(self) -> bool:
        """The same of both kernels of the backward pass, where they are short enough for it to tell."""
        is_short = self.is_short(SHORT // 2 - 1) and self.num_keys < SHORT // 2
        return is_short and self.fills_threes and fits_threes(self.num_keys)

    @property
    def leaves_rows_empty(self) -> bool:
        """Whether blocks of three warpgroups, of 192 rows, would not be worth what they leave empty: of the
        last block, or of the GPU (H = 128, causal, T = 1,024, 16 heads: 96 of three 22.8 us, 128 of two
        16.6; full T = 4,096, 8 heads: two waves of three 143, of two 103; causal T = 2,048, 16 heads 38.7 and
        32.8; H = 64, T = 768, 25 heads 13.8 and 11.4). Where heads end within a tile's columns three are soon
        worth it: full T = 1,024, H = 72, 80, 88, 104 103, 94, 111, 121 us, of two 117, 100, 129, 134 (cuDNN
        118, 109, 121, 126).
        """
        shortest = SHORT // 4 if self.starts_light else SHORT // 2 if self.ends_within else SHORT
        return self.has_lengths or self.one_wave or self.ends_first_in_pairs or self.is_short(shortest)


PLAIN = Call()


def padded(size: int | None, multiple: int) -> int:
    return math.ceil((size or 0) / multiple) * multiple


def fits_threes(rows: int | None) -> bool:
    """Whether blocks of three warpgroups leave no more rows empty than those of two."""
    return padded(rows, 192) <= padded(rows, 128)


def default_config(head_dim: int, call: Call = PLAIN) -> FlashConfig:
    """The tiles for a (padded) head dim; figures here and below are TFLOP/s forward on an H200.

    Few: blocks of one compute warpgroup take 6.2 us (T = 512, N = 8, H = 64), those of two 8.6; 22.7 and 27
    with gradients. In blocks, T = 8,192: H = 64, a quarter of them: in turn 428, overlapped 386; H = 128,
    half, a quarter, an eighth: in turn 635, 605, 554, overlapped 658, 608, 537 before its present loops (687,
    663, 615).
    """
    if call.few and head_dim <= 128 and not (call.crowded or call.in_blocks or call.has_lengths):
        gradient = GradientConfig(other=128 if head_dim <= 64 else 64, warpgroups=1)
        return FlashConfig(warpgroups=1, ping_pong=False, dq=gradient, dkv=gradient)
    if call.in_blocks and head_dim <= 128:
        gradient = GradientConfig(other=64 if call.crowded or head_dim > 64 else 128)
        wide = head_dim > 64
        return FlashConfig(q_stages=2, overlap=wide, ping_pong=not wide, dq=gradient, dkv=gradient)
    if head_dim <= 64:
        return _narrow_config(call)
    return _medium_config(call) if head_dim <= 128 else _wide_config(head_dim, call)


def _narrow_config(call: Call) -> FlashConfig:
    """H <= 64. Causal, T = 16,384: three warpgroups that overlap 538, without overlap 500, two 421. Causal
    T = 256, 512, 768, 1,024: two that overlap 174, 258, 301, 328, three 164, 274, 345, 360. Full T = 1,024:
    two that take turns at 256 keys 492, three 448; T = 2,048 488 and 498. Causal T = 128, 256: two that
    overlap at 64 keys 34.5, 38.4 us, at 128 36.6, 41.0 (cuDNN 31.0, 37.7); but 256 queries on 1,024 keys
    51.0, 44.7. Causal, where blocks fill the GPU once, T = 1,024, 2,048, 4,096: folded 11.0, 17.9, 31.3 us,
    in order 14.1, 23.5, 43.1 (cuDNN 12.4, 21.4, 39.3).
    """
    if (call.leaves_rows_empty or call.ends_within) and call.sees_all and not call.crowded:
        return _short_config(call)
    if call.busy > 1:
        return FlashConfig(stages=3, q_stages=2)
    if call.one_wave and call.starts_light and not call.crowded:
        gradient = GradientConfig(other=128)
        return FlashConfig(stages=3, q_stages=2, folds=True, overlap=True, ping_pong=False, dq=gradient)
    dq = GradientConfig(other=64 if call.crowded else 128)
    warpgroups = 2 if call.leaves_rows_empty and not (call.busy or call.has_lengths) else 3
    ahead = {"q_stages": 2, "ping_pong": False, "overlap": not call.busy}
    if warpgroups == 2 and call.starts_light and call.num_keys <= SHORT // 4:
        ahead |= {"tile_kv": 64, "stages": 6}
    else:
        ahead["stages"] = 3
    return FlashConfig(warpgroups=warpgroups, dq=dq, **ahead)


def _short_config(call: Call) -> FlashConfig:
    """H <= 64, few rows or few blocks that see all keys, and heads that end within a tile's columns (H = 48
    and 56, T = 2,048: two warpgroups at 256 keys 133 and 142 us, three 159 and 169, cuDNN 149 and 150): the
    tiles that multiply least beyond T and S.

    What a query and a key cost, over those of two warpgroups and 256 keys, is from T = 512 and 768 at H = 64.
    In us, 256 keys (which all such calls had), the choice, cuDNN: T = 128 48.7, 29.6, 28.9; 192 48.9, 27.6,
    44.5; 320 55.1, 38.0, 45.7; 384 54.0, 39.1, 41.7; 640 64.5, 56.3, 54.2; H = 32, T = 128 27.7, 15.0, 18.8,
    384 60.5, 44.3, 53.3. Masked at T = 197 that tile takes 50.3, at 256 38.9; two of 128 43.3 and 41.4.
    """
    dq, dkv = GradientConfig(other=128), GradientConfig()
    if call.differentiates_in_threes:
        dq = dkv = GradientConfig(warpgroups=3)
    pairs = {
        1.0: FlashConfig(tile_kv=256, q_stages=2),
        1.11: FlashConfig(stages=4, q_stages=2, overlap=call.num_keys > SHORT // 2),
        1.32: FlashConfig(tile_kv=64, stages=6, q_stages=2),
    }
    in_threes = FlashConfig(warpgroups=3, stages=3, q_stages=2, overlap=True, ping_pong=False)
    threes = {1.01: in_threes, 1.15: dataclasses.replace(in_threes, tile_kv=64, stages=5)}
    must_pair = call.one_wave or call.ends_first_in_pairs or call.ends_within

    def cost(choice: tuple[float, FlashConfig]) -> float:
        factor, config = choice
        keys = padded(call.num_keys, config.tile_kv)
        if config.tile_kv == 256 and call.num_keys % 256:
            keys += 77  # the last tile's mask
        return factor * padded(call.num_queries, 64 * config.warpgroups) * keys

    _, config = min([*pairs.items(), *({} if must_pair else threes).items()], key=cost)
    return dataclasses.replace(config, dq=dq, dkv=dkv)


def _medium_config(call: Call) -> FlashConfig:
    """64 < H <= 128. Causal, T = 16,384: three warpgroups, with no registers to overlap, 728, two that
    overlap 706; but a crowded kernel would spill the 160 registers a thread that three leave, and so would
    lengths. Causal T = 256 to 1,024: two that overlap 239, 383, 449, 495, three 229, 384, 466, 500. Full
    T = 1,024, where 192 rows leave most of a last block empty: 624 and 560 (an H100). 512 queries on 8,192
    keys: two that overlap and take turns 677, that overlap 621, that take turns 649; on 2,048 keys 608, 585,
    594. Causal, where blocks fill the GPU once, T = 1,024, 2,048, 4,096: folded 14.0, 22.5, 40.1 us, in order
    16.5, 28.0, 51.2 (cuDNN 17.8, 30.9, 56.3).
    """
    if call.busy:
        return FlashConfig(q_stages=2, overlap=not call.hashes, ping_pong=call.hashes and call.busy == 1)
    if call.crowded:
        return FlashConfig(q_stages=2, overlap=True, ping_pong=False)
    dq = GradientConfig(warpgroups=3)
    if call.one_wave and call.starts_light:
        return FlashConfig(q_stages=2, folds=True, overlap=True, ping_pong=False, dq=dq)
    if call.leaves_rows_empty and not call.fills_threes:
        in_turn = call.all_visible and call.num_keys > SHORT and call.is_short(SHORT // 2)
        return FlashConfig(q_stages=2, overlap=True, ping_pong=in_turn, dq=dq)
    return FlashConfig(warpgroups=3, q_stages=2, ping_pong=False, dq=dq)


def _wide_config(head_dim: int, call: Call) -> FlashConfig:
    """H > 128. Full T = 1,024, 4,096, causal T = 1,024, 4,096, us at 64, 80, 96, 112, 128 keys: H = 192 180,
    170, 165, 170; 631, 592, 564, 553; 110, 113, 116, 114; 332, 319, 307, 308 (cuDNN 168, 591, 116, 353);
    H = 160 167, 157, 153, 157, 143; 582, 541, 515, 506, 492; 98, 101, 104, 101, 92; 295, 286, 274, 276, 260
    (cuDNN 169, 581, 118, 353). Of 80 keys, H = 256, full T = 1,024, 2,048, 4,096, 16,384, TFLOP/s: 656, 728,
    764, 790, of 64 634, 690, 721, 725 (cuDNN 642, 706, 735, 740); causal T = 1,024, 4,096, 16,384 485, 702,
    774, of 64 493, 672, 736 (cuDNN 466, 607, 657); H = 224, full and causal T = 4,096 694 and 361 us, of 64
    735 and 380. Shorter ones would mostly be cut. Taken to be like these without a measurement: float32,
    folded blocks.

    Of 64 keys: two warpgroups hold the accumulators, and overlap: 751, in turn 734, neither 703 (T = 4,096:
    684, 645, 652). Full T = 512, 1,024, 4,096, 16,384: 532, 626, 716, 694, with a third tile of V 558, 645,
    723, 674; causal 366, 511, 682, 741 and 378, 512, 667, 713. With half of Q's columns in registers 724 and
    760, without 719 and 746, but ptxas 13.5 spills 108 bytes for it, and 13.0.88 lets weights overwrite such
    queries where nothing overlaps. Folded as narrower heads are, which gain by it; here it was run, and not
    timed.
    """
    overlap = not (call.crowded or call.in_blocks or call.has_lengths)
    is_long = call.num_keys > SHORT or (call.num_keys == SHORT and not call.starts_light)
    if overlap and head_dim <= 160:
        tile_kv = 128
    elif not (overlap and is_long):
        tile_kv = 64
    elif head_dim > 192:
        tile_kv = 80
    else:
        tile_kv = 112 if call.sees_all and call.num_keys > 2 * SHORT else 96
    more_values = overlap and call.all_visible and call.num_keys <= 4 * SHORT
    single = GradientConfig(stages=1)
    return FlashConfig(
        tile_kv=tile_kv,
        value_stages=3 if more_values and tile_kv == 64 else None,
        folds=call.one_wave and call.starts_light and overlap,
        overlap=overlap,
        ping_pong=False,
        dq=single,
        dkv=single,
        dkv_passes=2,
    )
