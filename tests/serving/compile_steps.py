"""Compiles the steps of a small model for an H200, kernels and all, and prints what XLA says of their memory.

Runs under the Python of .venv-hopper: python -m tests.serving.compile_steps
"""

import json
import re
import sys
from functools import partial
from types import SimpleNamespace

NUM_ROWS, NUM_PAGES, PAGE_SIZE, LENGTH = 8, 4096, 16, 64


def main() -> None:
    from tests.pallas_kernels import hopper

    hopper.setup()
    import jax
    import jax.numpy as jnp

    from jaxattn.models import LlamaConfig, create_model
    from pallas_kernels import device
    from serving.step import init_engine_state, make_steps

    # The kernels ask what the default device is; here it is a CPU that compiles for another.
    hopper_device = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H200")
    device.default_device = lambda: hopper_device

    config = LlamaConfig(
        vocab_size=512,
        num_layers=2,
        embed_dim=256,
        num_heads=4,
        num_kv_heads=2,
        mlp_dim=512,
        max_positions=256,
    )
    steps = make_steps(create_model(config, dtype=jnp.bfloat16))
    state = jax.eval_shape(
        lambda: init_engine_state(
            config,
            num_rows=NUM_ROWS,
            num_pages=NUM_PAGES,
            page_size=PAGE_SIZE,
            pages_per_row=config.max_positions // PAGE_SIZE,
            dtype=jnp.bfloat16,
        )
    )
    params = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in steps.params)
    functions = {
        "decode": (partial(steps.decode, num_rows=NUM_ROWS, kind="any"), (params, state)),
        "prefill": (partial(steps.prefill, kind="any"), (params, state, _batch())),
    }
    pool = state.pool.k_pages
    pool_bytes = 2 * pool.size * pool.dtype.itemsize
    shape = ",".join(map(str, pool.shape))
    for name, (function, specs) in functions.items():
        compiled = hopper.compile_for_hopper(function, specs, donate=(1,))
        answer = {
            "step": name,
            "num_kernels": len(compiled.kernels),
            "pool_bytes": pool_bytes,
            "layer_bytes": pool_bytes // config.num_layers,
            "alias_bytes": compiled.alias_bytes,
            "temp_bytes": compiled.temp_bytes,
            "pool_copies": re.findall(rf"\S*bf16\[{shape}\]\S* copy\S*\(", compiled.hlo),
        }
        print(json.dumps(answer), flush=True)


def _batch():
    """Shapes of a prefill of all rows."""
    import jax
    import jax.numpy as jnp

    from jaxattn.sampling import idle_rows
    from serving.step import PrefillBatch

    row = jax.ShapeDtypeStruct((NUM_ROWS,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((NUM_ROWS, LENGTH), jnp.int32)
    return PrefillBatch(row, tokens, row, row, jax.eval_shape(lambda: idle_rows(NUM_ROWS)))


if __name__ == "__main__":
    sys.exit(main())
