"""Kernels inside shard_map, where the type of an array says along which mesh axes it differs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def vary(tree: Any) -> Any:
    """Inside shard_map: arrays that differ along the axes along which any of them does.

    Kernels then see one kind of array, and autodiff sums the gradients of those that all devices share.
    """
    names = varying(tree)
    return jax.tree.map(lambda x: vary_along(x, names), tree)


def varying(tree: Any) -> frozenset[str]:
    """The mesh axes along which any array of a tree differs."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def vary_along(x: jax.Array, names: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(names - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def unsupported_layout(tree: Any) -> str | None:
    """Says why kernels cannot take the arrays of a tree outside shard_map, or None if they can."""
    specs = [jax.typeof(x).sharding.spec for x in jax.tree.leaves(tree)]
    if any(axis is not None for spec in specs for axis in spec):
        return (
            "arrays are divided along explicit mesh axes: call it inside shard_map, each device with its part"
        )
    return None


def in_32_bits(function: Callable) -> Callable:
    """The function, traced as without jax_enable_x64: numbers in kernels have 32 bits."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with jax.enable_x64(False):
            return function(*arguments)

    return call


def jit_kernels(num_static: int) -> Callable[[Callable], Callable]:
    """jax.jit, the first num_static arguments static, for functions that call kernels.

    The layers of an unrolled model then share one trace and one lowered kernel. Inside shard_map a function
    is traced for arrays without mesh axes: kernels write to references, and Pallas takes none that differ.
    """

    def decorate(function: Callable) -> Callable:
        jitted = jax.jit(function, static_argnums=tuple(range(num_static)))

        @functools.wraps(function)
        @jax.enable_x64(False)
        def call(*arguments: Any) -> Any:
            static, arrays = arguments[:num_static], arguments[num_static:]
            if not (names := varying(arrays)):
                return jitted(*arguments)
            plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
            results = jitted.trace(*static, *plain)(*arrays)
            return jax.tree.map(lambda x: vary_along(x, names), results)

        return call

    return decorate
