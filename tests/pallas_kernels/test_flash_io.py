"""io_bytes against counts by hand and against a mask spelled out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FlashConfig, io_bytes, tuned_config
from pallas_kernels.flash_attention.config import FusedConfig

CONFIG = FlashConfig(tile_q=64, tile_kv=128, stages=2, warpgroups=2)
FUSED = dataclasses.replace(CONFIG, fused=FusedConfig(tile_q=64))


def arrays(batch=1, t=1024, s=None, n=2, k=None, h=64):
    query = jax.ShapeDtypeStruct((batch, t, n, h), jnp.bfloat16)
    return query, jax.ShapeDtypeStruct((batch, s or t, k or n, h), jnp.bfloat16)


def test_full_attention_by_hand():
    """8 blocks of 128 queries a head, each streams all 1024 keys and values."""
    forward = io_bytes(*arrays(batch=3), config=CONFIG).forward
    array = 1024 * 64 * 2  # bytes of one head
    assert forward.l2_to_sm == 3 * 2 * (array + 8 * 2 * array)
    assert forward.sm_to_l2 == 3 * 2 * (array + 1024 * 4)
    assert forward.dram_read == 3 * 2 * 3 * array
    assert forward.dram_write == forward.sm_to_l2


def test_one_query_reads_what_it_sees_once_for_a_group():
    """32 heads share 8 KV heads: tiles of queries would read K and V four times."""
    query, key = arrays(batch=3, t=1, s=4096, n=32, k=8, h=128)
    row = 8 * 128 * 2  # bytes of K of one token
    forward = io_bytes(query, key).forward
    assert forward.l2_to_sm == forward.dram_read == 3 * (4 * row + 2 * 4096 * row)
    assert forward.sm_to_l2 == 3 * (4 * row + 32 * 4)
    assert io_bytes(query, key, config=CONFIG).forward.l2_to_sm > 3.9 * forward.l2_to_sm
    window = {"local_window_size": (999, 0), "causal_alignment": "bottom_right"}
    assert io_bytes(query, key, **window).forward.l2_to_sm == 3 * (4 * row + 2 * 1000 * row)


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ({}, {"is_causal": True}),
        ({"t": 1000, "s": 1500}, {"is_causal": True}),
        ({"t": 1000, "s": 1500}, {"is_causal": True, "causal_alignment": "bottom_right"}),
        ({}, {"is_causal": True, "local_window_size": (200, 0)}),
        ({"t": 700}, {"local_window_size": (100, 300)}),
        ({"n": 8, "k": 2}, {"is_causal": True}),
    ],
)
def test_masked_ranges_are_exact_to_the_tile(shape, mask):
    query, key = arrays(**shape)
    forward = io_bytes(query, key, config=CONFIG, **mask).forward
    (batch, t, n, h), s = query.shape, key.shape[1]
    rows, keys = np.arange(t)[:, None], np.arange(s)
    position = rows + (s - t if mask.get("causal_alignment") == "bottom_right" else 0)
    left, right = mask.get("local_window_size", (s + t, s + t))
    right = 0 if mask.get("is_causal") else right
    visible = (keys >= position - left) & (keys <= position + right)
    streamed = 0
    for start in range(0, t, 128):
        seen = np.flatnonzero(visible[start : start + 128].any(axis=0))
        first, last = seen[0] // 128 * 128, min(s, (seen[-1] // 128 + 1) * 128)
        streamed += last - first
    assert forward.l2_to_sm == batch * n * 2 * h * (t + 2 * streamed)


def test_larger_tiles_move_fewer_bytes():
    """The paper's statement: traffic falls with the size of the fast memory."""
    query, key = arrays(t=4096)
    moved = [
        io_bytes(
            query, key, config=FlashConfig(tile_q=tile, warpgroups=groups, ping_pong=False)
        ).forward.l2_to_sm
        for tile, groups in ((64, 1), (64, 2), (64, 3), (128, 2))
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] / moved[3] == pytest.approx(4, rel=0.05)


