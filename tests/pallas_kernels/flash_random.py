"""Random calls of flash_attention: rows of tables.py, and what tests/gpu/test_flash_random.py runs.

JAXATTN_INTERPRETED_CASES sets how many are interpreted (draws.py: from where on, and how often).
"""

import collections
import contextlib
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np

import tests.pallas_kernels.tolerance as tolerance
from jaxattn.block_mask import BlockMask
from pallas_kernels import flash_attention
from pallas_kernels.flash_attention.block_tiles import BlockTiles
from tests.pallas_kernels.draws import FIRST, NUM_INTERPRETED, check_draws, poison_of
from tests.pallas_kernels.flash_cases import IN_BLOCKS, poison_padding, random_inputs
from tests.pallas_kernels.flash_fused_cases import fused_config
from tests.pallas_kernels.interpreter import interpreted
from tests.pallas_kernels.tables import CompileCase

CASES = range(FIRST, FIRST + int(os.environ.get("JAXATTN_INTERPRETED_CASES", "2")))
DIFFERENTIATED = ("bias", "sinks")
SCALES = (0.75, 0.87, 1.0, 1.2)  # of values, in the naive computation


def draw(seed, longest=800, max_batch=3):
    """(shapes and dtype, arguments) of a call of at most so many tokens and batch rows; half of the features
    are absent from most calls.
    """
    rng = np.random.default_rng(seed)
    has = lambda probability=0.25: rng.random() < probability
    size = lambda limit: int(np.exp(rng.uniform(0, np.log(limit))))
    batch, k, group, t = (
        rng.integers(1, max_batch + 1),
        rng.integers(1, 3),
        rng.choice([1, 1, 2, 4]),
        size(longest),
    )
    n, s = int(k * group), t if has(0.5) else size(longest)
    h = int(rng.choice([32, 40, 48, 64, 64, 72, 80, 88, 96, 104, 120, 128, 128, 136, 160, 192, 200, 256]))
    hv = int(rng.choice([40, 64, 136])) if has(0.15) else h
    shape = {"batch": int(batch), "t": t, "s": s, "n": n, "k": int(k), "h": h, "hv": hv}
    shape["dtype"] = jnp.float16 if has() else jnp.bfloat16
    arguments = {
        "is_causal": bool(has(0.5)),
        "causal_alignment": str(rng.choice(["top_left", "bottom_right"])),
    }
    if has():
        arguments["local_window_size"] = (size(s + 1), None if has() else size(s + 1))
    if has(0.15):
        arguments["logits_soft_cap"] = float(rng.uniform(1, 20))
    for name, length in (("q_lengths", t), ("kv_lengths", s)):
        if has():
            arguments[name] = jnp.asarray(rng.integers(0, length + 1, batch), jnp.int32)
    if has(0.35):
        documents = rng.integers(1, 6)
        ids = [rng.integers(0, documents, (batch, length)) for length in (t, s)]
        if has(0.7):
            ids = [np.sort(x, axis=1) for x in ids]
        arguments |= {"q_segment_ids": jnp.asarray(ids[0]), "kv_segment_ids": jnp.asarray(ids[1])}
    if has():
        arguments |= {"dropout_rate": float(rng.uniform(0.05, 0.6)), "dropout_key": jax.random.key(seed)}
    if has(0.35):
        sizes = [size if has(0.5) else 1 for size in (batch, n, t, s)]
        bias = rng.normal(size=sizes) + np.where(rng.random(sizes) < 0.1, -np.inf, 0.0)
        arguments["bias"] = jnp.asarray(bias, shape["dtype"] if has(0.5) else jnp.float32)
    if has():
        slopes = 2.0 ** -rng.uniform(1, 8, (batch, n) if has() else n)
        arguments["alibi_slopes"] = jnp.asarray(slopes, jnp.float32)
    if has(0.2):
        arguments["block_mask"] = random_tiles(rng, t, s, batch, n)
    if has():
        arguments["sinks"] = jnp.asarray(rng.normal(size=n), jnp.float32)
    if has(0.4) and h == shape["hv"]:
        columns = h + -h % (64 if h > 128 and h % 16 else 32)  # of the forward's tiles
        arguments["config"] = fused_config(columns, IN_BLOCKS if h <= 128 else None)
    return shape, arguments


