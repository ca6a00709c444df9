"""Argument checks shared by the ops: a wrong call is a ValueError that names the argument, its value and what
is allowed.
"""

import math
import numbers
from collections.abc import Collection, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

FAR = 1 << 30  # beyond any sequence, and still an i32 where a position is added


def check_array(name: str, array: Any) -> None:
    """Holds an argument to what has a shape and a dtype."""
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        raise ValueError(f"{name} must be an array, got {type(array).__name__}")


def check_rank(name: str, array: Any, letters: str) -> None:
    """Holds an array to the number of dimensions that `letters` ("B T N H") names."""
    check_array(name, array)
    if array.ndim != len(letters.split()):
        raise ValueError(f"{name} must have the dimensions [{letters}], got shape {tuple(array.shape)}")
    if 0 in array.shape:
        raise ValueError(f"{name} must not be empty: every one of [{letters}] >= 1, got {tuple(array.shape)}")


def check_shape(name: str, array: Any, expected: Sequence[int | tuple[int, ...]], letters: str) -> None:
    """Holds an array to a shape; a tuple in `expected` lists the sizes allowed for that dimension."""
    check_array(name, array)
    allowed = [size if isinstance(size, tuple) else (size,) for size in expected]
    if array.ndim != len(allowed) or any(
        size not in sizes for size, sizes in zip(array.shape, allowed, strict=True)
    ):
        wanted = ", ".join("|".join(map(str, dict.fromkeys(sizes))) for sizes in allowed)
        raise ValueError(f"{name} must have shape [{letters}] = [{wanted}], got {tuple(array.shape)}")


def check_dtype(name: str, array: Any, allowed: Sequence[Any]) -> None:
    """Holds an array to one of the dtypes `allowed`."""
    if array.dtype not in [jnp.dtype(dtype) for dtype in allowed]:
        names = ", ".join(jnp.dtype(dtype).name for dtype in allowed)
        raise ValueError(f"{name} must have one of the dtypes ({names}), got {array.dtype}")


def check_integers(name: str, array: Any) -> None:
    """Holds an array to an integer dtype (ids, lengths, tables)."""
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(f"{name} must hold integers (int32), got {array.dtype}")


def as_int32(array: Any) -> Any:
    """Integers as i32, those beyond it at its ends: a cast would wrap them around to ids that there are.

    In NumPy where the array is NumPy's: without x64 JAX casts it before anything else.
    """
    ours, theirs = jnp.iinfo(jnp.int32), jnp.iinfo(array.dtype)
    if theirs.min < ours.min or theirs.max > ours.max:
        module = np if isinstance(array, np.ndarray) else jnp
        array = module.clip(array, max(ours.min, theirs.min), min(ours.max, theirs.max))
    return array.astype(jnp.int32)


def check_choice(name: str, value: Any, allowed: Collection[Any]) -> None:
    """Holds a static argument to a set of values."""
    try:
        is_allowed = value in allowed
    except (TypeError, ValueError):  # a list among keys, an array that has no truth
        is_allowed = False
    if not is_allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def is_int(value: Any) -> bool:
    """Whether a static argument is an integer, as which Python takes True and False too."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_bool(name: str, value: Any) -> bool:
    """Holds a static argument to True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be a bool, known when it is traced, got {describe(value)}")
    return bool(value)


def check_head_groups(num_heads: int, num_kv_heads: int) -> None:
    """Holds N to a multiple of K: each group of N/K query heads shares one KV head."""
    if num_heads % num_kv_heads:
        raise ValueError(
            f"query heads must be a multiple of the KV heads, got N = {num_heads} and K = {num_kv_heads}"
        )


def check_number(name: str, value: Any) -> float:
    """A static argument as a float: a number that float32 holds."""
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= float(jnp.finfo(jnp.float32).max):
        raise ValueError(f"{name} must be a finite number, known when it is traced, got {value!r}")
    return number


def check_soft_cap(logits_soft_cap: float | None) -> float | None:
    """Holds the soft cap to a positive number, or None for no cap."""
    if logits_soft_cap is None:
        return None
    number = check_number("logits_soft_cap", logits_soft_cap)
    if number < float(jnp.finfo(jnp.float32).tiny):
        raise ValueError(f"logits_soft_cap must be positive (or None), got {logits_soft_cap!r}")
    return number


def normalize_window(
    local_window_size: int | Sequence[int | None] | None, name: str = "local_window_size"
) -> tuple[int | None, int | None]:
    """Turns the window argument into (left, right): numbers of keys >= 0, None for an unbounded side."""
    if local_window_size is None:
        return None, None
    is_pair = isinstance(local_window_size, tuple | list)
    sides: Any = local_window_size if is_pair else (local_window_size,) * 2
    if len(sides) != 2 or not all(side is None or (is_int(side) and side >= 0) for side in sides):
        raise ValueError(
            f"{name} must be an int >= 0 or a pair (left, right) of such ints or None, "
            f"got {local_window_size!r}"
        )
    left, right = (None if side is None or side >= FAR else int(side) for side in sides)
    return left, right


def describe(value: Any) -> str:
    """An argument, for a message: of arrays the shape and dtype."""
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return f"{value.dtype}{list(value.shape)}" if is_array else repr(value)
