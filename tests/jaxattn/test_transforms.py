"""Attention under vmap, sharded jit, shard_map, checkpoint and scan, on eight simulated devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxattn import SAVE_ATTENTION, BlockMask, dot_product_attention
from pallas_kernels import device, flash_attention

B, T, N, K, H = 4, 24, 8, 4, 8
DROPOUT = {"dropout_rate": 0.3, "dropout_key": jax.random.key(5)}
HEADS = BlockMask.random(T, density=0.4, num_heads=N, tile=(8, 8))
LENGTHS = jnp.array([24, 0, 5, 24], jnp.int32)
OPTIONS = {
    "dropout": DROPOUT,
    "lengths": {"query_seq_lengths": LENGTHS, "key_value_seq_lengths": LENGTHS, "logits_soft_cap": 2.0},
    "block mask": {"block_mask": HEADS},
}


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def inputs(num_heads=N, num_kv_heads=K):
    return tuple(random(i, B, T, heads, H) for i, heads in enumerate((num_heads, num_kv_heads, num_kv_heads)))


def gradients(*operands, **options):
    """Of query, key, value and, where it is given, the bias."""

    def total(*operands):
        return jnp.sin(dot_product_attention(*operands, is_causal=True, **options)).sum()

    return jax.jit(jax.grad(total, argnums=tuple(range(len(operands)))))(*operands)


def assert_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-6, rtol=3e-6)


# --- vmap ---


@pytest.mark.parametrize("name", OPTIONS)
def test_vmap_is_a_loop(name):
    q, k, v = inputs()
    call = functools.partial(gradients, **OPTIONS[name])
    mapped = jax.jit(jax.vmap(call, in_axes=(0, 0, None)))(jnp.stack([q, 2 * q]), jnp.stack([k, -k]), v)
    for i, operands in enumerate(((q, k), (2 * q, -k))):
        assert_close([x[i] for x in mapped], call(*operands, v))


def test_vmap_of_what_has_no_batch_dimension():
    q, k, v = inputs()
    bias = random(9, 1, N, T, T)
    mapped = jax.vmap(gradients, in_axes=(0, None, None, None))(jnp.stack([q, 2 * q]), k, v, bias)
    assert_close([x[1] for x in mapped], gradients(2 * q, k, v, bias))


def test_vmap_over_rows_is_the_batch():
    q, k, v = inputs()
    nested = jax.vmap(jax.vmap(lambda q, k, v: dot_product_attention(q, k, v, is_causal=True)))
    pairs = [x.reshape(2, 2, *x.shape[1:]) for x in (q, k, v)]
    expected = dot_product_attention(q, k, v, is_causal=True)
    assert_close(nested(*pairs).reshape(q.shape)[None], expected[None])
    jaxpr = str(jax.make_jaxpr(nested)(*pairs))
    assert "scan" not in jaxpr
    assert "while" not in jaxpr


# --- devices ---


def mesh_of(data, tensor, axis_type=AxisType.Auto):
    devices = np.array(jax.devices()[: data * tensor]).reshape(data, tensor)
    return Mesh(devices, ("data", "tensor"), axis_types=(axis_type,) * 2)


def put(mesh, operands, specs):
    return [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(operands, specs, strict=True)]


ROWS_AND_HEADS = P("data", None, "tensor")
SPECS = (ROWS_AND_HEADS,) * 3


def collectives(compiled):
    return set(re.findall(r"(all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter)", compiled))


@pytest.mark.parametrize("name", OPTIONS)
def test_sharded_jit_moves_nothing(name):
    operands = inputs()
    call = jax.jit(functools.partial(gradients, **OPTIONS[name]))
    expected = call(*operands)
    sharded = put(mesh_of(2, 4), operands, SPECS)
    assert collectives(call.lower(*sharded).compile().as_text()) == set()
    actual = call(*sharded)
    assert_close(actual, expected)
    assert all(x.sharding.is_equivalent_to(sharded[0].sharding, 4) for x in actual)


@pytest.mark.parametrize(
    ("num_kv_heads", "kv_spec", "moved"),
    [
        (1, P("data"), {"all-reduce"}),  # each device holds the KV head; its gradients are summed
        (2, P("data"), {"all-reduce"}),  # of two, each device takes the one of its heads
        (4, P("data"), {"all-gather"}),  # of the gradients only
    ],
)
def test_query_heads_divided_further_than_kv_heads(num_kv_heads, kv_spec, moved):
    operands = inputs(N, num_kv_heads)
    call = jax.jit(gradients)
    sharded = put(mesh_of(2, 4), operands, (ROWS_AND_HEADS, kv_spec, kv_spec))
    assert_close(call(*sharded), call(*operands))
    assert moved in (None, collectives(call.lower(*sharded).compile().as_text()))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["dropout", "sinks"])
def test_eight_devices_share_two_kv_heads(axis_type, name):
    operands = inputs(8, 2)
    options = {"sinks": jnp.arange(8.0)} if name == "sinks" else OPTIONS[name]
    call = jax.jit(functools.partial(gradients, **options))
    specs = (P(None, None, "tensor"), P(), P())
    sharded = put(mesh_of(1, 8, axis_type), operands, specs)
    actual = call(*sharded)
    assert_close(jax.device_get(actual), call(*operands))
    assert collectives(call.lower(*sharded).compile().as_text()) <= {"all-reduce"}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_gradient_of_a_bias_is_summed_over_devices(axis_type):
    operands = (*inputs(), random(9, 1, N, T, T))
    call = jax.jit(gradients)
    sharded = put(mesh_of(2, 4, axis_type), operands, (*SPECS, P(None, "tensor")))
    actual = call(*sharded)
    assert_close(jax.device_get(actual), call(*operands))
    assert "all-gather" not in collectives(call.lower(*sharded).compile().as_text())


KV_ROWS = (ROWS_AND_HEADS, P("data"), P("data"))
OTHERWISE = {
    "bias for all rows": (SPECS, {"bias": (1, N, T, T)}),
    "bias of keys": (SPECS, {"bias": (B, 1, 1, T)}),
    "sinks": (SPECS, {"sinks": (N,)}),
    "keys of rows": (KV_ROWS, {}),
    "keys for all": ((ROWS_AND_HEADS, P(), P()), {}),
    "queries for all": ((P(), ROWS_AND_HEADS, ROWS_AND_HEADS), {}),
    "tokens": ((P(None, "data"), P(), P()), {}),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_operands_of_an_explicit_mesh_that_lie_otherwise(name):
    """Each gradient lies as its operand does."""
    specs, shapes = OTHERWISE[name]
    operands = *inputs(), *(random(9, *shape) for shape in shapes.values())

    def total(q, k, v, *others):
        options = dict(zip(shapes, others, strict=True))
        return jnp.sin(dot_product_attention(q, k, v, is_causal=True, **options)).sum()

    call = jax.jit(jax.grad(total, argnums=tuple(range(len(operands)))))
    sharded = put(mesh_of(2, 4, AxisType.Explicit), operands, (*specs, *(P() for _ in shapes)))
    actual = call(*sharded)
    assert_close(jax.device_get(actual), call(*operands))
    for one, operand in zip(actual, sharded, strict=True):
        assert one.sharding.is_equivalent_to(operand.sharding, one.ndim)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(axis_type, check_vma):
    operands = inputs()
    mesh = mesh_of(2, 4, axis_type)
    mapped = jax.shard_map(gradients, mesh=mesh, in_specs=SPECS, out_specs=SPECS, check_vma=check_vma)
    assert_close(jax.jit(mapped)(*put(mesh, operands, SPECS)), gradients(*operands))


@pytest.mark.parametrize(
    ("deterministic", "dtype"), [(True, jnp.bfloat16), (False, jnp.bfloat16), (False, jnp.float32)]
)
def test_kernels_are_traced_under_an_explicit_mesh(deterministic, dtype, monkeypatch):
    """Up to their lowering, which needs a GPU: they refuse arrays whose type says how they are sharded."""
    monkeypatch.setattr(device, "is_abstract_gpu", lambda: True)
    attend = functools.partial(flash_attention, implementation="sm90", deterministic=deterministic)
    call = jax.grad(lambda *qkv: attend(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    shape = (4, 1024, 4, 64)
    mesh = mesh_of(2, 4, AxisType.Explicit)
    sharded = put(mesh, [jnp.zeros(shape, dtype)] * 3, SPECS)
    results = jax.eval_shape(call, *sharded)
    assert [(x.shape, x.sharding.spec[0]) for x in results] == [(shape, "data")] * 3


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_arrays_from_outside_the_mesh(axis_type):
    operands = inputs()
    expected = gradients(*operands)
    expected_out = dot_product_attention(*operands, is_causal=True)
    with jax.set_mesh(mesh_of(2, 4, axis_type)):
        assert_close(gradients(*operands), expected)
        assert_close([dot_product_attention(*operands, is_causal=True)], [expected_out])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_shard_map_along_some_axes(axis_type):
    operands, mesh = inputs(), mesh_of(2, 4, axis_type)
    rows = (P("data"),) * 3

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows[0], axis_names={"data"})
    def attend(q, k, v):
        return jnp.sin(dot_product_attention(q, k, v, is_causal=True))

    call = jax.jit(jax.value_and_grad(lambda *qkv: attend(*qkv).sum(), argnums=(0, 1, 2)))
    with jax.set_mesh(mesh):
        total, actual = call(*put(mesh, operands, SPECS))
    assert_close(jax.device_get(actual), gradients(*operands))
    expected = jnp.sin(dot_product_attention(*operands, is_causal=True)).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_shard_map_sums_the_gradients_of_what_devices_share():
    operands = inputs(N, 1)
    mesh = mesh_of(1, 8)
    specs = (P(None, None, "tensor"), P(), P())
    mapped = jax.shard_map(gradients, mesh=mesh, in_specs=specs, out_specs=specs)
    assert_close(jax.jit(mapped)(*put(mesh, operands, specs)), gradients(*operands))


# --- checkpoint, scan ---


def two_layers(q, k, v, weights, policy):
    @functools.partial(jax.checkpoint, policy=policy)
    def layer(x, weight):
        return dot_product_attention(x @ weight, k, v, is_causal=True), None

    return jax.lax.scan(layer, q, weights)[0].sum()


def test_checkpoint_keeps_what_the_backward_pass_needs():
    q, k, v = inputs()
    step = jax.grad(two_layers, argnums=(0, 3))
    counts, results = [], []
    for policy in (None, SAVE_ATTENTION):
        call = jax.jit(functools.partial(step, policy=policy))
        text = call.lower(q, k, v, random(3, 2, H, H)).as_text()
        counts.append(len(re.findall(r"call @_forward", text)))
        results.append(call(q, k, v, random(3, 2, H, H)))
    assert counts == [2, 1]
    assert_close(*results)


# --- second derivatives ---

ONCE = lambda q, k, **options: jax.grad(
    lambda q: jnp.sin(dot_product_attention(q, k, k, is_causal=True, **options)).sum()
)(q)
TWICE = {
    "gradient of a gradient": lambda q, k, **options: jax.grad(lambda q: ONCE(q, k, **options).sum())(q),
    "forward over reverse": lambda q, k, **options: jax.jvp(
        functools.partial(ONCE, k=k, **options), (q,), (q,)
    ),
    "of the cotangent alone": lambda q, k, **options: jax.grad(
        lambda g: jax.vjp(lambda q: dot_product_attention(q, k, k, **options), q)[1](g)[0].sum()
    )(q),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_second_derivative_says_who_has_one(name):
    q, k, _ = inputs()
    with pytest.raises(NotImplementedError, match=r"no second derivative.*implementation='xla'"):
        jax.jit(TWICE[name])(q, k)
    results = TWICE[name](q, k, implementation="xla")
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(results))
