"""Tests run on the CPU unless JAXATTN_TEST_GPU=1; eight simulated devices stand in for a mesh."""

import os

if os.environ.get("JAXATTN_TEST_GPU") != "1":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
