"""dot_product_attention: a superset of jax.nn's, whoever computes it."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxattn.attention
from jaxattn.attention import IMPLEMENTATIONS, FlashAttention, dot_product_attention
from pallas_kernels.variants import Unsupported

B, T, S, N, K, H = 2, 7, 11, 4, 2, 16
HERE = ("reference", "xla")  # what runs on a CPU


def inputs(shape=(B, T, S, N, K, H), dtype=jnp.float32, seed=0):
    batch, t, s, n, k, h = shape
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = ((batch, t, n, h), (batch, s, k, h), (batch, s, k, h))
    return tuple(jax.random.normal(key, size, dtype) for key, size in zip(keys, sizes, strict=True))


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


LENGTHS = {
    "query_seq_lengths": jnp.array([5, 7], jnp.int32),
    "key_value_seq_lengths": jnp.array([11, 4], jnp.int32),
}
MASK = random(9, B, N, T, S) > -0.5
ALL_OF_JAX = {
    "plain": {},
    "bias": {"bias": random(1, 1, N, T, S)},
    "bias_broadcast": {"bias": random(1, B, 1, 1, S)},
    "mask": {"mask": MASK.at[..., 0].set(True)},
    "mask_and_bias": {"mask": MASK.at[..., 0].set(True), "bias": random(1, 1, N, T, S)},
    "causal": {"is_causal": True},
    "lengths": LENGTHS,
    "causal_lengths": {"is_causal": True, **LENGTHS},
    "window": {"local_window_size": (3, 2)},
    "window_int": {"local_window_size": 4, "is_causal": True},
    "scale": {"scale": 0.5},
}


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("name", ALL_OF_JAX)
def test_agrees_with_jax_nn(name, implementation):
    q, k, v = inputs()
    options = ALL_OF_JAX[name]
    expected = jax.nn.dot_product_attention(q, k, v, **options)
    actual = dot_product_attention(q, k, v, **options, implementation=implementation)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize("name", ["plain", "causal", "bias", "mask", "window"])
def test_takes_arguments_by_position_and_without_a_batch(name):
    q, k, v = (x[0] for x in inputs())
    options = {key: x[:1] if hasattr(x, "shape") else x for key, x in ALL_OF_JAX[name].items()}
    bias, mask = options.pop("bias", None), options.pop("mask", None)
    expected = jax.nn.dot_product_attention(q, k, v, bias, mask, **options)
    actual = dot_product_attention(q, k, v, bias, mask, **options)
    assert actual.shape == (T, N, H)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


@pytest.mark.parametrize("is_batched", [True, False])
def test_residual_is_jax_nns_in_float32(is_batched):
    q, k, v = inputs() if is_batched else (x[0] for x in inputs())
    out, residual = dot_product_attention(q, k, v, is_causal=True, return_residual=True)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True, return_residual=True)
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    np.testing.assert_allclose(residual, expected[1], atol=2e-6)
    half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    assert dot_product_attention(*half, return_residual=True)[1].dtype == jnp.float32


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize(
    "options",
    [
        {"causal_alignment": "bottom_right", "is_causal": True},
        {"causal_alignment": "bottom_right", "local_window_size": (2, 1)},
        {"causal_alignment": "bottom_right", "is_causal": True, **LENGTHS},
        {
            "query_segment_ids": jnp.array([[0, 0, 0, 1, 1, 2, 2]] * B),
            "key_value_segment_ids": jnp.array([[0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]] * B),
        },
    ],
    ids=["causal", "window", "causal_lengths", "segments"],
)
def test_our_masks_are_the_mask_written_out(options, implementation):
    q, k, v = inputs()
    mask = written_out(**options)
    expected = jax.nn.dot_product_attention(q, k, v, mask=mask)
    expected = jnp.where(mask.any(-1)[:, 0, :, None, None], expected, 0)
    actual = dot_product_attention(q, k, v, **options, implementation=implementation)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def written_out(
    is_causal=False,
    causal_alignment="top_left",
    local_window_size=(S, S),
    query_seq_lengths=(T,) * B,
    key_value_seq_lengths=(S,) * B,
    query_segment_ids=None,
    key_value_segment_ids=None,
):
    """The definition, entry by entry."""
    mask = np.zeros((B, 1, T, S), bool)
    for b, _, i, j in np.ndindex(*mask.shape):
        t, s = int(query_seq_lengths[b]), int(key_value_seq_lengths[b])
        at = i + (s - t if causal_alignment == "bottom_right" else 0)
        sees = i < t and j < s and at - local_window_size[0] <= j <= at + local_window_size[1]
        sees = sees and (not is_causal or j <= at)
        if query_segment_ids is not None:
            sees = sees and query_segment_ids[b, i] == key_value_segment_ids[b, j]
        mask[b, 0, i, j] = sees
    return jnp.asarray(mask)


def test_soft_cap():
    q, k, v = inputs((B, T, S, N, N, H))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
    weights = jax.nn.softmax(2.0 * jnp.tanh(logits / 2.0))
    expected = jnp.einsum("bnts,bsnh->btnh", weights, v)
    np.testing.assert_allclose(dot_product_attention(q, k, v, logits_soft_cap=2.0), expected, atol=2e-6)


def test_dropout_needs_a_key_repeats_with_it_and_keeps_the_mean():
    q, k, v = inputs((1, 64, 64, 4, 4, H))
    drop = lambda seed: dot_product_attention(q, k, v, dropout_rate=0.5, dropout_key=jax.random.key(seed))
    with pytest.raises(ValueError, match="dropout_key"):
        dot_product_attention(q, k, v, dropout_rate=0.5)
    assert (drop(0) == drop(0)).all()
    assert (drop(0) != drop(1)).any()
    mean = jnp.stack([drop(seed) for seed in range(64)]).mean(axis=0)
    np.testing.assert_allclose(mean, dot_product_attention(q, k, v), atol=0.25)


@pytest.mark.parametrize("implementation", HERE)
def test_rows_that_see_nothing_are_zero_with_zero_gradients(implementation):
    q, k, v = inputs()
    mask = jnp.ones((1, 1, T, S), bool).at[0, 0, 3].set(False)

    def total(q, k, v):
        return dot_product_attention(q, k, v, mask=mask, implementation=implementation).sum()

    out = dot_product_attention(q, k, v, mask=mask, implementation=implementation)
    assert (out[:, 3] == 0).all()
    gradients = jax.grad(total, argnums=(0, 1, 2))(q, k, v)
    assert (gradients[0][:, 3] == 0).all()
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("implementation", HERE)
def test_gradients_agree_with_jax_nn(implementation):
    q, k, v = inputs()
    mask = MASK.at[..., 0].set(True)
    bias = random(1, 1, N, T, S)
    ours = lambda q, k, v, b: (
        dot_product_attention(q, k, v, b, mask, implementation=implementation) ** 2
    ).sum()
    theirs = lambda q, k, v, b: (jax.nn.dot_product_attention(q, k, v, b, mask) ** 2).sum()
    actual, expected = (jax.grad(f, argnums=(0, 1, 2, 3))(q, k, v, bias) for f in (ours, theirs))
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_learned_scale_and_its_gradient_agree_with_jax_nn(implementation, shape):
    q, k, v = inputs()
    ours = functools.partial(dot_product_attention, is_causal=True, implementation=implementation)
    theirs = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    run = lambda attend: jax.jit(
        jax.value_and_grad(lambda scale, q: jnp.sin(attend(q, k, v, scale=scale)).sum(), argnums=(0, 1))
    )(jnp.full(shape, 0.3), q)
    for actual, expected in zip(jax.tree.leaves(run(ours)), jax.tree.leaves(run(theirs)), strict=True):
        np.testing.assert_allclose(actual, expected, atol=5e-6, rtol=1e-5)
    np.testing.assert_allclose(ours(q, k, v, scale=jnp.full(shape, 0.3)), ours(q, k, v, scale=0.3), atol=2e-6)


@pytest.mark.parametrize("implementation", HERE)
def test_the_gradient_of_a_scale_ends_at_the_lengths(implementation):
    q, k, v = inputs()
    gradient = jax.grad(
        lambda scale, q: dot_product_attention(
            q, k, v, scale=scale, implementation=implementation, **LENGTHS
        ).sum()
    )
    actual = gradient(jnp.float32(0.3), q.at[0, 5:].set(jnp.nan))
    np.testing.assert_allclose(actual, gradient(jnp.float32(0.3), q), rtol=1e-6)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_lies_beyond_a_length_may_be_anything(implementation, value):
    operands = inputs()
    lengths = LENGTHS["query_seq_lengths"], *[LENGTHS["key_value_seq_lengths"]] * 2
    beyond = [
        (jnp.arange(x.shape[1]) >= length[:, None])[..., None, None]
        for x, length in zip(operands, lengths, strict=True)
    ]
    poisoned = [jnp.where(there, value, x) for x, there in zip(operands, beyond, strict=True)]
    call = functools.partial(dot_product_attention, **LENGTHS, implementation=implementation)
    out, vjp = jax.vjp(call, *operands)
    poisoned_out, poisoned_vjp = jax.vjp(call, *poisoned)
    np.testing.assert_array_equal(poisoned_out, out)
    for one, other in zip(poisoned_vjp(out), vjp(out), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_a_bias_that_hides_all_keys_of_a_row(implementation, dtype):
    q, k, v = inputs()
    bias = jnp.zeros((1, 1, T, S), dtype).at[0, 0, 3].set(-jnp.inf)
    call = lambda *x: dot_product_attention(*x, implementation=implementation)
    out = call(q, k, v, bias)
    assert (out[:, 3] == 0).all()
    gradients = jax.grad(lambda *x: call(*x).sum(), argnums=(0, 1, 2, 3))(q, k, v, bias)
    assert (gradients[0][:, 3] == 0).all()
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("implementation", HERE)
def test_lengths_are_taken_as_int32_and_end_where_the_arrays_do(implementation):
    options = {"is_causal": True, "causal_alignment": "bottom_right", "implementation": implementation}
    call = functools.partial(dot_product_attention, *inputs(), **options)
    expected = call(query_seq_lengths=jnp.array([7, 5]), key_value_seq_lengths=jnp.array([11, 4]))
    for dtype in (jnp.uint8, jnp.uint16, jnp.int32):
        q_lengths, kv_lengths = jnp.array([9, 5], dtype), jnp.array([40, 4], dtype)
        actual = call(query_seq_lengths=q_lengths, key_value_seq_lengths=kv_lengths)
        np.testing.assert_array_equal(actual, expected)
    for convert in (np.array, np.uint64, list):
        q_lengths, kv_lengths = convert([2**40, 5]), convert([2**32 + 3, 4])
        actual = call(query_seq_lengths=q_lengths, key_value_seq_lengths=kv_lengths)
        np.testing.assert_array_equal(actual, expected)
    actual = call(query_seq_lengths=[jnp.int32(7), 5], key_value_seq_lengths=[11, jnp.int32(4)])
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("xla", {"logits_soft_cap": 1.0}),
        ("xla", {"return_residual": True}),
        ("xla", {"sinks": jnp.ones(N)}),
        ("xla", {"alibi_slopes": jnp.ones(N)}),
        ("xla", {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}),
        ("cudnn", {}),  # float32
        ("cudnn", {"causal_alignment": "bottom_right", "is_causal": True}),
    ],
)
def test_an_implementation_that_cannot_do_it_says_so(name, options):
    with pytest.raises(NotImplementedError, match=name):
        dot_product_attention(*inputs(), **options, implementation=name)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({}, None),
        ({"is_causal": True, "local_window_size": (4, 0)}, None),
        ({"mask": MASK}, "mask"),
        ({"logits_soft_cap": 1.0}, "logits_soft_cap"),
        ({"causal_alignment": "bottom_right", "is_causal": True}, "bottom_right"),
        ({"local_window_size": (4, 0)}, "window"),
        ({"deterministic": True}, "deterministic"),
        ({"sinks": jnp.ones(N)}, "sinks"),
        ({"alibi_slopes": jnp.ones(N)}, "alibi_slopes"),
    ],
)
def test_cudnn_is_asked_only_for_what_it_computes_as_we_define_it(options, refused, monkeypatch):
    asked = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, **kwargs: asked.append(kwargs) or args[0]
    )
    call = lambda: dot_product_attention(*inputs(dtype=jnp.bfloat16), **options, implementation="cudnn")
    if refused is None:
        call()
        assert asked[0]["implementation"] == "cudnn"
    else:
        with pytest.raises(NotImplementedError, match=refused):
            call()
        assert not asked


def test_falls_back_in_order_and_logs_the_choice_once(monkeypatch, caplog):
    def refuses(call):
        raise Unsupported("no such unit")

    monkeypatch.setitem(IMPLEMENTATIONS, "sm90", refuses)
    monkeypatch.setattr(jaxattn.attention, "_candidates", lambda: ("sm90", "xla", "reference"))
    monkeypatch.setattr(jaxattn.attention, "device_name", lambda: "test device")
    q, k, v = inputs()
    with caplog.at_level(logging.INFO, logger="jaxattn"):
        dot_product_attention(q, k, v)
        dot_product_attention(q, k, v)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "test device" in messages[0]
    assert "'xla'" in messages[0]
    assert "no such unit" in messages[0]
    # what xla cannot do goes to the next, never to a wrong answer
    capped = dot_product_attention(q, k, v, logits_soft_cap=1.0)
    assert (capped == dot_product_attention(q, k, v, logits_soft_cap=1.0, implementation="reference")).all()


@pytest.mark.parametrize("shape", [(B, 1, 1, S), (1, N, T, 1)])
def test_what_cudnn_cannot_of_odd_lengths_and_biases(shape, monkeypatch):
    """It takes a bias of every row and column, and has no gradients of odd lengths: XLA computes those."""
    theirs, asked = jax.nn.dot_product_attention, []

    def attend(query, key, value, bias, implementation, **options):
        asked.append(implementation)
        assert bias.shape == (*shape[:2], T, S)
        return theirs(query, key, value, bias, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    *qkv, bias = *inputs(dtype=jnp.bfloat16), random(4, *shape).astype(jnp.bfloat16)
    lengths = {"key_value_seq_lengths": jnp.array([5, S])}
    ours = functools.partial(dot_product_attention, implementation="cudnn", **lengths)
    call = lambda *x: ours(*x[:3], bias=x[3]).astype(jnp.float32)
    call(*qkv, bias)
    assert asked == ["cudnn"]
    gradients = jax.grad(lambda *x: call(*x).sum(), (0, 1, 2, 3))(*qkv, bias)
    assert asked == ["cudnn", "xla"]
    expected = jax.grad(lambda *x: theirs(*x, **lengths).astype(jnp.float32).sum(), (0, 1, 2, 3))(*qkv, bias)
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(np.float32(one), np.float32(other), atol=0.05, rtol=0.05)


def test_what_no_kernel_can_do_is_no_refusal():
    """Kernels have no gradients of gradients, whoever is asked; XLA's attention has them."""
    q, k, v = inputs()
    slope = lambda q, **options: jax.grad(lambda q: dot_product_attention(q, k, v, **options).sum())(q).sum()
    with pytest.raises(NotImplementedError, match="no second derivative") as raised:
        jax.grad(slope)(q)
    assert "no implementation" not in str(raised.value)
    assert jnp.isfinite(jax.grad(functools.partial(slope, implementation="xla"))(q)).all()


