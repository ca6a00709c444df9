"""The settings of a training run: frozen dataclasses, filled from a YAML recipe and `key=value` overrides.

Each setting is declared once, with its type, default, allowed values and meaning; reading, checking, the
error texts and the command line's help all come from that declaration.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parent / "recipes"


class ConfigError(ValueError):
    """A setting that does not exist or cannot have the value it was given."""


def setting(
    default: Any,
    meaning: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    metadata = {"meaning": meaning, "limits": limits, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read, and how it is cut into sequences."""

    text: str | None = setting(None, "text file or folder; package:NAME/PATH is inside an installed package")
    tokens: str | None = setting(None, "folder of prepared tokens; by default `data` in the run folder")
    tokenizer: str = setting("bytes", "bytes, gpt2, or the path of a tokenizer")
    pattern: str = setting("**/*.txt", "which files of a text folder are read")
    invalid_utf8: str = setting(
        "error", "what bytes that are not UTF-8 lead to", choices=("error", "replace")
    )
    validation_fraction: float = setting(0.1, "share of the text that is held out", above=0, below=1)
    sequence_length: int = setting(256, "tokens that one row of a batch reads", at_least=1)
    documents: str | None = setting(
        None,
        "packed: attention ends at their borders; separate: a row holds one, short rows are filled up; "
        "stream: borders are ignored; by default packed where there is more than one, else stream",
        choices=("packed", "separate", "stream"),
    )


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which model: a family, a preset of it, and any field of the family's own config."""

    family: str = setting("gpt2", "a key of jaxattn.models.MODELS")
    preset: str | None = setting(None, "a named size of the family; other keys change its fields")
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with clipping by the global norm."""

    learning_rate: float = setting(6e-4, "highest learning rate", above=0)
    beta1: float = setting(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = setting(0.95, "decay of the second moment", at_least=0, below=1)
    epsilon: float = setting(1e-8, "added to the root of the second moment", above=0)
    weight_decay: float = setting(0.1, "decoupled decay of matrices (two or more dimensions)", at_least=0)
    clip_norm: float | None = setting(1.0, "largest global norm of the gradient; null for none", above=0)


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then decay to the end of the run."""

    warmup_steps: int = setting(100, "steps from zero to the highest learning rate", at_least=0)
    decay: str = setting("cosine", "shape of the decay", choices=("cosine", "linear", "constant"))
    final_fraction: float = setting(0.1, "learning rate at the end, over the highest", at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """How long, how large, how exact, and where to."""

    dir: str = setting("runs/run", "run folder: checkpoints, metrics, samples")
    num_steps: int = setting(1000, "optimizer steps", at_least=1)
    batch_size: int = setting(32, "sequences of one step, over all devices", at_least=1)
    micro_batch_size: int | None = setting(None, "sequences at a time; by default all", at_least=1)
    seed: int = setting(0, "parameters, data order, dropout and samples follow from it", at_least=0)
    dtype: str = setting(
        "float32", "of the computation; the parameters stay float32", choices=("float32", "bfloat16")
    )
    remat: bool = setting(False, "recompute each layer in the backward pass: less memory, a third more time")
    attention: str | None = setting(None, "implementation of attention; by default the best for the device")
    loss_chunk_tokens: int | None = setting(
        None, "tokens whose logits exist at once; by default as many as take 4 GiB", at_least=1
    )
    max_seconds: float | None = setting(None, "stop, with a checkpoint, after this long", above=0)
    max_bad_steps: int = setting(10, "NaN or infinite gradients in a row that end the run", at_least=1)
    log_every: int = setting(10, "steps between rows of metrics.csv", at_least=1)
    checkpoint_every: int = setting(500, "steps between checkpoints; the last has one", at_least=1)
    keep_checkpoints: int = setting(2, "newest checkpoints that are kept", at_least=1)
    tensorboard: bool = setting(True, "write TensorBoard event files as well as metrics.csv")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Loss on the held-out text."""

    every: int = setting(250, "steps between evaluations; 0 for the end only", at_least=0)
    num_batches: int = setting(20, "batches of the held-out text; 0 for all of it", at_least=0)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Texts that the model writes while it learns."""

    every: int = setting(500, "steps between samples; 0 for the end only", at_least=0)
    prompts: tuple[str, ...] = setting(("",), "beginnings; an empty one starts a document")
    num_tokens: int = setting(200, "tokens of a sample; 0 for no samples", at_least=0)
    temperature: float = setting(0.8, "0 takes the likeliest token", at_least=0)
    top_k: int = setting(50, "likeliest tokens to choose from; 0 for all", at_least=0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that a run follows from."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)

    def __post_init__(self):
        for section in dataclasses.fields(self):
            _check_limits(section.name, getattr(self, section.name))
        batch, micro = self.run.batch_size, self.num_micro_sequences
        if batch % micro:
            raise ConfigError(f"run.micro_batch_size={micro}: must divide run.batch_size={batch}")
        if self.schedule.decay != "constant" and self.schedule.warmup_steps >= self.run.num_steps:
            raise ConfigError(
                f"schedule.warmup_steps={self.schedule.warmup_steps}: must be below "
                f"run.num_steps={self.run.num_steps}"
            )

    @property
    def num_micro_sequences(self) -> int:
        return self.run.micro_batch_size or self.run.batch_size

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dict, as a recipe holds it; `from_dict` reads it back."""
        tree = dataclasses.asdict(self)
        tree["model"] |= tree["model"].pop("fields")
        tree["sample"]["prompts"] = list(tree["sample"]["prompts"])
        return tree

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> "TrainConfig":
        """Reads `{section: {key: value}}`; unknown keys and values of a wrong type are a ConfigError."""
        sections = {field.name: field for field in dataclasses.fields(cls)}
        values = {}
        for name, content in tree.items():
            if name not in sections:
                raise unknown_key(name, sections)
            if not isinstance(content, Mapping):
                raise ConfigError(f"{name}={content!r}: must be a section of `key: value` lines")
            section_type = typing.cast(type, sections[name].type)
            read = read_model_section if section_type is ModelSettings else read_section
            values[name] = read(section_type, name, content)
        return cls(**values)


def load_recipe(recipe: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> TrainConfig:
    """Reads a recipe and changes single settings of it.

    Args:
        recipe: path of a YAML file, or the name of one of the recipes that come with the package.
        overrides: `section.key=value` texts as on the command line, or a mapping `{"section.key": value}`.
    Raises:
        ConfigError: the file is missing or no YAML, a key does not exist, a value is not allowed.
    """
    tree = _read_yaml(find_recipe(recipe))
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_split_override, overrides)
    for key, value in pairs:
        section, _, name = key.partition(".")
        sections = [field.name for field in dataclasses.fields(TrainConfig)]
        if section not in sections or not name:
            raise unknown_key(key, all_keys())
        content = tree.setdefault(section, {})
        if isinstance(content, dict):
            content[name] = value
    return TrainConfig.from_dict(tree)


def find_recipe(recipe: str | Path) -> Path:
    """Path of a recipe given by path or by name."""
    path, named = Path(recipe), RECIPES / f"{recipe}.yaml"
    if path.is_file():
        return path
    if named.is_file():
        return named
    raise ConfigError(f"recipe {str(recipe)!r}: no such file; recipes by name: {', '.join(recipe_names())}")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def all_keys() -> list[str]:
    """Every `section.key` of this file (a model family adds its own under `model.`)."""
    return [
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(TrainConfig)
        for field in dataclasses.fields(typing.cast(type, section.type))
        if field.metadata
    ]


def read_section[T](section_type: type[T], name: str, content: Mapping[str, Any]) -> T:
    """Fills a dataclass from `{key: value}`, each value converted to the field's type."""
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, section_type))}
    types_of = typing.get_type_hints(section_type)
    values = {}
    for key, value in content.items():
        if key not in fields:
            raise unknown_key(f"{name}.{key}", [f"{name}.{field}" for field in fields])
        values[key] = convert(f"{name}.{key}", value, types_of[key])
    return section_type(**values)


