"""Who computes attention in flash_attention.py: ours and the peers, behind one signature.

PEERS[name](row) gives attend(query, key, value, extras), or raises NotImplementedError with why it cannot do
that row. `extras` are arrays beside Q, K and V (lengths, segment ids), as `extras_of` makes them.
"""

import functools
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_rows import Row, document_lengths

from pallas_kernels import flash_attention

MAX_LOGITS_BYTES = 4.5e9  # of the rows XLA computes: several copies of the logits live at one time


def extras_of(row: Row) -> dict[str, Any]:
    """Lengths of padded rows; ids, lengths and offsets of packed documents; tiles of a block mask."""
    if row.density:
        return {"block_mask": jax.tree.map(jnp.asarray, row.block_mask.tiles())}
    if not row.ragged:
        return {}
    lengths = document_lengths(row)
    if row.ragged == "lengths":
        return {"lengths": jnp.asarray(lengths[:, 0])}
    ids = np.stack([np.repeat(np.arange(len(one)), one) for one in lengths])
    offsets = np.concatenate([np.zeros((row.B, 1)), np.cumsum(lengths, axis=1)], axis=1)
    arrays = {"ids": ids, "lengths": lengths, "offsets": offsets}
    return {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}


def ours(row: Row) -> Callable:
    def attend(query, key, value, extras):
        names = {"lengths": ("q_lengths", "kv_lengths"), "segments": ("q_segment_ids", "kv_segment_ids")}
        given = extras.get("ids", extras.get("lengths"))
        return flash_attention(
            query,
            key,
            value,
            is_causal=row.causal,
            local_window_size=(row.window - 1, 0) if row.window else None,
            block_mask=extras.get("block_mask"),
            deterministic=row.deterministic,
            implementation="sm90",
            **dict.fromkeys(names.get(row.ragged, ()), given),
        )

    return attend


def cudnn(row: Row) -> Callable:
    """cuDNN as JAX reaches it; packed documents through the offsets that jax.nn does not show."""
    if row.density:
        raise NotImplementedError("it has no block-sparse masks")
    if row.dtype == "float32":
        raise NotImplementedError("it takes 16 bits")
    if row.ragged == "segments":
        return _cudnn_packed(row)

    def attend(query, key, value, extras):
        return jax.nn.dot_product_attention(
            query, key, value, implementation="cudnn", **_options(row, extras)
        )

    return attend


def _cudnn_packed(row: Row) -> Callable:
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    mask_type = fused.MaskType.PADDING_CAUSAL if row.causal else fused.MaskType.PADDING

    def attend(query, key, value, extras):
        lengths, offsets = extras["lengths"], extras["offsets"]
        return fused.dot_product_attention(
            query,
            key,
            value,
            q_seqlen=lengths,
            kv_seqlen=lengths,
            q_offsets=offsets,
            kv_offsets=offsets,
            scale=row.H**-0.5,
            mask_type=mask_type,
        )

    return attend


def has_standard(row: Row) -> bool:
    """Says whether standard attention is measured: where its logits fit, in the main table and float32."""
    return row.section in ("main", "float32", "given") and row.logits_bytes <= MAX_LOGITS_BYTES


def xla(row: Row) -> Callable:
    """Standard attention: the logits are stored."""
    if row.logits_bytes > MAX_LOGITS_BYTES:
        raise NotImplementedError(f"its logits take {row.logits_bytes / 1e9:.0f} GB")

    dense = jnp.asarray(row.block_mask.to_dense()) if row.density else None

    def attend(query, key, value, extras):
        options = {**_options(row, extras), "mask": dense}
        if row.ragged == "segments":
            options["mask"] = (extras["ids"][:, :, None] == extras["ids"][:, None, :])[:, None]
        return jax.nn.dot_product_attention(query, key, value, implementation="xla", **options)

    return attend


def _options(row: Row, extras: dict[str, jax.Array]) -> dict[str, Any]:
    options: dict[str, Any] = {"is_causal": row.causal}
    if row.window:
        options["local_window_size"] = (row.window - 1, 0)
    if row.ragged == "lengths":
        options |= dict.fromkeys(("query_seq_lengths", "key_value_seq_lengths"), extras["lengths"])
    return options


def tokamax(row: Row) -> Callable:
    if row.ragged == "segments" or row.density:
        raise NotImplementedError("it takes segments and blocks only as a T x S mask")
    if row.deterministic:
        raise NotImplementedError("it has no deterministic switch")
    if row.dtype == "float32":
        raise NotImplementedError("float32 is compared with standard attention alone, in TF32")
    module = _import_tokamax()

    def attend(query, key, value, extras):
        return module.dot_product_attention(
            query, key, value, implementation="mosaic", **_options(row, extras)
        )

    return attend


@functools.cache
def _import_tokamax() -> Any:
    """Tokamax imports a profiler's command line that an installation need not have: an empty one does."""
    for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
        stub: Any = types.ModuleType(name)
        stub.__path__ = []
        sys.modules.setdefault(name, stub)
    sys.modules["xprof.cli.tools"].__dict__.setdefault("get_kernel_stats_tool", None)
    try:
        return importlib.import_module("tokamax")
    except ImportError as error:
        raise NotImplementedError(f"not installed: {error}") from error


OURS, STANDARD = "jaxattn", "xla"
PEERS: dict[str, Callable[[Row], Callable]] = {OURS: ours, "cudnn": cudnn, "tokamax": tokamax, STANDARD: xla}


def forward_and_backward(attend: Callable) -> Callable:
    """attend with its vector-Jacobian product, as training runs it."""

    def step(query, key, value, out_grad, extras):
        out, vjp = jax.vjp(lambda *qkv: attend(*qkv, extras), query, key, value)
        return out, vjp(out_grad)

    return step


def arrays_of(row: Row) -> list[jax.Array]:
    """Random query, key, value and cotangent of the output."""
    shapes = [(row.B, row.T, row.N, row.H), *[(row.B, row.S, row.K, row.H)] * 2, (row.B, row.T, row.N, row.H)]
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape, row.dtype) for key, shape in zip(keys, shapes, strict=True)]
