"""A table of vectors that reads tokens in and, transposed, scores them on the way out."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers


@jax.custom_vjp
def _scores(hidden: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)


def _scores_forward(hidden: jax.Array, table: jax.Array):
    return _scores(hidden, table), (hidden, table)


def _scores_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    # The float32 gradient of bfloat16 operands would turn both matmuls of the backward into float32 ones,
    # at a sixteenth of the tensor cores' rate: it is rounded to the operands' dtype, as their inputs are.
    hidden, table = saved
    gradient = gradient.astype(table.dtype)
    wide = {"preferred_element_type": jnp.float32}
    d_hidden = jnp.einsum("...v,vd->...d", gradient, table, **wide)
    d_table = jnp.einsum("...v,...d->vd", gradient, hidden, **wide)
    return d_hidden.astype(hidden.dtype), d_table.astype(table.dtype)


_scores.defvjp(_scores_forward, _scores_backward)


@jax.custom_vjp
def _look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(table, ids, axis=0, mode="clip")


def _look_up_forward(table: jax.Array, ids: jax.Array):
    return _look_up(table, ids), (table, ids)


def _look_up_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    # A frequent token gathers thousands of gradients: a bfloat16 sum would round most of them away.
    table, ids = saved
    rows = jnp.clip(ids, 0, table.shape[0] - 1)
    d_table = jnp.zeros(table.shape, jnp.float32).at[rows].add(gradient.astype(jnp.float32))
    return d_table.astype(table.dtype), None


_look_up.defvjp(_look_up_forward, _look_up_backward)


class Embedding(nnx.Module):
    """table[V, D]: `embedding(ids)` reads rows, `embedding.attend(hidden)` gives hidden . table^T in
    float32."""

    def __init__(
        self, size: int, embed_dim: int, *, stddev: float, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32
    ):
        init = initializers.normal(stddev)
        self.table = nnx.Param(init(rngs.params(), (size, embed_dim), jnp.float32).astype(dtype))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return _look_up(self.table[...], ids)

    def attend(self, hidden: jax.Array) -> jax.Array:
        return _scores(hidden, self.table[...])
