"""Output tokens per second of offline batch generation: 256 requests of 128 new tokens, random weights.

    python examples/benchmarks/serving.py --out FILE.json

Prompt lengths are uniform in 16..512. Times are of the first pass, over prompts of its own, in which nothing
compiled.
"""

import argparse
import functools
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import in_turn
import jax.numpy as jnp
import numpy as np
import report

from jaxattn.models import MODELS, ModelConfig, create_model
from pallas_kernels import PAGE_SIZES
from serving import LLM, SamplingParams

MAX_PASSES = 8  # prompts that happen to fall into new shapes compile: such a pass is not timed

SAMPLED = {"temperature": 0.8, "top_p": 0.95, "top_k": 50}
CONFIGS: dict[str, ModelConfig] = {
    "gpt2-medium": MODELS["gpt2"].presets["medium"],
    "llama-1b": MODELS["llama"].presets["1b"],
}


CASE_SECONDS = 300


def main() -> int:
    parser = report.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=CONFIGS)
    parser.add_argument("--num-requests", type=report.positive, default=256)
    parser.add_argument("--max-tokens", type=report.positive, default=128)
    parser.add_argument("--page-size", type=int, default=16, choices=PAGE_SIZES)
    args = parser.parse_args()
    report.begin("Offline batch generation")
    cases, engines = {}, {}
    for name in args.models:
        engine = functools.partial(engine_of, name, args, engines)
        for seed, (num_requests, kind) in enumerate(
            ((args.num_requests, "greedy"), (args.num_requests, "sampled"), (1, "greedy"))
        ):
            case = functools.partial(measure, name, engine, num_requests, kind, args.max_tokens, seed)
            cases[f"{name}, {num_requests} requests, {kind}"] = case
    rows = in_turn.measured(args.out, {}, cases, CASE_SECONDS, args.max_seconds)
    return in_turn.finish(args.out, {}, rows)


def engine_of(name: str, args: argparse.Namespace, engines: dict[str, LLM]) -> LLM:
    """With random weights; `engines` holds one at a time, for their memory."""
    if name not in engines:
        engines.clear()
        gc.collect()
        model = create_model(CONFIGS[name], dtype=jnp.bfloat16)
        shape = {"max_num_seqs": args.num_requests, "max_model_len": 1024, "page_size": args.page_size}
        engines[name] = LLM((model, None), **shape)
    return engines[name]


def measure(
    name: str, engine: Callable[[], LLM], num_requests: int, kind: str, max_tokens: int, seed: int
) -> dict[str, Any]:
    """Of the first pass that compiles nothing."""
    llm = engine()
    sampling = {"temperature": 0.0} if kind == "greedy" else SAMPLED
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampling)
    first_pass_seconds = seconds = 0.0
    outputs: list[Any] = []
    for attempt in range(MAX_PASSES):
        llm.metrics.reset()
        prompts = random_prompts(num_requests, CONFIGS[name].vocab_size, seed * MAX_PASSES + attempt)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        if attempt == 0:
            first_pass_seconds = seconds
        if llm.metrics.compile_seconds == 0:
            break
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "model": name,
        "requests": num_requests,
        "sampling": kind,
        "seconds": seconds,
        "output_tokens_per_second": num_tokens / seconds,
        "ms_per_token_of_a_row": 1e3 * seconds / (num_tokens / num_requests),
        "decode_steps": llm.metrics.num_decode_steps,
        "peak_pages": llm.metrics.peak_pages,
        "waste_percent": llm.metrics.waste_percent,
        "compile_seconds": llm.metrics.compile_seconds,
        "first_pass_seconds": first_pass_seconds,
    }


def random_prompts(num_prompts: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(16, 513, size=num_prompts)
    return [generator.integers(vocab_size, size=length).tolist() for length in lengths]


if __name__ == "__main__":
    sys.exit(main())
