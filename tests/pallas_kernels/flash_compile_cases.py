"""Rows of tables.py for flash_attention, compiled: what flash_cases.py interprets at sizes that ship."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import flash_attention
from tests.pallas_kernels.flash_cases import EIGHTY
from tests.pallas_kernels.flash_features import block_mask
from tests.pallas_kernels.tables import CompileCase

PERSISTENT_SPILLS = 24  # bytes, under a block mask at H = 128: backward_fused_items.is_persistent says why
# At H = 256 they are the forward's, used once an item (with a block mask 24 by ptxas 13.0, 28 by 13.5).
SPILLS = {(128, "block mask"): PERSISTENT_SPILLS, (256, "dropout"): 36, (256, "block mask"): 28}
SPILLS |= {(256, "block mask, bias"): 36}  # 32 by 13.0


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
INTERPRET = {}
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
        "flash_attention:forward H=192 long": forward_case(shapes(t=4096, s=4096, h=192)),
        "flash_attention:forward H=160": forward_case(shapes(h=160, batch=MANY), is_causal=True),
        # Tiles that short rows leave least of empty: of 128 and of 64 keys, in two warpgroups and in three.
        **{
            f"flash_attention:backward T={t}, H={h}": unbounded(backward_case(shapes(t, t, h=h, batch=MANY)))
            for t, h in ((40, 64), (128, 64), (197, 64), (257, 64), (384, 64), (384, 32), (384, 128))
        },
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
            f"flash_attention:forward odd, H={h} {'causal' if is_causal else 'full'}": forward_case(
                shapes(h=h, batch=MANY), is_causal=is_causal
            )
            for h, is_causal in ((40, True), (72, False), (104, True), (136, False))
        },
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
