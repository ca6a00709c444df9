"""float32 on kernels of 16 bits: the powers of two, and errors as TF32 has them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import halves, reference, scaling, sm90
from pallas_kernels.flash_attention.plan import LOGITS_EXPONENT, NORM_EXPONENT, WEIGHTS_EXPONENT
from pallas_kernels.flash_attention.spec import AttentionInputs, AttentionSpec
from pallas_kernels.mosaic import LOG2_E

FP16_MAX = 65504
T, S, H = 200, 900, 64
SPEC = AttentionSpec(scale=H**-0.5)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def inputs(query=1.0, key=1.0, value=1.0, batch=2, n=4, k=2, **more):
    shapes = ((batch, T, n, H), (batch, S, k, H), (batch, S, k, H))
    factors = (query, key, value)
    arrays = (normal(*s, seed=i) * f for i, (s, f) in enumerate(zip(shapes, factors, strict=True)))
    return AttentionInputs(*arrays, **more)


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1.0, 1e20, 1e37])
@pytest.mark.parametrize("exponent", [-120, -3, 0, 1, 120])
def test_powers_are_exact(size, exponent):
    x = normal(2, 5, 4, 8) * size
    exponents = jnp.array([[exponent, exponent + 1], [exponent - 1, exponent]])
    by_head = np.repeat(exponents, 2, axis=1)[:, None, :, None]
    with np.errstate(over="ignore", under="ignore"):
        expected = np.ldexp(np.asarray(x), by_head)
    scaled = scaling.times_power(x, exponents)
    is_normal = (np.abs(expected) >= np.finfo(np.float32).tiny) & np.isfinite(expected)
    np.testing.assert_array_equal(np.asarray(scaled)[is_normal], expected[is_normal])
    back = scaling.times_power(scaled, -exponents)
    np.testing.assert_array_equal(np.asarray(back)[is_normal], np.asarray(x)[is_normal])


def test_exponents_are_of_the_longest_finite_row_of_a_head():
    x = jnp.zeros((2, 3, 4, 8)).at[0, 0, 0, 0].set(-5.0).at[0, 1, 1].set(1.2)
    x = x.at[0, 2, 0, 0].set(jnp.nan).at[0, 2, 2, 0].set(-jnp.inf).at[0, 0, 3, 1].set(0.3)
    x = x.at[1, 0, 0, 0].set(3.4e38).at[1, 0, 3, 0].set(1.2e-38)
    np.testing.assert_array_equal(scaling.exponent_of(x, 2), [[2, -2], [127, -126]])
    assert (scaling.exponent_of(jnp.zeros((1, 2, 1, 8)), 1) == scaling.ZERO_EXPONENT).all()


@pytest.mark.parametrize(
    "factors", [(1, 1, 1), (1e3, 1e-3, 1e6), (1e-6, 1e6, 1e-30), (0, 1, 1e30), (1e-4, 0, 0), (0, 0, 1)]
)
def test_operands_fill_the_range_of_fp16_and_logits_stay(factors):
    given = inputs(*factors)
    exponents, (query, key, value) = scaling.scale_operands(given)
    np.testing.assert_array_equal(exponents.query + exponents.key, LOGITS_EXPONENT)
    largest = [float(jnp.max(jnp.abs(x))) for x in (query, key, value)]
    assert all(np.isfinite(largest))
    if factors[0] and factors[1]:
        assert 1 / 8 < largest[0] / largest[1] < 8
    if factors[2]:
        norms = np.linalg.norm(np.asarray(value, np.float32), axis=-1)
        assert 2.0 ** (NORM_EXPONENT - 2) < norms.max() < 2**NORM_EXPONENT
    for scaled, exponent, x in zip((query, key, value), exponents, given[:3], strict=True):
        assert scaled.dtype == jnp.float16
        restored = scaling.times_power(scaled.astype(jnp.float32), -exponent)
        np.testing.assert_allclose(restored, x, rtol=2**-11, atol=2**-25 * float(jnp.max(jnp.abs(x))))


def test_a_row_is_scaled_alone_and_only_by_what_lies_within_its_lengths():
    lengths = jnp.array([S, 300])
    given = inputs(kv_lengths=lengths)
    key = given.key.at[0].multiply(1e5).at[1, 300:].set(1e30)
    exponents, _ = scaling.scale_operands(given._replace(key=key))
    alone, _ = scaling.scale_operands(given)
    for one, other in zip(exponents, alone, strict=True):
        np.testing.assert_array_equal(one[1], other[1])


def test_what_is_not_finite_is_passed_on_and_what_is_too_large_cut():
    given = inputs(query=2e10, key=1e4)
    given = given._replace(value=given.value.at[0, 0, 0, :3].set(jnp.array([jnp.nan, jnp.inf, -jnp.inf])))
    _, (query, key, value) = scaling.scale_operands(given)
    assert float(jnp.max(jnp.abs(query))) == float(jnp.max(jnp.abs(key))) == FP16_MAX
    np.testing.assert_array_equal(value[0, 0, 0, :3], np.array([np.nan, np.inf, -np.inf], np.float16))
    assert np.isfinite(np.asarray(value[1], np.float32)).all()


@pytest.mark.parametrize("lse_grad", [0.0, 1.0, 1e12])
@pytest.mark.parametrize(("size", "rate"), [(0.0, 0.0), (1e-6, 0.9), (1e8, 0.0)])
def test_logit_gradients_fit_fp16_at_their_largest(size, rate, lse_grad):
    """All rows of V and dO point the same way, as far as they can."""
    given = inputs()._replace(value=jnp.full((2, S, 2, H), size))
    out_grad, out = jnp.full((2, T, 4, H), 1.99), jnp.full((2, T, 4, H), -size / (1 - rate))
    plan = sm90.plan_of(given, AttentionSpec(scale=1.0, dropout_rate=rate))
    lse, lse_grad = jnp.ones((2, 4, T)), jnp.full((2, 4, T), lse_grad)
    scaled = scaling.scale_all(plan, given, out, lse, out_grad, lse_grad)
    value, d_out = (x.astype(jnp.float32)[0, 0, 0] for x in scaled.arrays[2:])
    d_weights = jnp.dot(value, d_out) * 2.0**-plan.d_weights_exponent / (1 - rate)
    largest = 2.0**WEIGHTS_EXPONENT * float(jnp.max(jnp.abs(d_weights - scaled.kernel_delta)))
    assert largest < 2**15
    if size or lse_grad.max() > 0:
        assert largest > 2.0 ** (15 - 4)


def test_halves_hold_every_bit():
    plan = sm90.plan_of(inputs(), SPEC)
    x = jnp.concatenate([normal(64, 32) * 1e-30, jnp.full((64, 32), jnp.inf)], axis=1)
    output = jnp.stack(list(halves.split(plan, x)))
    assert output.dtype == plan.dtype == jnp.float16
    np.testing.assert_array_equal(halves.join(plan, output), x)
    half = sm90.plan_of(AttentionInputs(*(y.astype(jnp.float16) for y in inputs()[:3])), SPEC)
    assert not half.keeps_fp32
    assert [y.dtype for y in halves.split(half, x)] == [jnp.float16]


@pytest.mark.parametrize("precision", [None, "default", "tensorfloat32", "high", "highest", "float32"])
def test_precision_above_tf32_is_the_references(precision):
    query = jnp.zeros((1, 8, 1, 64))
    with jax.default_matmul_precision(precision):
        reason = sm90.unsupported(AttentionInputs(query, query, query), SPEC)
        assert (reason is None) == (precision in sm90.TF32_PRECISIONS)
        if reason:
            with pytest.raises(NotImplementedError, match=f"float32 only at .* got {precision!r}"):
                flash_attention(query, query, query, implementation="sm90")


# --- errors, beside those of TF32 ---------------------------------------------------------------------------


def emulated(given, out_grad):
    """What the kernels compute: operands, weights and their gradients rounded to fp16, sums in fp32."""
    plan, f32, round16 = sm90.plan_of(given, SPEC), jnp.float32, lambda x: x.astype(jnp.float16)
    exponents, (query, key, value) = scaling.scale_operands(given)
    logits = einsum("bthd,bshd->bhts", query, key) * plan.scale
    row_max = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - row_max)
    row_sum = weights.sum(axis=-1, keepdims=True)
    out = einsum("bhts,bshd->bthd", round16(weights), value) / row_sum.swapaxes(1, 2)
    out, lse = scaling.times_power(out, -exponents.value), (row_max + jnp.log(row_sum))[..., 0]
    scaled = scaling.scale_all(plan, given, out, lse, out_grad, jnp.zeros_like(lse))
    query, key, value, d_out = scaled.arrays
    weights = round16(jnp.exp2(logits * LOG2_E - lse[..., None] * LOG2_E + WEIGHTS_EXPONENT))
    d_weights = einsum("bthd,bshd->bhts", d_out, value) * 2.0**-plan.d_weights_exponent
    d_logits = round16(weights.astype(f32) * (d_weights - scaled.kernel_delta[..., None]))
    gradients = sm90.AttentionGradients(
        einsum("bhts,bshd->bthd", d_logits, key) * plan.scale,
        einsum("bhts,bthd->bshd", d_logits, query) * plan.scale,
        einsum("bhts,bthd->bshd", weights, d_out),
    )
    return out, *scaled.restore(plan, given, gradients)[:3]


def tf32(given, out_grad):
    """Standard attention and its gradient whose products round their operands to TF32."""

    def product(subscripts, x, y):
        return einsum(subscripts, round_to_tf32(x), round_to_tf32(y))

    query, key, value = given[:3]
    weights = jax.nn.softmax(product("bthd,bshd->bhts", query, key) * SPEC.scale)
    out = product("bhts,bshd->bthd", weights, value)
    d_weights = product("bthd,bshd->bhts", out_grad, value)
    d_logits = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) * SPEC.scale
    return (
        out,
        product("bhts,bshd->bthd", d_logits, key),
        product("bhts,bthd->bshd", d_logits, query),
        product("bhts,bthd->bshd", weights, out_grad),
    )


def round_to_tf32(x):
    """To the nearest number of 10 explicit bits, as is kinder than to cut them off."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitcast_convert_type((bits + (1 << 12)) & jnp.uint32(0xFFFFE000), jnp.float32)


