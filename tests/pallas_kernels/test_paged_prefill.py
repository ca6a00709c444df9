"""paged_attention over ragged queries: what the reference promises, and the prefill kernel's list of work."""

import heapq
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_kernels import PrefillConfig, paged_attention
from pallas_kernels.paged_attention import decode_plan, prefill_plan, sm90
from pallas_kernels.paged_attention.prefill_config import OCTET, WARPGROUP_ROWS, default_config
from pallas_kernels.paged_attention.prefill_plan import unsupported
from pallas_kernels.paged_attention.prefill_units import FIELDS, NO_WORK, Work
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec
from tests.pallas_kernels.hopper import abstract_mesh
from tests.pallas_kernels.late_items import taken_together
from tests.pallas_kernels.paged_inputs import make_case
from tests.pallas_kernels.prefill_cases import make_plan


def attend(case, query, query_start, kv_lengths, **arguments):
    arrays = [jnp.asarray(x) for x in (query, case.k_pages, case.v_pages, case.block_tables, kv_lengths)]
    return paged_attention(
        *arrays, query_start=jnp.asarray(query_start), layer=case.layer, return_lse=True, **arguments
    )


def test_a_prompt_in_chunks_equals_the_prompt_at_once():
    case = make_case(rows=2, lengths=[45, 30], query_lengths=[45, 20])
    whole, whole_lse = attend(case, case.query, case.query_start, case.kv_lengths)
    # The first row's first 18 tokens, then the rest of it and the second row, of which 10 are cached.
    first, first_lse = attend(case, case.query[:18], np.array([0, 18, 18]), np.array([18, 0]))
    second, second_lse = attend(case, case.query[18:], np.array([0, 27, 47]), case.kv_lengths)
    np.testing.assert_allclose(np.concatenate([first, second]), whole, atol=2e-6)
    np.testing.assert_allclose(np.concatenate([first_lse, second_lse]), whole_lse, atol=2e-6)


def test_queries_that_are_not_causal_see_their_row():
    case = make_case(rows=2, lengths=[45, 30], query_lengths=[5, 1])
    out, lse = attend(case, case.query, case.query_start, case.kv_lengths, is_causal=False)
    for token, row in enumerate([0, 0, 0, 0, 0, 1]):
        alone = case._replace(query=case.query[token][None])
        start = np.array([0, 1, 1]) if row == 0 else np.array([0, 0, 1])
        expected, expected_lse = attend(alone, alone.query, start, case.kv_lengths)
        np.testing.assert_allclose(out[token], expected[0], atol=2e-6)
        np.testing.assert_allclose(lse[token], expected_lse[0], atol=2e-6)


def test_slopes_count_positions_of_queries_that_are_not_causal():
    """The distance of a later query is longer to every key: only the log-sum-exp tells."""
    case, slopes = make_case(rows=1, lengths=[45], query_lengths=[3]), jnp.linspace(0.1, 0.4, 4)
    same = np.broadcast_to(case.query[:1], case.query.shape)
    out, lse = attend(case, same, case.query_start, case.kv_lengths, is_causal=False, alibi_slopes=slopes)
    np.testing.assert_allclose(out, np.broadcast_to(out[:1], out.shape), atol=2e-6)
    np.testing.assert_allclose(np.diff(lse, axis=0), np.broadcast_to(-slopes, (2, 4)), atol=2e-6)
    alone, alone_lse = attend(case, same[:1], np.array([0, 1]), case.kv_lengths, alibi_slopes=slopes)
    np.testing.assert_allclose(out[2], alone[0], atol=2e-6)
    np.testing.assert_allclose(lse[2], alone_lse[0], atol=2e-6)


def test_kernel_says_what_it_cannot():
    pool = jax.ShapeDtypeStruct((1, 9, 1, 16, 256), jnp.int8)
    query, scale = jax.ShapeDtypeStruct((8, 1, 256), jnp.bfloat16), jax.ShapeDtypeStruct(pool.shape[:4], "f4")
    inputs = PagedInputs(query, pool, pool, None, None, None, k_scale=scale, v_scale=scale)
    assert "at most 224" in str(unsupported(inputs, PagedSpec(1.0)))
    # A tile of one warpgroup has room for eight heads of eight tokens.
    inputs = inputs._replace(query=jax.ShapeDtypeStruct((8, 9, 160), jnp.bfloat16))
    assert "at most 8 query heads" in str(unsupported(inputs, PagedSpec(1.0)))
    inputs = inputs._replace(query=jax.ShapeDtypeStruct((8, 9, 128), jnp.bfloat16))
    assert unsupported(inputs, PagedSpec(1.0)) is None
    single = PagedSpec(1.0, prefill_config=PrefillConfig(1))
    assert "at most 8 query heads" in str(unsupported(inputs, single))
    inputs = inputs._replace(query=jax.ShapeDtypeStruct((8, 1, 64), jnp.bfloat16))
    assert unsupported(inputs, PagedSpec(1.0)) is None
    for config in (PrefillConfig(), PrefillConfig(2, overlap=True)):
        assert "two warpgroups, and no overlap" in str(
            unsupported(inputs, PagedSpec(1.0, prefill_config=config))
        )


