"""BlockMask against masks written out, as tile lists, and in attention."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxattn import BlockMask, block_picture, dot_product_attention
from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention.block_tiles import unpack_tiles

T, S, TILE = 83, 101, (16, 24)
GRID = (1, 1, 6, 5)
i, j = np.arange(T)[:, None], np.arange(S)
tile_i, tile_j = i // TILE[0], j // TILE[1]
near = (j >= i - 9) & (j <= i + 4)
RULE = lambda q, k: (q * 7 + k * 3) % 11 < 4
MASKS = {
    "causal": (BlockMask.causal(T, S, tile=TILE), j <= i),
    "bottom right": (BlockMask.causal(T, S, alignment="bottom_right", tile=TILE), j <= i + S - T),
    "window": (BlockMask.window(T, S, size=(9, 4), tile=TILE), near),
    "open window": (BlockMask.window(T, S, size=(None, 20), tile=TILE), j <= i + 20),
    "local_global": (
        BlockMask.local_global(T, S, window=(9, 4), num_global=17, tile=TILE),
        near | (i < 17) | (j < 17),
    ),
    "local, none global": (BlockMask.local_global(T, S, window=(9, 4), num_global=0, tile=TILE), near),
    "strided": (BlockMask.strided(T, S, stride=3, tile=TILE), (tile_i - tile_j) % 3 == 0),
    "butterfly": (
        BlockMask.butterfly(T, S, tile=TILE),
        np.isin(tile_i ^ tile_j, [0, 1, 2, 4]),
    ),
    "mask_fn": (BlockMask.from_mask_fn(RULE, T, S, tile=TILE), RULE(i, j)),
    "empty": (BlockMask.from_mask_fn(lambda q, k: q < 0, T, S, tile=TILE), j < 0 * i),
}


def random_dense(seed, *shape, density=0.5):
    """Tiles that are empty, whole, and mixed."""
    random = np.random.default_rng(seed)
    cells = random.random((*shape[:-2], -(-shape[-2] // TILE[0]), -(-shape[-1] // TILE[1])))
    elements = random.random(shape) < 0.5
    level = cells.repeat(TILE[0], -2).repeat(TILE[1], -1)[..., : shape[-2], : shape[-1]]
    return np.where(level < density, True, elements & (level < (1 + density) / 2))


@pytest.mark.parametrize("name", MASKS)
def test_equals_the_mask_written_out(name):
    mask, expected = MASKS[name]
    np.testing.assert_array_equal(mask.to_dense()[0, 0], np.broadcast_to(expected, (T, S)))
    assert mask == BlockMask.from_dense(np.broadcast_to(expected, (T, S)), tile=TILE)


@pytest.mark.parametrize("name", MASKS)
def test_density_counts_every_tile_touched(name):
    mask, expected = MASKS[name]
    padded = np.zeros((GRID[2] * TILE[0], GRID[3] * TILE[1]), bool)
    padded[:T, :S] = expected
    touched = padded.reshape(GRID[2], TILE[0], GRID[3], TILE[1]).any((1, 3))
    assert mask.density == touched.mean()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (2, 1), (1, 3)]), st.sampled_from([(1, 1), (1, 3)]))
def test_and_and_or_are_those_of_elements(seed, leading, other_leading):
    one, other = random_dense(seed, *leading, T, S), random_dense(seed + 1, *other_leading, T, S)
    for operation in (operator.and_, operator.or_):
        mask = operation(BlockMask.from_dense(one, tile=TILE), BlockMask.from_dense(other, tile=TILE))
        assert mask == BlockMask.from_dense(operation(one, other), tile=TILE)
        np.testing.assert_array_equal(mask.to_dense(), operation(one, other))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (2, 3)]), st.integers(1, 60), st.integers(1, 60))
def test_tile_lists_keep_their_promises(seed, leading, num_queries, num_keys):
    dense = random_dense(seed, *leading, num_queries, num_keys)
    tiles = BlockMask.from_dense(dense, tile=TILE).tiles()
    listed = unpack_tiles(tiles)
    by_query = np.stack(listed[:4], axis=1)
    lists = (
        (2, 3, tiles.num_kv, tiles.num_partial, tiles.kv_index, tiles.kv_mask),
        (3, 2, tiles.num_q, tiles.num_q_partial, tiles.q_index, tiles.q_mask),
    )
    for own, other, counts, partial_counts, index, masks in lists:
        for place in np.ndindex(*counts.shape):
            mine = (by_query[:, [0, 1, own]] == place).all(1)
            partial = mine & (listed.mask >= 0)
            count, num_partial = counts[place], partial_counts[place]
            assert (count, num_partial) == (mine.sum(), partial.sum())
            parts = (index[place][:num_partial], index[place][num_partial:count])
            for part, chosen in zip(parts, (partial, mine & ~partial), strict=True):
                assert (np.diff(part) > 0).all()  # ascending
                assert set(part) == set(by_query[chosen, other])
            by_index = dict(zip(by_query[mine, other], listed.mask[mine], strict=True))
            assert [by_index[t] for t in parts[0]] == list(masks[place][:num_partial])
            if count:  # a kernel may load ahead
                assert set(index[place][count:]) <= set(index[place][:count])
    assert len({mask.tobytes() for mask in tiles.masks}) == len(tiles.masks)


def test_random_blocks():
    draw = functools.partial(BlockMask.random, 40 * 16, 40 * 24, tile=TILE, num_heads=3)
    mask = draw(density=0.25, seed=5)
    assert mask == draw(density=0.25, seed=5)
    assert mask != draw(density=0.25, seed=6)
    assert mask.density == 0.25
    assert (mask.tiles().num_kv == 10).all()
    assert (mask.tiles().kv_index[0, 0] != mask.tiles().kv_index[0, 1]).any()
    assert draw(density=1e-9).density == 1 / 40  # no query tile without keys


def test_memory_and_patterns_of_a_long_window_do_not_grow_with_t():
    sizes, patterns = [], []
    for length in (1 << 15, 1 << 17):
        mask = BlockMask.causal(length) & BlockMask.window(length, size=1000)
        tiles = mask.tiles()
        sizes.append(sum(x.nbytes for x in tiles) - tiles.masks.nbytes)
        patterns.append(len(tiles.masks))
    assert sizes[1] < 4.1 * sizes[0]
    assert patterns[0] == patterns[1] < 5


def test_is_a_pytree_and_hashable():
    mask, other = MASKS["causal"][0], MASKS["window"][0]
    assert hash(mask) == hash(BlockMask.causal(T, S, tile=TILE)) != hash(other)
    assert mask != other
    total = lambda mask: mask.tiles().num_kv.sum()
    expected = mask.tiles().num_kv.sum()
    assert jax.jit(total)(mask) == expected  # an argument
    assert jax.jit(total, static_argnums=0)(mask) == expected  # a static one
    assert jax.jit(lambda: jnp.sum(total(mask)))() == expected  # a constant
    leaves, treedef = jax.tree.flatten(mask)
    assert jax.tree.unflatten(treedef, leaves) == mask


def test_arrays_of_a_mask_cannot_be_written():
    mask = MASKS["causal"][0] & MASKS["window"][0]
    for array in mask.tiles():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 1


def test_pictures(tmp_path):
    mask = BlockMask.causal(64, tile=(16, 16)) & BlockMask.window(64, size=(31, 0), tile=(16, 16))
    assert repr(mask) == "BlockMask(T=64, S=64, tile=(16, 16), density=0.562)"
    assert str(mask).splitlines()[1:] == ["+----+", "|:   |", "|#:  |", "|:#: |", "| :#:|", "+----+"]
    assert "#" in str(BlockMask.causal(1 << 14))  # more tiles than characters
    mask.save_png(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_shows_its_whole_title_and_the_head_that_is_asked_for(tmp_path):
    mask = BlockMask.random(1664, density=0.25, num_heads=3)
    drawn = block_picture.figure(mask.tiles(), repr(mask).replace("1664", "1048576"), head=2)
    drawn.draw_without_rendering()
    title = drawn.axes[0].title.get_window_extent()
    assert drawn.bbox.x0 < title.x0 < title.x1 < drawn.bbox.x1
    assert title.y1 < drawn.bbox.y1
    shown = np.asarray(drawn.axes[0].images[0].get_array())
    np.testing.assert_array_equal(shown, mask.to_dense()[0, 2, ::128, ::128])
    for head in (3, 7, -1):
        with pytest.raises(ValueError, match=rf"head must lie in 0\.\.2, .* got {head}"):
            mask.save_png(tmp_path / "mask.png", head=head)


# --- in attention ---


def inputs(batch=2, num_heads=4, num_kv_heads=2, head_dim=16):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(batch, T, num_heads, head_dim)] + [(batch, S, num_kv_heads, head_dim)] * 2
    return [jax.random.normal(key, shape) for key, shape in zip(keys, [*shapes, shapes[0]], strict=True)]


@pytest.mark.parametrize(("leading", "in_chunks"), [((1, 1), True), ((2, 1), False), ((1, 4), True)])
def test_attention_is_that_of_the_dense_mask(leading, in_chunks, monkeypatch):
    if in_chunks:  # many chunks of queries, the last one ragged
        monkeypatch.setattr(reference, "CHUNK_LOGITS", 1)
        jax.clear_caches()
    dense = random_dense(3, *leading, T, S)
    dense[:, :, 20] = False  # a query that sees nothing
    mask = BlockMask.from_dense(dense, tile=TILE)
    q, k, v, out_grad = inputs()

    def run(**arguments):
        call = functools.partial(dot_product_attention, is_causal=True, **arguments)
        out, vjp = jax.vjp(call, q, k, v)
        return out, *vjp(out_grad)

    for one, other in zip(jax.jit(functools.partial(run, block_mask=mask))(), run(mask=dense), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    if in_chunks:
        jax.clear_caches()


def test_xla_attention_takes_it_too():
    mask, dense = MASKS["mask_fn"]
    q, k, v, _ = inputs()
    expected = dot_product_attention(q, k, v, mask=dense)
    actual = dot_product_attention(q, k, v, block_mask=mask, implementation="xla")
    np.testing.assert_allclose(actual, expected, atol=1e-5)


BAD_MASKS = {
    "num_queries": lambda: BlockMask.causal(0),
    "num_keys": lambda: BlockMask.causal(3, -1),
    "alignment": lambda: BlockMask.causal(3, alignment="left"),
    "^size must be": lambda: BlockMask.window(3, size=-1),
    "^window must be": lambda: BlockMask.local_global(3, window=-1, num_global=1),
    "num_queries must be .* got True": lambda: BlockMask.causal(True),
    r"agree in \[B, N\].* got \(1, 2\) and \(1, 3\)": lambda: (
        BlockMask.random(64, density=0.5, num_heads=2) & BlockMask.random(64, density=0.5, num_heads=3)
    ),
    "num_global": lambda: BlockMask.local_global(3, window=1, num_global=-1),
    "stride": lambda: BlockMask.strided(3, stride=0),
    "density": lambda: BlockMask.random(3, density=0.0),
    "num_heads": lambda: BlockMask.random(3, density=0.5, num_heads=0),
    "mask must have one of the dtypes": lambda: BlockMask.from_dense(np.ones((3, 3))),
    "mask must have the dimensions": lambda: BlockMask.from_dense(np.ones((3,), bool)),
    "mask_fn": lambda: BlockMask.from_mask_fn(lambda q, k: q + k, 3),
    "tile": lambda: BlockMask.causal(3, tile=(3, 8)),
    "tile must be .* got 8": lambda: BlockMask.strided(64, stride=1, tile=8),
    r"tile must be .* got \(8.0, 8.0\)": lambda: BlockMask.window(64, size=3, tile=(8.0, 8.0)),
    r"tile must be .* got \(8,\)": lambda: BlockMask.butterfly(64, tile=(8,)),
    "density must lie in .* got 'a'": lambda: BlockMask.random(64, density="a"),
    "density must lie in .* got nan": lambda: BlockMask.random(64, density=float("nan")),
    "seed must be an integer >= 0, got -1": lambda: BlockMask.random(64, density=0.5, seed=-1),
    "mask_fn must be a function": lambda: BlockMask.from_mask_fn(None, 64),
    r"mask_fn returns must broadcast to \(.*\), got \(3,\)": lambda: BlockMask.from_mask_fn(
        lambda q, k: np.ones(3, bool), 64
    ),
    "agree in shape and tile": lambda: BlockMask.causal(3) & BlockMask.causal(4),
}


@pytest.mark.parametrize("message", BAD_MASKS)
def test_bad_masks_name_the_argument(message):
    with pytest.raises(ValueError, match=message):
        BAD_MASKS[message]()


def test_bad_calls_name_the_argument():
    q, k, v, _ = inputs()
    mask = MASKS["causal"][0]
    with pytest.raises(ValueError, match="block_mask: must be"):
        dot_product_attention(q, k, v, block_mask=BlockMask.causal(T))
    with pytest.raises(ValueError, match="block_mask: must be a BlockMask"):
        dot_product_attention(q, k, v, block_mask=mask.tiles())
    with pytest.raises(ValueError, match="block_mask must be a BlockTiles"):
        flash_attention(q, k, v, block_mask=mask)
    with pytest.raises(ValueError, match=r"block_mask\.num_kv must have shape"):
        flash_attention(q[:, :16], k, v, block_mask=mask.tiles())
    three_heads = BlockMask.from_dense(random_dense(0, 1, 3, T, S), tile=TILE)
    with pytest.raises(ValueError, match=r"block_mask\.num_kv .*N\|1"):
        flash_attention(q, k, v, block_mask=three_heads.tiles())
    broken = mask.tiles()._replace(q_index=mask.tiles().q_index.astype(np.int64))
    with pytest.raises(ValueError, match=r"block_mask\.q_index must have one of the dtypes"):
        flash_attention(q, k, v, block_mask=broken)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    with pytest.raises(NotImplementedError, match="in multiples of 128 x 128, got 16 x 24"):
        flash_attention(*half, block_mask=mask.tiles(), implementation="sm90")
