"""flash_attention's reference against textbook attention in fp32, its gradients, and the op's validation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention
from pallas_kernels.flash_attention import reference
from pallas_kernels.flash_attention.dropout import dropout_seed, keep_mask

B, T, S, N, K, H = 2, 37, 53, 4, 2, 16
IDS = {
    "q_segment_ids": jnp.broadcast_to(jnp.arange(T) // 10, (B, T)),
    "kv_segment_ids": jnp.broadcast_to(jnp.arange(S) // 10, (B, S)),
}
LENGTHS = {"q_lengths": jnp.array([20, 37]), "kv_lengths": jnp.array([53, 0])}
CASES = {
    "plain": {},
    "causal top left": {"is_causal": True},
    "causal bottom right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"local_window_size": (5, 3)},
    "one-sided window": {"local_window_size": (None, 3)},
    "window of an int, causal": {"local_window_size": 4, "is_causal": True},
    "soft cap and scale": {"logits_soft_cap": 2.0, "scale": 0.3},
    "lengths": LENGTHS,
    "lengths, bottom right": LENGTHS | {"is_causal": True, "causal_alignment": "bottom_right"},
    "segments": IDS,
    "segments, causal": IDS | {"is_causal": True},
    "slopes": {"alibi_slopes": jnp.array([0.5, 0.25, 0.125, 1.0]), "is_causal": True},
    "slopes of each batch row, soft cap": {"alibi_slopes": jnp.ones((B, N)) / 4, "logits_soft_cap": 2.0},
    "slopes, lengths, bottom right": LENGTHS
    | {"alibi_slopes": jnp.array([0.5, 0.25, 0.125, 1.0]), "causal_alignment": "bottom_right"},
}
BIASES = {None: None, "full": (1, N, T, S), "row": (B, 1, 1, S), "head": (1, N, 1, 1)}


@pytest.fixture(scope="module")
def tensors():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H), (B, T, N)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


@pytest.fixture
def in_chunks(monkeypatch):
    """Forces many chunks of queries, the last one ragged."""
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 1)
    jax.clear_caches()
    yield
    jax.clear_caches()


def textbook(
    query, key, value, bias=None, sinks=None, *, is_causal=False, causal_alignment="top_left", **arguments
):
    """softmax over a dense mask; returns (out, lse)."""
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest") * arguments.get("scale", H**-0.5)
    if cap := arguments.get("logits_soft_cap"):
        logits = cap * jnp.tanh(logits / cap)
    if bias is not None:
        logits += bias
    q_lengths = arguments.get("q_lengths", jnp.full(B, T))[:, None, None]
    kv_lengths = arguments.get("kv_lengths", jnp.full(B, S))[:, None, None]
    i, j = jnp.arange(T)[None, :, None], jnp.arange(S)[None, None]
    visible = (i < q_lengths) & (j < kv_lengths)
    position = i + (kv_lengths - q_lengths if causal_alignment == "bottom_right" else 0)
    if "alibi_slopes" in arguments:
        logits -= arguments["alibi_slopes"][..., None, None] * jnp.abs(position - j)[:, None]
    window = arguments.get("local_window_size", (None, None))
    left, right = window if isinstance(window, tuple) else (window, window)
    if is_causal:
        visible &= j <= position
    if left is not None:
        visible &= j >= position - left
    if right is not None:
        visible &= j <= position + right
    if "q_segment_ids" in arguments:
        visible &= arguments["q_segment_ids"][:, :, None] == arguments["kv_segment_ids"][:, None, :]
    visible = visible[:, None]
    logits = jnp.where(visible, logits, -1e30)
    live = visible.any(-1)
    if sinks is not None:  # one more key, whose value is dropped
        column = jnp.broadcast_to(sinks[:, None, None], (B, N, T, 1))
        logits, live = jnp.concatenate([logits, column], axis=-1), i[..., 0] < q_lengths[..., 0]
        live = live[:, None]
    weights = (jax.nn.softmax(logits) * live[..., None])[..., :S]
    lse = jnp.where(live, jax.nn.logsumexp(logits, axis=-1), -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", weights, value, precision="highest"), lse.swapaxes(1, 2)


def check(tensors, bias, arguments, sinks=None):
    query, key, value, out_grad, lse_grad = tensors
    ours = functools.partial(flash_attention, return_lse=True, implementation="reference", **arguments)
    operands = (query, key, value, *(x for x in (bias, sinks) if x is not None))

    def run(function, query, key, value, *others):
        names = [name for name, x in (("bias", bias), ("sinks", sinks)) if x is not None]
        out, lse = function(query, key, value, **dict(zip(names, others, strict=True)))
        total = jnp.sum(out * out_grad) + jnp.sum(jnp.where(jnp.isneginf(lse), 0.0, lse) * lse_grad)
        return total, (out, lse)

    gradients = lambda function: jax.jit(jax.grad(function, tuple(range(len(operands))), has_aux=True))
    grads, (out, lse) = gradients(functools.partial(run, ours))(*operands)
    expected_grads, (expected, expected_lse) = gradients(
        functools.partial(run, functools.partial(textbook, **arguments))
    )(*operands)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-5)
    for one, other in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_equals_textbook(tensors, name):
    check(tensors, None, CASES[name])


IN_CHUNKS = [
    ("causal bottom right", None),
    ("lengths", "full"),
    ("segments", "row"),
    ("soft cap and scale", "head"),
]


@pytest.mark.parametrize(("name", "shape"), IN_CHUNKS)
def test_equals_textbook_in_chunks(tensors, in_chunks, name, shape):
    bias = None if shape is None else jax.random.normal(jax.random.key(1), BIASES[shape])
    check(tensors, bias, CASES[name])


@pytest.mark.parametrize("shape", [name for name in BIASES if name])
def test_bias_and_its_gradient(tensors, shape):
    check(tensors, jax.random.normal(jax.random.key(1), BIASES[shape]), {"is_causal": True})


@pytest.mark.parametrize("name", ["causal bottom right", "lengths, bottom right"])
def test_sinks_and_their_gradient(tensors, name):
    check(tensors, None, CASES[name], sinks=jnp.array([-1.0, 0.0, 1.0, 3.0]))


def test_a_sink_of_minus_infinity_is_none(tensors):
    query, key, value, *_ = tensors

    def run(query, key, value, sinks):
        out, lse = flash_attention(query, key, value, **LENGTHS, sinks=sinks, return_lse=True)
        return out.sum() + jnp.where(jnp.isneginf(lse), 0.0, lse).sum(), (out, lse)

    results = [
        jax.grad(run, argnums=(0, 1, 2), has_aux=True)(query, key, value, sinks)
        for sinks in (None, jnp.full(N, -jnp.inf))
    ]
    for expected, actual in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-6)
    gradient = jax.grad(lambda sinks: run(query, key, value, sinks)[0])(jnp.full(N, -jnp.inf))
    np.testing.assert_array_equal(gradient, jnp.zeros(N))


def test_a_bias_far_below_zero_hides_keys_as_minus_infinity_does(tensors):
    query, key, value, *_ = tensors
    for hidden in (-jnp.inf, jnp.finfo(jnp.float32).min):
        out = flash_attention(query, key, value, bias=jnp.full((1, 1, 1, S), hidden))
        np.testing.assert_array_equal(out, jnp.zeros_like(out))


def test_a_bias_hides_the_logits_of_keys_that_are_not_finite(tensors):
    query, key, value, *_ = tensors
    bias = jnp.zeros(S).at[7].set(-jnp.inf).reshape(1, 1, 1, S)
    out = flash_attention(query, key, value, bias=bias)
    for hidden in (jnp.nan, jnp.inf):
        poisoned = flash_attention(query, key.at[:, 7].set(hidden), value, bias=bias)
        np.testing.assert_array_equal(poisoned, out)


def test_nothing_beyond_the_lengths_leaks(tensors):
    query, key, value, out_grad, _ = tensors
    inside_q = (jnp.arange(T) < LENGTHS["q_lengths"][:, None])[..., None, None]
    inside_kv = (jnp.arange(S) < LENGTHS["kv_lengths"][:, None])[..., None, None]
    poisoned = [
        jnp.where(i, x, jnp.nan) for i, x in ((inside_q, query), (inside_kv, key), (inside_kv, value))
    ]
    call = functools.partial(flash_attention, **LENGTHS)
    out, vjp = jax.vjp(call, query, key, value)
    poisoned_out, poisoned_vjp = jax.vjp(call, *poisoned)
    np.testing.assert_array_equal(poisoned_out, out)
    for one, other in zip(poisoned_vjp(out_grad), vjp(out_grad), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int16, jnp.uint32])
def test_lengths_of_any_integer_dtype(tensors, dtype):
    query, key, value, *_ = tensors
    call = functools.partial(
        flash_attention, query, key, value, is_causal=True, causal_alignment="bottom_right"
    )
    lengths = {name: x.astype(dtype) for name, x in LENGTHS.items()}
    np.testing.assert_array_equal(call(**lengths), call(**LENGTHS))


def test_lengths_end_where_the_arrays_do(tensors):
    query, key, value, *_ = tensors
    call = functools.partial(
        flash_attention, query, key, value, is_causal=True, causal_alignment="bottom_right", return_lse=True
    )
    expected = call(q_lengths=jnp.array([T, 0]), kv_lengths=jnp.array([S, 0]))
    for lengths in ([2 * T, -3], [S + 9, -1]), (np.array([2**32 + 1, -(2**40)]), np.array([2**40, -1])):
        q_lengths, kv_lengths = (x if isinstance(x, np.ndarray) else jnp.array(x) for x in lengths)
        actual = call(q_lengths=q_lengths, kv_lengths=kv_lengths)
        for one, other in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("side", [2**30, 2**31 - 1, 2**40])
def test_a_window_beyond_any_sequence_is_none(tensors, side):
    query, key, value, *_ = tensors
    out = flash_attention(query, key, value, local_window_size=(side, side))
    np.testing.assert_array_equal(out, flash_attention(query, key, value))


def test_memory_does_not_grow_with_the_square_of_t():
    def temp_bytes(length):
        spec = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32)
        step = jax.grad(lambda q, k, v: flash_attention(q, k, v, is_causal=True).sum(), argnums=(0, 1, 2))
        return jax.jit(step).lower(spec, spec, spec).compile().memory_analysis().temp_size_in_bytes

    # beyond one chunk of logits the memory grows with T (inputs, outputs and their gradients), not T^2
    small, large = temp_bytes(8192), temp_bytes(16384)
    assert large < 1.5 * small + 16 * 16384 * 4 * 64 * 4
    assert large < 16384 * 16384 * 4


def test_dropout_keeps_the_mean_and_ignores_chunks(tensors, monkeypatch):
    query, key, value, *_ = tensors
    call = functools.partial(
        flash_attention, query, key, value, dropout_rate=0.3, dropout_key=jax.random.key(3)
    )
    whole = call()
    assert not np.allclose(whole, flash_attention(query, key, value), atol=1e-2)
    monkeypatch.setattr(reference, "CHUNK_LOGITS", 1)
    jax.clear_caches()
    np.testing.assert_allclose(call(), whole, atol=2e-6)
    jax.clear_caches()
    one = jax.jit(lambda key_: flash_attention(query, key, value, dropout_rate=0.3, dropout_key=key_))
    rows = [one(jax.random.key(seed)) for seed in range(200)]
    np.testing.assert_allclose(np.mean(rows, axis=0), flash_attention(query, key, value), atol=0.25)


def test_dropout_gradient_matches_a_dense_mask(tensors):
    query, key, value, out_grad, _ = tensors
    random_key, rate = jax.random.key(3), 0.25
    keep = keep_mask(
        dropout_seed(random_key),
        jnp.arange(B)[:, None, None, None],
        jnp.arange(N)[:, None, None],
        jnp.arange(T)[:, None],
        jnp.arange(S),
        rate=rate,
    )

    def dense(query, key, value):
        key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
        weights = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest") * H**-0.5)
        return jnp.einsum("bnts,bsnh->btnh", weights * keep / (1 - rate), value, precision="highest")

    ours = functools.partial(flash_attention, dropout_rate=rate, dropout_key=random_key)
    out, vjp = jax.vjp(ours, query, key, value)
    expected, expected_vjp = jax.vjp(dense, query, key, value)
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for one, other in zip(vjp(out_grad), expected_vjp(out_grad), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_dropout_hash_is_uniform_and_uncorrelated():
    seed = dropout_seed(jax.random.key(0))
    index = jnp.arange(256)
    keep = keep_mask(
        seed, index[:2, None, None, None], index[:4, None, None], index[:, None], index, rate=0.5
    )
    bits = np.asarray(keep, np.float64).reshape(8, 256, 256)
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / np.sqrt(bits.size)
    for axis in (1, 2):
        neighbours = np.mean((bits.take(range(255), axis) - 0.5) * (bits.take(range(1, 256), axis) - 0.5))
        assert abs(neighbours) < 5 * 0.25 / np.sqrt(bits.size)
    heads = np.corrcoef(bits.reshape(8, -1))
    assert np.abs(heads - np.eye(8)).max() < 5 / 256


BAD_CALLS = {
    "query must have": ({"query": jnp.ones((T, N, H))}, {}),
    "key must have shape": ({"key": jnp.ones((B, S, K, H + 1))}, {}),
    "value must have shape": ({"value": jnp.ones((B, S + 1, K, H))}, {}),
    "multiple of the KV heads": ({"key": jnp.ones((B, S, 3, H)), "value": jnp.ones((B, S, 3, H))}, {}),
    "query must have one of the dtypes": ({"query": jnp.ones((B, T, N, H), jnp.int32)}, {}),
    "key must have one of the dtypes": ({"key": jnp.ones((B, S, K, H), jnp.bfloat16)}, {}),
    "must not be empty": ({"query": jnp.ones((B, 0, N, H))}, {}),
    "bias must have shape": ({}, {"bias": jnp.ones((B, N, T, S + 1))}),
    "bias must have one of the dtypes": ({}, {"bias": jnp.ones((B, N, T, S), jnp.int32)}),
    "alibi_slopes must have shape": ({}, {"alibi_slopes": jnp.ones((N + 1,))}),
    "alibi_slopes must have one of": ({}, {"alibi_slopes": jnp.ones((N,), jnp.int32)}),
    "sinks must have shape": ({}, {"sinks": jnp.ones((B, N))}),
    "sinks must have one of": ({}, {"sinks": jnp.ones((N,), jnp.int32)}),
    "must be given together": ({}, {"q_segment_ids": jnp.zeros((B, T), jnp.int32)}),
    "q_segment_ids must lie in .* got 4294967296": (
        {},
        {"q_segment_ids": np.full((B, T), 2**32), "kv_segment_ids": np.zeros((B, S), np.int32)},
    ),
    "q_lengths must have shape": ({}, {"q_lengths": jnp.zeros((B + 1,), jnp.int32)}),
    "kv_lengths must hold integers": ({}, {"kv_lengths": jnp.zeros((B,))}),
    "causal_alignment must be one of": ({}, {"causal_alignment": "left"}),
    "local_window_size must be": ({}, {"local_window_size": -1}),
    "local_window_size must be .* got True": ({}, {"local_window_size": True}),
    "logits_soft_cap must be positive": ({}, {"logits_soft_cap": 0.0}),
    "logits_soft_cap must be a finite number": ({}, {"logits_soft_cap": jnp.inf}),
    "logits_soft_cap must be a finite .* got 'a'": ({}, {"logits_soft_cap": "a"}),
    "logits_soft_cap must be a finite .* 1e.39": ({}, {"logits_soft_cap": 1e39}),
    "scale must be a finite number": ({}, {"scale": float("nan")}),
    "scale must be a finite number.* 'x'": ({}, {"scale": "x"}),
    "dropout_rate must be a finite number": ({}, {"dropout_rate": "x"}),
    "dropout_rate must lie": ({}, {"dropout_rate": 1.0}),
    "dropout_key must be one key": ({}, {"dropout_rate": 0.1, "dropout_key": 0}),
    r"dropout_key must be one key.*\[2\]": (
        {},
        {"dropout_rate": 0.1, "dropout_key": jax.random.split(jax.random.key(0))},
    ),
    "kv_lengths must be an array": ({}, {"kv_lengths": 5}),
    "q_lengths must be an array": ({}, {"q_lengths": [5, 5]}),
    "alibi_slopes must be an array": ({}, {"alibi_slopes": [0.5] * N}),
    "config must be a FlashConfig": ({}, {"config": "x"}),
    "dropout_key must be given": ({}, {"dropout_rate": 0.1}),
    r"dropout_key must be one key.*\[3\]": (
        {},
        {"dropout_rate": 0.1, "dropout_key": jnp.zeros(3, jnp.uint32)},
    ),
    "is_causal must be a bool": ({}, {"is_causal": "no"}),
    "return_lse must be a bool": ({}, {"return_lse": 1}),
    "implementation must be one of": ({}, {"implementation": "cuda"}),
    r"implementation must be one of .* got \[\]": ({}, {"implementation": []}),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_name_the_argument(tensors, message):
    arrays, arguments = BAD_CALLS[message]
    operands = dict(zip(("query", "key", "value"), tensors, strict=False)) | arrays
    with pytest.raises(ValueError, match=message):
        flash_attention(*operands.values(), **arguments)


def test_a_named_variant_that_cannot_says_so(tensors):
    query, key, value, *_ = tensors
    with jax.default_matmul_precision("highest"), pytest.raises(NotImplementedError, match="float32"):
        flash_attention(query, key, value, implementation="sm90")
