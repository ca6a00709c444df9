"""Runs Mosaic GPU kernels on a CPU, with race detection; fills what jax 0.11.2's interpreter lacks.

The interpreter knows barriers, TMA copies and wgmma on references. Missing, and added here by `install`:
`pl.run_state`, wgmma with its left operand in registers, stores into a wgmma accumulator, and TMA copies that
add to global memory.

Each warpgroup of a thread block may wait in a host callback: XLA's CPU client needs a thread for each and one
more (NPROC, which worker.py sets; it is read when JAX starts).

It sees: a missing commit_smem before a TMA store, two warpgroups writing one tile, a broken barrier protocol
(which may hang: the caller keeps a clock), indices out of range, shared memory read before it was written
(NaN). It does not see: a missing wait before data that only wgmma reads; layouts; registers. About 0.06 s per
thread block and KV tile.
"""

import contextlib
import functools
import threading
import unittest.mock
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import callback
from jax._src.pallas.mosaic_gpu import core as mosaic_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    jaxpr_interpret,
    race_detection_state,
    shared_memory,
)
from jax._src.state import discharge
from jax._src.state import types as state_types

from pallas_kernels.flash_attention import mapped
from pallas_kernels.mosaic import TMA_ALIGNMENT, plgpu
from tests.pallas_kernels.hopper import abstract_mesh
from tests.pallas_kernels.plain_terms import plain_terms

Interpreter = jaxpr_interpret.JaxprInterpreter


@contextlib.contextmanager
def interpreted(num_cores: int = 2):
    """Kernels called inside run in the interpreter; a data race among them is an AssertionError.

    num_cores: few, so that persistent thread blocks have more than one item each.
    """
    install()
    _Detector.seen.clear()
    try:
        with (
            plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)),
            jax.sharding.use_abstract_mesh(abstract_mesh(num_cores)),
            # The interpreter's callbacks are ordered, which a partitioned function may not contain.
            unittest.mock.patch.object(mapped, "_partitioned", lambda function, _: function),
            plain_terms(),
        ):
            yield
        assert _Detector.seen, "no kernel was interpreted"
        assert not any(detector.races_found for detector in _Detector.seen), "data race (printed above)"
    except BaseException:
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        raise


@functools.cache
def install() -> None:
    """Teaches the interpreter the missing primitives."""
    known_inline, known_wgmma = Interpreter._interpret_inline_mgpu_p, Interpreter._interpret_wgmma_ref_p
    handlers = {discharge.run_state_p: _run_state, primitives.wgmma_accumulator_store_p: _store_accumulator}

    # The interpreter's match statement compares primitives with names of this module: ours equal one of
    # those.
    names = _Overlay(primitives, inline_mgpu_p=_AnyOf(primitives.inline_mgpu_p, *handlers))
    jaxpr_interpret.gpu_primitives = names

    def inline_or_ours(self, eqn, token, get_invals):
        return handlers.get(eqn.primitive, known_inline)(self, eqn, token, get_invals)

    def wgmma(self, eqn, token, get_invals):
        in_registers = not isinstance(eqn.invars[1].aval, state_types.AbstractRef)
        return (_wgmma_from_registers if in_registers else known_wgmma)(self, eqn, token, get_invals)

    gpu_callbacks.GPURaceDetectionState = _Detector
    known_copy = gpu_callbacks.copy_smem_to_gmem

    def copy_or_add(*, reduction_op, **arguments):
        _check_alignment(arguments["src_allocation_key_as_array"], arguments["src_transforms"])
        return (
            _add_smem_to_gmem(**arguments)
            if reduction_op == "add"
            else known_copy(reduction_op=reduction_op, **arguments)
        )

    gpu_callbacks.copy_smem_to_gmem = copy_or_add
    Interpreter._interpret_inline_mgpu_p = inline_or_ours
    Interpreter._interpret_wgmma_ref_p = wgmma