def read_model_section(section_type: type, name: str, content: Mapping[str, Any]) -> ModelSettings:
    """`family` and `preset`; every other key must be a field of the family's config."""
    from jaxattn.models import MODELS

    own = read_section(ModelSettings, name, {k: v for k, v in content.items() if k in ("family", "preset")})
    if own.family not in MODELS:
        raise ConfigError(f"{name}.family={own.family!r}: must be one of {', '.join(MODELS)}")
    family = MODELS[own.family]
    if own.preset is not None and own.preset not in family.presets:
        raise ConfigError(f"{name}.preset={own.preset!r}: must be one of {', '.join(family.presets)}")
    hints = typing.get_type_hints(family.config)
    names = [field.name for field in dataclasses.fields(family.config)]
    types_of = {
        field: hints[field] for field in names if field != "vocab_size"
    }  # that follows from the tokenizer
    fields = {}
    for key in content.keys() - {"family", "preset"}:
        if key not in types_of:
            raise unknown_key(
                f"{name}.{key}", [f"{name}.{field}" for field in (*types_of, "family", "preset")]
            )
        fields[key] = convert(f"{name}.{key}", content[key], types_of[key])
    return dataclasses.replace(own, fields={key: fields[key] for key in sorted(fields)})


def unknown_key(key: str, known: Iterable[str]) -> ConfigError:
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:  # the right name in the wrong section
        name = key.rpartition(".")[2]
        near = [other for other in known if other.rpartition(".")[2] == name][:1]
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return ConfigError(f"unknown setting {key}: {hint}")


