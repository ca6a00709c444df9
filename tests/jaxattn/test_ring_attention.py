"""Ring attention on simulated devices against attention on one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn import (
    SAVE_ATTENTION,
    dot_product_attention,
    from_zigzag,
    ring_attention,
    to_zigzag,
    zigzag_positions,
)

B, CHUNK, N, K, H = 2, 6, 4, 2, 8
SPEC = P("data", "context", "tensor")


def mesh_of(data, context, tensor, axis_type=AxisType.Auto):
    devices = np.array(jax.devices()[: data * context * tensor]).reshape(data, context, tensor)
    return Mesh(devices, ("data", "context", "tensor"), axis_types=(axis_type,) * 3)


def inputs(num_devices, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, 2 * CHUNK * num_devices, heads, H) for heads in (N, K, K, N)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def with_gradients(attend):
    @jax.jit
    def run(q, k, v, out_grad):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(out_grad)

    return run


def on_ring(mesh, check_vma=True, spec=SPEC, axis_names=frozenset(), **options):
    """Whole arrays in order, in and out."""
    num_devices = mesh.shape["context"]
    attend = functools.partial(ring_attention, **options)
    attend = jax.shard_map(
        attend, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=check_vma, axis_names=axis_names
    )
    return lambda *qkv: from_zigzag(attend(*(to_zigzag(x, num_devices) for x in qkv)), num_devices)


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        ((1, 8, 1), {"is_causal": True}),
        ((1, 3, 1), {"is_causal": True, "logits_soft_cap": 2.0, "scale": 0.4}),
        ((2, 2, 2), {"is_causal": True}),
        ((1, 1, 1), {"is_causal": True}),
        ((1, 4, 2), {}),
    ],
)
def test_equals_one_device(devices, options):
    operands = inputs(devices[1])
    expected = with_gradients(functools.partial(dot_product_attention, **options))(*operands)
    actual = with_gradients(on_ring(mesh_of(*devices), **options))(*operands)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6)


def test_inside_a_shard_map_along_its_axis_alone():
    operands = inputs(2)
    expected = with_gradients(functools.partial(dot_product_attention, is_causal=True))(*operands)
    mesh = mesh_of(2, 2, 2)
    attend = on_ring(mesh, spec=P(None, "context"), axis_names={"context"}, is_causal=True)
    sharded = [jax.device_put(x, NamedSharding(mesh, SPEC)) for x in operands]
    for one, other in zip(with_gradients(attend)(*sharded), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6)


def test_on_an_explicit_mesh():
    operands = inputs(2)
    expected = with_gradients(functools.partial(dot_product_attention, is_causal=True))(*operands)
    mesh = mesh_of(2, 2, 2, AxisType.Explicit)
    sharded = [jax.device_put(x, NamedSharding(mesh, SPEC)) for x in operands]
    actual = with_gradients(on_ring(mesh, is_causal=True))(*sharded)
    for one, other in zip(actual, expected, strict=True):
        assert one.sharding.is_equivalent_to(sharded[0].sharding, 4)
        np.testing.assert_allclose(one, other, atol=3e-6)


def test_in_bfloat16_it_is_as_near_the_truth_as_one_device():
    operands = inputs(4, jnp.bfloat16)
    truth = with_gradients(functools.partial(dot_product_attention, is_causal=True))(
        *(x.astype(jnp.float32) for x in operands)
    )
    actual = with_gradients(on_ring(mesh_of(1, 4, 1), is_causal=True))(*operands)
    for one, other in zip(actual, truth, strict=True):
        error = jnp.sqrt(jnp.mean((one.astype(jnp.float32) - other) ** 2) / jnp.mean(other**2))
        assert error < 5e-3


def test_large_logits_do_not_overflow_the_sums():
    q, k, v, out_grad = inputs(4)
    q = q.at[:, : 2 * CHUNK].multiply(100)
    expected = with_gradients(functools.partial(dot_product_attention, is_causal=True))(q, k, v, out_grad)
    actual = with_gradients(on_ring(mesh_of(1, 4, 1), is_causal=True))(q, k, v, out_grad)
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


def test_no_device_ever_holds_all_keys():
    num_devices = 8
    operands = inputs(num_devices)
    mesh = mesh_of(1, num_devices, 1)
    gradients = jax.grad(lambda *x: ring_attention(*x, is_causal=True).sum(), (0, 1, 2))
    local = jax.shard_map(gradients, mesh=mesh, in_specs=(SPEC,) * 3, out_specs=(SPEC,) * 3)
    sharded = [jax.device_put(x, NamedSharding(mesh, SPEC)) for x in operands[:3]]
    compiled = jax.jit(local).lower(*sharded).compile().as_text()
    assert "collective-permute" in compiled
    assert not re.search("all-gather|all-reduce|all-to-all", compiled)
    assert f"f32[{B},{2 * CHUNK * num_devices}," not in compiled


def test_checkpoint_saves_its_output_too():
    q, k, v, _ = inputs(2)
    texts = []
    for policy in (None, SAVE_ATTENTION):
        attend = jax.checkpoint(on_ring(mesh_of(1, 2, 1), is_causal=True), policy=policy)
        step = jax.grad(lambda x, attend=attend: attend(attend(x, k, v), k, v).sum())
        texts.append(jax.jit(step).lower(q).as_text())
    forwards = [len(re.findall("call @_forward", text)) for text in texts]
    assert forwards[1] < forwards[0]


def test_zigzag_balances_and_returns():
    positions = zigzag_positions(24, 3).reshape(3, 8)
    assert positions.tolist()[1] == [4, 5, 6, 7, 16, 17, 18, 19]
    seen = (positions[:, :, None] >= np.arange(24)).sum((1, 2))  # (query, key) pairs of each device
    assert len(set(seen)) == 1
    x = jnp.arange(48).reshape(2, 24)
    np.testing.assert_array_equal(to_zigzag(x, 3)[0], positions.reshape(-1))
    np.testing.assert_array_equal(from_zigzag(to_zigzag(x, 3), 3), x)
    mesh = mesh_of(1, 4, 2, AxisType.Explicit)
    x = jax.device_put(x, NamedSharding(mesh, P(None, "context")))
    for axis in (1, -1):
        np.testing.assert_array_equal(to_zigzag(x, 3, axis=axis)[0], positions.reshape(-1))
        np.testing.assert_array_equal(from_zigzag(to_zigzag(x, 3), 3, axis=axis), x)


def test_bad_calls_name_the_argument():
    q, k, v, _ = inputs(2)
    with pytest.raises(ValueError, match="axis_name"):
        ring_attention(q, k, v)
    with pytest.raises(ValueError, match="num_tokens"):
        zigzag_positions(26, 3)
    with pytest.raises(ValueError, match="num_devices"):
        zigzag_positions(32, 0)
    for name, wrong in {
        "num_devices": (16, 4.0),
        "num_tokens": ("a", 4),
        r"num_tokens .*16\.0": (16.0, 4),
    }.items():
        with pytest.raises(ValueError, match=f"{name}.*"):
            zigzag_positions(*wrong)
    on_two = functools.partial(jax.shard_map, mesh=mesh_of(1, 2, 1), in_specs=(SPEC,) * 3, out_specs=SPEC)
    with pytest.raises(ValueError, match="query must have an even"):
        on_two(functools.partial(ring_attention, is_causal=True))(*(x[:, :-2] for x in (q, k, v)))
    with pytest.raises(ValueError, match="key must have as many"):
        on_two(ring_attention)(q, k[:, :-2], v[:, :-2])
    with pytest.raises(ValueError, match="value must have shape"):
        on_two(ring_attention)(q, k, v[:, :-2])
    with pytest.raises(ValueError, match="query must have the dimensions"):
        on_two(lambda q, k, v: ring_attention(q[0], k[0], v[0]))(q, k, v)
    with pytest.raises(ValueError, match="is_causal must be a bool"):
        on_two(functools.partial(ring_attention, is_causal="no"))(q, k, v)
    with pytest.raises(ValueError, match="logits_soft_cap"):
        on_two(functools.partial(ring_attention, logits_soft_cap=-1.0))(q, k, v)
