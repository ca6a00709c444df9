"""Generates from a list of prompts in one continuous batch; `jaxattn-generate` does the same for files.

    python examples/generate_batch.py MODEL PROMPT [PROMPT ...]

MODEL is a Hugging Face folder, a .gguf file or a run folder of `jaxattn-train`.
"""

import sys

from serving import LLM, SamplingParams

if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    model, *prompts = sys.argv[1:]
    for output in LLM(model).generate(prompts, SamplingParams(temperature=0.8, max_tokens=64)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r} ({output.outputs[0].finish_reason})")
