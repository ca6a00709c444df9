"""Pictures of block-sparse masks: characters for a terminal, a PNG for a page."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from pallas_kernels.flash_attention.block_tiles import FULL, BlockTiles, unpack_tiles

CELLS = 64  # a picture in characters is at most so wide
PIXELS = 1024
TITLE_WIDTH = 36  # characters of a title's line, which is as wide as the axes
SHADES = " .:+#"  # the share of a cell that is visible: none, up to 1/3, 2/3, less than all, all


def shares(tiles: BlockTiles, head: int = 0) -> Float[np.ndarray, "Tq Ts"]:
    """The visible share of every tile of one head of the first batch row."""
    num_heads = tiles.num_kv.shape[1]
    if not isinstance(head, int | np.integer) or not 0 <= head < num_heads:
        raise ValueError(f"head must lie in 0..{num_heads - 1}, those of the mask, got {head!r}")
    listed = unpack_tiles(tiles)
    mine = (listed.batch == 0) & (listed.head == head)
    mean = np.append(np.asarray(tiles.masks).mean((1, 2)), 1.0)  # FULL = -1 reads the last
    assert FULL == -1
    grid = np.zeros((tiles.num_kv.shape[2], tiles.num_q.shape[2]))
    grid[listed.q[mine], listed.kv[mine]] = mean[listed.mask[mine]]
    return grid


def text(tiles: BlockTiles, head: int = 0) -> str:
    """One character a tile ('#' whole, ' ' skipped), or a cell of several where there are more than 64."""
    grid = _shrink(shares(tiles, head), CELLS)
    level = np.where(grid == 1, 4, np.ceil(grid * 3)).astype(int)
    rows = ["".join(SHADES[value] for value in row) for row in level]
    border = "+" + "-" * level.shape[1] + "+"
    return "\n".join([border, *(f"|{row}|" for row in rows), border])


def save_png(tiles: BlockTiles, path: Any, title: str, head: int = 0) -> None:
    """The same as an image, a tile a square."""
    figure(tiles, title, head).savefig(Path(path), dpi=160)


def figure(tiles: BlockTiles, title: str, head: int = 0) -> Any:
    """A matplotlib Figure of it."""
    from matplotlib.figure import Figure  # slow to import, and only pictures need it

    drawn = Figure(figsize=(5, 5), layout="constrained")
    axes = drawn.subplots()
    tile_q, tile_kv = tiles.tile
    grid = _shrink(shares(tiles, head), PIXELS)
    extent = (0, tiles.num_q.shape[2] * tile_kv, tiles.num_kv.shape[2] * tile_q, 0)
    axes.imshow(grid, cmap="Blues", vmin=0, vmax=1, extent=extent, interpolation="nearest")
    axes.set(title=textwrap.fill(title, TITLE_WIDTH), xlabel="key", ylabel="query")
    return drawn


def _shrink(grid, most: int):
    """Means over square cells, so that the longer side has at most `most`."""
    step = -(-max(grid.shape) // most)
    padded = np.pad(grid, [(0, -size % step) for size in grid.shape], constant_values=np.nan)
    cells = padded.reshape(padded.shape[0] // step, step, padded.shape[1] // step, step)
    return np.nanmean(cells, axis=(1, 3))
