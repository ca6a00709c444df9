"""Which thread block works on what: every item once, and no block much longer than the others."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxattn.block_mask import BlockMask
from pallas_kernels import FlashConfig, flash_attention
from pallas_kernels.flash_attention.extras import Footprint, prepare
from pallas_kernels.flash_attention.forward_plan import ITEM_COST, ForwardPlan
from pallas_kernels.flash_attention.sm90 import forward_plan_of
from pallas_kernels.flash_attention.spec import AttentionInputs, AttentionSpec
from pallas_kernels.flash_attention.tiles import Schedule, TileOrder
from pallas_kernels.kv_tiles import kv_tiles
from tests.pallas_kernels.hopper import abstract_mesh

PLAN = ForwardPlan(
    batch=2,
    num_queries=4096,
    num_keys=4096,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    value_dim=128,
    dtype=jnp.bfloat16,
    scale=1.0,
    reach=(None, 0),
    bottom_right=False,
    logits_soft_cap=None,
    has_q_lengths=False,
    has_kv_lengths=False,
    config=FlashConfig(),
    key_columns=128,
    value_columns=128,
)


@pytest.mark.parametrize(("heads", "warpgroups"), [(8, 1), (16, 2), (128, 3)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_grow_when_the_gpu_is_full(heads, warpgroups, head_dim):
    array = jax.ShapeDtypeStruct((1, 1024, heads, head_dim), jnp.bfloat16)
    spec = AttentionSpec(scale=1.0, is_causal=True)
    plan = forward_plan_of(AttentionInputs(*(array,) * 3), spec)
    assert plan.config.warpgroups == warpgroups


@pytest.mark.parametrize("head_dim", [32, 56, 64])
@pytest.mark.parametrize("num_keys", [None, 77, 1500])
def test_short_rows_multiply_little_beyond_their_ends(head_dim, num_keys):
    """At most a third more than the tiles that multiply least, which may be the slower ones."""
    spec = AttentionSpec(scale=1.0)
    for num_queries in range(8, 1025, 24):
        lengths = num_queries, num_keys or num_queries
        query, key = (jax.ShapeDtypeStruct((64, size, 12, head_dim), jnp.bfloat16) for size in lengths)
        config = forward_plan_of(AttentionInputs(query, key, key), spec).config
        blocks = config.tile_q * config.warpgroups, config.tile_kv
        multiplied = math.prod(-(-size // tile) * tile for size, tile in zip(lengths, blocks, strict=True))
        least = min(-(-num_queries // rows) * rows for rows in (128, 192)) * -(-lengths[1] // 64) * 64
        assert multiplied <= 1.34 * least, (num_queries, config)


def test_a_config_that_does_not_fit_is_refused_by_name():
    array = jax.ShapeDtypeStruct((1, 1024, 4, 256), jnp.bfloat16)
    config = FlashConfig(tile_kv=256)
    call = functools.partial(flash_attention, config=config, implementation="sm90")
    with jax.sharding.use_abstract_mesh(abstract_mesh()):
        with pytest.raises(ValueError, match=r"config must fit .* got FlashConfig\(.*tile_kv=256.*: 589,824"):
            jax.eval_shape(call, array, array, array)
        jax.eval_shape(functools.partial(call, config=dataclasses.replace(config, tile_kv=64)), *(array,) * 3)


ORDERS = [
    TileOrder(num_tiles=9, num_heads=32, section=8),
    TileOrder(num_tiles=9, num_heads=32, section=4, num_late=12),
    TileOrder(num_tiles=9, num_heads=32, section=1, num_late=32, heavy_last=False),
    TileOrder(num_tiles=9, num_heads=32, section=2, num_late=14).in_equal_sections,
]


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_holds_every_tile_of_every_head(order):
    places = [tuple(map(int, order.locate(jnp.int32(block)))) for block in range(order.num_blocks)]
    assert sorted(places) == [(tile, head) for tile in range(9) for head in range(32)]
    assert places == [order.place_of(block) for block in range(order.num_blocks)]
    early = places[: 9 * (32 - order.num_late)]
    assert [head // order.section for _, head in early] == sorted(head // order.section for _, head in early)
    weights = [tile if order.heavy_last else -tile for tile, _ in places[len(early) :]]
    assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("costs", [(1,) * 9, tuple(range(1, 10))])
@pytest.mark.parametrize("num_multiprocessors", [1, 7, 132, 500])
def test_every_item_once_and_in_order(num_multiprocessors, costs, order):
    table = Schedule(order, num_multiprocessors, costs).table()
    mine = [list(row[1 : 1 + row[0]]) for row in table]
    assert sorted(item for items in mine for item in items) == list(range(9 * 32))
    places = [order.place_of(block) for block in range(order.num_blocks)]
    position = {tile * 32 + head: place for place, (tile, head) in enumerate(places)}
    assert all(items and items == sorted(items, key=position.__getitem__) for items in mine)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_end_together(causal):
    plan = PLAN if causal else dataclasses.replace(PLAN, reach=(None, None))
    schedule = plan.schedule
    loads = [
        sum(schedule.costs[item // schedule.order.num_heads] for item in row[1 : 1 + row[0]])
        for row in schedule.table()
    ]
    assert max(loads) - min(loads) <= max(schedule.costs)
    assert sum(loads) / len(loads) > (0.95 if causal else 0.9) * max(loads)


@pytest.mark.parametrize(
    ("warpgroups", "reach", "bottom_right", "keys", "expected"),
    [
        (2, (None, None), False, 512, [4, 4]),
        (2, (None, 0), False, 512, [1, 2]),
        (2, (None, 0), True, 512, [3, 4]),
        (2, (127, 0), False, 512, [1, 2]),
        (2, (0, 0), False, 100, [1, 0]),
        (3, (None, None), False, 512, [4, 4]),  # rows 0 to 191, 192 to 255
        (3, (None, 0), False, 512, [1, 2]),  # 0 to 63, 64 to 255
        (3, (None, 0), True, 512, [3, 4]),
    ],
)
def test_costs_are_the_tiles_that_rows_see(warpgroups, reach, bottom_right, keys, expected):
    config = FlashConfig(warpgroups=warpgroups, ping_pong=False)
    plan = dataclasses.replace(
        PLAN, reach=reach, bottom_right=bottom_right, num_keys=keys, num_queries=256, config=config
    )
    assert [cost - ITEM_COST for cost in plan.schedule.costs] == expected


@pytest.mark.parametrize("own", [64, 128])
@pytest.mark.parametrize("other", [64, 128])
@pytest.mark.parametrize("right", [None, 0, 1, 64])
@pytest.mark.parametrize("bottom_right", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(512, 512), (512, 500), (300, 520), (448, 256)])
def test_where_an_end_cuts_one_tile_no_second_needs_a_mask(own, other, right, bottom_right, queries, keys):
    plan = dataclasses.replace(
        PLAN, reach=(None, right), bottom_right=bottom_right, num_queries=queries, num_keys=keys
    )
    queries, keys = np.int32(queries), np.int32(keys)
    offset, rows, columns = plan.offset(queries, keys), jnp.arange(0, queries, own), jnp.arange(0, keys, own)
    ends = jax.vmap(lambda row: kv_tiles(row, own, offset, queries, keys, (None, right), other))(rows)
    starts = jax.vmap(
        lambda column: kv_tiles(column, own, -offset, keys, queries, (right, None), other, mask_end=False)
    )(columns)
    cut = jnp.concatenate([ends.stop - ends.full_stop, starts.full_start - starts.start])
    assert not plan.is_cut_once(own, other) or cut.max() <= 1


def test_a_causal_mask_cuts_one_tile_where_those_of_keys_are_as_long():
    assert PLAN.is_cut_once(64, 128)
    assert PLAN.is_cut_once(128, 128)
    assert not PLAN.is_cut_once(128, 64)
    assert not dataclasses.replace(PLAN, has_segments=True).is_cut_once(64, 128)
    assert not dataclasses.replace(PLAN, bottom_right=True, has_kv_lengths=True).is_cut_once(64, 128)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("owns_queries", [True, False])
def test_packed_documents_are_taken_by_what_they_see(owns_queries, is_causal):
    length, own, other, warpgroups = 1000, 64, 128, 2
    rng = np.random.default_rng(0)
    ids = np.stack([np.searchsorted(np.sort(rng.choice(length, 5)), np.arange(length)) for _ in range(2)])
    plan = dataclasses.replace(
        PLAN, num_queries=length, num_keys=length, has_segments=True, reach=(None, 0 if is_causal else None)
    )
    inputs = AttentionInputs(*[jnp.zeros(())] * 3, q_segment_ids=ids, kv_segment_ids=ids)
    order = prepare(plan, inputs, Footprint(own, other, warpgroups, owns_queries)).by_weight

    sees = ids[:, :, None] == ids[:, None]
    sees &= np.tri(length, dtype=bool) if is_causal else True
    sees = sees if owns_queries else sees.swapaxes(1, 2)
    num_blocks, num_others = -(-length // (own * warpgroups)), -(-length // other)
    padding = num_blocks * own * warpgroups - length, num_others * other - length
    sees = np.pad(sees, ((0, 0), (0, padding[0]), (0, padding[1])))
    tiles = sees.reshape(2, num_blocks, -1, num_others, other).any(axis=(2, 4))
    visited = num_others - tiles[:, :, ::-1].argmax(axis=2) - tiles.argmax(axis=2)
    for blocks, weights in zip(np.asarray(order), visited, strict=True):
        assert sorted(blocks) == list(range(num_blocks))
        assert list(weights[blocks]) == sorted(weights, reverse=not owns_queries)


@pytest.mark.parametrize("owns_queries", [True, False])
def test_every_block_is_taken_once_where_ids_are_padded_to_tiles_of_a_block_mask(owns_queries):
    length, own = 900, 64  # 15 blocks, and 16 in whole tiles of the mask
    ids = jnp.arange(length)[None] // 300
    plan = dataclasses.replace(
        PLAN, batch=1, num_queries=length, num_keys=length, has_segments=True, has_block_mask=True
    )
    tiles = jax.tree.map(jnp.asarray, BlockMask.random(length, length, density=0.5).tiles())
    inputs = AttentionInputs(*[jnp.zeros(())] * 3, q_segment_ids=ids, kv_segment_ids=ids, block_mask=tiles)
    (order,) = np.asarray(prepare(plan, inputs, Footprint(own, 128, 1, owns_queries)).by_weight)
    assert sorted(order) == list(range(15))
