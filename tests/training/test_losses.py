import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.data.batches import NO_TARGET
from training.losses import bits_per_byte, cross_entropy, next_token_loss


def example(num_tokens=24, embed_dim=8, vocab_size=50, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (2, num_tokens // 2, embed_dim), dtype)
    head = jax.random.normal(keys[1], (embed_dim, vocab_size), dtype)
    targets = jax.random.randint(keys[2], (2, num_tokens // 2), 0, vocab_size)
    return hidden, head, targets.at[0, 3:7].set(NO_TARGET).at[1, -1].set(NO_TARGET)


def plain_loss(logits: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
    """Token by token, in float64."""
    total, count = 0.0, 0
    for row, target in zip(
        logits.reshape(-1, logits.shape[-1]).astype(np.float64), targets.ravel(), strict=True
    ):
        if target != NO_TARGET:
            total += float(np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[target])
            count += 1
    return total, count


def test_cross_entropy_is_the_plain_sum():
    hidden, head, targets = example()
    loss = cross_entropy(hidden @ head, targets)
    total, count = plain_loss(np.asarray(hidden @ head), np.asarray(targets))
    assert int(loss.count) == count == 19
    np.testing.assert_allclose(loss.total, total, rtol=1e-6)


def test_cross_entropy_of_large_logits_is_finite():
    logits = jnp.array([[3e4, 0.0, -3e4]], jnp.bfloat16)
    assert float(cross_entropy(logits, jnp.array([0])).total) == 0.0
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([1])).total, logits[0, 0], rtol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 8, 23, 24, 100, None])
def test_chunks_change_neither_loss_nor_gradients(chunk_tokens):
    hidden, head, targets = example()

    def chunked(hidden, head):
        return 0.7 * next_token_loss(lambda h: h @ head, hidden, targets, 50, chunk_tokens).total

    def plain(hidden, head):
        return 0.7 * cross_entropy(hidden @ head, targets).total

    got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(hidden, head)
    want = jax.value_and_grad(plain, argnums=(0, 1))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, want)
    assert float(jnp.max(jnp.abs(want[1][1]))) > 0.1
    without_gradient = next_token_loss(lambda h: h @ head, hidden, targets, 50, chunk_tokens)
    np.testing.assert_allclose(without_gradient.total, want[0] / 0.7, rtol=1e-6)
    assert int(without_gradient.count) == 19


def test_gradients_of_chunks_are_added_up_in_float32():
    hidden, head, targets = example(num_tokens=4096, vocab_size=11, dtype=jnp.bfloat16)

    def loss(head, dtype, chunk):
        hidden_ = hidden.astype(dtype)
        return next_token_loss(lambda h: h @ head.astype(dtype), hidden_, targets, 11, chunk).total

    truth = jax.grad(loss)(head.astype(jnp.float32), jnp.float32, 4096)
    errors = {
        chunk: float(jnp.linalg.norm(jax.grad(loss)(head, jnp.bfloat16, chunk).astype(jnp.float32) - truth))
        for chunk in (4096, 16)
    }
    assert errors[16] < 2 * errors[4096] + 1e-6  # 256 additions in bf16 would be far off


def test_the_logits_of_a_batch_never_exist_at_once():
    vocab_size, num_tokens, chunk = 4096, 2048, 128
    hidden = jax.ShapeDtypeStruct((1, num_tokens, 32), jnp.float32)
    head = jax.ShapeDtypeStruct((32, vocab_size), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)

    def temporaries(chunk):
        loss = lambda hidden, head, targets: (
            next_token_loss(lambda h: h @ head, hidden, targets, vocab_size, chunk).total
        )
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    all_logits = 4 * vocab_size * num_tokens
    assert temporaries(num_tokens) >= all_logits
    assert temporaries(chunk) < all_logits / 4


def test_bits_per_byte():
    np.testing.assert_allclose(bits_per_byte(np.log(2.0), 1.0), 1.0)
    np.testing.assert_allclose(bits_per_byte(np.log(2.0) * 8, 4.0), 2.0)
