"""flash_attention's Hopper kernels on random shapes, masks and combinations of features, against the
reference in fp32; what lies beyond the lengths is poison.

JAXATTN_RANDOM_CASES sets how many are compiled (JAXATTN_RANDOM_SEED: from where on), JAXATTN_RANDOM_DRAWS
with how many draws of data, lengths, ids, biases and the like each is checked.
"""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import flash_attention
from tests.pallas_kernels.draws import FIRST, NUM_ON_GPU
from tests.pallas_kernels.flash_cases import random_inputs
from tests.pallas_kernels.flash_random import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("JAXATTN_TEST_GPU") != "1", reason="needs a Hopper GPU"),
]
CASES = range(FIRST, FIRST + int(os.environ.get("JAXATTN_RANDOM_CASES", "200")))


@pytest.mark.parametrize("seed", CASES)
def test_random_call(seed):
    check(seed, NUM_ON_GPU)


def test_dropout_drops_the_same_weights_forward_and_backward():
    """With values of one-hot keys the output shows the weights, and d_value the ones that came through."""
    t = s = 256
    query, key = random_inputs([(1, t, 1, 64), (1, s, 1, 64)], jnp.bfloat16)
    value = jnp.eye(s, dtype=jnp.bfloat16)[None, :, None]
    call = functools.partial(
        flash_attention, query, key, dropout_rate=0.5, dropout_key=jax.random.key(1), implementation="sm90"
    )
    weights, vjp = jax.vjp(call, value)
    kept = np.asarray(weights[0, :, 0]) != 0
    out_grad = jnp.eye(t, s, dtype=jnp.bfloat16)[None, :, None]
    (d_value,) = vjp(out_grad)
    np.testing.assert_array_equal(np.asarray(d_value[0, :, 0]).T != 0, kept)
    assert abs(kept.mean() - 0.5) < 5 * 0.5 / np.sqrt(kept.size)