def test_long_sequences_do_not_go_where_all_logits_are_stored(monkeypatch):
    monkeypatch.setattr(jaxattn.attention, "_candidates", lambda: ("xla", "reference"))
    asked = []
    for name in ("xla", "reference"):
        answer = lambda call, name=name: (asked.append(name) or call.query, None)
        monkeypatch.setitem(IMPLEMENTATIONS, name, answer)
    for length in (16384, 65536):  # 1 and 16 GiB of logits
        x = jax.ShapeDtypeStruct((1, length, 1, H), jnp.float32)
        jax.eval_shape(dot_product_attention, x, x, x)
    jax.eval_shape(functools.partial(dot_product_attention, implementation="xla"), x, x, x)
    assert asked == ["xla", "reference", "xla"]


def test_slopes_and_sinks():
    q, k, v = inputs()
    slopes, sinks = 2.0 ** -jnp.arange(1, N + 1), random(3, N)
    distance = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(S))
    bias = -slopes[:, None, None] * distance
    keys, values = (jnp.concatenate([jnp.zeros((B, 1, K, H)), x], axis=1) for x in (k, v))
    with_sink = jnp.concatenate([jnp.broadcast_to(sinks[:, None, None], (N, T, 1)), bias], axis=-1)
    expected = jax.nn.dot_product_attention(q, keys, values, with_sink[None])
    actual = dot_product_attention(q, k, v, alibi_slopes=slopes, sinks=sinks)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_flash_attention_object_is_a_pytree_that_masks_documents():
    q, k, v = inputs((B, T, T, N, K, H))
    segment_ids = jnp.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]])

    @jax.jit
    def attend(attention, q, k, v):
        return attention(0, q, k, v)[0]

    packed = attend(FlashAttention(segment_ids=segment_ids), q, k, v)
    alone = attend(FlashAttention(), q[:1, 3:], k[:1, 3:], v[:1, 3:])
    np.testing.assert_allclose(packed[:1, 3:], alone, atol=2e-6)
    whole = attend(FlashAttention(is_causal=False), q, k, v)
    np.testing.assert_allclose(whole, jax.nn.dot_product_attention(q, k, v), atol=2e-6)


def test_flash_attention_object_drops_only_with_a_key():
    q, k, v = inputs((B, T, T, N, K, H))
    attention = FlashAttention(dropout_rate=0.5)
    plain, same = attention(0, q, k, v)
    assert same is attention
    assert (plain == FlashAttention()(0, q, k, v)[0]).all()
    assert (attention(0, q, k, v, dropout_key=jax.random.key(1))[0] != plain).any()