def test_kernels_count_rows_not_tokens():
    """A prompt may have more tokens than the decode kernel has room for rows."""
    tokens, rows = 2 * decode_plan.MAX_ROWS, 4
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    query = jax.ShapeDtypeStruct((tokens, 8, 64), jnp.bfloat16)
    pool = jax.ShapeDtypeStruct((1, 9, 2, 16, 64), jnp.bfloat16)
    inputs = PagedInputs(query, pool, pool, integers(rows, 8), integers(rows), integers(), integers(rows + 1))
    assert sm90.unsupported(inputs, PagedSpec(1.0)) is None
    inputs = inputs._replace(kv_lengths=integers(tokens), query_start=None)
    assert f"{decode_plan.MAX_ROWS} rows" in str(sm90.unsupported(inputs, PagedSpec(1.0)))


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(
    data=st.data(),
    group=st.sampled_from((1, 3, 4, 5)),
    config=st.sampled_from(
        (PrefillConfig(), PrefillConfig(2, 64, 2, splits=3), PrefillConfig(2, packs=True))
    ),
    is_causal=st.booleans(),
)
def test_every_token_sees_its_keys_in_one_item(data, group, config, is_causal):
    """Oracle: the tiles of each token's items, where tiles are packed of each of its heads', cover its keys
    once, and no item holds tokens of two rows."""
    window = data.draw(st.sampled_from((None, 0, 150))) if is_causal else None
    queries = np.array(data.draw(st.lists(st.integers(0, 120), min_size=3, max_size=3)))
    lengths = queries + np.array([data.draw(st.sampled_from((0, 7, 520))) for _ in queries])
    lengths = np.maximum(0, lengths - data.draw(st.sampled_from((0, 0, 100))))
    first = data.draw(st.integers(0, 20))
    starts = first + np.concatenate([[0], np.cumsum(queries)])
    tokens = 400
    with jax.sharding.use_abstract_mesh(abstract_mesh(num_cores=4)):  # few, so that rows are taken together
        plan = make_plan(tokens, 3, group, 40, config, is_causal, window)
        work = taken_together(plan, jnp.asarray(starts), jnp.asarray(lengths))
    work = jax.tree.map(np.asarray, work)
    listed = [Work(*row[:FIELDS], None, row[-1]) for row in work.items if row[0] != NO_WORK]
    assert len(listed) <= plan.max_items
    assert work.items[len(listed), 0] == NO_WORK
    items = {item.item: item for item in listed}
    records = {item.item: row for item, row in zip(listed, work.items, strict=False)}
    assert sorted(items) == list(range(len(listed)))
    heads = range(group) if plan.is_packed else [None]
    for token, head in itertools.product(range(tokens), heads):
        row = int(np.searchsorted(starts, token, side="right")) - 1
        is_dead = not 0 <= row < 3
        places = {i: place_in(plan, items[i], token, head) for i in range(len(items))}
        mine = [i for i, place in places.items() if place is not None]
        if not is_dead and is_causal and queries[row] == 1:  # the decode kernel's
            assert not mine
            continue
        at = token if head is None else (token, head)
        assert mine == [*range(work.first_item[at], work.first_item[at] + work.num_splits[token])]
        assert all(places[i] == work.place[at] for i in mine)
        length = 0 if is_dead else lengths[row]
        position = length - starts[row + 1] + token if not is_dead else 0
        last = min(position if is_causal else length - 1, length - 1)
        keys = np.arange(0 if window is None else max(0, position - window), last + 1)
        tiles = [t for i in mine for t in range(items[i].tile_start, items[i].tile_stop)]
        assert len(set(tiles)) == len(tiles)
        assert set(keys // config.tile_kv) <= set(tiles)
        assert all(0 <= t * config.tile_kv < max(length, 1) for t in tiles)
        assert is_dead or all(items[i].row == row for i in mine)
        for i in mine:
            check_range(plan, items[i], records[i], work.place[at], set(keys))


@pytest.mark.parametrize(
    "shape", [(8, 1, 256, 2048, 4), (9, 3, 64, 777, 16), (16, 16, 64, 1024, 16)], ids=str
)
def test_programs_that_draw_a_unit_ahead_end_together(shape):
    num_heads, num_kv_heads, head_dim, tokens, rows = shape
    query = jax.ShapeDtypeStruct((rows * tokens, num_heads, head_dim), jnp.bfloat16)
    pool = jax.ShapeDtypeStruct((1, 9, num_kv_heads, 16, head_dim), jnp.bfloat16)
    tables = jax.ShapeDtypeStruct((rows, -(-tokens // 16)), jnp.int32)
    starts, lengths = jnp.arange(rows + 1) * tokens, jnp.full(rows, tokens)
    with jax.sharding.use_abstract_mesh(abstract_mesh()):
        plan = prefill_plan.make_plan(PagedInputs(query, pool, pool, tables, lengths, None), PagedSpec(1.0))
        items = np.asarray(taken_together(plan, starts, lengths).items)
        num_programs = plan.num_programs
    listed = [Work(*row[:FIELDS], None) for row in items if row[0] != NO_WORK]
    costs = [1 + item.num_tiles for item in listed for _ in range(num_kv_heads)]
    ends = costs[:num_programs]
    drawing = [(0, program) for program in range(num_programs)]  # as it begins a unit, the one after
    heapq.heapify(drawing)
    for cost in costs[num_programs:]:
        _, program = drawing[0]
        heapq.heapreplace(drawing, (ends[program], program))
        ends[program] += cost
    assert max(ends) < 1.08 * sum(costs) / num_programs


def place_in(plan, item, token, head):
    """Where an item's tile holds a token, or its head, or None."""
    if not item.first <= token < item.stop:
        return None
    if head is None:
        return token - item.token
    octet = (token - item.token) // OCTET * plan.group + head - item.first_head
    return octet * OCTET + token % OCTET if 0 <= octet < plan.tile_size else None


def check_range(plan, item, record, place, keys):
    """The record's range of a token's warpgroup holds the token's keys; those of full tiles are all such."""
    warpgroup = place // WARPGROUP_ROWS if plan.has_own_ranges else 0
    start, full_start, full_stop, stop = record[FIELDS + 4 * warpgroup :][:4] + item.tile_start
    tile_kv = plan.config.tile_kv
    assert item.tile_start <= start <= full_start <= full_stop <= stop <= item.tile_stop
    assert keys.isdisjoint(range(item.tile_start * tile_kv, start * tile_kv))
    assert keys.isdisjoint(range(stop * tile_kv, item.tile_stop * tile_kv))
    assert keys.issuperset(range(full_start * tile_kv, full_stop * tile_kv))


def test_config_holds_itself_to_what_the_kernel_can():
    for wrong in (
        {"warpgroups": 4},
        {"tile_kv": 96},
        {"stages": 1},
        {"splits": 0},
        {"stages": 9},
        {"overlap": 1},
    ):
        with pytest.raises(ValueError, match="must be"):
            PrefillConfig(**wrong)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_default_tiles_have_no_rows_of_no_head(head_dim):
    for group, crowded in itertools.product(range(1, 17), (False, True)):
        plan = make_plan(8192, 4, group, 40, default_config(8192, 4, group, 8, head_dim, crowded, 8192))
        rows = plan.config.warpgroups * WARPGROUP_ROWS
        assert plan.tile_size * OCTET == rows if plan.is_packed else plan.tile_q * group == rows


def test_default_tiles_are_smaller_where_they_fit_the_gpu_at_once():
    for head_dim, tokens, is_invariant in itertools.product((64, 128), (333, 512, 600), (False, True)):
        config = default_config(tokens, 1, 4, 8, head_dim, False, 512, batch_invariant=is_invariant)
        assert (config.warpgroups == 2) == (tokens <= 512 and not is_invariant)


def test_default_config_fits_shared_memory_and_splits_few_tokens():
    features = itertools.product((64, 80, 128, 224, 256), (8, 64, 2048), *[(False, True)] * 3)
    for head_dim, tokens, crowded, has_slopes, is_quantized in features:
        config = default_config(tokens, 4, 4, 8, head_dim, crowded, 8192, has_slopes, is_quantized)
        kv_bytes = (2 if is_quantized else 4) * config.stages * config.tile_kv * head_dim
        if is_quantized:
            assert config.warpgroups <= 2
            kv_bytes += 4 * (2 if head_dim <= 128 else 1) * config.tile_kv * head_dim
        assert kv_bytes + 128 * config.warpgroups * head_dim < 227 * 1024
        assert (config.splits > 1) == (tokens < 2048)
