"""`jaxattn-train`: trains from a recipe; `jaxattn-train prepare`: text to tokens."""

import argparse
import contextlib
import dataclasses
import logging
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from training.config import ConfigError, TrainConfig, find_recipe, load_recipe, recipe_names

USAGE_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for anything the user can mend, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["prepare"]:
            return prepare_command(arguments[1:])
        return train_command(arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not is_users(error):
            raise
        print(f"jaxattn-train: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USAGE_ERROR


def is_users(error: Exception) -> bool:
    """Whether the message alone says what to change; anything else keeps its traceback."""
    if isinstance(error, ConfigError | OSError):
        return True
    from training.checkpoint import CheckpointError
    from training.data import DataError
    from training.meter import TrainingError

    return isinstance(error, CheckpointError | DataError | TrainingError)


def train_command(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jaxattn-train",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Trains a language model from a recipe.\n\n"
        f"recipes by name: {', '.join(recipe_names())}\n"
        "A run folder that has checkpoints is continued where it stopped.\n"
        "`jaxattn-train prepare --help`: turns text into token files once, for many runs.",
        epilog=f"settings (section.key=value):\n{settings_table()}\n"
        "  model.*    and every field of the family's config, such as model.num_layers",
    )
    parser.add_argument("recipe", help="YAML file, or the name of a recipe that comes with the package")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings to change")
    parser.add_argument("--fresh", action="store_true", help="begin anew: the earlier run folder is renamed")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    options = parser.parse_intermixed_args(arguments)
    config = load_recipe(options.recipe, options.overrides)
    from training.trainer import Trainer  # late: errors in a recipe show at once, without loading JAX

    trainer = Trainer(config, fresh=options.fresh, progress=not options.quiet)
    if options.quiet:
        result = trainer.run()
    else:
        print("\n".join(describe(trainer, find_recipe(options.recipe))), flush=True)
        with show_attention_choice():
            result = trainer.run()
        print("\n".join(summarize(result)))
    return INTERRUPTED if result.stopped_by == "interrupt" else 0


def prepare_command(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="jaxattn-train prepare", description="Turns a text file or folder into token files."
    )
    parser.add_argument("text", help="text file or folder; package:NAME/PATH is inside an installed package")
    parser.add_argument("--out", required=True, help="folder for the tokens: data.tokens of a recipe")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, gpt2, or a path (default: bytes)")
    parser.add_argument("--pattern", default="**/*.txt", help="which files of a folder (default: **/*.txt)")
    parser.add_argument(
        "--validation-fraction", type=float, default=0.1, help="held-out share (default: 0.1)"
    )
    parser.add_argument("--invalid-utf8", default="error", choices=("error", "replace"))
    parser.add_argument("--seed", type=int, default=0, help="chooses the documents that are held out")
    options = vars(parser.parse_args(arguments))
    from training.data import prepare

    tokens = prepare(options.pop("text"), options.pop("out"), **options)
    for split, counts in tokens.meta["splits"].items():
        replaced = f", {counts['num_replaced']:,} characters replaced" if counts["num_replaced"] else ""
        print(
            f"{split}: {counts['num_documents']:,} documents, {counts['num_bytes']:,} bytes, "
            f"{counts['num_tokens']:,} tokens{replaced}"
        )
    print(f"train on them with data.tokens={tokens.folder}")
    return 0


class AboveTheBar(logging.Handler):
    """Prints log lines where a progress bar may be running."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm.auto import tqdm

        tqdm.write(record.getMessage())


@contextlib.contextmanager
def show_attention_choice() -> Iterator[None]:
    """jaxattn logs once which attention it chose and why; a terminal should show that line, once."""
    logger, handler = logging.getLogger("jaxattn"), AboveTheBar()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def describe(trainer: Any, recipe: Any) -> list[str]:
    """What is about to run, and on what."""
    import jax

    config, tokens, device = trainer.config, trainer.tokens, jax.devices()[0]
    train = tokens.meta["splits"]["train"]
    sequences = f"{config.run.batch_size} x {config.data.sequence_length} tokens a step"
    if config.num_micro_sequences != config.run.batch_size:
        sequences += f" in micro-batches of {config.num_micro_sequences}"
    return [
        f"recipe   {recipe}",
        f"device   {device.device_kind} ({device.platform}), compute in {config.run.dtype}",
        f"text     {train['num_documents']:,} documents, {train['num_tokens']:,} training tokens",
        f"model    {trainer.model_config.model_type}, {trainer.num_parameters:,} parameters, {sequences}",
        f"run      {trainer.run_dir}: step {trainer.step:,} of {config.run.num_steps:,}",
    ]


def summarize(result: Any) -> list[str]:
    reasons = {
        "num_steps": "done",
        "max_seconds": "stopped at run.max_seconds",
        "interrupt": "interrupted; the same command goes on from here",
    }
    lines = [f"{reasons[result.stopped_by]}: {result.step:,} steps"]
    if result.validation_loss is not None:
        lines[0] += (
            f", validation loss {result.validation_loss:.4f}, "
            f"{result.validation_bits_per_byte:.4f} bits per byte"
        )
    if result.num_skipped:
        lines.append(f"{result.num_skipped} steps were skipped: NaN or infinite gradients")
    lines.append(f"model, metrics.csv, loss.png and samples.txt are in {result.run_dir}")
    return lines


def settings_table() -> str:
    """Every setting with its default and meaning, from the declarations in config.py."""
    lines = []
    for section in dataclasses.fields(TrainConfig):
        for field in dataclasses.fields(typing.cast(Any, section.type)):
            if field.metadata:
                default = "null" if field.default is None else field.default
                name = f"{section.name}.{field.name}={default}"
                lines.append(f"  {name:<40} {field.metadata['meaning']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
