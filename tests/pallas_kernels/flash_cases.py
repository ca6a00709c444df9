"""Rows of tables.py for flash_attention."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import FlashConfig, flash_attention
from pallas_kernels.flash_attention.config import Call, GradientConfig, default_config
from tests.pallas_kernels.flash_features import FEATURES, RAGGED, block_mask
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.tables import CompileCase

THREE = FlashConfig(tile_q=64, tile_kv=64, stages=2, warpgroups=3, ping_pong=False)
PERSISTENT_SPILLS = 24  # bytes, under a block mask at H = 128: backward_fused_items.is_persistent says why
# At H = 256 they are the forward's, used once an item (with a block mask 24 by ptxas 13.0, 28 by 13.5).
SPILLS = {(128, "block mask"): PERSISTENT_SPILLS, (256, "dropout"): 36, (256, "block mask"): 28}
SPILLS |= {(256, "block mask, bias"): 36}  # 32 by 13.0
AHEAD = FlashConfig(tile_q=64, tile_kv=64, stages=2, overlap=True, ping_pong=False)
SMALL = FlashConfig(tile_q=64, tile_kv=64, stages=2, q_stages=2)
EIGHTY = dataclasses.replace(AHEAD, tile_kv=80)
IN_BLOCKS = default_config(128, Call(crowded=True, in_blocks=True, busy=1))  # serves all calls


def random_inputs(shapes, dtype, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def check_forward(
    batch=1, t=130, s=130, n=1, k=1, h=64, hv=None, dtype=jnp.bfloat16, poison=False, **arguments
):
    """The interpreted kernel against the reference on the same inputs; NaN beyond the lengths must not
    matter.
    """
    hv = hv or h
    query, key, value = random_inputs([(batch, t, n, h), (batch, s, k, h), (batch, s, k, hv)], dtype)
    if poison:
        query, key, value = poison_padding(query, key, value, **arguments)
    arguments = {"config": SMALL} | arguments
    call = functools.partial(flash_attention, return_lse=True, **arguments)
    expected, expected_lse = call(query, key, value, implementation="reference")
    with interpreted():
        out, lse = jax.block_until_ready(call(query, key, value, implementation="sm90"))
    compare(out, expected, dtype)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-4, rtol=1e-4)


def check_backward(
    batch=1,
    t=100,
    s=100,
    n=1,
    k=1,
    h=64,
    hv=None,
    dtype=jnp.bfloat16,
    poison=False,
    num_cores=2,
    **arguments,
):
    """Gradients through output and log-sum-exp, also of a bias and sinks: the interpreted kernels against the
    reference.
    """
    hv = hv or h
    shapes = [(batch, t, n, h), (batch, s, k, h), (batch, s, k, hv), (batch, t, n, hv)]
    query, key, value, out_grad = random_inputs(shapes, dtype)
    lse_grad = jax.random.normal(jax.random.key(9), (batch, t, n))
    if poison:
        query, key, value = poison_padding(query, key, value, **arguments)
    arguments = {"config": SMALL} | arguments

    differentiated = {name: arguments.pop(name) for name in ("bias", "sinks") if name in arguments}

    def gradients(implementation):
        call = functools.partial(flash_attention, return_lse=True, implementation=implementation, **arguments)
        _, vjp = jax.vjp(lambda qkv, named: call(*qkv, **named), (query, key, value), differentiated)
        return jax.tree.leaves(jax.block_until_ready(vjp((out_grad, lse_grad))))

    expected = gradients("reference")
    with interpreted(num_cores):
        actual = gradients("sm90")
    for one, other in zip(actual, expected, strict=True):
        # Sums of whole rows, in which most cancels, carry the rounding of the outputs.
        sums_rows = one.ndim == 1 or (one.shape[-1] == 1 and one.ndim == 4)
        compare(one, other, dtype, tolerance=10 if sums_rows else 1)


def poison_padding(query, key, value, q_lengths=None, kv_lengths=None, **_):
    def poison(x, lengths):
        inside = jnp.arange(x.shape[1]) < lengths[:, None]
        return jnp.where(inside[..., None, None], x, jnp.nan)

    if q_lengths is not None:
        query = poison(query, q_lengths)
    if kv_lengths is not None:
        key, value = poison(key, kv_lengths), poison(value, kv_lengths)
    return query, key, value


def compare(actual, expected, dtype, tolerance=1):
    """Relative RMS error against fp32, as the precision of the dtype allows."""
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    error = np.sqrt(np.mean((actual - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), 1e-3)
    assert error < tolerance * {"bfloat16": 6e-3, "float16": 8e-4, "float32": 7e-4}[jnp.dtype(dtype).name], (
        error
    )


FORWARD_CASES: dict[str, dict[str, Any]] = {
    "plain": {"t": 128, "s": 128},
    "causal": {"batch": 2, "n": 2, "is_causal": True},
    "causal top left, T < S": {"t": 100, "s": 200, "is_causal": True},
    "causal bottom right, T < S": {"t": 100, "s": 200, "is_causal": True, "causal_alignment": "bottom_right"},
    "causal bottom right, T > S": {"t": 200, "s": 70, "is_causal": True, "causal_alignment": "bottom_right"},
    "grouped heads": {"t": 65, "s": 65, "n": 4, "k": 2, "is_causal": True},
    "head dim 128, fp16": {"t": 70, "s": 129, "h": 128, "dtype": jnp.float16},
    "head dim 40 padded": {"t": 70, "s": 70, "h": 40},
    "value dim": {"t": 70, "s": 70, "h": 64, "hv": 128},
    "lengths": dict(RAGGED, poison=True),
    "lengths, causal bottom right": dict(
        RAGGED, poison=True, is_causal=True, causal_alignment="bottom_right"
    ),
    "window": {"t": 260, "s": 260, "local_window_size": (40, 20)},
    "window, causal": {"t": 260, "s": 260, "is_causal": True, "local_window_size": (70, None)},
    "soft cap": {"t": 70, "s": 70, "is_causal": True, "logits_soft_cap": 2.0},
    "one token": {"t": 1, "s": 1},
    "tile_q 128": {"is_causal": True, "config": FlashConfig(tile_q=128, tile_kv=64, stages=2)},
    "overlap, causal, grouped heads": {"n": 2, "k": 1, "is_causal": True, "config": AHEAD},
    "overlap, lengths": dict(RAGGED, poison=True, config=dataclasses.replace(AHEAD, q_stages=2)),
    "overlap, window": {"t": 260, "s": 260, "local_window_size": (40, 20), "config": AHEAD},
    "overlap, in turns": {"n": 2, "is_causal": True, "config": dataclasses.replace(AHEAD, ping_pong=True)},
    "overlap, head dim 256, a tail and a diagonal": {
        **{"t": 130, "s": 190, "h": 256, "is_causal": True, "causal_alignment": "bottom_right"},
        "config": dataclasses.replace(AHEAD, ping_pong=True),
    },
    "overlap, a third tile of V": {"t": 130, "s": 330, "config": dataclasses.replace(AHEAD, value_stages=3)},
    "tiles of 80 keys": {"t": 130, "s": 330, "h": 256, "config": EIGHTY},
    "tiles of 80 keys, a tail and a diagonal": {
        **{"t": 130, "s": 190, "h": 256, "is_causal": True, "causal_alignment": "bottom_right"},
        "config": EIGHTY,
    },
    "tiles of 80 keys, a diagonal, fp16": {
        **{"t": 330, "s": 330, "h": 224, "is_causal": True, "dtype": jnp.float16},
        "config": dataclasses.replace(SMALL, tile_kv=80),
    },
    "tiles of 80 keys, lengths": dict(RAGGED, poison=True, config=dataclasses.replace(SMALL, tile_kv=80)),
    "tiles of 80 keys, window": {"t": 260, "s": 260, "local_window_size": (40, 20), "config": EIGHTY},
    "in turns, queries in one buffer": {"n": 2, "config": dataclasses.replace(SMALL, q_stages=1)},
    "head dim 96": {"t": 70, "s": 70, "h": 96, "is_causal": True},
    # One block has two items to attend and three without a key: nobody may wait for a turn in between.
    "in turns, items that see nothing": {
        **{"batch": 10, "t": 5, "s": 5, "config": SMALL},
        "q_lengths": jnp.array([5, 5, 0, 0, 0, 0, 0, 0, 5, 5]),
    },
    "folded, a tile in the middle": {
        **{"t": 300, "s": 300, "is_causal": True, "config": dataclasses.replace(AHEAD, folds=True)},
    },
    # Where later queries do not see more keys, nothing is folded.
    "folded, a window": {
        **{"t": 260, "s": 260, "local_window_size": (40, 20)},
        "config": dataclasses.replace(AHEAD, folds=True),
    },
    "folded, lengths": {
        **{**RAGGED, "poison": True, "is_causal": True},
        "config": dataclasses.replace(SMALL, folds=True),
    },
    "folded, in turns, T < S": {
        **{"t": 190, "s": 260, "n": 2, "is_causal": True, "causal_alignment": "bottom_right"},
        "config": dataclasses.replace(SMALL, folds=True),
    },
    "three warpgroups": {"is_causal": True, "config": THREE},
    # The first thread block of a head has 64 rows for three warpgroups: the first two stay idle.
    "three warpgroups, idle ones first": {
        **{"t": 250, "s": 310, "is_causal": True, "causal_alignment": "bottom_right"},
        "config": dataclasses.replace(THREE, overlap=True, q_stages=2),
    },
    "three warpgroups, idle ones first, keys ahead": {
        **{"t": 130, "s": 100, "local_window_size": (None, 70), "config": THREE},
    },
    **FEATURES,
}

BACKWARD_CASES: dict[str, dict[str, Any]] = {
    "plain": {"t": 128, "s": 64},
    "causal": {"is_causal": True},
    "causal bottom right, T < S": {"t": 70, "s": 140, "is_causal": True, "causal_alignment": "bottom_right"},
    "causal top left, T > S": {"t": 140, "s": 70, "is_causal": True},
    "grouped heads": {"t": 65, "s": 65, "n": 4, "k": 2, "is_causal": True},
    "head dim 128, fp16": {"h": 128, "dtype": jnp.float16, "is_causal": True},
    "head dim 72 padded": {"t": 70, "s": 130, "h": 72, "is_causal": True},
    "value dim": {"h": 64, "hv": 128},
    "lengths": dict(RAGGED, poison=True),
    "lengths, causal bottom right": dict(
        RAGGED, poison=True, is_causal=True, causal_alignment="bottom_right"
    ),
    "window": {"t": 200, "s": 200, "local_window_size": (40, 20)},
    "soft cap": {"is_causal": True, "logits_soft_cap": 2.0},
    "bias of NaN where it is not seen": {
        **{"t": 70, "s": 130, "is_causal": True, "q_lengths": jnp.array([60])},
        "bias": jnp.where(jnp.tri(70, 130) * (jnp.arange(70)[:, None] < 60) > 0, 0.5, jnp.nan)[None, None],
    },
    "two passes": {
        "is_causal": True,
        "config": dataclasses.replace(SMALL, dq=GradientConfig(stages=1), dkv_passes=2),
    },
    **FEATURES,
}

INTERPRET = {
    f"flash_attention:{direction} {name}": functools.partial(check, **case)
    for direction, check, cases in (
        ("forward", check_forward, FORWARD_CASES),
        ("backward", check_backward, BACKWARD_CASES),
    )
    for name, case in cases.items()
}


def shapes(t=1024, s=1024, n=4, k=4, h=128, batch=2, dtype=jnp.bfloat16):
    return [
        jax.ShapeDtypeStruct(shape, dtype) for shape in ((batch, t, n, h), (batch, s, k, h), (batch, s, k, h))
    ]


def forward_case(specs, extra=(), **arguments):
    def attend(query, key, value, *extra):
        named = name_extra(extra)
        return flash_attention(
            query, key, value, implementation="sm90", return_lse=True, **named, **arguments
        )

    query = specs[0]
    lse_bytes = query.shape[0] * query.shape[1] * query.shape[2] * 4
    return CompileCase(attend, (*specs, *extra), max_temp_bytes=2 * lse_bytes + 65536)


def name_extra(extra):
    """Arrays beside query, key and value: lengths, or a dict by name with a random key's data among them."""
    if extra and isinstance(extra[0], dict):
        named = dict(extra[0])
        if "key_data" in named:
            named["dropout_key"] = jax.random.wrap_key_data(named.pop("key_data"))
        return named
    return dict(zip(("q_lengths", "kv_lengths"), extra, strict=False))


