"""Units of paged prefill: what one is, and how the warpgroups of a program go through its units together."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.kv_tiles import KvTiles
from pallas_kernels.mosaic import plgpu, rem
from pallas_kernels.mosaic_inline import load_numbers, meet

NO_WORK = -1  # the row of a record that is no item: behind it there are only such
RECORDS = 4  # of the unit that is computed, of the next, whose tiles are loaded, of one more, and of the last


class Work(NamedTuple):
    """A unit of work: an item, which is a query tile of a row and the KV tiles that it takes, and a KV head.
    Tokens count over the whole batch."""

    row: Any  # of the block tables
    token: Any  # the tile's first token, a multiple of OCTET, maybe negative
    first: Any  # the row's tokens of the tile: first <= token < stop
    stop: Any
    offset: Any  # token t stands at position t + offset
    kv_length: Any
    tile_start: Any  # KV tiles [tile_start, tile_stop)
    tile_stop: Any
    item: Any  # place of its results: items count row after row, also where the list takes rows together
    kv_head: Any
    first_head: Any = None  # of the group, in the first octet: the first that a packed tile holds

    @property
    def num_tiles(self) -> Any:
        return self.tile_stop - self.tile_start


FIELDS = Work._fields.index("kv_head")  # of an item, which its record holds


def record_size(num_ranges: int, is_packed: bool = False) -> int:
    """Numbers in an item's record, its fields and ranges of tiles, and last a packed tile's first head: a
    multiple of 16 bytes, as TMA copies."""
    return -(-(FIELDS + num_ranges * len(KvTiles._fields) + is_packed) // 4) * 4


class Records(NamedTuple):
    """A ring of units in shared memory, their items' records: the loading warpgroup fills it, every warpgroup
    reads it."""

    fields: Any  # i32[RECORDS, record size]
    full: Any
    empty: Any
    units: Any  # i32[RECORDS]: units, counted over items and, of each, its KV heads

    @classmethod
    def types(cls, num_warpgroups: int, size: int) -> "Records":
        return cls(
            fields=plgpu.SMEM((RECORDS, size), jnp.int32),
            full=plgpu.Barrier(num_barriers=RECORDS),
            empty=plgpu.Barrier(num_barriers=RECORDS, num_arrivals=num_warpgroups),
            units=plgpu.SMEM((RECORDS,), jnp.int32),
        )

    def read(self, turn, num_kv_heads: int, *names: str) -> Work:
        """A unit's fields of these names; the others are None."""
        slot = slot_of(turn)
        known = dict.fromkeys(Work._fields)
        of_item = [name for name in Work._fields[:FIELDS] if name in names]
        if of_item:
            places = [Work._fields.index(name) for name in of_item]
            known |= zip(of_item, load_numbers(self.fields.at[slot], places), strict=True)
        if "kv_head" in names:
            known["kv_head"] = rem(self.units[slot], num_kv_heads)
        if "first_head" in names:
            (known["first_head"],) = load_numbers(self.fields.at[slot], [self.fields.shape[1] - 1])
        return Work(**known)

    def read_range(self, turn, index) -> KvTiles:
        """A range of tiles, counted from the unit's first."""
        size = len(KvTiles._fields)
        places = [FIELDS + index * size + i for i in range(size)]
        return KvTiles(*load_numbers(self.fields.at[slot_of(turn)], places))

    def wait(self, turn):
        """Waits for a record, and returns its row."""
        slot = slot_of(turn)
        plgpu.barrier_wait(self.full.at[slot])
        return self.fields[slot, 0]

    def release(self, turn) -> None:
        meet()  # all fields are read before a copy overwrites them
        plgpu.barrier_arrive(self.empty.at[slot_of(turn)])


def slot_of(turn):
    return rem(turn, RECORDS)


def for_each_unit(records: Records, visit, carry):
    """Calls carry = visit(turn, carry) for this program's units, as their records come; returns how many
    there were, and the last carry."""

    def step(state):
        turn, _, carry = state
        carry = visit(turn, carry)
        records.release(turn)
        return turn + 1, records.wait(turn + 1), carry

    zero = np.int32(0)
    turns, _, carry = lax.while_loop(
        lambda state: state[1] != NO_WORK, step, (zero, records.wait(zero), carry)
    )
    records.release(turns)
    return turns, carry
