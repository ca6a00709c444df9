"""Weights in and out: Hugging Face folders, .gguf files, our own checkpoints."""

from pathlib import Path
from typing import Any

from jaxattn.weights.checkpoint import FORMAT, load_checkpoint, read_config_json
from jaxattn.weights.hf import load_hf, save_hf
from jaxattn.weights.loaded import GenerationDefaults, LoadedModel

__all__ = ["GenerationDefaults", "LoadedModel", "load_model", "save_hf"]


def load_model(path: str | Path, *, dtype: Any = None) -> LoadedModel:
    """The model, tokenizer and generation defaults at a path.

    path: a Hugging Face folder (config.json, *.safetensors, tokenizer files), a .gguf file, or a folder that
        training or `save_checkpoint` wrote.
    dtype: of the parameters, in which the model computes; None keeps the files' (float32 for .gguf).

    Raises FileNotFoundError or ValueError that says what was looked for, or what is broken.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"model {str(path)!r}: no such file or folder")
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model {str(path)!r}: a file must be a .gguf; give the folder of other formats")
        from jaxattn.weights.gguf import load_gguf

        return load_gguf(path, dtype=dtype)
    if read_config_json(path).get("format") == FORMAT:
        return load_checkpoint(path, dtype=dtype)
    return load_hf(path, dtype=dtype)
