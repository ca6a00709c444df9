"""Completes a list of prompts in one continuous batch; `jaxattn-generate` does the same for files.

python examples/generate_batch.py runs/sotu_bytes "My fellow Americans," "The state of the Union is"
"""

import argparse
import sys

from serving import LLM, SamplingParams


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a Hugging Face folder, a .gguf file or a training run")
    parser.add_argument("prompts", nargs="+", metavar="prompt")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest (0.8)")
    parser.add_argument("--max-tokens", type=int, default=64, help="new tokens of each prompt (64)")
    args = parser.parse_args()
    try:
        params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
        outputs = LLM(args.model).generate(args.prompts, params)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for output in outputs:
        print(f"{output.prompt!r} -> {output.outputs[0].text!r} ({output.outputs[0].finish_reason})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
