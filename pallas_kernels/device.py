"""What the default device is. Nothing here runs at import: asking touches the backend."""

from typing import Any

import jax

NUM_MULTIPROCESSORS = 132  # of an H100 or H200, where no GPU is there to be asked


def default_device() -> Any:
    """Where computations go that no array says otherwise of: jax.default_device, or the first one."""
    chosen = jax.config.jax_default_device
    if isinstance(chosen, jax.Device):
        return chosen
    return jax.devices(chosen)[0]  # of a platform, or of the default backend


def is_hopper() -> bool:
    """Says whether the default device is an NVIDIA GPU of compute capability 9.x."""
    device = default_device()
    return device.platform == "gpu" and str(getattr(device, "compute_capability", "")).startswith("9.")


def device_name() -> str:
    """What the default device is called."""
    return default_device().device_kind


def is_abstract_gpu() -> bool:
    """Says whether what is traced is for a GPU that need not be here: jax.sharding.AbstractDevice."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return abstract is not None and abstract.platform == "gpu"


def num_multiprocessors() -> int:
    """Counts the multiprocessors of the device that is compiled for: an abstract one where there is such."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.num_cores:  # None: of a CPU
        return abstract.num_cores
    device = default_device()
    return device.core_count if device.platform == "gpu" else NUM_MULTIPROCESSORS
