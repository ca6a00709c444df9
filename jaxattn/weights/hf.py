"""Hugging Face folders: config.json, safetensors (one file or shards) and tokenizer files, read and
written."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
from safetensors.numpy import save_file

from jaxattn.models import MODELS, ModelFamily, model_from_params, model_params
from jaxattn.models.mapping import Tensors
from jaxattn.tokenizer import Tokenizer
from jaxattn.tokenizer_files import load_tokenizer
from jaxattn.weights.checkpoint import read_config_json
from jaxattn.weights.loaded import GenerationDefaults, LoadedModel, cast_arrays

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


def load_hf(folder: str | Path, *, dtype: Any = None) -> LoadedModel:
    """The model of a Hugging Face folder, in `dtype` (None: the files')."""
    folder = Path(folder)
    fields = read_config_json(folder)
    mapping = _family(fields.get("model_type"), folder).hf
    config = mapping.config_from_hf(fields)
    tensors = _open_tensors(folder)
    params = mapping.params_from_hf(tensors, config)
    tensors.check_all_taken()
    model = model_from_params(config, cast_arrays(params, dtype))
    tokenizer = load_tokenizer(folder) if any((folder / name).exists() for name in TOKENIZER_FILES) else None
    eos = _eos_token_ids(folder, fields, tokenizer)
    if tokenizer is not None and tokenizer.eos_token_id is None and eos:
        tokenizer.eos_token_id = eos[0]
    return LoadedModel(model, tokenizer, GenerationDefaults(eos_token_ids=eos))


def _family(model_type: Any, folder: Path) -> ModelFamily:
    if model_type not in MODELS:
        raise ValueError(f"{folder}: model_type {model_type!r} is not supported, only {sorted(MODELS)}")
    return MODELS[model_type]


def _eos_token_ids(folder: Path, fields: Mapping[str, Any], tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """generation_config.json decides, then config.json, then the tokenizer."""
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    eos = generation.get("eos_token_id", fields.get("eos_token_id"))
    if eos is None and tokenizer is not None:
        eos = tokenizer.eos_token_id
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def _open_tensors(folder: Path) -> Tensors:
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        file_of = {name: folder / file for name, file in index["weight_map"].items()}
    elif (folder / WEIGHTS).exists():
        file_of = dict.fromkeys(_names(folder / WEIGHTS), folder / WEIGHTS)
    else:
        raise FileNotFoundError(f"{folder}: no weights in it (looked for {WEIGHTS} and {INDEX})")
    return Tensors(list(file_of), _reader(file_of), str(folder))


def _open_file(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path}: this shard is named in {INDEX} but missing")
    try:
        return safetensors.safe_open(path, framework="np")
    except Exception as error:  # SafetensorError is no subclass of anything narrower
        raise ValueError(f"{path}: broken safetensors file: {error}") from error


def _names(path: Path) -> list[str]:
    with _open_file(path) as file:
        return list(file.keys())


def _reader(file_of: Mapping[str, Path]) -> Callable[[str], np.ndarray]:
    """Reads one tensor at a time: the host never holds a model twice."""

    def read(name: str) -> np.ndarray:
        with _open_file(file_of[name]) as file:
            if name not in set(file.keys()):
                raise ValueError(f"{file_of[name]}: tensor {name!r} is missing, {INDEX} says it is here")
            return file.get_tensor(name)

    return read


def save_hf(
    model: Any, folder: str | Path, *, tokenizer: Tokenizer | None = None, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Writes a folder that transformers reads (and `load_model`): the same numbers in the same dtype.

    model: a jaxattn model. max_shard_bytes: weights beyond this go into several files with an index.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mapping = MODELS[model.config.model_type].hf
    params = jax.tree.map(np.asarray, model_params(model))
    tensors = mapping.params_to_hf(params, model.config)
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    fields = mapping.config_to_hf(model.config)
    fields["torch_dtype"] = str(next(iter(tensors.values())).dtype)
    if tokenizer is not None:
        tokenizer.save(folder)
        fields |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    _write_json(folder / "config.json", fields)
    _save_tensors(tensors, folder, max_shard_bytes)


def _save_tensors(tensors: dict[str, np.ndarray], folder: Path, max_shard_bytes: int) -> None:
    for stale in (*folder.glob("model*.safetensors"), folder / INDEX):
        stale.unlink(missing_ok=True)
    shards = _shards(tensors, max_shard_bytes)
    metadata = {"format": "pt"}
    if len(shards) == 1:
        save_file(tensors, folder / WEIGHTS, metadata=metadata)
        return
    file_of = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata=metadata)
        file_of |= dict.fromkeys(names, file)
    total = sum(array.nbytes for array in tensors.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})


def _shards(tensors: Mapping[str, np.ndarray], max_bytes: int) -> list[list[str]]:
    """Names in order, cut where a file would grow beyond max_bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += array.nbytes
    return shards


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
