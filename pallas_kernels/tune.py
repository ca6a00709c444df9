"""Finds better tiles for flash_attention on the GPU of this machine, by trying them.

    python -m pallas_kernels.tune --batch 4 --heads 32/8 --head-dim 128 --length 4096 --causal --save

First the forward kernel's fields are swept together, then each backward kernel's (with --backward). Configs
near the default come first; one that does not compile, or does not compute what the default does, is dropped.
With --save the winner goes to a cache of this user, $XDG_CACHE_HOME/jaxattn/flash_configs.json, where
pallas_kernels.tuned_config(query, key, ...) finds it. Nothing else reads that file.

Exit codes: 0 done, 1 nothing could be measured, 2 wrong arguments or no Hopper GPU.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import device
from pallas_kernels.flash_attention import FlashConfig, flash_attention, sm90, tuned
from pallas_kernels.flash_attention.arguments import MAX_HEAD_DIM
from pallas_kernels.flash_attention.spec import AttentionInputs, AttentionSpec

# What is tried of each field, wherever it stands. A field that is not here is tried at its default only.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "tile_q": (64, 128),
    "tile_kv": (64, 80, 96, 112, 128, 192, 256),
    "stages": (1, 2, 3, 4),
    "value_stages": (None, 3),
    "warpgroups": (1, 2, 3),
    "q_stages": (1, 2),
    "overlap": (False, True),
    "ping_pong": (False, True),
    "own": (64, 128),
    "other": (64, 128),
}
MAX_CHANGES = 3  # fields in which a config differs from where the sweep began
MAX_ERROR = 1e-2  # relative RMS distance from what the default config computes


class Trial(NamedTuple):
    """One config: what it took, or why it cannot be used."""

    config: FlashConfig
    compile_seconds: float
    microseconds: float | None
    failure: str | None = None


class Call(NamedTuple):
    """What is tuned: arrays and keyword arguments of flash_attention."""

    arrays: tuple[Any, ...]  # query, key, value and the output's cotangent
    options: dict[str, Any]

    @property
    def flops(self) -> float:
        """Of the forward pass, over visible pairs."""
        batch, num_queries, num_heads, head_dim = self.arrays[0].shape
        num_keys, value_dim = self.arrays[1].shape[1], self.arrays[2].shape[3]
        query = np.arange(num_queries)
        first, last = np.zeros_like(query), np.full_like(query, num_keys - 1)
        if self.options["is_causal"]:
            last = np.minimum(last, query)
        if window := self.options["local_window_size"]:
            first = np.maximum(first, query - window[0])
            last = last if window[1] is None else np.minimum(last, query + window[1])
        pairs = np.maximum(last - first + 1, 0).sum()
        return 2.0 * batch * num_heads * float(pairs) * (head_dim + value_dim)

    def default(self) -> FlashConfig:
        spec = AttentionSpec(
            scale=1.0,
            is_causal=self.options["is_causal"],
            window=self.options["local_window_size"] or (None, None),
            logits_soft_cap=self.options["logits_soft_cap"],
            deterministic=self.options["deterministic"],
        )
        return sm90.plan_of(AttentionInputs(*self.arrays[:3]), spec).config


# --- which configs ---


def stages(config: FlashConfig, backward: bool, deterministic: bool) -> list[tuple[str, ...]]:
    """What is swept, one after the other: () is the forward kernel, else the field of a backward kernel."""
    groups: list[tuple[str, ...]] = [()]
    if not backward:
        return groups
    nested = [field.name for field in dataclasses.fields(config) if is_config(getattr(config, field.name))]
    fused = [name for name in nested if name == "fused"]
    return groups + [
        (name,) for name in (fused if fused and not deterministic else sorted(set(nested) - set(fused)))
    ]


def is_config(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def neighbours(config: Any) -> Iterator[Any]:
    """Valid configs over OPTIONS of the plain fields, those that differ in fewer fields first."""
    names = [field.name for field in dataclasses.fields(config) if not is_config(getattr(config, field.name))]
    choices = [dict.fromkeys((getattr(config, name), *OPTIONS.get(name, ()))) for name in names]
    changes = [dict(zip(names, values, strict=True)) for values in itertools.product(*choices)]
    num_changed = lambda change: sum(value != getattr(config, name) for name, value in change.items())
    for change in sorted((c for c in changes if num_changed(c) <= MAX_CHANGES), key=num_changed):
        try:
            yield dataclasses.replace(config, **change)
        except ValueError:
            continue


def candidates(config: FlashConfig, group: tuple[str, ...]) -> list[FlashConfig]:
    if not group:
        return list(neighbours(config))
    (name,) = group
    return [dataclasses.replace(config, **{name: value}) for value in neighbours(getattr(config, name))]


# --- how good they are ---


def compile_call(call: Call, config: FlashConfig, backward: bool) -> Callable:
    """The compiled forward pass, or forward and backward pass, under a config."""
    attend = functools.partial(flash_attention, implementation="sm90", config=config, **call.options)

    def forward(query, key, value, out_grad):
        return attend(query, key, value)

    def both(query, key, value, out_grad):
        out, vjp = jax.vjp(attend, query, key, value)
        return out, vjp(out_grad)

    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in call.arrays]
    return jax.jit(both if backward else forward).lower(*specs).compile()


def sweep(
    call: Call, configs: list[FlashConfig], backward: bool, iterations: int, deadline: float
) -> list[Trial]:
    """Compiles in threads, then times one by one. The others must compute what the first config does."""

    def build(config: FlashConfig):
        start = time.perf_counter()
        if start > deadline:
            return None, 0.0, "no time left"
        try:
            compiled = compile_call(call, config, backward)
        except Exception as error:  # too much shared memory, a tile that wgmma has not: any reason counts
            return None, 0.0, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return compiled, time.perf_counter() - start, None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        built = list(pool.map(build, configs))
    trials, expected = [], None
    for config, (compiled, seconds, failure) in zip(configs, built, strict=True):
        if compiled is None:
            trials.append(Trial(config, 0.0, None, failure))
            continue
        try:
            results = jax.tree.leaves(compiled(*call.arrays))
            expected = results if expected is None else expected
            if distance(results, expected) > MAX_ERROR:
                raise ArithmeticError("it computes something else than the default")
            trials.append(Trial(config, seconds, microseconds(compiled, call.arrays, iterations)))
        except Exception as error:
            trials.append(Trial(config, seconds, None, f"{type(error).__name__}: {error}"))
    return trials


def distance(actual: list[jax.Array], expected: list[jax.Array]) -> float:
    """The largest relative RMS difference."""

    def relative(x: jax.Array, y: jax.Array) -> float:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return float(jnp.sqrt(jnp.mean((x - y) ** 2)) / jnp.maximum(jnp.sqrt(jnp.mean(y**2)), 1e-6))

    worst = max(relative(x, y) for x, y in zip(actual, expected, strict=True))
    return worst if worst == worst else float("inf")  # NaN is far from everything


def microseconds(compiled: Any, arrays: tuple[Any, ...], iterations: int) -> float:
    """Median time in kernels, by CUPTI."""
    from jax.experimental.mosaic.gpu import profiler

    _, times = profiler.measure(compiled, iterations=iterations)(*arrays)
    if times is None:
        raise RuntimeError("no kernel ran")
    return 1e3 * statistics.median(times)


def tune(
    call: Call, backward: bool, iterations: int, seconds: float
) -> tuple[FlashConfig, list[list[Trial]]]:
    """The best config, and the trials of each stage; the first trial of each is where it began."""
    best, deadline, all_trials = call.default(), time.perf_counter() + seconds, []
    for group in stages(best, backward, call.options["deterministic"]):
        trials = sweep(call, candidates(best, group), bool(group), iterations, deadline)
        all_trials.append(trials)
        timed = [trial for trial in trials if trial.microseconds is not None]
        if not timed:
            break
        best = min(timed, key=lambda trial: trial.microseconds or 0.0).config
    return best, all_trials


# --- the command ---


def describe(config: Any, base: Any = None) -> str:
    """The fields, of a config that differs from a base only those that differ."""
    parts = []
    for field in dataclasses.fields(config):
        value, other = getattr(config, field.name), getattr(base, field.name, None)
        if base is not None and value == other:
            continue
        shown = f"({describe(value, other if is_config(other) else None)})" if is_config(value) else value
        parts.append(f"{field.name}={shown}")
    return " ".join(parts) or "default"


def table(trials: list[Trial], flops: float, shown: int) -> str:
    """The best trials and the one they started from."""
    base = trials[0]
    timed = sorted((t for t in trials if t.microseconds is not None), key=lambda t: t.microseconds or 0.0)
    lines = [f"{'compile s':>9}  {'us':>9}  {'TFLOP/s':>8}  {'vs default':>10}  config"]
    listed = timed[:shown] + [trial for trial in timed[shown:] if trial is base]
    for trial in listed:
        assert trial.microseconds is not None
        gain = base.microseconds / trial.microseconds if base.microseconds else float("nan")
        rate = flops / trial.microseconds / 1e6
        name = "default: " + describe(trial.config) if trial is base else describe(trial.config, base.config)
        lines.append(
            f"{trial.compile_seconds:9.1f}  {trial.microseconds:9.1f}  {rate:8.1f}  {gain:10.3f}  {name}"
        )
    reasons = [trial.failure for trial in trials if trial.failure]
    lines.append(
        f"{len(timed)} of {len(trials)} configs ran"
        + (f"; the others: {reasons[0][:90]} ..." if reasons else "")
    )
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batch", type=int, required=True, help="B")
    parser.add_argument("--heads", required=True, help="N, or N/K with K KV heads")
    parser.add_argument("--head-dim", type=int, required=True, help="H")
    parser.add_argument("--length", type=int, required=True, help="T, queries")
    parser.add_argument("--key-length", type=int, help="S, keys (T)")
    parser.add_argument("--value-dim", type=int, help="head dim of the values (H)")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--window", type=int, metavar="LEFT", help="keys visible to the left of a query")
    parser.add_argument("--soft-cap", type=float, help="logits soft cap")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--backward", action="store_true", help="tune the backward kernels too")
    parser.add_argument("--deterministic", action="store_true", help="those of deterministic=True")
    parser.add_argument("--iterations", type=int, default=10, help="timed runs of each config (10)")
    parser.add_argument(
        "--seconds", type=float, default=600, help="begin to compile nothing after so long (600)"
    )
    parser.add_argument("--show", type=int, default=10, help="lines of each table (10)")
    parser.add_argument(
        "--save", action="store_true", help=f"keep the best for tuned_config: {tuned.cache_path()}"
    )
    options = parser.parse_args(arguments)
    heads = options.heads.split("/")
    if (
        not all(part.isdecimal() and int(part) for part in heads)
        or len(heads) > 2
        or int(heads[0]) % int(heads[-1])
    ):
        parser.error(f"--heads must be N or N/K, N a multiple of K, got {options.heads!r}")
    options.num_heads, options.num_kv_heads = int(heads[0]), int(heads[-1])
    for name in ("batch", "head_dim", "length", "iterations", "key_length", "value_dim", "show"):
        value, most = getattr(options, name), MAX_HEAD_DIM if name.endswith("dim") else None
        if value is not None and (value < 1 or (most and value > most)):
            allowed = f"lie in 1..{most}" if most else "be at least 1"
            parser.error(f"--{name.replace('_', '-')} must {allowed}, got {value}")
    if options.window is not None and options.window < 0:
        parser.error(f"--window must be at least 0, got {options.window}")
    if options.soft_cap is not None and not 0 < options.soft_cap < float("inf"):
        parser.error(f"--soft-cap must be positive and finite, got {options.soft_cap}")
    if not options.seconds >= 0:
        parser.error(f"--seconds must be at least 0, got {options.seconds}")
    return options


def make_call(options: argparse.Namespace) -> Call:
    batch, num_keys = options.batch, options.key_length or options.length
    value_dim = options.value_dim or options.head_dim
    shapes = [
        (batch, options.length, options.num_heads, options.head_dim),
        (batch, num_keys, options.num_kv_heads, options.head_dim),
        (batch, num_keys, options.num_kv_heads, value_dim),
        (batch, options.length, options.num_heads, value_dim),
    ]
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, shape, options.dtype) for key, shape in zip(keys, shapes, strict=True)]
    window = None if options.window is None else (options.window, 0 if options.causal else None)
    return Call(
        tuple(arrays),
        {
            "is_causal": options.causal,
            "local_window_size": window,
            "logits_soft_cap": options.soft_cap,
            "deterministic": options.deterministic,
        },
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if not device.is_hopper():
        print(
            f"tune: needs a Hopper GPU (compute capability 9.0), found {device.device_name()}",
            file=sys.stderr,
        )
        return 2
    call = make_call(options)
    best, all_trials = tune(call, options.backward, options.iterations, options.seconds)
    for stage, trials in enumerate(all_trials):
        print(f"\n{'forward' if stage == 0 else 'forward + backward'}, {device.device_name()}")
        print(table(trials, call.flops * (3.5 if stage else 1), options.show))
    last, first = all_trials[-1], all_trials[0]
    if not any(trial.microseconds for trial in last):
        print("tune: no config ran", file=sys.stderr)
        return 1
    print(f"\nbest: {best!r}")
    if options.save:
        name = tuned.shape_class(*call.arrays[:3], **call.options)
        stage_times = {
            "forward_us": min(t.microseconds for t in first if t.microseconds),
            "default_forward_us": first[0].microseconds,
        }
        print(f"saved for {name!r}: {tuned.save_config(name, best, stage_times)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
