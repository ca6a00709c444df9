"""batch_invariant=True: the cuts of the paged kernels, which must follow from heads and pages alone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PrefillConfig, contiguous_attention, paged_attention
from pallas_kernels.mosaic import SMEM_BYTES
from pallas_kernels.paged_attention import decode_plan, prefill_plan
from pallas_kernels.paged_attention.decode_plan import MAX_ROWS
from pallas_kernels.paged_attention.spec import PagedInputs, PagedSpec
from tests.pallas_kernels.invariance_cases import only
from tests.pallas_kernels.paged_inputs import make_case

INVARIANT = PagedSpec(1.0, batch_invariant=True)
HEADS = [(1, 1), (8, 2), (16, 16), (28, 4), (32, 8)]
SHAPES = list(itertools.product((1, 2, 3, 16, 256, 1000, MAX_ROWS), (1, 16, 300, 8192)))


def inputs_of(heads, head_dim, dtype, page_size, rows, width, tokens=None):
    spec = jax.ShapeDtypeStruct
    query = spec((tokens or rows, heads[0], head_dim), jnp.bfloat16)
    pages = spec((1, 9, heads[1], page_size, head_dim), dtype)
    tables, lengths = spec((rows, width), jnp.int32), spec((rows,), jnp.int32)
    start = None if tokens is None else spec((rows + 1,), jnp.int32)
    return PagedInputs(query, pages, pages, tables, lengths, None, start)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize("page_size", [8, 256])
def test_decode_is_cut_alike_for_any_rows_and_tables(heads, head_dim, dtype, page_size):
    cuts = set()
    for (rows, width), tokens in itertools.product(SHAPES, (None, 4096)):
        plan = decode_plan.make_plan(
            inputs_of(heads, head_dim, dtype, page_size, rows, width, tokens), INVARIANT
        )
        assert decode_plan.shared_bytes(plan) <= SMEM_BYTES
        cuts.add((plan.config.tile, plan.config.split, plan.config.consumers, plan.is_merged))
    assert len(cuts) == 1
    assert next(iter(cuts))[1] in (512, 1024)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_prefill_is_cut_alike_for_any_rows_and_tokens(heads, head_dim, dtype):
    cuts = set()
    for (rows, width), tokens in itertools.product(SHAPES, (1, 16, 5000)):
        inputs = inputs_of(heads, head_dim, dtype, 16, rows, width, tokens)
        config = prefill_plan.make_plan(inputs, INVARIANT).config
        cuts.add((config.warpgroups, config.tile_kv, config.splits, config.overlap, config.packs))
    assert len(cuts) == 1
    assert next(iter(cuts))[2] == 1


def test_without_it_the_cuts_follow_the_batch():
    splits = {
        decode_plan.make_plan(
            inputs_of((32, 8), 128, jnp.bfloat16, 16, rows, 1024), PagedSpec(1.0)
        ).config.split
        for rows in (1, 2, 4)
    }
    assert splits == {1024, 2048, 4096}


@pytest.mark.parametrize("ragged", [False, True])
def test_the_reference_takes_it(ragged):
    case = make_case(rows=3, lengths=[40, 17, 33], query_lengths=[2, 1, 5] if ragged else None)

    def attend(case):
        start = jnp.asarray(case.query_start) if ragged else None
        arrays = [jnp.asarray(x) for x in case[:5]]
        return paged_attention(*arrays, query_start=start, layer=case.layer, batch_invariant=True)

    first, stop = case.query_start[:2]
    np.testing.assert_allclose(attend(only(case, 0)), attend(case)[first:stop], atol=2e-6)


def test_caches_take_it_too():
    query, cache, lengths = jnp.ones((2, 4, 16)), jnp.ones((2, 32, 2, 16)), jnp.array([3, 32])
    out = contiguous_attention(query, cache, cache, lengths, batch_invariant=True)
    np.testing.assert_allclose(out, 1, atol=1e-6)


def test_keys_of_prompts_may_not_be_split():
    case = make_case(query_lengths=[2, 1, 1])
    with pytest.raises(ValueError, match=r"prefill_config.splits must be 1 if batch_invariant, got 2"):
        paged_attention(
            *map(jnp.asarray, case[:5]),
            query_start=jnp.asarray(case.query_start),
            batch_invariant=True,
            prefill_config=PrefillConfig(splits=2),
        )
