"""How a call maps over batch rows and heads, which never meet in attention: under `vmap`, and over devices.

`vmap` folds its axis into the batch, where the kernels have a grid for it. A `jit` over sharded arrays runs
the kernel on each device's rows and heads: to XLA it is opaque, and its inputs would be gathered.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels.flash_attention.block_tiles import BlockTiles
from pallas_kernels.flash_attention.dropout import shift_seed
from pallas_kernels.flash_attention.spec import AttentionGradients, AttentionInputs
from pallas_kernels.manual import vary_along, varying

SEED = "word"
# The dimensions of every array: b, n and k are batch, heads and KV heads; #b and #n may be 1 for all.
_inputs: Any = AttentionInputs  # here of names, not arrays
_block_tiles: Any = BlockTiles
_gradients: Any = AttentionGradients
INPUTS = _inputs(
    query="b t n h",
    key="b s k h",
    value="b s k v",
    bias="#b #n t s",
    sinks="n",
    alibi_slopes="#b n",
    q_segment_ids="b t",
    kv_segment_ids="b s",
    q_lengths="b",
    kv_lengths="b",
    dropout_seed=SEED,
    block_mask=_block_tiles(
        num_kv="#b #n i",
        num_partial="#b #n i",
        kv_index="#b #n i a",
        kv_mask="#b #n i a",
        num_q="#b #n j",
        num_q_partial="#b #n j",
        q_index="#b #n j a",
        q_mask="#b #n j a",
        masks="u i j",
    ),
)
OUTPUTS = ("b t n v", "b n t")  # the output, the log-sum-exp


def forward(function: Callable, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    """function(inputs) -> (out, lse), mapped."""
    return _map(function, (_letters(inputs),), OUTPUTS, inputs)


def backward(
    function: Callable, inputs: AttentionInputs, outputs: tuple, cotangents: tuple
) -> AttentionGradients:
    """function(inputs, *outputs, *cotangents) -> AttentionGradients, mapped."""
    letters = _letters(inputs)
    results = _gradients(*letters[: len(AttentionGradients._fields)])
    operands = (letters, *OUTPUTS, *OUTPUTS)
    gradients = _map(function, operands, results, inputs, *outputs, *cotangents)
    return jax.tree.map(_lie_like, gradients, _gradients(*inputs[: len(gradients)]))


def _letters(inputs: AttentionInputs) -> AttentionInputs:
    """Of the arrays that are given."""
    return _inputs(*(None if x is None else name for x, name in zip(inputs, INPUTS, strict=True)))


class _Arrays(NamedTuple):
    """Letters of the dimensions of each array."""

    operands: list[str]
    results: list[str]


def _map(function: Callable, operand_letters: Any, result_letters: Any, *operands: Any) -> Any:
    """function(*operands) for arrays of these dimensions."""
    given, tree = jax.tree.flatten(operands)
    letters = _Arrays(jax.tree.leaves(operand_letters), jax.tree.leaves(result_letters))
    flat = lambda *arrays: jax.tree.leaves(function(*tree.unflatten(arrays)))
    results = _fold_vmap(_divide(flat, letters), letters)(*given)
    results = [vary_along(x, varying(given[0])) for x in results]  # kernels lose it
    return jax.tree.unflatten(jax.tree.structure(result_letters), results)


# --- vmap ---------------------------------------------------------------------------------------------------


def _fold_vmap(function: Callable, letters: _Arrays) -> Callable:
    """The function with a rule for vmap: the mapped axis becomes part of the batch.

    Where an array with a value for each example has no batch dimension (sinks, patterns of a block mask, the
    gradient of a bias), or where each example draws the same dropout mask, examples run one after another.
    """
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def rule(axis_size: int, is_batched: Sequence[bool], *arrays: jax.Array):
        names = [*letters.results, *(n for n, b in zip(letters.operands, is_batched, strict=True) if b)]
        is_foldable = all("b" in name for name in names) and SEED not in letters.operands
        is_foldable &= all(not name.startswith("#b") for name in letters.results)
        if not is_foldable:
            chosen = [x for x, b in zip(arrays, is_batched, strict=True) if b]

            def one(chosen):
                rest = iter(chosen)
                return mapped(*(next(rest) if b else x for x, b in zip(arrays, is_batched, strict=True)))

            return lax.map(one, chosen), [True] * len(letters.results)
        batch = arrays[0].shape[is_batched[0]]
        fold = functools.partial(_fold, size=axis_size, batch=batch)
        results = mapped(*map(fold, arrays, is_batched, letters.operands))
        unfolded = [x.reshape(axis_size, batch, *x.shape[1:]) for x in results]
        return unfolded, [True] * len(unfolded)

    return mapped


def _fold(x: jax.Array, is_batched: bool, letters: str, *, size: int, batch: int) -> jax.Array:
    """[size, B, ...] or [B, ...], for all examples, as [size x B, ...]."""
    if "b" not in letters or (not is_batched and letters.startswith("#b") and x.shape[0] == 1):
        return x
    shape = x.shape[1 + is_batched :]
    return jnp.broadcast_to(x if is_batched else x[None], (size, batch, *shape)).reshape(-1, *shape)


# --- devices ------------------------------------------------------------------------------------------------


def _divide(function: Callable, letters: _Arrays) -> Callable:
    """The function on arrays that are sharded over batch rows and heads: each device computes its own.

    On axes of an explicit mesh the sharding is part of the types.
    """

    def call(*arrays: jax.Array):
        types = [jax.typeof(x) for x in arrays]
        meshes = [x.sharding.mesh for x in types if AxisType.Explicit in x.sharding.mesh.axis_types]
        if meshes:
            mesh = meshes[0]
            axes = _Axes.of(mesh, *types[:2])
            specs = axes.specs(types, letters.operands)
            arrays = tuple(map(jax.reshard, arrays, map(functools.partial(NamedSharding, mesh), specs)))
            with _no_mesh():  # kernels take no arrays whose sharding is part of the type
                plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in types]
                out_specs = axes.specs(jax.eval_shape(function, *plain), letters.results)
            local = functools.partial(_local, function, letters, axes, out_specs)
            return jax.shard_map(local, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs)(*arrays)
        return _partitioned(function, letters)(*arrays)

    return call


def _partitioned(function: Callable, letters: _Arrays) -> custom_partitioning:
    """Where XLA decides on shardings, it asks here what each device computes."""

    def partition(mesh, operands, results):
        axes = _Axes.of(mesh, *operands[:2])
        specs, out_specs = axes.specs(operands, letters.operands), axes.specs(results, letters.results)

        def local(*arrays):
            with _no_mesh():
                return _local(function, letters, axes, out_specs, *arrays)

        named = functools.partial(NamedSharding, mesh)
        return mesh, local, [*map(named, out_specs)], tuple(map(named, specs))

    partitioned = custom_partitioning(function)
    partitioned.def_partition(partition=partition, sharding_rule=functools.partial(_sharding_rule, letters))
    return partitioned


def _lie_like(gradient: jax.Array, operand: jax.Array) -> jax.Array:
    """A gradient, on the devices as its operand lies: on axes of an explicit mesh that is its type."""
    mesh = jax.typeof(gradient).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return gradient
    return jax.reshard(gradient, NamedSharding(mesh, jax.typeof(operand).sharding.spec))


def _no_mesh() -> Any:
    """A context: what is traced in it is for one device, whatever mesh is set around the call."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


