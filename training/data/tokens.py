"""Prepared tokens on disk: `train.bin`, `validation.bin` and `meta.json` in one folder.

A split is one stream, EOS doc EOS doc ... EOS: an EOS token opens every document (so that generation can
start from it) and, as the next one's opening, is what the last token of a document must predict.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FORMAT = 1
SPLITS = ("train", "validation")


class DataError(ValueError):
    """Text or tokens that cannot be trained on."""


class TokenFiles(NamedTuple):
    """An opened folder of prepared tokens."""

    folder: Path
    splits: dict[str, np.ndarray]  # u16 or u32 [num_tokens], memory-mapped
    meta: dict[str, Any]

    @property
    def eos_token_id(self) -> int:
        return self.meta["eos_token_id"]

    @property
    def num_documents(self) -> int:
        return self.meta["splits"]["train"]["num_documents"]

    def bytes_per_token(self, split: str) -> float:
        """UTF-8 bytes of text that one token of the split stands for, on average."""
        counts = self.meta["splits"][split]
        return counts["num_bytes"] / counts["num_tokens"]


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def open_tokens(folder: str | Path) -> TokenFiles:
    """Opens what `prepare` wrote.

    Raises:
        DataError: the folder is not one, or its files do not agree with `meta.json`.
    """
    folder = Path(folder)
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise DataError(f"{folder}: token format {meta['format']}, this version reads {FORMAT}")
        splits = {split: _map_split(folder, split, meta) for split in SPLITS}
    except FileNotFoundError as error:
        raise DataError(
            f"{folder}: no prepared tokens there ({Path(error.filename).name} is missing)"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'meta.json'}: broken ({type(error).__name__}: {error})") from None
    return TokenFiles(folder, splits, meta)


def _map_split(folder: Path, split: str, meta: dict[str, Any]) -> np.ndarray:
    path, dtype = folder / f"{split}.bin", np.dtype(meta["dtype"])
    expected = meta["splits"][split]["num_tokens"] * dtype.itemsize
    if path.stat().st_size != expected:
        raise DataError(f"{path}: {path.stat().st_size} bytes, but meta.json says {expected}")
    return np.memmap(path, dtype=dtype, mode="r")
