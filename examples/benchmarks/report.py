"""What every benchmark has in common: its command line, and figures beside the command, device, versions and
date they came from.
"""

import argparse
import datetime
import json
import platform
import shlex
import shutil
import signal
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax

DEVICE = ("device", "num_devices")
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "flax", "numpy", "tokamax", "torch")


def parser(description: str | None, out: str = "write every figure here, as JSON") -> argparse.ArgumentParser:
    """The command line that all share."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", help=out)
    made.add_argument("--max-seconds", type=seconds, help="what is not reached by then is not measured")
    return made


def positive(text: str) -> int:
    """The type of an argument that counts something."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seconds(text: str) -> float:
    """The type of an argument that is a time."""
    if not (value := float(text)) >= 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def read(
    option: str, path: str, fields: Iterable[str], row_fields: Iterable[str], rows: str = "rows"
) -> dict:
    """What this benchmark wrote to `path`: a JSON object with `fields`, and `row_fields` in each of its
    `rows` (a list, or lists by section). One line and exit code 2 where the file is missing or another's.
    """
    try:
        figures = json.loads(Path(path).read_text())
    except OSError as error:
        refuse(f"{option}: cannot read {path}: {error.strerror}")
    except ValueError as error:
        refuse(f"{option}: {path} is not JSON: {error}")
    has = lambda item, names: isinstance(item, dict) and set(names) <= item.keys()
    if not has(figures, [*fields, rows]):
        missing = [name for name in [*fields, rows] if not has(figures, [name])]
        refuse(f"{option}: {path} is not of this benchmark: no {', '.join(missing)} in it")
    listed = figures[rows]
    listed = [row for section in listed.values() for row in section] if isinstance(listed, dict) else listed
    if not listed or not all(has(row, row_fields) for row in listed):
        refuse(f"{option}: {path} is not of this benchmark: no {', '.join(row_fields)} in its {rows}")
    return figures


def refuse(why: str) -> NoReturn:
    """One line, and the exit code of a wrong command line."""
    print(f"{Path(sys.argv[0]).name}: {why}", file=sys.stderr)
    raise SystemExit(2)


def begin(what: str, needs_gpu: bool = True) -> None:
    """Says what is measured and on which device; ends with exit code 2 where that is no GPU but must be."""
    try:
        device = device_facts()
    except RuntimeError as error:  # JAX_PLATFORMS asks for a device that is not there
        refuse(f"needs an NVIDIA GPU: {str(error).splitlines()[0]}")
    if needs_gpu and jax.default_backend() != "gpu":
        refuse(f"needs an NVIDIA GPU, found {device['device']}")
    print(f"{what}; on {device['num_devices']} x {device['device']}", flush=True)


def begin_processes(what: str) -> None:
    """As begin, where others than this process use the GPU: its memory is theirs."""
    if shutil.which("nvidia-smi") is None:
        refuse("needs an NVIDIA GPU, found no nvidia-smi")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that they are ended with this one
    jax.config.update("jax_platforms", "cpu")
    print(f"{what}; in fresh processes on this GPU", flush=True)


def device_facts() -> dict[str, Any]:
    return {"device": jax.devices()[0].device_kind, "num_devices": len(jax.devices())}


def environment(device: dict[str, Any] | None = None) -> dict[str, Any]:
    """Command, date, device and versions of this run. device: figures that name it, where asking JAX would
    take GPU memory.
    """
    device = {name: device[name] for name in DEVICE if name in device} if device else {}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **(device or device_facts()),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def save(path: str | Path | None, figures: dict[str, Any], is_last: bool = True) -> None:
    """Writes {environment, figures} as JSON; without a path nothing. A run that is cut off leaves whole what
    was written last.
    """
    if path is None:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps({**environment(figures), **figures}, indent=1) + "\n")
    draft.replace(path)
    if is_last:
        print(f"written: {path}")


def save_chart(figure: Any, path: str | Path) -> None:
    """Writes a figure of matplotlib, as save does its numbers: folders that are missing are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Columns that line up: text to the left, numbers to the right."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    numeric = [
        all(isinstance(row[i], int | float) or row[i] is None for row in rows) for i in range(len(header))
    ]

    def line(values: Any) -> str:
        padded = [v.rjust(w) if n else v.ljust(w) for v, w, n in zip(values, widths, numeric, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, cells)])


def markdown(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """The same as a table of Markdown, for the README."""
    lines = [header, ["---"] * len(header), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