def test_columns_past_the_head_dim_are_not_loaded():
    narrow, wide = (
        io_bytes(*arrays(h=h), config=CONFIG) for h in (72, 96)
    )  # both lie in shared memory as 96
    assert narrow.forward.l2_to_sm * 4 == wide.forward.l2_to_sm * 3
    assert narrow.backward.sm_to_l2 * 4 == wide.backward.sm_to_l2 * 3
    narrow, wide = (io_bytes(*arrays(h=h), config=FUSED).backward for h in (72, 96))
    sums = wide.sm_to_l2 - narrow.sm_to_l2
    assert sums * 4 == 2 * 2 * 1024 * 2 * 96  # of dK and dV; sums of dQ have all 96


def test_fused_backward_by_hand():
    """Two tiles of keys of 128: causal, the first meets all tiles of queries, the second the later half."""
    config = FlashConfig(fused=FusedConfig(tile_q=128))
    fused = io_bytes(*arrays(t=256), is_causal=True, config=config).backward
    tile, statistics = 128 * 64 * 2, 2 * 128 * 4  # bytes of 128 rows of one head
    assert fused.l2_to_sm == 2 * (2 * 2 * tile + 3 * (2 * tile + statistics))
    assert fused.sm_to_l2 == 2 * (2 * 2 * tile + 3 * 2 * tile)  # dK and dV once, dQ in fp32 thrice
    assert fused.dram_read == 2 * (4 * 2 * tile + 2 * statistics + 2 * 2 * tile)
    deterministic = io_bytes(*arrays(t=256), is_causal=True, config=config, deterministic=True).backward
    assert deterministic.l2_to_sm > fused.l2_to_sm
    assert deterministic.sm_to_l2 < fused.sm_to_l2


def test_fused_backward_of_wide_heads_owns_half_as_many_keys():
    config = FlashConfig(fused=FusedConfig(tile_q=64))
    narrow, wide = (io_bytes(*arrays(t=256, h=h), config=config).backward for h in (128, 256))
    sums, results = 2 * 256 * 4, 2 * 2 * 256 * 2  # bytes for each element of a head: of dQ, of dK and dV
    assert narrow.sm_to_l2 == 128 * (results + 2 * sums)
    assert wide.sm_to_l2 == 256 * (results + 4 * sums)


@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_reads_at_least_every_operand(deterministic):
    query, key = arrays(batch=2, n=4, k=2)
    backward = io_bytes(query, key, is_causal=True, deterministic=deterministic).backward
    array = 2 * 1024 * 4 * 64 * 2  # Q, or dO
    assert backward.dram_read >= 3 * array
    assert backward.l2_to_sm > backward.dram_read
    assert backward.sm_to_l2 >= backward.dram_write >= 2 * array


def test_what_is_not_counted_is_said():
    query, key = (jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in arrays())
    with pytest.raises(NotImplementedError, match="float32 is not counted"):
        io_bytes(query, key)


SHAPED = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
WRONG = {
    "query heads must be a multiple of the KV heads": arrays(n=4, k=3),
    r"key must have shape \[B S K H\]": (SHAPED(1, 64, 2, 64), SHAPED(1, 64, 2, 32)),
    "the head dim of query must be at most 256, got 300": arrays(h=300),
    r"query must have the dimensions \[B T N H\]": (SHAPED(64, 2, 64), SHAPED(1, 64, 2, 64)),
    r"key must have the dimensions \[B S K H\]": (SHAPED(1, 64, 2, 64), SHAPED(64, 2, 64)),
    "query must be an array, got NoneType": (None, SHAPED(1, 64, 2, 64)),
    "key must be an array, got str": (SHAPED(1, 64, 2, 64), "k"),
    "query must have one of the dtypes .* got int8": [SHAPED(1, 64, 2, 64, dtype=jnp.int8)] * 2,
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    for look_up in (io_bytes, tuned_config):
        with pytest.raises(ValueError, match=message):
            look_up(*WRONG[message])


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="causal_alignment must be one of"):
        io_bytes(*arrays(), causal_alignment="left")
    for config in ("x", {}):
        with pytest.raises(ValueError, match="config must be a FlashConfig"):
            io_bytes(*arrays(), config=config)
    for look_up in (io_bytes, tuned_config):
        with pytest.raises(ValueError, match="is_causal must be a bool"):
            look_up(*arrays(), is_causal="no")
    with pytest.raises(ValueError, match="logits_soft_cap must be positive"):
        tuned_config(*arrays(), logits_soft_cap=-1.0)
