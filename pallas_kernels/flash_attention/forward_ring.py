"""K and V tiles of the forward kernel on their way through shared memory."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.forward_plan import ForwardPlan
from pallas_kernels.mosaic import pl, plgpu, rem


class KeyValueRing(NamedTuple):
    """K and V tiles on their way through shared memory: slots, filled in turn."""

    k: Any  # [stages, tile_kv, H], or in blocks of columns
    v: Any  # [value_stages, tile_kv, Hv], or such
    ids: (
        Any  # i32[value_stages + 1, tile_kv]: segment ids, which come with K and are read until V is; or None
    )
    k_loaded: Any
    v_loaded: Any
    k_consumed: Any
    v_consumed: Any

    @classmethod
    def types(cls, plan: ForwardPlan) -> "KeyValueRing":
        config = plan.config
        stages, value_stages = config.stages, config.value_stages or config.stages
        k_loaded = plgpu.Barrier(num_barriers=stages, num_arrivals=1 + plan.has_segments)
        v_loaded = plgpu.Barrier(num_barriers=value_stages)
        k_consumed, v_consumed = (
            plgpu.Barrier(num_barriers=size, num_arrivals=config.warpgroups)
            for size in (stages, value_stages)
        )
        k = plan.tiles(stages, config.tile_kv, plan.head_dim)
        v = plan.tiles(value_stages, config.tile_kv, plan.value_dim)
        ids = plgpu.SMEM((value_stages + 1, config.tile_kv), jnp.int32) if plan.has_segments else None
        return cls(k, v, ids, k_loaded, v_loaded, k_consumed, v_consumed)

    def k_slot(self, position):
        return _slot(self.k, position)

    def v_slot(self, position):
        return _slot(self.v, position)

    def ids_at(self, position):
        """The segment ids of a tile: of those that had this place the values are gone, for which the loader
        waited before it loaded the values of the tile before this one.
        """
        return None if self.ids is None else self.ids.at[_slot(self.ids, position)]

    def load_keys(self, position, copy, ids):
        self._load(position, copy, self.k, self.k_loaded, self.k_consumed)
        if ids is not None:
            plgpu.copy_gmem_to_smem(ids, self.ids_at(position), self.k_loaded.at[self.k_slot(position)])

    def load_values(self, position, copy):
        self._load(position, copy, self.v, self.v_loaded, self.v_consumed)

    def _load(self, position, copy, smem, loaded, consumed):
        """Starts the copy into a slot, when its last user has left."""
        slot = _slot(smem, position)
        wait = functools.partial(plgpu.barrier_wait, consumed.at[slot])
        pl.when(position >= smem.shape[0])(wait)
        copy(smem.at[slot], loaded.at[slot])

    def drain(self, stop):
        """Sees every arrival, before the block ends."""

        def drain(smem, consumed):
            wait = lambda position, _: plgpu.barrier_wait(consumed.at[_slot(smem, position)])
            lax.fori_loop(lax.max(0, stop - smem.shape[0]), stop, wait, None)

        drain(self.k, self.k_consumed)
        drain(self.v, self.v_consumed)


def _slot(smem, position):
    return rem(position, smem.shape[0])
