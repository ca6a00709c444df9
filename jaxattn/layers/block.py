"""The block most decoders are made of, and the run through a model's blocks, each traced and lowered once for
all layers.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxattn.layers.dropout import dropout
from jaxattn.layers.rope import Angles


class PreNormBlock(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on what is added; models make the parts."""

    attention_norm: nnx.Module
    attention: nnx.Module
    mlp_norm: nnx.Module
    mlp: nnx.Module
    dropout_rate: float

    def __call__(
        self,
        x: jax.Array,
        angles: Angles | None,
        attention: Any,
        layer: jax.Array,
        *,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        keys = (None,) * 3 if dropout_key is None else jax.random.split(dropout_key, 3)
        y, attention = self.attention(self.attention_norm(x), angles, attention, layer, dropout_key=keys[0])
        x = x + dropout(y, self.dropout_rate, keys[1])
        return x + dropout(self.mlp(self.mlp_norm(x)), self.dropout_rate, keys[2]), attention


def _block(
    graphdef: Any,
    params: nnx.State,
    hidden: jax.Array,
    angles: Angles | None,
    attention: Any,
    layer: jax.Array,
    dropout_key: jax.Array | None,
) -> tuple[jax.Array, Any]:
    return nnx.merge(graphdef, params)(hidden, angles, attention, layer, dropout_key=dropout_key)


# The layer index is traced: all layers share one jaxpr and one lowered function (and one kernel in it), which
# XLA inlines. Lowering 24 layers this way took 0.5 s where 24 copies took 7.5 s.
_run_block = jax.jit(_block, static_argnums=0)
_run_block_remat = jax.jit(jax.checkpoint(_block, static_argnums=(0,)), static_argnums=0)


def run_blocks(
    blocks: Sequence[nnx.Module],
    hidden: jax.Array,
    angles: Angles | None,
    attention: Any,
    *,
    dropout_key: jax.Array | None = None,
    remat: bool = False,
) -> tuple[jax.Array, Any]:
    """hidden[..., D] through every block, threading the attention object.

    With a dropout key layer l uses fold_in(key, l). With remat the backward recomputes each block from its
    input instead of keeping its activations (Chen et al. 2016).
    """
    run = _run_block_remat if remat else _run_block
    fold = functools.partial(jax.random.fold_in, dropout_key) if dropout_key is not None else lambda _: None
    for layer, block in enumerate(blocks):
        graphdef, params = nnx.split(block)
        hidden, attention = run(graphdef, params, hidden, angles, attention, np.int32(layer), fold(layer))
    return hidden, attention
