"""Compiles functions to sm_90a binaries on a machine with no GPU, and reads what the assembler says of them.

Runs under the Python of .venv-hopper (requirements-hopper.txt), in the compile worker; `setup` comes before
JAX is used.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

TARGET = Path(__file__).parent / "hopper_target.txtpb"  # an H200, as XLA describes one


class Assembled(NamedTuple):
    """What ptxas said of one kernel."""

    name: str
    registers: int
    spill_bytes: int
    warnings: list[str]


class Compiled(NamedTuple):
    """A compiled function: its kernels, and XLA's account of its memory."""

    kernels: list[Assembled]
    temp_bytes: int
    alias_bytes: int
    hlo: str


def setup() -> None:
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # no cuDNN or cuBLAS here, and none needed
    os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"
    os.environ["MOSAIC_GPU_DUMP_TO"] = tempfile.mkdtemp(prefix="ptxas-")
    import jax

    jax.config.update("jax_platforms", "cpu")


def compile_for_hopper(function, specs, donate=(), num_devices=1, partition=()) -> Compiled:
    """Compiles function(*arrays of these specs) for an H200, or for several, a mesh axis "devices".

    All arrays, in and out, lie on them as the PartitionSpec `partition` says.
    """
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

    dump = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    topology = topologies.get_topology_desc(
        "", "cuda", topology=f"1x{num_devices}x1", target_config=TARGET.read_text()
    )
    sharding = NamedSharding(Mesh(np.array(topology.devices), ("devices",)), PartitionSpec(*partition))
    specs = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), specs)
    device = AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    mesh = AbstractMesh((), (), abstract_device=device)
    with jax.default_device(topology.devices[0]), jax.sharding.use_abstract_mesh(mesh):
        jitted = jax.jit(function, out_shardings=sharding, donate_argnums=donate)
        compiled = jitted.trace(*specs).lower(lowering_platforms=("cuda",)).compile()
    memory = compiled.memory_analysis()
    kernels = [_read_dump(path) for path in sorted(dump.glob("*.ptxas"))]
    shutil.rmtree(dump)
    dump.mkdir()
    return Compiled(kernels, memory.temp_size_in_bytes, memory.alias_size_in_bytes, compiled.as_text())


def _read_dump(path: Path) -> Assembled:
    text = path.read_text()
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", text)
    registers = re.findall(r"Used (\d+) registers", text)
    warnings = [line.strip() for line in text.splitlines() if "warning" in line.lower() or "C75" in line]
    return Assembled(
        path.stem, max(map(int, registers), default=0), max(map(int, spills), default=0), warnings
    )