def random_tiles(rng, t, s, batch, n):
    """Tiles that are whole, absent or random, for each batch row or head or for all."""
    batch, n = (size if rng.random() < 0.5 else 1 for size in (batch, n))
    kinds = rng.integers(0, 3, (batch, n, t // 128 + 1, s // 128 + 1))
    kinds = np.kron(kinds, np.ones((1, 1, 128, 128), np.int32))[:, :, :t, :s]
    return BlockMask.from_dense((kinds == 1) | ((kinds == 2) & (rng.random(kinds.shape) < 0.3))).tiles()


def redraw(shape, arguments, seed):
    """The arguments with others of the same shapes and dtypes for those at run time; edges are likely."""
    rng = np.random.default_rng(seed)
    has = lambda probability: rng.random() < probability
    batch, t, s, n = (shape[name] for name in ("batch", "t", "s", "n"))
    others = {}
    for name, length in (("q_lengths", t), ("kv_lengths", s)):
        edges = rng.choice([0, 1, length], batch)
        others[name] = np.where(rng.random(batch) < 0.6, edges, rng.integers(0, length + 1, batch))
    documents = rng.choice([1, 2, 5, 40])
    ids = [rng.integers(0, documents, (batch, length)) for length in (t, s)]
    if has(0.7):
        ids = [np.sort(x, axis=1) for x in ids]
    ids[1] += documents * (rng.random((batch, 1)) < 0.2)  # whose queries and keys do not meet
    others["q_segment_ids"], others["kv_segment_ids"] = ids
    if "bias" in arguments:
        sizes = arguments["bias"].shape
        is_hidden = rng.random(sizes) < rng.choice([0.0, 0.1, 0.9])
        is_hidden |= rng.random((*sizes[:3], 1)) < 0.1  # from whole rows
        others["bias"] = np.where(is_hidden, -np.inf, rng.normal(size=sizes))
    if "alibi_slopes" in arguments:
        others["alibi_slopes"] = 2.0 ** -rng.uniform(1, 8, arguments["alibi_slopes"].shape)
    others["sinks"] = np.where(rng.random(n) < 0.2, -np.inf, 3 * rng.normal(size=n))
    drawn = {name: jnp.asarray(x, arguments[name].dtype) for name, x in others.items() if name in arguments}
    if "dropout_key" in arguments:
        drawn["dropout_key"] = jax.random.key(rng.integers(2**31))
    if "block_mask" in arguments:
        drawn["block_mask"] = redraw_tiles(rng, arguments["block_mask"])
    return arguments | drawn


def redraw_tiles(rng, tiles):
    """The tiles of each batch row and head for another, with less or nothing to see in partial ones."""
    rows, heads = (rng.permutation(size) for size in tiles.num_kv.shape[:2])
    is_kept = rng.random(tiles.masks.shape) < rng.choice([0.0, 0.1, 1.0])
    return BlockTiles(*(x[rows][:, heads] for x in tiles[:-1]), masks=tiles.masks * is_kept)


def attention(implementation, arguments):
    """A function of arrays and cotangents, and of other arguments at run time: output, log-sum-exp and
    gradients by name. It is compiled once for all of the same shapes.
    """
    static = {name: x for name, x in arguments.items() if not isinstance(x, jax.Array | BlockTiles)}

    # Each array is rounded to its dtype, also where XLA would rather leave a rounding and its undoing out.
    @functools.partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    def step(arrays, differentiated, given, cotangents):
        call = lambda arrays, differentiated: flash_attention(
            *arrays, **differentiated, **given, **static, return_lse=True, implementation=implementation
        )
        (out, lse), vjp = jax.vjp(call, arrays, differentiated)
        (d_query, d_key, d_value), others = vjp((cotangents[0].astype(out.dtype), cotangents[1]))
        return {"out": out, "lse": lse, "query": d_query, "key": d_key, "value": d_value} | others

    def call(arrays, cotangents, arguments=arguments):
        given = {name: x for name, x in arguments.items() if name not in static}
        differentiated = {name: given.pop(name) for name in DIFFERENTIATED if name in given}
        return step(list(arrays), differentiated, given, cotangents)

    return call


def naive_errors(reference, arrays, cotangents):
    """RMS errors by name of the reference on 16-bit arrays, whose gradients see the rounded output too. Over
    values of several scales: each rounds in other places.
    """
    query, key, value = arrays
    squares = collections.defaultdict(float)
    for scale in SCALES:
        scaled = [query, key, value * scale]
        naive = reference(scaled, cotangents)
        exact = reference([x.astype(jnp.float32) for x in scaled], cotangents)
        for name in exact.keys() - {"lse"}:
            error = tolerance.rms(np.float64(naive[name]) - np.float64(exact[name]))
            squares[name] += error**2 / len(SCALES)
    return {name: np.sqrt(square) for name, square in squares.items()}


def random_arrays(shape, seed):
    """(query, key, value), cotangents of the output and the log-sum-exp."""
    batch, t, s, n, k, h, hv, dtype = shape.values()
    shapes = [(batch, t, n, h), (batch, s, k, h), (batch, s, k, hv), (batch, t, n, hv)]
    *arrays, out_grad = random_inputs(shapes, dtype, seed)
    return arrays, (out_grad, jax.random.normal(jax.random.key(seed + 1), (batch, t, n)))


def assert_near_reference(results, reference, arrays, cotangents):
    """Each of the results within what 16 bits allow of the reference in fp32."""
    expected = reference([x.astype(jnp.float32) for x in arrays], cotangents)
    naive = functools.cache(lambda: naive_errors(reference, arrays, cotangents))
    np.testing.assert_allclose(results["lse"], expected["lse"], atol=2e-4, rtol=2e-4)
    for name in results.keys() - {"lse"}:
        limit = tolerance.LIMITS[arrays[0].dtype.name] * (1 if name == "out" else 1.5)
        tolerance.assert_close(name, results[name], expected[name], limit, lambda name=name: naive()[name])


def check(seed, num_draws=NUM_INTERPRETED, is_interpreted=False, **limits):
    """Output, log-sum-exp and gradients of calls whose padding is poisoned, against the reference in fp32."""
    shape, first = draw(seed, **limits)
    kernel, reference = (attention(name, first) for name in ("sm90", "reference"))

    def check_draw(number):
        arguments = redraw(shape, first, (seed, number)) if number else first
        arrays, cotangents = random_arrays(shape, seed + (number << 20))
        padding = {"poison_with": poison_of(number), **arguments}
        poisoned = poison_padding(*arrays, **padding), poison_cotangents(*cotangents, **padding)
        with interpreted() if is_interpreted else contextlib.nullcontext():
            results = jax.block_until_ready(kernel(*poisoned, arguments))
        assert_near_reference(results, functools.partial(reference, arguments=arguments), arrays, cotangents)

    check_draws(seed, num_draws, check_draw)


def poison_cotangents(out_grad, lse_grad, poison_with, q_lengths=None, **_):
    if q_lengths is None:
        return out_grad, lse_grad
    inside = (jnp.arange(out_grad.shape[1]) < q_lengths[:, None])[..., None]
    return jnp.where(inside[..., None], out_grad, poison_with), jnp.where(inside, lse_grad, poison_with)


INTERPRET = {
    f"flash_attention:random {seed}": functools.partial(
        check, seed, is_interpreted=True, longest=150, max_batch=2
    )
    for seed in CASES
}
COMPILE: dict[str, CompileCase] = {}
