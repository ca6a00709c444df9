"""Compiles functions to sm_90a binaries on a machine with no GPU, and reads what the assembler says of them.

Runs under the Python of .venv-hopper (requirements-hopper.txt), in the compile worker; `setup` comes before
JAX is used.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

TARGET = Path(__file__).parent / "hopper_target.txtpb"  # an H200, as XLA describes one


class Assembled(NamedTuple):
    """What ptxas said of one kernel."""

    name: str
    registers: int
    spill_bytes: int


class Compiled(NamedTuple):
    """A compiled function: its kernels, and XLA's account of its memory."""

    kernels: list[Assembled]
    warnings: list[str]  # of ptxas
    temp_bytes: int
    alias_bytes: int
    hlo: str


def abstract_mesh(num_cores: int = 132):
    """For jax.sharding.use_abstract_mesh: what is traced under it is for an H200 that need not be here."""
    from jax.sharding import AbstractDevice, AbstractMesh

    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=num_cores)
    return AbstractMesh((), (), abstract_device=device)


def setup() -> None:
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # no cuDNN or cuBLAS here, and none needed
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"  # to standard output: a folder would get every pass's dump
    import jax

    jax.config.update("jax_platforms", "cpu")


def compile_for_hopper(function, specs, donate=(), num_devices=1, partition=()) -> Compiled:
    """Compiles function(*arrays of these specs) for an H200, or for several, a mesh axis "devices".

    All arrays, in and out, lie on them as the PartitionSpec `partition` says.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    topology = topologies.get_topology_desc(
        "", "cuda", topology=f"1x{num_devices}x1", target_config=TARGET.read_text()
    )
    sharding = NamedSharding(Mesh(np.array(topology.devices), ("devices",)), PartitionSpec(*partition))
    specs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), specs)
    with jax.default_device(topology.devices[0]), jax.sharding.use_abstract_mesh(abstract_mesh()):
        jitted = jax.jit(function, out_shardings=sharding, donate_argnums=donate)
        lowered = jitted.trace(*specs).lower(lowering_platforms=("cuda",))
        compiled, output = _with_output(lowered.compile)
    memory = compiled.memory_analysis()
    return Compiled(
        _kernels_in(output),
        _warnings_in(output),
        memory.temp_size_in_bytes,
        memory.alias_size_in_bytes,
        compiled.as_text(),
    )


def _with_output(function: Callable[[], Any]) -> tuple[Any, str]:
    """What function() returns, and what it writes to standard output, from C++ too."""
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            result = function()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return result, file.read().decode(errors="replace")


def _kernels_in(output: str) -> list[Assembled]:
    _, *parts = re.split(r"Compiling entry function '(\w+)'", output)
    kernels = []
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        # Behind the stack frame: a warning of spills stands before the name of its kernel.
        spills = re.search(r"stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.search(r"Used (\d+) registers", text)
        assert spills, text
        assert registers, text
        kernels.append(Assembled(name, int(registers[1]), max(map(int, spills.groups()))))
    return kernels


def _warnings_in(output: str) -> list[str]:
    return [line.strip() for line in output.splitlines() if "warning" in line.lower() or "C75" in line]