def convert(key: str, value: Any, kind: Any) -> Any:
    """`value` as type `kind`; texts from the command line are read as YAML reads them."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if value is None or (value in ("null", "none", "None") and type(None) in options):
        if type(None) in options:
            return None
        raise ConfigError(f"{key}=null: must be {_kind_name(kind)}")
    kind = next(option for option in options if option is not type(None))
    try:
        return _CONVERTERS.get(typing.get_origin(kind) or kind, lambda value: value)(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{key}={value!r}: must be {_kind_name(kind)}") from None


def _to_int(value: Any) -> int:
    if isinstance(value, str):
        value = float(value) if "e" in value.lower() else int(value.replace("_", ""))
    if isinstance(value, bool) or value != int(value):
        raise ValueError
    return int(value)


def _to_float(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def _to_bool(value: Any) -> bool:
    words = {
        "true": True,
        "yes": True,
        "on": True,
        "1": True,
        "false": False,
        "no": False,
        "off": False,
        "0": False,
    }
    return words[value.lower()] if isinstance(value, str) and value.lower() in words else _only(bool, value)


def _to_str(value: Any) -> str:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else _only(str, value)


def _to_texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        parsed = yaml.safe_load(value) if value.startswith("[") else [value]
        value = parsed if isinstance(parsed, list) else [value]
    return tuple(_to_str(item) for item in _only((list, tuple), value))


def _only(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


_CONVERTERS = {int: _to_int, float: _to_float, bool: _to_bool, str: _to_str, tuple: _to_texts}
_KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a list of texts",
}


def _kind_name(kind: Any) -> str:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    names = [_KIND_NAMES.get(typing.get_origin(option) or option, str(option)) for option in options]
    return " or ".join(
        "null" if option is type(None) else name for option, name in zip(options, names, strict=True)
    )


def _check_limits(section: str, settings: Any) -> None:
    holds = {
        "at least": lambda value, limit: value >= limit,
        "above": lambda value, limit: value > limit,
        "at most": lambda value, limit: value <= limit,
        "below": lambda value, limit: value < limit,
    }
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        limits = {
            word: limit for word, limit in field.metadata.get("limits", {}).items() if limit is not None
        }
        if value is not None and not all(holds[word](value, limit) for word, limit in limits.items()):
            allowed = " and ".join(f"{word} {limit}" for word, limit in limits.items())
            raise ConfigError(f"{section}.{field.name}={value!r}: must be {allowed}")
        choices = field.metadata.get("choices", ())
        if choices and value is not None and value not in choices:
            raise ConfigError(f"{section}.{field.name}={value!r}: must be one of {', '.join(choices)}")


def _split_override(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{text!r}: an override is written section.key=value, such as run.num_steps=100")
    return key.strip(), value.strip()


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is sections of `key: value` lines")
    return tree
