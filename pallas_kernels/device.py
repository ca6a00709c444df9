"""What the default device is. Nothing here runs at import: asking touches the backend."""

import functools

import jax


@functools.cache
def is_hopper() -> bool:
    """Says whether the first device of the default backend is an NVIDIA GPU of compute capability 9.x."""
    device = jax.devices()[0]
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")).startswith("9.")
