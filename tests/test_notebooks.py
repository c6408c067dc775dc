"""Notebooks come in pairs that say the same, without stale outputs (nbmake executes them)."""

from __future__ import annotations

from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted({path.stem for path in FOLDER.iterdir() if path.suffix in {".py", ".ipynb"}})


def test_there_are_notebooks() -> None:
    assert NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_says_the_same(name: str) -> None:
    script = jupytext.read(FOLDER / f"{name}.py")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [[(c.cell_type, c.source) for c in book.cells] for book in (script, notebook)]
    assert cells[0] == cells[1], f"run: jupytext --sync notebooks/{name}.py"


@pytest.mark.parametrize("name", NAMES)
def test_no_outputs_are_stored(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
