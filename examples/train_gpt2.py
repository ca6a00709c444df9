"""Trains a GPT-2 on the State of the Union addresses from Python; `jaxattn-train sotu_bytes` does the same.

python examples/train_gpt2.py [section.key=value ...]
"""

import sys

from training import Trainer, load_recipe

if __name__ == "__main__":
    result = Trainer(load_recipe("sotu_bytes", sys.argv[1:])).run()
    print(
        f"{result.step} steps, {result.validation_bits_per_byte:.3f} bits per byte; {result.run_dir}/loss.png"
    )
