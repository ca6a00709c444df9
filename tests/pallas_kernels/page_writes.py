"""Random pools and tokens for the tests of page writes and copies, and plain loops as oracles."""

import jax.numpy as jnp
import numpy as np


def random_pool(shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [np.asarray(jnp.asarray(rng.standard_normal(shape), dtype)) for _ in range(2)]


def random_tokens(shape, num_tokens, dtype=np.float32, seed=1):
    """Keys, values, and distinct slots, of which every fifth is negative."""
    rng = np.random.default_rng(seed)
    key, value = random_pool((num_tokens, shape[2], shape[4]), dtype, seed)
    slots = rng.permutation(shape[1] * shape[3])[:num_tokens].astype(np.int32)
    slots[::5] = -1 - slots[::5]
    return key, value, slots


def write_oracle(pages, tokens, slots, layer):
    pages = pages.copy()
    for token, slot in zip(tokens, slots, strict=True):
        if slot >= 0:
            pages[layer, slot // pages.shape[3], :, slot % pages.shape[3]] = token
    return pages


def copy_oracle(pages, src_pages, dst_pages):
    copied = pages.copy()
    for src, dst in zip(src_pages, dst_pages, strict=True):
        if src:
            copied[:, dst] = pages[:, src]
    return copied