class _Axes(NamedTuple):
    """The mesh axes that divide batch rows and heads."""

    batch: tuple[str, ...]
    head: tuple[str, ...]
    kv_head: tuple[str, ...]  # as head; or none: each device has all of them, and takes the one of its heads
    num_parts: int  # of heads

    @classmethod
    def of(cls, mesh: Any, query: Any, key: Any) -> "_Axes":
        """Those of the query, where rows and heads divide evenly, and KV heads or those who share one.

        None where its sharding names no axes: arrays from outside a mesh, and inside a shard_map that is
        manual along some axes, where XLA divides along the others.
        """
        rows, _, heads, _ = (*getattr(query.sharding, "spec", ()), *(None,) * 4)[:4]
        batch, head = _names(rows), _names(heads)
        parts = lambda names: math.prod(mesh.shape[name] for name in names)
        if query.shape[0] % parts(batch):
            batch = ()
        num_kv_heads = key.shape[2]
        if query.shape[2] % parts(head) or (num_kv_heads % parts(head) and parts(head) % num_kv_heads):
            head = ()
        return cls(batch, head, () if num_kv_heads % parts(head) else head, parts(head))

    def specs(self, arrays: Sequence[Any], letters: Sequence[str]) -> list[PartitionSpec]:
        """How arrays lie on the devices; one with a single row or head for all lies on every one."""
        axes = {"b": self.batch, "n": self.head, "k": self.kv_head}
        of_dimension = lambda size, letter: (axes.get(letter.removeprefix("#")) or None) if size > 1 else None
        return [
            PartitionSpec(*map(of_dimension, array.shape, names.split()))
            for array, names in zip(arrays, letters, strict=True)
        ]

    def absent(self, spec: PartitionSpec) -> tuple[str, ...]:
        """Those that an array does not lie along."""
        present = {
            name for names in spec if names for name in ((names,) if isinstance(names, str) else names)
        }
        return tuple(name for name in (*self.batch, *self.head) if name not in present)

    def own_kv_head(self, x: jax.Array, letters: str) -> jax.Array:
        """Of an array of all KV heads, the one that this device's heads read."""
        axis = letters.split().index("k")
        return lax.dynamic_index_in_dim(x, self._kv_head_of(x.shape[axis]), axis)

    def among_kv_heads(self, x: jax.Array, letters: str, num_kv_heads: int) -> jax.Array:
        """What this device has of its KV head, with zeros for the others."""
        shape = [num_kv_heads if name == "k" else 1 for name in letters.split()]
        is_own = jnp.arange(num_kv_heads) == self._kv_head_of(num_kv_heads)
        return jnp.where(is_own.reshape(shape), x, 0)

    def _kv_head_of(self, num_kv_heads: int) -> jax.Array:
        return lax.axis_index(self.head) * num_kv_heads // self.num_parts


