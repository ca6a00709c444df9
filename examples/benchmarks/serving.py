"""Output tokens per second of offline batch generation: 256 requests of 128 new tokens, random weights.

    python examples/benchmarks/serving.py --out FILE.json

Prompt lengths are uniform in 16..512. Times are of the first pass, over prompts of its own, in which nothing
compiled.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax.numpy as jnp
import numpy as np

from examples.benchmarks import report
from jaxattn.models import MODELS, ModelConfig, create_model
from serving import LLM, SamplingParams

MAX_PASSES = 8  # prompts that happen to fall into new shapes compile: such a pass is not timed

CONFIGS: dict[str, ModelConfig] = {
    "gpt2-medium": MODELS["gpt2"].presets["medium"],
    "llama-1b": MODELS["llama"].presets["1b"],
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(CONFIGS), choices=CONFIGS)
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--out", help="JSON file for all figures")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        rows += measure(name, args)
    print(report.table(tuple(rows[0]), [tuple(row.values()) for row in rows]))
    report.save(args.out, {"rows": rows})
    return 0


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for the full batch, greedy and sampled, and one for a single request."""
    config = CONFIGS[name]
    model = create_model(config, dtype=jnp.bfloat16)
    llm = LLM((model, None), max_num_seqs=args.num_requests, max_model_len=1024, page_size=args.page_size)
    greedy = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True)
    sampled = SamplingParams(
        temperature=0.8, top_p=0.95, top_k=50, max_tokens=args.max_tokens, ignore_eos=True
    )
    cases = [
        (args.num_requests, "greedy", greedy),
        (args.num_requests, "sampled", sampled),
        (1, "greedy", greedy),
    ]
    rows: list[dict[str, Any]] = []
    first_pass_seconds = seconds = 0.0
    outputs: list[Any] = []
    for num_requests, kind, params in cases:
        for attempt in range(MAX_PASSES):
            llm.metrics.reset()
            prompts = random_prompts(num_requests, config.vocab_size, seed=len(rows) * MAX_PASSES + attempt)
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
            if attempt == 0:
                first_pass_seconds = seconds
            if llm.metrics.compile_seconds == 0:
                break
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        rows.append(
            {
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
        )
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def random_prompts(num_prompts: int, vocab_size: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(16, 513, size=num_prompts)
    return [generator.integers(vocab_size, size=length).tolist() for length in lengths]


if __name__ == "__main__":
    sys.exit(main())
