"""Text folder or file -> token files."""

import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from jaxattn.tokenizer import Tokenizer
from jaxattn.tokenizer_files import get_tokenizer
from training.data.text import list_text_files, read_text, resolve_text, split_pieces
from training.data.tokens import FORMAT, SPLITS, DataError, TokenFiles, open_tokens, token_dtype

PIECES_IN_FLIGHT = 16


class Source(NamedTuple):
    """All that the token files follow from; kept in `meta.json`, it tells a later run if they are its own."""

    text: str
    num_files: int
    num_bytes: int
    tokenizer: str
    validation_fraction: float
    invalid_utf8: str
    seed: int


def prepare(
    text: str | Path,
    out: str | Path,
    *,
    tokenizer: str = "bytes",
    pattern: str = "**/*.txt",
    validation_fraction: float = 0.1,
    invalid_utf8: str = "error",
    seed: int = 0,
    progress: bool = True,
) -> TokenFiles:
    """Writes `train.bin`, `validation.bin`, `meta.json` and the tokenizer into the folder `out`.

    A folder gives one document a file; whole documents are held out for validation, chosen by `seed`. A
    single file is one document whose last part is held out. Tokens that are there already are used again.

    Args:
        text: file or folder; `package:NAME/PATH` is inside an installed package.
        tokenizer: `bytes`, `gpt2`, or a path (see `jaxattn.get_tokenizer`).
        pattern: which files of a folder are read.
        validation_fraction: share of the documents, or of the single file, in (0, 1).
        invalid_utf8: `error` names the file and the byte; `replace` puts U+FFFD and counts.
    Raises:
        DataError: no such text, nothing in it, no UTF-8, or `out` holds something else.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(f"validation_fraction={validation_fraction}: must be above 0 and below 1")
    if invalid_utf8 not in ("error", "replace"):
        raise DataError(f"invalid_utf8={invalid_utf8!r}: must be one of error, replace")
    out, resolved = Path(out), resolve_text(text)
    paths = list_text_files(resolved, pattern)
    source = Source(
        text=str(text) if str(text).startswith("package:") else str(resolved.resolve()),
        num_files=len(paths),
        num_bytes=sum(path.stat().st_size for path in paths),
        tokenizer=str(tokenizer),
        validation_fraction=validation_fraction,
        invalid_utf8=invalid_utf8,
        seed=seed,
    )
    if (found := _open_same(out, source)) is not None:
        return found
    partial = out.with_name(f"{out.name}.partial")  # renamed when whole: a kill leaves no half folder
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_tokens(partial, paths, source, progress)
        if out.exists():
            out.rmdir()  # it is empty
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_tokens(out)


def _open_same(out: Path, source: Source) -> TokenFiles | None:
    """The tokens in `out` if they are those of the source, None if `out` is free."""
    if out.is_file():
        raise DataError(f"{out}: is a file; prepared tokens need a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return None
    if not (out / "meta.json").is_file():
        raise DataError(f"{out}: holds other files; prepared tokens need a folder of their own")
    tokens = open_tokens(out)
    made = tokens.meta["source"]
    for name, wanted in source._asdict().items():
        if made.get(name) != wanted:
            raise DataError(
                f"{out}: holds tokens of {name}={made.get(name)!r}, not {wanted!r}; "
                "remove the folder or choose another"
            )
    return tokens


def _write_tokens(folder: Path, paths: list[Path], source: Source, progress: bool) -> None:
    tokenizer = get_tokenizer(source.tokenizer)
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer {source.tokenizer!r}: has no end-of-text token to part documents with")
    meta: dict[str, Any] = {
        "format": FORMAT,
        "source": source._asdict(),
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "splits": {},
    }
    for split in SPLITS:
        with tqdm(
            unit="B", unit_scale=True, desc=f"{split} tokens", disable=not progress, leave=False, delay=1
        ) as bar:
            documents = _read_split(paths, split, source)
            counts = _write_split(folder / f"{split}.bin", documents, tokenizer, bar)
        if not counts["num_bytes"]:
            raise DataError(f"{source.text}: {source.num_files} file(s) leave no text for the {split} split")
        meta["splits"][split] = counts
    tokenizer.save(folder)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _read_split(paths: list[Path], split: str, source: Source) -> Iterator[tuple[str, int]]:
    """(text, number of replaced characters) of each document of a split."""
    fraction = source.validation_fraction
    if len(paths) == 1:
        text, num_replaced = read_text(paths[0], source.invalid_utf8)
        cut = round(len(text) * (1 - fraction))
        yield (text[:cut], num_replaced) if split == "train" else (text[cut:], 0)
        return
    num_held_out = min(max(1, round(fraction * len(paths))), len(paths) - 1)
    held_out = set(np.random.default_rng(source.seed).permutation(len(paths))[:num_held_out].tolist())
    for index, path in enumerate(paths):
        if (index in held_out) == (split == "validation"):
            yield read_text(path, source.invalid_utf8)


def _write_split(
    path: Path, documents: Iterable[tuple[str, int]], tokenizer: Tokenizer, bar: tqdm
) -> dict[str, int]:
    """Streams documents through the tokenizer; memory holds one document and a few pieces, not the corpus."""
    dtype = token_dtype(tokenizer.vocab_size)
    counts = {"num_tokens": 0, "num_bytes": 0, "num_documents": 0, "num_replaced": 0}

    def pieces() -> Iterator[str | None]:  # None: a document opens
        for text, num_replaced in documents:
            counts["num_replaced"] += num_replaced
            if text:
                yield None
                yield from split_pieces(text)
        yield None

    def encode(piece: str | None) -> np.ndarray:
        ids = [tokenizer.eos_token_id] if piece is None else tokenizer.encode(piece, add_special_tokens=False)
        return np.asarray(ids).astype(dtype)

    with path.open("wb") as file, ThreadPoolExecutor() as pool:
        for group in itertools.batched(pieces(), PIECES_IN_FLIGHT):
            for piece, tokens in zip(group, pool.map(encode, group), strict=True):
                file.write(tokens.tobytes())
                num_bytes = len((piece or "").encode())
                counts["num_tokens"] += tokens.size
                counts["num_bytes"] += num_bytes
                counts["num_documents"] += piece is None
                bar.update(num_bytes)
    counts["num_documents"] -= 1  # the last border closes
    return counts