def unbounded(case: CompileCase) -> CompileCase:
    return case._replace(max_temp_bytes=None)


def backward_case(specs, extra=(), **arguments):
    def gradients(query, key, value, out_grad, *extra):
        named = name_extra(extra)
        differentiated = {name: named.pop(name) for name in ("bias",) if name in named}
        call = functools.partial(flash_attention, implementation="sm90", **named, **arguments)
        _, vjp = jax.vjp(lambda qkv, more: call(*qkv, **more), (query, key, value), differentiated)
        return vjp(out_grad)

    query = specs[0]
    sum_bytes = query.size * 4  # dQ is summed in fp32
    row_bytes = query.size // query.shape[-1] * 4
    return CompileCase(
        gradients,
        (*specs, query, *extra),
        max_temp_bytes=sum_bytes + 6 * row_bytes + 65536,
    )


def feature_cases(h, names=None, t=1024, n=4, batch=2):
    """A backward row, which holds the forward kernel too, for each feature (or those of names)."""
    spec = jax.ShapeDtypeStruct
    ids = spec((batch, t), jnp.int32)
    features = {
        "segments": {"q_segment_ids": ids, "kv_segment_ids": ids},
        "dropout": {"key_data": spec((2,), jnp.uint32)},
        "slopes": {"alibi_slopes": spec((n,), jnp.float32)},
        "bias": {"bias": spec((1, n, t, t), jnp.bfloat16)},
        "bias of keys": {"bias": spec((batch, 1, 1, t), jnp.float32)},
        "block mask": jax.eval_shape(lambda: jax.tree.map(jnp.asarray, block_mask(t, t))),
    }
    features["block mask, bias"] = features["block mask"] | features["bias"]
    return {
        f"flash_attention:backward H={h} {name}": unbounded(
            backward_case(
                shapes(t, t, n, n, h, batch),
                (features[name],),
                is_causal="block mask" not in name,
                dropout_rate=0.1 if name == "dropout" else 0.0,
            )
        )._replace(max_spill_bytes=SPILLS.get((h, name), 0))
        for name in names or features
    }


