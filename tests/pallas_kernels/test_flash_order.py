"""The order in which a deterministic backward's thread blocks add to dQ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention.backward_fused_order import L2_BYTES, AddOrder


def visited(order: AddOrder) -> list[list[int]]:
    """Of each tile of keys, the tiles of queries that it goes through, in order."""
    tiles, places = (jnp.arange(size, dtype=jnp.int32) for size in (order.num_tiles, order.num_query_tiles))
    return jax.vmap(lambda tile: jax.vmap(lambda place: order.query_tile(tile, place))(places))(
        tiles
    ).tolist()


def turns(order: AddOrder, paths: list[list[int]]) -> dict[tuple[int, int], int]:
    """(tile of keys, tile of queries) -> how many come before."""
    pairs = [(tile, query_tile) for tile, path in enumerate(paths) for query_tile in path]
    columns = (jnp.asarray(column, jnp.int32) for column in zip(*pairs, strict=True))
    return dict(zip(pairs, np.asarray(jax.vmap(order.num_before)(*columns)).tolist(), strict=True))


def lock_step(order: AddOrder, paths: list[list[int]], turn: dict[tuple[int, int], int]) -> tuple[int, int]:
    """Steps until all have added, where a block adds once a step when it is its turn, and passes on before
    the next; and the most that one block has to add."""
    blocks = []
    for row in order.table():
        items = [divmod(int(item), order.num_heads) for item in row[1 : 1 + row[0]]]
        blocks.append([(head, tile, query_tile) for tile, head in items for query_tile in paths[tile]])
    every = {(head, *pair) for head in range(order.num_heads) for pair in turn}
    assert sorted(add for adds in blocks for add in adds) == sorted(every)
    waiting, counts, steps = [list(reversed(adds)) for adds in blocks], {}, 0
    while any(waiting):
        ready = []
        for adds in waiting:
            if adds:
                head, tile, query_tile = adds[-1]
                if counts.get((head, query_tile), 0) == turn[tile, query_tile]:
                    ready.append(adds)
        assert ready, "all wait for each other"
        for adds in ready:
            head, _, query_tile = adds.pop()
            counts[head, query_tile] = counts.get((head, query_tile), 0) + 1
        steps += 1
    return steps, max(map(len, blocks))


@st.composite
def orders(draw):
    num_tiles, parts = draw(st.integers(1, 13)), draw(st.sampled_from([1, 2]))
    num_query_tiles = num_tiles * parts + draw(st.integers(1 - parts, 5))
    num_heads, multiprocessors = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    order = AddOrder(num_tiles, num_query_tiles, parts, num_heads, multiprocessors, head_bytes=1)
    fewest = -(-num_tiles // order.num_multiprocessors)
    return dataclasses.replace(order, classes=draw(st.integers(fewest, fewest + 3)))


@settings(max_examples=40, deadline=None)
@given(orders())
def test_each_has_its_turn_at_every_tile_and_no_one_waits_for_ever(order):
    paths = visited(order)
    everything = list(range(order.num_query_tiles))
    assert all(sorted(path) == everything for path in paths)
    turn = turns(order, paths)
    for query_tile in everything:
        found = sorted(number for (_, other), number in turn.items() if other == query_tile)
        assert found == list(range(order.num_tiles))
    lock_step(order, paths, turn)


@pytest.mark.parametrize("num_tiles", [8, 13])
def test_blocks_that_start_together_do_not_wait(num_tiles):
    order = AddOrder(num_tiles, 2 * num_tiles, 2, 6, 33, head_bytes=1).in_best_classes()
    paths = visited(order)
    steps, most = lock_step(order, paths, turns(order, paths))
    assert steps == most


@pytest.mark.parametrize(
    ("num_tiles", "num_heads", "classes"), [(32, 64, 2), (64, 32, 2), (128, 16, 2), (50, 64, 2), (67, 32, 3)]
)
def test_waves_fill_the_gpu_and_heads_fit_in_l2(num_tiles, num_heads, classes):
    head_bytes = num_tiles * 128 * 128 * 8
    order = AddOrder(num_tiles, 2 * num_tiles, 2, num_heads, 132, head_bytes).in_best_classes()
    assert order.classes == classes
    assert order.num_waves < 1.3 * num_heads * num_tiles / 132
    assert order.wave_heads * order.wave_tiles <= 132
    assert order.wave_heads * head_bytes <= L2_BYTES
