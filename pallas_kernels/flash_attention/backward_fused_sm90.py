"""FlashAttention backward on Hopper in one kernel of 5 matmuls; the order of dQ's sums is not fixed.

A thread block stays on its multiprocessor and works through items: it owns a tile of keys and values, half of
it each compute warpgroup, and streams the queries of a head. One more warpgroup loads, and goes on to the
next item while the others end theirs (wide heads: a thread block an item). dK and dV are summed in registers.
dS of both halves meets in shared memory; each warpgroup multiplies half of dQ's tile, which the copy engine
adds to fp32 sums in global memory (FlashAttention-3, section 3.1; FlashAttention-2, section 3.2). What the
heads of a group give is summed after the kernel: a block that streamed them all would leave too few blocks to
fill the GPU evenly.

    S^T = K Q^T,  P = exp(S - lse),  dP^T = V dO^T,  dS = P * (dP - delta)
    dV = P^T dO,  dK = scale dS^T Q,  dQ += scale dS K
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.device import num_multiprocessors
from pallas_kernels.flash_attention import backward_fused_wide, halves
from pallas_kernels.flash_attention.backward_fused_adds import Adds, NoAdds
from pallas_kernels.flash_attention.backward_fused_block import (
    HALF,
    WARPGROUPS,
    Barriers,
    Block,
    Buffers,
    add_order,
    block_keys,
    parts_of_dq,
    visit_last,
    visit_queries,
)
from pallas_kernels.flash_attention.backward_fused_items import (
    Queue,
    draws_items,
    is_persistent,
    order_of,
    schedule_of,
)
from pallas_kernels.flash_attention.backward_fused_load import Loader
from pallas_kernels.flash_attention.backward_fused_order import orders_adds
from pallas_kernels.flash_attention.backward_fused_tile import Step, finish, store, take_tile
from pallas_kernels.flash_attention.extras import Footprint, prepare
from pallas_kernels.flash_attention.operands import backward_operands
from pallas_kernels.flash_attention.plan import AttentionPlan
from pallas_kernels.flash_attention.spec import AttentionInputs
from pallas_kernels.flash_attention.tiles import TileOrder
from pallas_kernels.mosaic import (
    call_in_place,
    ceil_div,
    make_kernel,
    pl,
    plgpu,
    register_zeros,
    specialize,
)
from pallas_kernels.mosaic_copy import OCTET


def serves(plan: AttentionPlan, inputs: AttentionInputs) -> bool:
    """Whether the config asks for this kernel, and its tiles and registers suit the call."""
    fused = plan.config.fused
    head_dims = (32, 64) if fused and fused.tile_q == 128 else (96, 128, 192, 256)
    if fused is None or plan.head_dim != plan.value_dim or plan.head_dim not in head_dims:
        return False
    if plan.is_deterministic and not (is_persistent(plan, inputs) and orders_adds(plan)):
        return False
    if inputs.block_mask is not None:
        tile_q, tile_kv = inputs.block_mask.tile
        if tile_q % fused.tile_q or tile_kv % block_keys(plan):
            return False
    return not _spills(plan, inputs)


def _spills(plan: AttentionPlan, inputs: AttentionInputs) -> bool:
    """Whether a call takes more registers than there are; beside, the bytes the assembler spilled."""
    has_slopes, has_dropout = inputs.alibi_slopes is not None, plan.dropout_rate > 0
    has_cap, has_bias = plan.logits_soft_cap is not None, inputs.bias is not None
    if plan.head_dim > 128:
        has = plan.has_segments, plan.has_block_mask, has_slopes, has_cap, has_bias, has_dropout
        return sum(has) > 2  # 8 to 28 with three, lengths and a window
    if plan.head_dim <= 64:
        return has_slopes and has_dropout  # 16
    has_ids = plan.has_segments or plan.has_block_mask
    is_whole = plan.reach == (None, None) and not (plan.has_q_lengths or plan.has_kv_lengths)
    if plan.has_segments and (plan.dtype == jnp.float16 or not is_whole):  # 28, 24, 48
        return True
    has_lengths = plan.has_q_lengths or plan.has_kv_lengths
    if sum((has_cap, has_lengths, plan.reach[0] is not None)) > 1:  # 4 to 16
        return True
    # 200 with dropout; with segment ids and slopes 20, with a bias of queries and a soft cap 48, and so on.
    return has_dropout or sum((has_ids, has_slopes, has_cap, has_bias)) > 1


def statistics_multiple(plan: AttentionPlan) -> int:
    """What T must be a multiple of in lse2 and delta."""
    return plan.fused.tile_q


def launch(plan: AttentionPlan, inputs: AttentionInputs, query, key, value, out_grad, lse2, delta):
    """dQ [B, T, N, H], dK [B, S, K, H], dV [B, S, K, Hv]; arguments and dtype as the deterministic kernels
    have them, with lse2 and delta padded to statistics_multiple.
    """
    extras = prepare(
        plan, inputs, Footprint(HALF, plan.fused.tile_q, block_keys(plan) // HALF, owns_queries=False)
    )
    operands = backward_operands(inputs, query, key, value, out_grad)
    arrays = *operands, lse2, delta, extras
    of_heads = tuple(halves.out_type(plan, (*x.shape[:2], plan.num_heads, x.shape[3])) for x in (key, value))
    order, sums = order_of(plan), (*query.shape[:3], plan.head_dim)
    zeros = jnp.zeros((sums[0], ceil_div(sums[1], OCTET) * OCTET, *sums[2:]), jnp.float32)
    if plan.head_dim > 128:
        body = functools.partial(backward_fused_wide.body, plan, order)
        kernel = _kernel(body, of_heads, backward_fused_wide.scratch(plan), order.num_blocks)
        call = lambda d_query: kernel(*arrays, d_query)
        d_query, d_key, d_value = call_in_place(call, zeros, of_heads)
    else:
        is_one = not is_persistent(plan, inputs)
        d_query, d_key, d_value = _launch_items(plan, order, of_heads, arrays, zeros, is_one)
    d_query = d_query[:, : query.shape[1], :, : query.shape[3]] * plan.scale
    d_key, d_value = (_of_groups(plan, halves.join(plan, x)) for x in (d_key, d_value))
    return d_query if plan.keeps_fp32 else d_query.astype(plan.dtype), d_key, d_value


def _launch_items(plan: AttentionPlan, order: TileOrder, out_type, arrays, zeros, is_one) -> list[jax.Array]:
    num_blocks = order.num_blocks if is_one else min(order.num_blocks, num_multiprocessors())
    is_drawn = draws_items(plan) and not is_one
    if is_one:  # few registers are left
        order, table = order.in_equal_sections, None
    elif plan.is_deterministic:
        order, table = order.by_tile, add_order(plan).dealt()
        num_blocks = table.shape[0]
    elif not is_drawn:
        order, table = order.by_tile, schedule_of(plan).dealt()
    else:
        table = None
    drawn = jnp.zeros(1, jnp.int32) if is_drawn else None
    turns = None
    if plan.is_deterministic:
        turns = jnp.zeros(plan.batch * plan.num_heads * add_order(plan).num_query_tiles, jnp.int32)
    scratch = Buffers.types(plan), Barriers.types(plan)
    kernel = _kernel(functools.partial(_body, plan, order, num_blocks), out_type, scratch, num_blocks)

    def call(refs):
        d_query, drawn, turns = refs
        return kernel(*arrays, d_query, table if drawn is None else drawn, turns)

    (d_query, *_), *results = call_in_place(call, (zeros, drawn, turns), out_type)
    return [d_query, *results]


def _kernel(body, out_type, scratch, num_blocks: int):
    return make_kernel(
        body,
        out_type=out_type,
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        # Barriers around every store would cost a fifth of the causal speed; nothing is read back. Nor is
        # anything reduced across lanes.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        kernel_name="flash_attention_backward",
    )


def _of_groups(plan: AttentionPlan, x: jax.Array) -> jax.Array:
    """[B, S, N, H] -> [B, S, K, H], in fp32 between."""
    if plan.group == 1:
        return x
    by_group = x.reshape(*x.shape[:2], plan.num_kv_heads, plan.group, x.shape[3])
    return by_group.sum(axis=3, dtype=jnp.float32).astype(x.dtype)


def _body(plan: AttentionPlan, order: TileOrder, num_blocks: int, *refs):
    *sources, extras, d_q, table, turns, d_k, d_v, buffers, barriers = refs
    warpgroup = lax.axis_index("warpgroup")
    queue = Queue(order, num_blocks, table, buffers.item.at[pl.ds(2, 1)] if draws_items(plan) else None)
    adds = Adds(plan, d_q, turns, buffers, barriers) if plan.is_deterministic else NoAdds()
    loader = Loader(plan, sources, buffers, barriers, adds)

    def begin(item, num_taken, role: int = 0) -> Step:
        block = Block.locate(plan, order, extras, item, num_taken, buffers.item)
        return Step(plan, block, warpgroup, d_q, buffers, barriers, role)

    specialize(
        WARPGROUPS,
        warpgroup,
        compute=lambda: _compute(plan, begin, queue.last, warpgroup, d_k, d_v, buffers, barriers),
        load=lambda: _load(begin, queue, loader),
    )


def _load(begin, queue: Queue, loader: Loader):
    """What the loading warpgroup does."""

    def load(item, is_later, carry):
        num_taken, first_number = carry
        block = begin(item, num_taken).block
        loader.load_item(block, (item, num_taken), is_later, first_number)
        return block.number(block.indices.stop), num_taken

    num_tiles, first_number = queue.visit(load, (jnp.int32(0), jnp.int32(0)))
    loader.end(queue.last, num_tiles, first_number)


def _compute(
    plan: AttentionPlan,
    begin,
    num_items: int | None,
    warpgroup,
    d_k,
    d_v,
    buffers: Buffers,
    barriers: Barriers,
):
    """What the computing warpgroups do, in code of their own where their parts of dQ differ in shape."""

    def see():
        plgpu.barrier_wait(barriers.item_loaded)
        return buffers.item[0]

    def compute(role: int):
        def differentiate(item):
            _differentiate(begin(item, buffers.item[1], role), d_k, d_v)
            return see()

        if num_items is None:
            _differentiate(begin(see(), buffers.item[1], role), d_k, d_v)
        else:
            lax.while_loop(lambda item: item < num_items, differentiate, see())
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if plan.is_deterministic:
            plgpu.barrier_wait(barriers.d_q_free)

    if len({*parts_of_dq(plan)}) == 1:
        compute(0)
        return
    for role in range(WARPGROUPS):
        pl.when(warpgroup == role)(functools.partial(compute, role))


def _differentiate(step: Step, d_k, d_v):
    """An item's dK and dV, and what it adds to dQ."""
    plan, barriers = step.plan, step.barriers

    def attend(sums):
        sum_dk, sum_dv = sums
        visit_queries(plan, step.block.indices, functools.partial(take_tile, step, sums))
        plgpu.barrier_arrive(barriers.v_free)
        visit_last(step.block.indices, functools.partial(finish, step))
        plgpu.barrier_arrive(barriers.k_free)  # the next keys are on their way meanwhile
        store(step, sum_dv, 1 / (1 - plan.dropout_rate), d_v)
        store(step, sum_dk, plan.scale, d_k)

    pl.run_state(attend)(
        tuple(plgpu.ACC.init(register_zeros((HALF, dim))) for dim in (plan.head_dim, plan.value_dim))
    )
