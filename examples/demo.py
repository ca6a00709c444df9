"""The main job, once through: real text -> a trained GPT-2 -> served from a page pool; then SmolLM2.

1. Prepares the State of the Union addresses (or --text) and trains a GPT-2: on a CPU a small one on bytes, in
   about two minutes; on a Hopper GPU GPT-2 small on GPT-2's own vocabulary.
2. Serves the checkpoint just written, the same parameters, and continues 8 openings in one continuous batch.
3. Serves SmolLM2-135M-Instruct and answers 8 prompts of different lengths in one batch.
"""

import argparse
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs from a checkout, installed or not

from examples import assets
from examples.benchmarks import report
from training.cli import show_attention_choice

OPENINGS = [
    "The state of the Union is",
    "My fellow Americans,",
    "To the Congress of the United States:",
    "I recommend to the Congress",
    "During the past year",
    "Our relations with foreign nations",
    "The Treasury",
    "We must",
]
QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colors.",
    "Write one sentence about the sea.",
    "Translate 'good morning' into Spanish.",
    "A train leaves at 3 pm and arrives at 5 pm. How many hours did the trip take?",
    "Give a title for a story about a lighthouse keeper who befriends a storm.",
    "Explain in two sentences, to a child of ten, why the sky is blue during the day and red at sunset.",
    "Summarize in one sentence: The page pool is allocated once. Each sequence owns a list of pages, not one "
    "contiguous block, so memory is not reserved for tokens that may never come, and pages of a shared "
    "prefix can belong to several sequences at once.",
]


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    started = time.perf_counter()
    device, on_hopper = describe_device()
    sizes = "Hopper kernels, full sizes" if on_hopper else "no Hopper GPU: no kernels, small sizes"
    print(f"Device: {device}; {sizes}.")
    try:
        with show_attention_choice():
            trained = train(args, on_hopper)
            continued = continue_openings(trained.run_dir)
            answered = answer_questions()
    except (FileNotFoundError, ValueError) as error:
        print(f"demo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    print(f"\nDone in {seconds / 60:.1f} minutes. Model, curve, samples: {trained.run_dir}")
    if args.result:
        figures = {"seconds": seconds, "training": training_figures(trained)}
        report.save(args.result, figures | {"continuations": continued, "answers": answered})
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", help="a text file or a folder of .txt files to train on")
    parser.add_argument("--steps", type=int, help="training steps (default: the recipe's)")
    parser.add_argument("--out", default="runs", help="where run folders are made (default: runs)")
    parser.add_argument("--result", help="also write all figures to this JSON file")
    return parser.parse_args(argv)


def describe_device() -> tuple[str, bool]:
    import jax

    from pallas_kernels.device import is_hopper

    device = jax.devices()[0]
    return f"{device.device_kind} ({device.platform}), {len(jax.devices())} in use", is_hopper()


def heading(text: str) -> None:
    print(f"\n== {text} ".ljust(100, "="), flush=True)


def train(args: argparse.Namespace, on_hopper: bool) -> Any:
    """Trains the recipe for this device; the run folder is made anew."""
    from training import Trainer, load_recipe

    recipe = "gpt2_small" if on_hopper else "sotu_bytes"
    heading(f"1. Training: recipe {recipe}")
    overrides: dict[str, Any] = {"run.dir": str(Path(args.out) / f"demo_{recipe}")}
    overrides["data.text"] = args.text or str(assets.state_of_the_union())
    if args.steps is not None:
        overrides["run.num_steps"] = args.steps
    started = time.perf_counter()
    result = Trainer(load_recipe(recipe, overrides), fresh=True).run()
    seconds, loss = time.perf_counter() - started, result.validation_loss
    print(
        f"{result.step:,} steps in {seconds:.0f} s: validation loss {loss:.3f}, "
        f"{result.validation_bits_per_byte:.3f} bits per byte. "
        f"Curve: {result.run_dir / 'loss.png'}, {result.run_dir / 'metrics.csv'}"
    )
    return result


def training_figures(trained: Any) -> dict[str, Any]:
    fields = ("step", "loss", "bits_per_byte", "validation_loss", "validation_bits_per_byte", "num_skipped")
    figures = {name: getattr(trained, name) for name in fields}
    speeds = [row.tokens_per_second for row in trained.rows if row.tokens_per_second is not None]
    return figures | {"tokens_per_second_median": sorted(speeds)[len(speeds) // 2] if speeds else None}


def continue_openings(run_dir: Path) -> dict[str, Any]:
    from serving import LLM, SamplingParams

    heading("2. Serving the checkpoint just written: 8 continuations in one continuous batch")
    llm = LLM(run_dir, max_num_seqs=8)
    params = [
        SamplingParams(temperature=0.8, top_p=0.95, max_tokens=48, seed=i) for i in range(len(OPENINGS))
    ]
    outputs = llm.generate(OPENINGS, params)
    return print_answers(llm, outputs, "opening", OPENINGS, "continuation")


def answer_questions() -> dict[str, Any]:
    from serving import LLM, SamplingParams

    heading("3. Serving SmolLM2-135M-Instruct: 8 questions of different lengths in one batch")
    llm = LLM(assets.smollm2(), max_num_seqs=8, max_model_len=512)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=64))
    return print_answers(llm, outputs, "prompt", QUESTIONS, "answer")


def print_answers(llm: Any, outputs: list[Any], left: str, prompts: list[str], right: str) -> dict[str, Any]:
    """Prints the table and the engine's summary; returns both as plain figures."""
    rows = [
        (
            prompt,
            output.outputs[0].text,
            str(len(output.outputs[0].token_ids)),
            str(output.outputs[0].finish_reason),
        )
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    print(format_table((left, right, "tokens", "finish"), rows, widths=(34, 66, 6, 6)))
    metrics = llm.metrics
    print(metrics.summary())
    return {
        "rows": rows,
        "output_tokens_per_second": metrics.output_tokens_per_second,
        "decode_steps": metrics.num_decode_steps,
        "peak_pages": metrics.peak_pages,
        "num_pages": metrics.num_pages,
        "waste_percent": metrics.waste_percent,
    }


def format_table(header: tuple[str, ...], rows: list[tuple[str, ...]], widths: tuple[int, ...]) -> str:
    """Columns of fixed width; long cells wrap, so that nothing is hidden."""

    def lines(cells: tuple[str, ...]) -> list[str]:
        wrapped = [
            textwrap.wrap(" ".join(cell.split()), width) or [""]
            for cell, width in zip(cells, widths, strict=True)
        ]
        height = max(map(len, wrapped))
        padded = [cell + [""] * (height - len(cell)) for cell in wrapped]
        return [
            "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
            for line in zip(*padded, strict=True)
        ]

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([*lines(header), rule, *(line for row in rows for line in lines(row))])


if __name__ == "__main__":
    sys.exit(main())
