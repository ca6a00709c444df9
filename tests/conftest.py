"""Tests run on the CPU unless JAXATTN_TEST_GPU=1; eight simulated devices stand in for a mesh.

Most of the time of a test on the CPU is XLA's, which compiles a program to run it once: unless XLA_FLAGS says
otherwise, it leaves out what only makes the program faster. `make test-all` compiles as users do.
"""

import os

XLA_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",  # those go through MLIR, pass by pass
)

if os.environ.get("JAXATTN_TEST_GPU") != "1":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_FLAGS", " ".join(XLA_FLAGS))
