"""The two feed-forward layers: GPT-2's and LLaMA's."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers


class MLP(nnx.Module):
    """gelu(x . up + b) . down + b, with the tanh form of GELU (GPT-2)."""

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        stddev: float,
        out_stddev: float,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
    ):
        init, out_init = initializers.normal(stddev), initializers.normal(out_stddev)
        self.up = nnx.Linear(embed_dim, mlp_dim, kernel_init=init, param_dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(mlp_dim, embed_dim, kernel_init=out_init, param_dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


class GatedMLP(nnx.Module):
    """(silu(x . gate) * (x . up)) . down (SwiGLU, Shazeer 2020; LLaMA).

    gate and up are one kernel[D, 2, F]: one matmul reads x once, and the axis F can be sharded.
    """

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        *,
        use_bias: bool,
        stddev: float,
        out_stddev: float,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
    ):
        options = {"use_bias": use_bias, "param_dtype": dtype, "rngs": rngs}
        init, out_init = initializers.normal(stddev), initializers.normal(out_stddev)
        self.gate_up = nnx.LinearGeneral(embed_dim, (2, mlp_dim), kernel_init=init, **options)
        self.down = nnx.Linear(mlp_dim, embed_dim, kernel_init=out_init, **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_up = self.gate_up(x)
        return self.down(jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :])