LENGTHS = (jax.ShapeDtypeStruct((2,), jnp.int32),) * 2
MANY = 64  # batch rows: more thread blocks than multiprocessors, which other calls here do not have
COMPILE = (
    {
        f"flash_attention:forward H={h} {'causal' if causal else 'full'}": forward_case(
            shapes(h=h, batch=MANY), is_causal=causal
        )
        for h in (64, 128, 256)
        for causal in (False, True)
    }
    | {
        f"flash_attention:backward H={h} {'causal' if causal else 'full'}": backward_case(
            shapes(h=h), is_causal=causal
        )
        for h in (64, 128, 256)
        for causal in (False, True)
    }
    | {
        "flash_attention:forward H=96": forward_case(shapes(h=96), is_causal=True),
        "flash_attention:forward value dim": forward_case((*shapes(h=64)[:2], shapes()[2]), is_causal=True),
        "flash_attention:forward long": forward_case(shapes(t=2048, s=2048), is_causal=True),
        "flash_attention:forward fp16": forward_case(shapes(dtype=jnp.float16), is_causal=True),
        "flash_attention:forward window": forward_case(
            shapes(), is_causal=True, local_window_size=(256, None)
        ),
        "flash_attention:forward soft cap": forward_case(shapes(), is_causal=True, logits_soft_cap=30.0),
        # Not a copy of the values: a tile of each row alone gets zeros beyond its length.
        "flash_attention:forward lengths": forward_case(shapes(), LENGTHS, is_causal=True)._replace(
            max_temp_bytes=shapes()[2].size
        ),
        "flash_attention:forward H=192": forward_case(shapes(h=192, batch=MANY)),
        "flash_attention:forward wide, long": forward_case(shapes(t=8192, s=8192, h=256)),
        "flash_attention:forward wide, value dim": forward_case(
            (*shapes(h=128)[:2], shapes(h=256)[2]), is_causal=True
        ),
        **{
            f"flash_attention:forward tiles of 80 keys, {name}": unbounded(
                forward_case(shapes(t=1000, s=1000, h=256, batch=MANY), is_causal=is_causal, config=config)
            )
            for name, is_causal, config in (
                ("full", False, EIGHTY),
                ("causal", True, EIGHTY),
                ("in turns", False, dataclasses.replace(EIGHTY, ping_pong=True)),
                ("folded", True, dataclasses.replace(EIGHTY, folds=True)),
                ("in order", True, dataclasses.replace(EIGHTY, overlap=False)),
            )
        },
        "flash_attention:forward one wave": forward_case(shapes(t=2048, s=2048, h=64), is_causal=True),
        "flash_attention:forward one wave, wide": forward_case(shapes(t=2048, s=2048, h=256), is_causal=True),
        "flash_attention:forward one wave, short": forward_case(shapes(h=64), is_causal=True),
        # No copies: the kernels end rows within an octet, and columns within a block, themselves.
        "flash_attention:forward odd, full": forward_case(shapes(t=333, s=777)),
        "flash_attention:forward odd, value dim": forward_case(
            (*shapes(t=1021, s=1021, h=72)[:2], shapes(t=1021, s=1021, h=40)[2]), is_causal=True
        ),
        **{
            f"flash_attention:backward odd, H={h}": backward_case(shapes(t=1021, s=1021, h=h), is_causal=True)
            for h in (40, 80, 128)
        },
        # Copies to rows of whole 16 bytes.
        "flash_attention:backward odd, H=36": unbounded(
            backward_case(shapes(t=1021, s=1021, n=3, k=3, h=36), is_causal=True)
        ),
        # dQ is summed in 192 columns.
        "flash_attention:backward odd, H=160": unbounded(
            backward_case(shapes(t=1021, s=1021, h=160), is_causal=True)
        ),
        "flash_attention:backward grouped heads": backward_case(
            shapes(k=1, h=64, batch=MANY), is_causal=True
        ),
        "flash_attention:backward window": backward_case(
            shapes(), is_causal=True, local_window_size=(256, None)
        ),
        "flash_attention:backward soft cap": backward_case(
            shapes(h=64, batch=MANY), is_causal=True, logits_soft_cap=30.0
        ),
        "flash_attention:backward lengths, odd": unbounded(
            backward_case(
                shapes(t=333, s=777, h=64),
                LENGTHS,
                is_causal=True,
                causal_alignment="bottom_right",
            )
        ),
    }
    | {
        f"flash_attention:backward, {name} on two devices": unbounded(
            backward_case(shapes(k=2, h=64), is_causal=True)
        )._replace(num_devices=2, partition=partition, keep_hlo=True)
        for name, partition in (("rows", ("devices",)), ("heads", (None, None, "devices")))
    }
    | {
        # No causal mask: nothing but the ids says which rows a tile has.
        "flash_attention:backward segments, full": unbounded(
            backward_case(
                shapes(h=64),
                (
                    dict.fromkeys(
                        ("q_segment_ids", "kv_segment_ids"), jax.ShapeDtypeStruct((2, 1024), jnp.int32)
                    ),
                ),
            )
        )
    }
    | {
        f"flash_attention:backward H={h} block mask of each head, grouped heads": unbounded(
            backward_case(
                shapes(k=1, h=h),
                (jax.eval_shape(lambda: block_mask(1024, 1024, heads=4)),),
                is_causal=is_causal,
                deterministic=True,  # the kernel that goes through the lists of a group
            )
        )
        for h, is_causal in ((64, True), (128, False))
    }
    | feature_cases(64, ("segments", "dropout", "bias"))
    | feature_cases(128)
    | feature_cases(256, ("dropout", "block mask", "block mask, bias"))
)
