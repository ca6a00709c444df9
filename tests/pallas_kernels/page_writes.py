"""Random pools and tokens for the tests of page writes and copies, and plain loops as oracles."""

import jax.numpy as jnp
import numpy as np

CODES = {"int8": 127, "float8_e4m3fn": 448}  # quantized dtypes, and their largest numbers


def random_pool(shape, dtype=np.float32, seed=0):
    """k_pages and v_pages; of a quantized dtype also k_scale and v_scale."""
    rng = np.random.default_rng(seed)
    largest = CODES.get(jnp.dtype(dtype).name)
    scale = largest / 5 if largest else 1
    numbers = lambda: np.clip(scale * rng.standard_normal(shape), -(largest or np.inf), largest or np.inf)
    pools = [np.array(jnp.asarray(numbers(), dtype)) for _ in range(2)]
    return pools + [rng.random(shape[:4], np.float32) for _ in range(2)] if largest else pools


def scales_of(pools):
    """The scales of a pool, as keyword arguments of the ops."""
    return dict(zip(("k_scale", "v_scale"), pools[2:], strict=False))


def random_tokens(shape, num_tokens, dtype=np.float32, seed=1):
    """Keys, values, and distinct slots, of which every fifth is negative."""
    rng = np.random.default_rng(seed)
    key, value = random_pool((num_tokens, shape[2], shape[4]), dtype, seed)
    slots = rng.permutation(shape[1] * shape[3])[:num_tokens].astype(np.int32)
    slots[::5] = -1 - slots[::5]
    return key, value, slots


def write_oracle(pages, tokens, slots, layer):
    """Pages [L, P, K, Z, ...] after the write of tokens [tokens, K, ...]."""
    pages = pages.copy()
    for token, slot in zip(tokens, slots, strict=True):
        if slot >= pages.shape[3]:  # not in NULL_PAGE
            pages[layer, slot // pages.shape[3], :, slot % pages.shape[3]] = token
    return pages


def quantize_oracle(vectors, dtype):
    """Codes [..., H] and scales [...], computed by NumPy."""
    limit, dtype, vectors = CODES[jnp.dtype(dtype).name], jnp.dtype(dtype), vectors.astype(np.float32)
    largest = np.maximum(np.abs(vectors).max(axis=-1), np.float32(1e-30))
    scaled = vectors * (np.float32(limit) / largest)[..., None]
    codes = (np.rint(scaled) if dtype == np.int8 else scaled).astype(dtype)
    return codes, largest * np.float32(1 / limit)


def copy_oracle(pages, src_pages, dst_pages):
    copied = pages.copy()
    for src, dst in zip(src_pages, dst_pages, strict=True):
        if src and dst:
            copied[:, dst] = pages[:, src]
    return copied
