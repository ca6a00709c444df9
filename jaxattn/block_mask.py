"""Block-sparse masks: which keys each query sees, as the tiles that a kernel visits. Host-side numpy."""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from jaxattn import block_picture, block_rules
from pallas_kernels import checks
from pallas_kernels.flash_attention.block_tiles import TILE, BlockTiles

__all__ = ["BlockMask"]

Size = int | tuple[int | None, int | None] | None
Tile = tuple[int, int]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """Which of S keys each of T queries sees, stored as its visible tiles of tile_q x tile_kv elements.

    A kernel skips tiles in which nothing is visible, takes whole ones without a mask and reads the elements
    of partial ones, of which each distinct pattern is stored once: memory grows with the visible tiles, for a
    window with T. Immutable; `&` and `|` combine masks of one shape and tile.

    A pytree, and hashable by content: an argument of a jitted function, static or not, or a constant in one.
    Where its arrays are traced only `tiles()` works.

        mask = BlockMask.causal(8192) & BlockMask.local_global(8192, window=512, num_global=64)
        out = jaxattn.dot_product_attention(query, key, value, block_mask=mask)

    Lengths are in tokens; num_keys is num_queries by default; `tile` is (tile_q, tile_kv), multiples of 8, by
    default the kernels' own. Wrong arguments raise a ValueError that names them.
    From: Dao et al., FlashAttention (2022), section 3.3 and algorithm 5.
    """

    arrays: BlockTiles
    shape: tuple[int, int]  # (T, S)

    # --- constructors ---------------------------------------------------------------------------------------

    @classmethod
    def causal(
        cls,
        num_queries: int,
        num_keys: int | None = None,
        *,
        alignment: str = "top_left",
        tile: Tile = (TILE, TILE),
    ) -> "BlockMask":
        """Query i sees keys 0..i ("top_left"), or 0..i + S - T ("bottom_right")."""
        checks.check_choice("alignment", alignment, ("top_left", "bottom_right"))
        shape = _shape(num_queries, num_keys)
        offset = shape[1] - shape[0] if alignment == "bottom_right" else 0
        return cls(block_rules.band(shape, (None, offset), tile), shape)

    @classmethod
    def window(
        cls, num_queries: int, num_keys: int | None = None, *, size: Size, tile: Tile = (TILE, TILE)
    ) -> "BlockMask":
        """Query i sees keys i - left .. i + right; size: (left, right), None no limit, or an int for both."""
        shape = _shape(num_queries, num_keys)
        return cls(block_rules.band(shape, checks.normalize_window(size, "size"), tile), shape)

    @classmethod
    def local_global(
        cls,
        num_queries: int,
        num_keys: int | None = None,
        *,
        window: Size,
        num_global: int,
        tile: Tile = (TILE, TILE),
    ) -> "BlockMask":
        """A window, and num_global first tokens that see and are seen by all (Longformer, section 3.1)."""
        shape = _shape(num_queries, num_keys)
        _check_at_least("num_global", num_global, 0)
        local = cls(block_rules.band(shape, checks.normalize_window(window, "window"), tile), shape)
        seeing, seen = (
            cls(block_rules.first_tokens(shape, num_global, axis, tile), shape) for axis in (0, 1)
        )
        return local | seeing | seen

    @classmethod
    def strided(
        cls, num_queries: int, num_keys: int | None = None, *, stride: int, tile: Tile = (TILE, TILE)
    ) -> "BlockMask":
        """Every stride-th tile, counted from the diagonal (Sparse Transformer, section 4.2, in tiles)."""
        _check_at_least("stride", stride, 1)
        shape = _shape(num_queries, num_keys)
        return cls._where(shape, tile, lambda q, kv: (q - kv) % stride == 0)

    @classmethod
    def butterfly(
        cls, num_queries: int, num_keys: int | None = None, *, tile: Tile = (TILE, TILE)
    ) -> "BlockMask":
        """The tiles whose row and column differ in at most one bit (Pixelated Butterfly, section 3.2): each
        row has 1 + log2 of all, and every token reaches every other in log2 layers."""
        shape = _shape(num_queries, num_keys)
        return cls._where(shape, tile, lambda q, kv: (q ^ kv) & ((q ^ kv) - 1) == 0)

    @classmethod
    def random(
        cls,
        num_queries: int,
        num_keys: int | None = None,
        *,
        density: float,
        seed: int = 0,
        num_heads: int = 1,
        tile: Tile = (TILE, TILE),
    ) -> "BlockMask":
        """Each query tile sees the same number of tiles, drawn for each head: round(density x all), at least
        one (BigBird, section 2)."""
        shape = _shape(num_queries, num_keys)
        if not isinstance(density, int | float | np.number) or not 0 < density <= 1:
            raise ValueError(f"density must lie in (0, 1], got {density!r}")
        _check_at_least("seed", seed, 0)
        _check_at_least("num_heads", num_heads, 1)
        num_q, num_kv = block_rules.grid_of(shape, tile)
        order = np.random.default_rng(seed).random((1, num_heads, num_q, num_kv)).argsort(axis=-1)
        return cls(block_rules.whole_tiles(order < max(1, round(density * num_kv)), shape, tile), shape)

    @classmethod
    def from_dense(
        cls, mask: Bool[np.ndarray, "T S"] | Bool[np.ndarray, "B N T S"], *, tile: Tile = (TILE, TILE)
    ) -> "BlockMask":
        """From True where a key is visible, [T, S] or [B|1, N|1, T, S]."""
        mask = np.asarray(mask)
        mask = mask[None, None] if mask.ndim == 2 else mask
        checks.check_rank("mask", mask, "B|1 N|1 T S")
        checks.check_dtype("mask", mask, (np.bool_,))
        return cls._everywhere(mask.shape[2:], tile, lambda *indices: mask[indices], mask.shape[:2])

    @classmethod
    def from_mask_fn(
        cls,
        mask_fn: Callable[[Any, Any], Any],
        num_queries: int,
        num_keys: int | None = None,
        *,
        tile: Tile = (TILE, TILE),
    ) -> "BlockMask":
        """From mask_fn(q_index, kv_index) -> visible, which broadcasts over integer arrays.

        Evaluated on all T x S pairs, some tiles at a time: the time is O(T S), the memory is not.
        """

        if not callable(mask_fn):
            raise ValueError(f"mask_fn must be a function of (q_index, kv_index), got {mask_fn!r}")

        def rule(batch, head, q_index, kv_index):
            visible = np.asarray(mask_fn(q_index, kv_index))
            checks.check_dtype("what mask_fn returns", visible, (np.bool_,))
            shape = np.broadcast_shapes(q_index.shape, kv_index.shape)
            # Of trailing dimensions each is the indices' or 1: it may depend on one of them, or on none.
            sizes = zip(visible.shape[::-1], shape[::-1], strict=False)
            if visible.ndim > len(shape) or any(size not in (1, full) for size, full in sizes):
                raise ValueError(f"what mask_fn returns must broadcast to {shape}, got {visible.shape}")
            return visible

        return cls._everywhere(_shape(num_queries, num_keys), tile, rule)

    @classmethod
    def _where(cls, shape, tile, choose) -> "BlockMask":
        num_q, num_kv = block_rules.grid_of(shape, tile)
        chosen = choose(np.arange(num_q)[:, None], np.arange(num_kv))
        return cls(block_rules.whole_tiles(chosen[None, None], shape, tile), shape)

    @classmethod
    def _everywhere(cls, shape, tile, rule, leading=(1, 1)) -> "BlockMask":
        places = np.indices((*leading, *block_rules.grid_of(shape, tile))).reshape(4, -1)
        return cls(block_rules.from_rule(rule, shape, tile, tuple(places), leading=leading), shape)

    # --- what it is -----------------------------------------------------------------------------------------

    def tiles(self) -> BlockTiles:
        """The tile lists that `pallas_kernels.flash_attention` takes."""
        return self.arrays

    @property
    def tile(self) -> Tile:
        """(tile_q, tile_kv)."""
        return self.arrays.tile

    @functools.cached_property
    def density(self) -> float:
        """The share of all tiles that a kernel visits, partial ones counted whole."""
        *leading, num_q = self.arrays.num_kv.shape
        return int(np.sum(self.arrays.num_kv)) / (np.prod(leading) * num_q * self.arrays.num_q.shape[-1])

    def to_dense(self) -> Bool[np.ndarray, "B N T S"]:
        """True where a key is visible: T x S bytes for each batch row and head of the mask."""
        return block_rules.to_dense(self.arrays, self.shape)

    def __and__(self, other: "BlockMask") -> "BlockMask":
        return self._combine(operator.and_, other)

    def __or__(self, other: "BlockMask") -> "BlockMask":
        return self._combine(operator.or_, other)

    def _combine(self, operation, other) -> "BlockMask":
        if not isinstance(other, BlockMask):
            return NotImplemented
        if (self.shape, self.tile) != (other.shape, other.tile):
            raise ValueError(
                f"masks must agree in shape and tile, got {self.shape}, {self.tile} and "
                f"{other.shape}, {other.tile}"
            )
        leading, others = (mask.arrays.num_kv.shape[:2] for mask in (self, other))
        if any(1 not in sizes and len(set(sizes)) > 1 for sizes in zip(leading, others, strict=True)):
            raise ValueError(
                f"masks must agree in [B, N], batch rows and heads, where neither has 1, got {leading} and "
                f"{others}"
            )
        return BlockMask(block_rules.combine(operation, self.arrays, other.arrays), self.shape)

    def __eq__(self, other) -> bool:
        return isinstance(other, BlockMask) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    @functools.cached_property
    def _content(self) -> tuple:
        arrays = tuple(np.asarray(x) for x in self.arrays)
        return (self.shape, *((x.shape, x.tobytes()) for x in arrays))

    # --- pictures -------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        return (
            f"BlockMask(T={self.shape[0]}, S={self.shape[1]}, tile={self.tile}, density={self.density:.3f})"
        )

    def __str__(self) -> str:
        return f"{self!r}\n{block_picture.text(self.arrays)}"

    def save_png(self, path: Any, *, head: int = 0) -> None:
        """Draws the tiles of one head: the darker, the larger its visible share."""
        block_picture.save_png(self.arrays, path, repr(self), head)


def _shape(num_queries: int, num_keys: int | None) -> tuple[int, int]:
    num_keys = num_queries if num_keys is None else num_keys
    _check_at_least("num_queries", num_queries, 1)
    _check_at_least("num_keys", num_keys, 1)
    return num_queries, num_keys


def _check_at_least(name: str, value: int, least: int) -> None:
    if not checks.is_int(value) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
