"""Trains a small GPT-2 from Python: on the State of the Union addresses, or on your text.

    python examples/train_gpt2.py
    python examples/train_gpt2.py data.text=my_texts/ run.num_steps=500

Arguments are settings of the recipe sotu_bytes (`jaxattn-train --help` lists them all; that command does the
same for any recipe).
"""

import argparse
import sys

from training import ConfigError, DataError, Trainer, load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    try:
        result = Trainer(load_recipe("sotu_bytes", parser.parse_args().settings)).run()
    except (ConfigError, DataError, OSError) as error:
        parser.error(str(error))
    bits = result.validation_bits_per_byte
    print(
        f"{result.step} steps, {bits:.3f} bits per byte; model and {result.run_dir}/loss.png"
        if bits is not None
        else f"{result.step} steps; model in {result.run_dir}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