def _check_alignment(key, transforms):
    """TMA copies read shared memory from multiples of 128 bytes on; plain ones, of one dimension, of 16."""
    memory = gpu_callbacks._get_shared_memory()
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
    shape, dtype = memory.buffer_shape_and_dtype(key)
    access = memory.access(key, transforms)
    starts = [getattr(index, "start", index) for index in access.range]
    place = dtype.itemsize * int(np.ravel_multi_index(starts, shape))
    multiple = TMA_ALIGNMENT if len(access.shape) > 1 else 16
    assert place % multiple == 0, f"a copy from byte {place} of a buffer {shape} {dtype} is misaligned"


class _Detector(race_detection_state.GPURaceDetectionState):
    """The detector of one kernel, remembered: the interpreter forgets it when the next kernel starts.

    Views of a RefUnion are compared part by part: index i of each is the same memory, as that of a warpgroup.
    """

    seen: ClassVar[list["_Detector"]] = []

    def __init__(self, **fields):
        super().__init__(**fields)
        self.seen.append(self)

    def check_read(self, thread, clock, buffer_key, rnge, source_info=None):
        known = super(race_detection_state.GPURaceDetectionState, self)
        known.check_read(thread, clock, buffer_key, rnge.range, source_info)
        self._check_part(thread, clock, buffer_key, rnge.range, False, source_info)

    def check_write(self, thread, clock, buffer_key, rnge, source_info=None):
        known = super(race_detection_state.GPURaceDetectionState, self)
        known.check_write(thread, clock, buffer_key, rnge.range, source_info)
        self._check_part(thread, clock, buffer_key, rnge.range, True, source_info)

    def _check_part(self, thread, clock, buffer_key, indices, is_write, source_info):
        if (membership := self.ref_union_members.get(buffer_key)) is None:
            return
        first = indices[0]
        part = (first, first + 1) if isinstance(first, int) else (first.start, first.stop)
        self.ref_union_members[buffer_key, part] = (membership[0], part), membership[1]
        self._check_ref_union(thread, clock, (buffer_key, part), is_write, source_info)


class _AnyOf:
    """Equals each of several primitives."""

    def __init__(self, *members):
        self.members = members

    def __eq__(self, other):
        return any(other is member for member in self.members)

    __hash__ = None


class _Overlay:
    """A module with some names replaced."""

    def __init__(self, module, **replaced):
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(self._module, name)


def _run_state(self, eqn, token, get_invals):
    assert all(eqn.params["is_initialized"])
    keys, owned = [], []
    for variable, value in zip(eqn.invars, get_invals(), strict=True):
        is_ref = isinstance(variable.aval, state_types.AbstractRef)
        if not is_ref:
            token, value = _allocate(self, token, jnp.asarray(value), eqn.source_info)
        keys.append(value)
        owned.append(not is_ref)
    token, _ = self.interpret(eqn.params["jaxpr"], token, *keys)
    outs = []
    for key, own, out in zip(keys, owned, eqn.outvars, strict=True):
        if own:
            token, value = _read_accumulator(self, token, key, out.aval, eqn.source_info)
            token = _free(self, token, key, eqn.source_info)
            outs.append(value)
        else:
            outs.append(key)
    return token, outs


def _store_accumulator(self, eqn, token, get_invals):
    key, value = get_invals()
    token = callback.io_callback(
        _store_registers, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, self.mesh_location, self.thread, key, value
    )
    return token, value


def _store_registers(token, mesh_location, thread, key, value):
    """Stores into a warpgroup's own registers, on which there is no race to detect."""
    key = gpu_callbacks.HostAllocationKey.from_array(key)
    memory = gpu_callbacks._get_shared_memory()
    memory.store_buffer_content(
        key,
        memory.access(key, ()),
        np.asarray(value),
        thread,
        logging_info=gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, None),
    )
    return token


