"""Rotary position embedding (Su et al. 2021), in the half-split order of LLaMA on Hugging Face."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

type Angles = tuple[
    jax.Array, jax.Array
]  # cos, sin: f32[..., 1, H/2], the axis of length 1 is that of the heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    kind "linear": every frequency divided by factor. kind "llama3" (Llama 3.1): wavelengths longer than
    original_max_positions / low_freq_factor divided by factor, those shorter than
    original_max_positions / high_freq_factor kept, a linear blend between.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rope_scaling.kind={self.kind!r}: must be 'linear' or 'llama3'")
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor={self.factor!r}: must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            low, high = self.low_freq_factor, self.high_freq_factor
            raise ValueError(
                f"rope_scaling.low_freq_factor={low!r}: must be in (0, high_freq_factor={high!r})"
            )


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """theta^(-2i/H) for i in 0 .. H/2 - 1, stretched as `RopeScaling` says; f32[H/2], radians a token."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return frequencies.astype(np.float32)
    stretched = frequencies / scaling.factor
    if scaling.kind == "linear":
        return stretched.astype(np.float32)
    turns = scaling.original_max_positions * frequencies / (2 * math.pi)  # full turns in the trained context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (kept * frequencies + (1 - kept) * stretched).astype(np.float32)


def rope_angles(positions: jax.Array, frequencies: np.ndarray) -> Angles:
    """cos and sin of position * frequency: positions i32[...] -> two of f32[..., 1, H/2]."""
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, angles: Angles) -> jax.Array:
    """Turns the pairs (x[i], x[i + H/2]) of x[..., N, H] by the angles, in float32."""
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
