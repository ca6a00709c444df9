"""vmap, checkpoint, sharded jit and ring attention with the kernels of the device; more where there are more
GPUs.
"""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn import SAVE_ATTENTION, dot_product_attention, from_zigzag, ring_attention, to_zigzag

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("JAXATTN_TEST_GPU") != "1", reason="needs a Hopper GPU"),
]

B, T, N, K, H = 2, 2048, 8, 2, 64
several = pytest.mark.skipif("jax.device_count() < 2", reason="needs two GPUs")


def inputs(dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, T, heads, H) for heads in (N, K, K, N)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients(attend):
    @jax.jit
    def run(q, k, v, out_grad):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(out_grad)

    return run


def alone(**options):
    return functools.partial(dot_product_attention, **options)


def assert_near(actual, expected, tolerance):
    for one, other in zip(jax.device_get(actual), jax.device_get(expected), strict=True):
        one, other = np.float32(one), np.float32(other)
        assert np.sqrt(np.mean((one - other) ** 2) / np.mean(other**2)) < tolerance


def assert_near_truth(actual, options):
    truth = with_gradients(alone(implementation="reference", **options))
    assert_near(actual, truth(*(x.astype(jnp.float32) for x in inputs())), 5e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_vmap_is_the_batch(dtype):
    operands = inputs(dtype)
    run = with_gradients(alone(is_causal=True))
    mapped = jax.vmap(run)(*(x[:, None] for x in operands))
    assert_near([x[:, 0] for x in mapped], run(*operands), 1e-3)


def test_checkpoint_keeps_what_the_backward_pass_needs():
    q, k, v, out_grad = inputs()
    counts, results = [], []
    for policy in (None, SAVE_ATTENTION):
        attend = jax.checkpoint(alone(is_causal=True), policy=policy)
        compiled = with_gradients(lambda q, k, v, attend=attend: attend(attend(q, k, v), k, v))
        compiled = compiled.lower(q, k, v, out_grad).compile()
        counts.append(compiled.as_text().count('custom_call_target="mosaic_gpu'))
        results.append(compiled(q, k, v, out_grad))
    assert counts[1] < counts[0]
    assert_near(*results, 1e-3)


@pytest.mark.parametrize("is_causal", [True, False])
def test_ring_of_four_on_one_device(is_causal):
    operands = inputs()
    local = functools.partial(ring_attention, is_causal=is_causal)
    ring = jax.vmap(local, in_axes=1, out_axes=1, axis_name="context")

    def attend(*qkv):
        parts = [to_zigzag(x, 4).reshape(B, 4, T // 4, *x.shape[2:]) for x in qkv]
        return from_zigzag(ring(*parts).reshape(B, T, N, H), 4)

    assert_near_truth(with_gradients(attend)(*operands), {"is_causal": is_causal})


@several
@pytest.mark.parametrize("is_causal", [True, False])
def test_ring_of_all_devices(is_causal):
    operands = inputs()
    num_devices = jax.device_count()
    mesh = Mesh(np.array(jax.devices()), ("context",), axis_types=(AxisType.Auto,))
    spec = P(None, "context")
    local = functools.partial(ring_attention, is_causal=is_causal)
    ring = jax.shard_map(local, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    attend = lambda *qkv: from_zigzag(ring(*(to_zigzag(x, num_devices) for x in qkv)), num_devices)
    sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in operands]
    assert_near_truth(with_gradients(attend)(*sharded), {"is_causal": is_causal})


@several
@pytest.mark.parametrize("spec", [P("x"), P(None, None, "x")])
def test_sharded_jit_moves_nothing(spec):
    operands = inputs()
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",), axis_types=(AxisType.Auto,))
    run = with_gradients(alone(is_causal=True))
    sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x in operands]
    compiled = run.lower(*sharded).compile()
    assert not re.search("all-gather|all-to-all|all-reduce", compiled.as_text())
    assert_near(compiled(*sharded), run(*operands), 1e-3)
