"""Our own checkpoints: a folder that holds everything a model needs, the same for training and serving.

folder/config.json                 the model's config, marked `"format": "jaxattn"`
folder/tokenizer.json, ...         what `tokenizer.save` writes
folder/checkpoints/<step>/params   the parameters, written by Orbax: a nested dict of float32 arrays
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxattn.models import ModelConfig, config_from_dict, model_from_params, model_params
from jaxattn.tokenizer import Tokenizer
from jaxattn.tokenizer_files import load_tokenizer
from jaxattn.weights.loaded import GenerationDefaults, LoadedModel, cast_arrays

FORMAT = "jaxattn"
STEPS_FOLDER = "checkpoints"
PARAMS = "params"


def write_metadata(folder: str | Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Writes config.json and the tokenizer's files; creates the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    text = json.dumps({"format": FORMAT, **config.to_dict()}, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def read_metadata(folder: str | Path) -> tuple[ModelConfig, Tokenizer]:
    """What `write_metadata` wrote."""
    fields = read_config_json(folder)
    if fields.pop("format", None) != FORMAT:
        raise ValueError(f"{folder}: its config.json is not one of jaxattn's (no format={FORMAT!r} in it)")
    return config_from_dict(fields), load_tokenizer(folder)


def read_config_json(folder: str | Path) -> dict[str, Any]:
    """The dict in folder/config.json; a clear error where there is none."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder}: no config.json in it")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return fields


def save_checkpoint(folder: str | Path, model: Any, tokenizer: Tokenizer, *, step: int = 0) -> None:
    """Writes a model that `load_model(folder)` reads. The parameters keep their dtype."""
    import orbax.checkpoint as ocp  # a second of imports

    write_metadata(folder, model.config, tokenizer)
    with ocp.CheckpointManager(Path(folder).resolve() / STEPS_FOLDER) as manager:
        item = ocp.args.StandardSave(model_params(model))
        manager.save(step, args=ocp.args.Composite(**{PARAMS: item}))
        manager.wait_until_finished()


def steps_of(folder: str | Path) -> list[int]:
    """The steps whose checkpoints are whole, in order."""
    steps = (Path(folder) / STEPS_FOLDER).glob(f"*/{PARAMS}")
    return sorted(int(path.parent.name) for path in steps if path.parent.name.isdigit())


def load_checkpoint(folder: str | Path, *, step: int | None = None, dtype: Any = None) -> LoadedModel:
    """The model of a step, the latest by default, in `dtype` (None: as it was saved)."""
    config, tokenizer = read_metadata(folder)
    steps = steps_of(folder)
    if not steps:
        raise FileNotFoundError(f"{folder}: no checkpoint in it (looked for {STEPS_FOLDER}/<step>/{PARAMS})")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"{folder}: no checkpoint of step {step}, only of {steps}")
    params = _read_params(Path(folder).resolve() / STEPS_FOLDER / str(step) / PARAMS)
    model = model_from_params(config, cast_arrays(params, dtype))
    eos = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return LoadedModel(model, tokenizer, GenerationDefaults(eos_token_ids=eos))


def _read_params(path: Any) -> dict[str, Any]:
    """NumPy arrays, wherever and however sharded they were when written."""
    import orbax.checkpoint as ocp

    try:
        handler = ocp.PyTreeCheckpointHandler()
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(path).tree
        )
        return handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:  # orbax and tensorstore raise many kinds
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"{path}: broken checkpoint ({type(error).__name__}: {reason})") from error
