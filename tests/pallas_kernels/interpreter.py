"""Runs Mosaic GPU kernels on a CPU, with race detection; fills what jax 0.11.2's interpreter lacks.

The interpreter knows barriers, TMA copies and wgmma on references. Missing, and added here by `install`:
`pl.run_state`, wgmma with its left operand in registers, and stores into a wgmma accumulator.

It sees: a missing commit_smem before a TMA store, two warpgroups writing one tile, a broken barrier protocol
(which may hang: the caller keeps a clock), indices out of range, shared memory read before it was written
(NaN). It does not see: a missing wait before data that only wgmma reads; layouts; registers. About 0.06 s per
thread block and KV tile.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
from jax._src import callback
from jax._src.pallas.mosaic_gpu import core as mosaic_core
from jax._src.pallas.mosaic_gpu import primitives
from jax._src.pallas.mosaic_gpu.interpret import (
    gpu_callbacks,
    interpret_pallas_call,
    jaxpr_interpret,
    shared_memory,
)
from jax._src.state import discharge
from jax._src.state import types as state_types

from pallas_kernels.mosaic import plgpu

Interpreter = jaxpr_interpret.JaxprInterpreter


@contextlib.contextmanager
def interpreted():
    """Kernels called inside run in the interpreter; a data race among them is an AssertionError."""
    install()
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            yield
        assert not interpret_pallas_call.get_races().races_found, "data race (printed above)"
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

    Interpreter._interpret_inline_mgpu_p = inline_or_ours
    Interpreter._interpret_wgmma_ref_p = wgmma


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
    return gpu_callbacks.call_swap(
        token=token,
        result_shape_and_dtype=jax.ShapeDtypeStruct(value.shape, value.dtype),
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_key_as_array=key,
        transforms=(),
        val=value,
        mask=None,
        source_info=eqn.source_info,
    )


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