def _wgmma_from_registers(self, eqn, token, get_invals):
    acc, a, b, *leaves = get_invals()
    empty = jax.tree.structure([])
    trees = [eqn.params[f"{name}_transforms_tree"] or empty for name in ("acc", "a", "b")]
    acc_transforms, _, b_transforms = jax.tree.unflatten(jax.tree_util.treedef_tuple(trees), leaves)
    acc, acc_transforms = jaxpr_interpret.resolve_ref(eqn.invars[0].aval, acc, acc_transforms)
    b, b_transforms = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, b_transforms)
    token, a = _allocate(self, token, a, eqn.source_info)
    token = callback.io_callback(
        functools.partial(gpu_callbacks.wgmma, source_info=eqn.source_info),
        gpu_callbacks.TOKEN_SHAPE_DTYPE,
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        acc_allocation_key_as_array=acc,
        acc_transforms=acc_transforms,
        a_allocation_key_as_array=a,
        a_transforms=(),
        b_allocation_key_as_array=b,
        b_transforms=b_transforms,
    )
    return _free(self, token, a, eqn.source_info), []


def _allocate(self, token, value, source_info):
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token,
        compute_unit=self.thread,
        memory_space_id=shared_memory.get_memory_space_idx(mosaic_core.MemorySpace.REGS),
        initial_ref_count=1,
    )
    return gpu_callbacks.call_allocate_buffer(
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_request_as_array=request,
        value=value,
        source_info=source_info,
    )


def _free(self, token, key, source_info):
    return gpu_callbacks.call_deallocate_buffer(
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_key_as_array=key,
        source_info=source_info,
    )


def _read_accumulator(self, token, key, aval, source_info):
    return callback.io_callback(
        functools.partial(gpu_callbacks.wgmma_accumulator_deref, source_info=source_info),
        (gpu_callbacks.TOKEN_SHAPE_DTYPE, jax.ShapeDtypeStruct(aval.shape, aval.dtype)),
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        acc_allocation_key_as_array=key,
        wait_n=0,
    )


class _AddTask(gpu_callbacks.AsyncCopySmemToGmemTask):
    """A TMA copy that adds. Sums of several threads do not race with each other; races of a sum with plain
    reads and writes are not looked for.
    """

    lock = threading.Lock()

    def __call__(self, tma_thread_id):
        memory = gpu_callbacks._get_shared_memory()
        self.pre_read(tma_thread_id, memory)
        value, *_ = memory.get_buffer_content(
            self.src_allocation_key, self.src_access, self.thread, self.logging_info
        )
        if memory.detect_races:
            self.clock.inc(tma_thread_id)
            self.write_clock = self.clock.copy()
        shape = tuple(memory.buffer_shape_and_dtype(self.dst_allocation_key).shape)
        inside = gpu_callbacks._clip_store_to_shape(self.dst_access, value, shape)
        if inside is not None:
            access, value = inside
            with self.lock:
                old, *_ = memory.get_buffer_content(
                    self.dst_allocation_key, access, self.thread, self.logging_info
                )
                memory.store_buffer_content(
                    self.dst_allocation_key, access, old + value, self.thread, self.logging_info
                )
        self.post_write(tma_thread_id, memory)


@gpu_callbacks.fail_on_exception
def _add_smem_to_gmem(
    *,
    token,
    mesh_location,
    thread,
    src_allocation_key_as_array,
    src_transforms,
    dst_allocation_key_as_array,
    dst_transforms,
    predicate,
    source_info,
    commit_group,
):
    assert predicate is None
    assert commit_group
    memory = gpu_callbacks._get_shared_memory()
    ends = []
    for key, transforms in (
        (src_allocation_key_as_array, src_transforms),
        (dst_allocation_key_as_array, dst_transforms),
    ):
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(transforms))
        ends += [key, memory.access(key, transforms)]
    clock = memory.incr_clock(thread) if memory.detect_races else None
    memory.execute_async_task(_AddTask(mesh_location, thread, *ends, source_info, clock))
    return token
