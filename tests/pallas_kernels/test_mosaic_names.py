"""Names for layout inference: those that JAX finds, whatever it prints for them."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import mosaic_names, paged_attention


def lower_decode() -> str:
    spec = jax.ShapeDtypeStruct
    query, pages = spec((3, 8, 64), jnp.bfloat16), spec((1, 9, 2, 16, 64), jnp.bfloat16)

    def attend(*arrays):
        return paged_attention(*arrays, implementation="sm90")

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", platform="gpu", num_cores=132)
    arrays = query, pages, pages, spec((3, 4), jnp.int32), spec((3,), jnp.int32)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        jax.clear_caches()
        return jax.jit(attend).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def test_quick_names_are_those_of_jax(monkeypatch):
    quick_name, names = mosaic_names.quick_name, []

    def compare(site):
        names.append(quick_name(site))
        assert names[-1] == mosaic_names.by_jax(site)
        return names[-1]

    monkeypatch.setattr(mosaic_names, "quick_name", compare)
    assert "mosaic_gpu" in lower_decode()
    assert len(set(names)) > 10


@pytest.mark.parametrize("name", ["SITE", "PATTERN"])
def test_a_jax_that_names_otherwise_is_left_alone(monkeypatch, name):
    monkeypatch.setattr(mosaic_names.SITE, "__str__", mosaic_names.by_jax)
    monkeypatch.setattr(mosaic_names, name, None)
    mosaic_names.use_quick_names()
    assert "mosaic_gpu" in lower_decode()
