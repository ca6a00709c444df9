"""What a run stands on: its folder, its tokens, its model."""

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import yaml

from jaxattn.attention import IMPLEMENTATIONS
from jaxattn.models import MODELS, ModelConfig, create_model, model_params
from training.checkpoint import has_checkpoints
from training.config import ConfigError, TrainConfig
from training.data import DataError, TokenFiles, open_tokens, prepare

CONFIG_FILE = "config.yaml"
GPT2_WIDTH = 768
FIXED_SECTIONS = ("data", "model")  # a run cannot change them; anything else it may


def make_model_config(config: TrainConfig, vocab_size: int) -> ModelConfig:
    """The family's config: its preset or defaults, then the recipe's fields.

    The context is as long as the training sequences unless the recipe says more.

    Sizes that a family derives from others (declared as 0) are derived anew from the fields.
    """
    settings, family = config.model, MODELS[config.model.family]
    fields = {"max_positions": config.data.sequence_length, **settings.fields, "vocab_size": vocab_size}
    if fields["max_positions"] < config.data.sequence_length:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length}: must be at most "
            f"model.max_positions={fields['max_positions']}"
        )
    try:
        if settings.preset is None:
            return family.config(**fields)
        derived = {
            field.name: 0
            for field in dataclasses.fields(family.config)
            if type(field.default) is int and not field.default
        }
        return dataclasses.replace(family.presets[settings.preset], **(derived | fields))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {error}") from None


def initial_params(model_config: ModelConfig, seed: int) -> dict[str, Any]:
    """The family's own random parameters; matrices of narrow models are drawn wider.

    GPT-2's N(0, 0.02) suits D = 768: the products of a matrix of D rows shrink with sqrt(D). With factor
    sqrt(768 / D) below that, a model of D = 128 reached 1.92 instead of 2.16 bits per byte after 900 steps.
    """
    params = model_params(create_model(model_config, seed=seed))
    factor = max(1.0, math.sqrt(GPT2_WIDTH / model_config.embed_dim))
    return jax.tree.map(lambda leaf: leaf * factor if leaf.ndim >= 2 else leaf, params)


def check_attention(config: TrainConfig) -> None:
    if config.run.attention is not None and config.run.attention not in IMPLEMENTATIONS:
        raise ConfigError(
            f"run.attention={config.run.attention!r}: must be null or one of {', '.join(IMPLEMENTATIONS)}"
        )


def open_or_prepare(config: TrainConfig, *, progress: bool) -> TokenFiles:
    """The tokens of the run, made from config.data.text if they are not there yet.

    Raises:
        DataError: no text, or the folder's tokens come from another text or another way of cutting it.
    """
    data = config.data
    folder = Path(data.tokens) if data.tokens else Path(config.run.dir) / "data"
    if data.text is None:
        if not (folder / "meta.json").is_file():
            raise DataError("data.text: give a text file or folder, or data.tokens=FOLDER of prepared tokens")
        return open_tokens(folder)
    return prepare(
        data.text,
        folder,
        tokenizer=data.tokenizer,
        pattern=data.pattern,
        validation_fraction=data.validation_fraction,
        invalid_utf8=data.invalid_utf8,
        seed=config.run.seed,
        progress=progress,
    )


def check_same_run(run_dir: Path, config: TrainConfig) -> list[str]:
    """Changes since the folder's run began, as texts; a change of data or model is a ConfigError."""
    path = run_dir / CONFIG_FILE
    if not (path.is_file() and has_checkpoints(run_dir)):
        return []
    before, now, changes = yaml.safe_load(path.read_text(encoding="utf-8")), config.to_dict(), []
    for section, settings in now.items():
        old_settings = before.get(section, {})
        for key in {**old_settings, **settings}:
            old, new = old_settings.get(key), settings.get(key)
            if old == new or (section, key) == ("run", "dir"):
                continue
            if section in FIXED_SECTIONS:
                raise ConfigError(
                    f"{section}.{key}={new!r}: the run in {run_dir} began with {old!r}; "
                    "choose another run.dir, or --fresh to move that run aside"
                )
            changes.append(f"{section}.{key}: {old!r} -> {new!r}")
    return changes


def write_config(run_dir: Path, config: TrainConfig) -> None:
    partial = run_dir / f"{CONFIG_FILE}.partial"
    partial.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
    os.replace(partial, run_dir / CONFIG_FILE)


@contextlib.contextmanager
def moved_aside(run_dir: Path) -> Iterator[Path | None]:
    """Renames a run folder to the first free `NAME.old-1`, `NAME.old-2`, ...: nothing is deleted. Gives the
    new name, None where there was no such folder. After an exception inside, the folder is back in its place.
    """
    if not run_dir.exists():
        yield None
        return
    number = 1
    while (target := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
        number += 1
    run_dir.rename(target)
    try:
        yield target
    except BaseException:
        shutil.rmtree(run_dir, ignore_errors=True)
        target.rename(run_dir)
        raise
