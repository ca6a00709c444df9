"""Notebooks run from top to bottom, and what GitHub shows of them is small and without errors."""

import contextlib
import io
from pathlib import Path

import matplotlib
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))
MAX_BYTES = 400_000  # of a committed notebook, its pictures included


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(path.parent)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_of_the_recorded_figures(path, monkeypatch):
    """Cells with the tag "recorded" take nothing but what the first cell imports, and figures of files."""
    matplotlib.use("Agg")
    monkeypatch.chdir(path.parent)
    first, *cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    names: dict = {}
    exec(first.source, names)
    cells = [cell for cell in cells if "recorded" in cell.metadata.get("tags", ())]
    assert cells
    for cell in cells:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(cell.source, names)
        committed = "".join(out.text for out in cell.outputs if out.output_type == "stream")
        assert printed.getvalue() == committed, f"jupyter execute --inplace {path}"
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_whole_and_small(path):
    assert path.stat().st_size < MAX_BYTES
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it from the top"
    errors = [
        out
        for cell in cells
        for out in cell.outputs
        if out.output_type in ("error", "stream") and out.get("name") != "stdout"
    ]
    assert not errors
