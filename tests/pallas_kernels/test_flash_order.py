"""The order in which a deterministic backward's thread blocks add to dQ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention.backward_fused_order import AddOrder


def visited(order: AddOrder) -> list[list[int]]:
    """Of each tile of keys, the tiles of queries that it goes through, in order."""
    stops = [int(order.visits(tile).stop) for tile in range(order.num_tiles)]
    tiles, places = (jnp.arange(size, dtype=jnp.int32) for size in (order.num_tiles, max(stops)))
    found = jax.vmap(lambda tile: jax.vmap(lambda place: order.query_tile(tile, place))(places))(tiles)
    return [row[:stop].tolist() for row, stop in zip(np.asarray(found), stops, strict=True)]


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
    num_tiles, parts, is_causal = draw(st.integers(1, 13)), draw(st.sampled_from([1, 2])), draw(st.booleans())
    more = 0 if is_causal else draw(st.integers(1 - parts, 5))
    multiprocessors = draw(st.integers(1, 12))
    order = AddOrder(
        num_tiles, num_tiles * parts + more, parts, draw(st.integers(1, 5)), is_causal, multiprocessors
    )
    fewest = -(-order.num_units // multiprocessors)
    return dataclasses.replace(order, classes=draw(st.integers(fewest, fewest + 3)))


@settings(max_examples=40, deadline=None)
@given(orders())
def test_each_has_its_turn_at_every_tile_it_visits_and_no_one_waits_for_ever(order):
    paths = visited(order)
    for tile, path in enumerate(paths):
        first = tile * order.parts if order.is_causal else 0
        assert sorted(path) == list(range(first, order.num_query_tiles))
        assert not order.is_causal or path[: order.parts] == list(range(first, first + order.parts))
    turn = turns(order, paths)
    for query_tile in range(order.num_query_tiles):
        found = sorted(number for (_, other), number in turn.items() if other == query_tile)
        assert found == list(range(len(found)))
    lock_step(order, paths, turn)


@pytest.mark.parametrize(("is_causal", "num_tiles"), [(True, 8), (True, 9), (False, 8), (False, 13)])
def test_blocks_that_start_together_do_not_wait(is_causal, num_tiles):
    order = AddOrder(num_tiles, 2 * num_tiles, 2, 6, is_causal, 33).in_best_classes()
    paths = visited(order)
    steps, most = lock_step(order, paths, turns(order, paths))
    assert steps <= most + 2


def test_waves_fill_the_gpu():
    for num_tiles, num_heads, is_causal in (
        (32, 64, False),
        (32, 64, True),
        (128, 16, True),
        (50, 64, False),
    ):
        order = AddOrder(num_tiles, 2 * num_tiles, 2, num_heads, is_causal, 132).in_best_classes()
        fewest = num_heads * order.num_units / 132
        assert order.num_waves < 1.12 * fewest
        assert order.wave_heads * order.wave_units <= 132
