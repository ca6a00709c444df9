"""Tokens per second of the training step, with each implementation of attention in the same run.

    python examples/benchmarks/training.py --out FILE.json

One step is forward, backward and AdamW on random tokens at T = 1024, with the loss, clipping and master
weights of a real run. Times are medians of steps launched without waiting, read every few steps.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import in_turn
import jax
import numpy as np
import report

from jaxattn.models import MODELS, create_model, model_params
from training import flops
from training.config import ModelSettings, RunConfig, TrainConfig
from training.data.batches import Batch
from training.step import init_train_state, make_train_step

STEPS_AT_A_TIME = 5


BATCH_SIZES = {"small": 64, "medium": 32, "large": 16, "xl": 8}  # of presets, where none is given
CASE_SECONDS = 300


def parse() -> argparse.Namespace:
    parser = report.parser(__doc__)
    parser.add_argument("--presets", nargs="+", default=["small", "medium"], choices=MODELS["gpt2"].presets)
    parser.add_argument("--batch-sizes", nargs="+", type=int, help="one for each preset")
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument(
        "--attention",
        nargs="+",
        default=["sm90", "cudnn"],
        help="implementations to compare",
    )
    parser.add_argument("--repeats", type=int, default=5, help=f"timed groups of {STEPS_AT_A_TIME} steps")
    args = parser.parse_args()
    args.batch_sizes = args.batch_sizes or [BATCH_SIZES.get(preset, 8) for preset in args.presets]
    if len(args.batch_sizes) != len(args.presets):
        parser.error(f"--batch-sizes: one for each of {args.presets}, got {args.batch_sizes}")
    return args


def main() -> int:
    args = parse()
    report.begin("GPT-2's training step")
    cases = {
        f"gpt2-{preset}, B = {batch_size}, {attention}": functools.partial(
            measure, preset, batch_size, args.sequence_length, attention, args.repeats
        )
        for preset, batch_size in zip(args.presets, args.batch_sizes, strict=True)
        for attention in args.attention
    }
    rows = in_turn.measured(args.out, {}, cases, CASE_SECONDS, args.max_seconds)
    return in_turn.finish(args.out, {}, rows)


def measure(preset: str, batch_size: int, length: int, attention: str, repeats: int) -> dict[str, Any]:
    run = RunConfig(batch_size=batch_size, dtype="bfloat16", attention=attention)
    config = TrainConfig(model=ModelSettings(family="gpt2", preset=preset), run=run)
    model_config = MODELS["gpt2"].presets[preset]
    params = model_params(create_model(model_config))
    batch = random_batch(batch_size, length, model_config.vocab_size)
    batch_flops = flops.step_flops(batch, flops.matmul_parameters(params, model_config), model_config)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    state = init_train_state(config, params)
    start = time.perf_counter()
    step = make_train_step(config, model_config).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    memory = step.memory_analysis()
    state, metrics = step(state, batch)
    first_loss = float(metrics.loss)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(STEPS_AT_A_TIME):
            state, metrics = step(state, batch)
        last_loss = float(metrics.loss)
        seconds.append((time.perf_counter() - start) / STEPS_AT_A_TIME)
    step_seconds = statistics.median(seconds)
    peak = flops.peak_flops(jax.devices()[0], "bfloat16")
    return {
        "model": f"gpt2-{preset}",
        "parameters": num_parameters,
        "batch": batch_size,
        "T": length,
        "attention": attention,
        "step_ms": step_seconds * 1e3,
        "tokens_per_second": batch_size * length / step_seconds,
        "mfu_percent": None if peak is None else 100 * batch_flops / step_seconds / peak,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "compile_seconds": compile_seconds,
        "first_loss": first_loss,
        "last_loss": last_loss,
    }


def random_batch(batch_size: int, length: int, vocab_size: int) -> Batch:
    stream = np.random.default_rng(0).integers(vocab_size, size=(batch_size, length + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (batch_size, length)).copy()
    return Batch(stream[:, :-1], stream[:, 1:], positions, None)


if __name__ == "__main__":
    sys.exit(main())