def einsum(subscripts, x, y):
    return reference._einsum(subscripts, x.astype(jnp.float32), y.astype(jnp.float32))


def heavy_tailed(*shape, seed):
    return jax.random.t(jax.random.key(seed), 2.0, shape)


CASES = {
    "normal": lambda shape, i: normal(*shape, seed=i),
    "heavy tails in V and dO": lambda shape, i: (heavy_tailed if i > 1 else normal)(*shape, seed=i),
    "rows of all sizes in dO": lambda shape, i: (
        normal(*shape, seed=i) * (10 ** normal(*shape[:3], 1, seed=9) if i == 3 else 1)
    ),
    "far from zero": lambda shape, i: normal(*shape, seed=i) + 3 * (i > 1),
    "scaled": lambda shape, i: normal(*shape, seed=i) * (1e3, 1e-3, 1e6, 1e-8)[i],
    "small": lambda shape, i: normal(*shape, seed=i) * (1e-2, 1e-3, 1e-12, 1e-12)[i],
    "large": lambda shape, i: normal(*shape, seed=i) * (3, 3, 1e15, 1e15)[i],
}


def errors(case):
    """RMS errors of ours and of TF32, by result."""
    shapes = [(1, T, 2, H), (1, S, 2, H), (1, S, 2, H), (1, T, 2, H)]
    *arrays, out_grad = (case(shape, i) for i, shape in enumerate(shapes))
    given = AttentionInputs(*arrays)
    call = functools.partial(flash_attention, implementation="reference")
    out, vjp = jax.vjp(call, *arrays)
    exact = [np.asarray(x, np.float64) for x in (out, *vjp(out_grad))]
    rms = lambda x: np.sqrt(np.mean(x**2))
    for function in (emulated, tf32):
        yield [
            rms(np.asarray(x, np.float64) - e) / rms(e)
            for x, e in zip(function(given, out_grad), exact, strict=True)
        ]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i > 3)) for i, name in enumerate(CASES)]
)
def test_errors_are_at_most_twice_those_of_tf32(name):
    ours, others = errors(CASES[name])
    for one, other in zip(ours, others, strict=True):
        assert one < 2 * other + 2**-18
