"""The house rules that a reader relies on: imports go one way, cost little and touch no device."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "pallas_kernels": set(),
    "jaxattn": {"pallas_kernels"},
    "serving": {"jaxattn", "pallas_kernels"},
    "training": {"jaxattn", "pallas_kernels"},
}
# Only these call kernels, or build what a kernel takes: everything above asks them.
KERNEL_CALLERS = {
    "jaxattn/attention.py",
    "jaxattn/block_mask.py",
    "jaxattn/block_picture.py",
    "jaxattn/block_rules.py",
    "jaxattn/implementations.py",
    "jaxattn/page_pool.py",
    "jaxattn/ring_attention.py",
    "jaxattn/__init__.py",
}


def python_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, at any depth of nesting."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = path.relative_to(ROOT).with_suffix("").parts[: -node.level]
                modules.add(".".join([*package, node.module or ""]))
            else:
                modules |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    ours = set(ALLOWED) | {"tests", "examples"}
    files = python_files(package)
    assert files
    for path in files:
        reached = {name.split(".")[0] for name in imported_modules(path)} & ours
        forbidden = reached - ALLOWED[package] - {package}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


@pytest.mark.parametrize(
    ("api", "module"),
    [
        ("pallas.mosaic_gpu", "mosaic.py"),
        ("mosaic.gpu.fragmented_array", "mosaic_inline.py"),
        ("mosaic.gpu.wgmma", "mosaic_wgmma.py"),
        ("mosaic.gpu.launch_context", "mosaic_copy.py"),
    ],
)
def test_one_module_touches_each_api_of_mosaic(api, module):
    touches = {
        path.name
        for path in python_files("pallas_kernels")
        if any(name.startswith(f"jax.experimental.{api}") for name in imported_modules(path))
    }
    assert touches == {module}


def test_kernels_have_two_callers():
    for package in ("jaxattn", "serving", "training"):
        for path in python_files(package):
            reached = {name.split(".")[0] for name in imported_modules(path)}
            if "pallas_kernels" in reached:
                assert str(path.relative_to(ROOT)) in KERNEL_CALLERS, path


def test_import_is_quick_and_touches_no_device():
    program = (
        "import time, jaxattn, serving, training, pallas_kernels\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge._backends, 'importing initialised a backend'\n"
        "print(time.process_time())\n"  # not the clock: other tests hold the cores too
    )
    command = [sys.executable, "-c", program]
    done = [subprocess.run(command, check=True, cwd=ROOT, timeout=60, capture_output=True) for _ in range(2)]
    assert min(float(run.stdout) for run in done) < 3.0, done
