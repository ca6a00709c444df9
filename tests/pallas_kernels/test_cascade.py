"""cascade_attention equals paged_attention, however rows share their pages."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cascade_attention, paged_attention
from pallas_kernels.paged_attention.reference import merge
from tests.pallas_kernels.cascade_cases import share
from tests.pallas_kernels.paged_inputs import make_case

GROUPS = {
    "two groups, rows in any order, one row of none": ([24, 16], [1, 0, -1, 0, 1, 1]),
    "a group of one row, and one without rows": ([8, 16, 16], [2, 2, 2, 2, 0, 2]),
    "no group": ([0], [-1] * 6),
    "groups that do not exist": ([16], [0, 1, 0, 7, -1, 0]),
    "a prefix of length 0": ([0, 24], [0, 0, 1, 1, 1, 0]),
    "rows that are shorter than their prefix": ([40, 32], [0, 0, 0, 1, 1, 1]),
    "a prefix of no whole pages, one below zero": ([20, -8], [0, 0, 0, 1, 1, 1]),
    "a prefix beyond the tables": ([56], [0] * 6),
}


@pytest.mark.parametrize("name", GROUPS)
def test_cascade_equals_paged_attention(name):
    prefix_lengths, group_of_row = GROUPS[name]
    case = make_case(rows=6, lengths=[40, 37, 25, 48, 26, 33], page_size=8, width=6)
    case = share(case, prefix_lengths, group_of_row)
    arrays = [jnp.asarray(x) for x in case[:5]]
    arguments = {"layer": case.layer, "logits_soft_cap": 4.0, "sinks": jnp.arange(4.0), "return_lse": True}
    expected = paged_attention(*arrays, **arguments)
    attend = jax.jit(lambda *groups: cascade_attention(*arrays, *groups, **arguments))
    actual = attend(jnp.asarray(prefix_lengths), jnp.asarray(group_of_row))
    for mine, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6)


@pytest.mark.parametrize("group", [-1, 0])
def test_an_empty_row_gives_zeros(group):
    case = share(make_case(rows=3, lengths=[20, 0, 20], page_size=8, width=3), [16], [0, -1, 0])
    arrays = [jnp.asarray(x) for x in case[:5]]
    groups = jnp.asarray([16]), jnp.asarray([0, group, 0])
    out, lse = cascade_attention(*arrays, *groups, return_lse=True)
    assert (out[1] == 0).all()
    assert (lse[1] == -jnp.inf).all()


def test_merge_weighs_parts_by_their_log_sum_exp():
    out, other = jnp.full((1, 3, 2), 1.0), jnp.full((1, 3, 2), 5.0)
    lse, other_lse = jnp.log(jnp.asarray([[1.0, 3.0, 0.0]])), jnp.log(jnp.asarray([[3.0, 0.0, 0.0]]))
    merged, total = merge(out, lse, other, other_lse)
    np.testing.assert_allclose(merged[0, :, 0], [4.0, 1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(total[0], [np.log(4), np.log(3), -np.inf], atol=1e-6)


@pytest.mark.parametrize(
    ("message", "groups"),
    [
        ("group_of_row must have shape", (jnp.zeros(1, jnp.int32), jnp.zeros(2, jnp.int32))),
        ("prefix_lengths must have the dimensions", (jnp.int32(16), jnp.zeros(3, jnp.int32))),
        ("prefix_lengths must not be empty", (jnp.zeros(0, jnp.int32), jnp.zeros(3, jnp.int32))),
        ("prefix_lengths must hold integers", (jnp.zeros(1), jnp.zeros(3, jnp.int32))),
        (r"multiples of the page size 8, >= 0, got \[8, 12\]", (np.array([8, 12]), jnp.zeros(3, jnp.int32))),
        (r"multiples of the page size 8, >= 0, got \[-8\]", (np.array([-8]), jnp.zeros(3, jnp.int32))),
        ("group_of_row must be an array, got list", (jnp.array([8]), [0, 0, 0])),
    ],
)
def test_wrong_groups_are_named(message, groups):
    case = make_case()
    with pytest.raises(ValueError, match=message):
        cascade_attention(*[jnp.asarray(x) for x in case[:5]], *groups)
