"""What row_worker.py lowers, compiles and times: a call over sets of inputs that are taken in turn."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from timing import elapsed_milliseconds, milliseconds

L2_BYTES = 60e6
MAX_SETS = 64


def sets_in_turn(num_bytes: float) -> int:
    """Sets of so many bytes that are taken in turn, so that none is found in L2; no more than compile in good
    time."""
    return min(MAX_SETS, -(-int(4 * L2_BYTES) // int(num_bytes)))


class Program(NamedTuple):
    """call(set, *arrays), or state = call(set, state, *arrays) in place; large arrays as shapes, filled when
    they are needed. `stays`: a copy of the state is an error.
    """

    call: Callable[..., Any]
    arrays: tuple[Any, ...]
    num_sets: int
    state: tuple[Any, ...] = ()
    stays: bool = False

    def lower(self) -> "Lowered":
        """One call for each of the sets in turn."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a peer is deprecated
            run = jax.jit(self._run, donate_argnums=0).lower(self.state, *self.arrays)
            state_bytes = sum(x.size * x.dtype.itemsize for x in self.state) if self.stays else 0
            inputs = (self.state, self.arrays)
            return Lowered(run, inputs, lower_fillers(inputs), self.num_sets, state_bytes)

    def _run(self, state: tuple[Any, ...], *arrays: Any) -> tuple[tuple[Any, ...], list[Any]]:
        results = []
        for index in range(self.num_sets):
            if state:
                state = self.call(index, state, *arrays)
            else:
                results.append(self.call(index, *arrays))
        return state, results


class Lowered(NamedTuple):
    """A program before the compiler, which may run in a thread; all that comes before it may not."""

    run: jax.stages.Lowered
    inputs: tuple[Any, Any]  # state and arrays
    fillers: dict[jax.ShapeDtypeStruct, jax.stages.Lowered]
    num_sets: int
    state_bytes: int  # that must stay where they are

    def compile(self) -> "Compiled":
        run = self.run.compile()
        memory: Any = run.memory_analysis()
        is_copied = memory.temp_size_in_bytes > self.state_bytes // 16
        if self.state_bytes and (is_copied or memory.alias_size_in_bytes < self.state_bytes):
            aliased, temporary = memory.alias_size_in_bytes, memory.temp_size_in_bytes
            raise RuntimeError(
                f"of {self.state_bytes:,} bytes {aliased:,} are in place; {temporary:,} temporary"
            )
        fillers = {spec: filler.compile() for spec, filler in self.fillers.items()}
        return Compiled(run, self.inputs, fillers, self.num_sets, memory.temp_size_in_bytes)


class Compiled(NamedTuple):
    """A program for the device, and what makes its arrays there."""

    run: jax.stages.Compiled
    inputs: tuple[Any, Any]
    fillers: dict[jax.ShapeDtypeStruct, jax.stages.Compiled]
    num_sets: int
    temp_bytes: int

    def figures(self, iterations: int) -> dict[str, float]:
        """Of one call: its kernels' time, the median over runs of all sets in turn; the time from one call to
        the next, launches and gaps between kernels included; temporary memory of the whole run."""
        state, arrays = filled(self.inputs, self.fillers)
        run = _InPlace(self.run, state)  # pyright: ignore[reportAbstractUsage]
        per_call = lambda run_time: 1e3 * run_time / self.num_sets
        return {
            "microseconds": per_call(milliseconds(run, arrays, iterations)),
            "elapsed_us": per_call(elapsed_milliseconds(run, arrays, iterations)),
            "temp_bytes": self.temp_bytes,
        }


class _InPlace(jax.stages.Wrapped):
    """A compiled call whose donated state comes back, so that it can be called again; the profiler takes it
    for a jitted function."""

    def __init__(self, run: jax.stages.Compiled, state: Any):
        self.run, self.state = run, state

    def __call__(self, *arrays: Any) -> Any:
        self.state, results = self.run(self.state, *arrays)
        jax.block_until_ready(self.state)  # the next call donates it: nobody else can wait for it
        return results


def lower_fillers(inputs: Any) -> dict[jax.ShapeDtypeStruct, jax.stages.Lowered]:
    """For each shape among the inputs what fills it with random numbers, given a seed: there are many more
    arrays than shapes."""
    specs = {x for x in jax.tree.leaves(inputs) if isinstance(x, jax.ShapeDtypeStruct)}
    seed = jax.ShapeDtypeStruct((), jnp.int32)
    return {
        spec: jax.jit(lambda seed, spec=spec: _random(jax.random.key(seed), spec)).lower(seed)
        for spec in specs
    }


def filled(inputs: Any, fillers: dict[jax.ShapeDtypeStruct, jax.stages.Compiled]) -> Any:
    """The inputs on the device."""
    seeds = map(np.int32, itertools.count())
    fill = lambda x: fillers[x](next(seeds)) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)
    return jax.tree.map(fill, inputs)


def _random(key: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    numbers = jax.random.normal(key, shape.shape, jnp.bfloat16)
    if shape.dtype == jnp.float32:  # scales
        return jnp.abs(numbers).astype(jnp.float32) / 40
    return (numbers * (40 if shape.dtype.itemsize == 1 else 1)).astype(shape.dtype)


def scattered_tables(lengths: Sequence[int], page_size: int, room: int = 0) -> np.ndarray:
    """Block tables i32[R, M] for `room` tokens a row, or for the longest length: every row's pages, anywhere
    in the pool; NULL_PAGE beyond its length."""
    counts = [-(-length // page_size) for length in lengths]
    pages = iter(np.random.default_rng(0).permutation(sum(counts)).astype(np.int32) + 1)
    tables = np.zeros((len(counts), -(-max(room, *lengths) // page_size)), np.int32)
    for table, count in zip(tables, counts, strict=True):
        table[:count] = [next(pages) for _ in range(count)]
    return tables