def _names(axes: Any) -> tuple[str, ...]:
    """The mesh axes of one dimension of a PartitionSpec."""
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


def _local(function: Callable, letters: _Arrays, axes: _Axes, out_specs: Sequence[PartitionSpec], *arrays):
    """What one device computes: its part of the results, and the sums of gradients over what others have."""
    arrays = list(arrays)
    if SEED in letters.operands:  # the mask is that of the whole: a function of global rows and heads
        place = letters.operands.index(SEED)
        batch, _, num_heads, _ = arrays[0].shape
        first_row = lax.axis_index(axes.batch) * batch if axes.batch else 0
        first_head = lax.axis_index(axes.head) * num_heads if axes.head else 0
        arrays[place] = shift_seed(arrays[place], first_row, first_head)
    num_kv_heads = arrays[1].shape[2]
    is_shared = axes.head != axes.kv_head and num_kv_heads > 1
    if is_shared:
        arrays = [
            axes.own_kv_head(vary_along(x, varying(arrays[0])), names) if "k" in names.split() else x
            for x, names in zip(arrays, letters.operands, strict=True)
        ]
    results = function(*arrays)
    if is_shared:
        results = [
            axes.among_kv_heads(x, names, num_kv_heads) if "k" in names.split() else x
            for x, names in zip(results, letters.results, strict=True)
        ]
    sums = map(axes.absent, out_specs)
    return [lax.psum(x, names) if names else x for x, names in zip(results, sums, strict=True)]


def _sharding_rule(letters: _Arrays, mesh: Any, operand_types: Any, result_types: Any) -> str:
    """For XLA's propagation of shardings: rows go with rows, heads with heads.

    KV heads go with query heads where there are as many; parts of a group could not be named to us.
    """
    num_heads, num_kv_heads = operand_types[0].shape[2], operand_types[1].shape[2]
    factors = {"b": "b", "n": "n", "k": "n" if num_heads == num_kv_heads else "k"}
    fresh = (f"x{i}" for i in itertools.count())  # a dimension that goes with no other

    def mapping(array_type: Any, names: str) -> str:
        dimensions = zip(array_type.shape, names.replace("#", "").split(), strict=True)
        return " ".join(
            factors[name] if size > 1 and name in factors else next(fresh) for size, name in dimensions
        )

    operands, results = (
        ", ".join(map(mapping, types, names))
        for types, names in ((operand_types, letters.operands), (result_types, letters.results))
    )
    return f"{operands} -> {results}"
