"""The notebooks run from top to bottom, and what is stored of them is of a whole run."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path):
    notebook = nbformat.read(path, as_version=4)
    stored = [cell.execution_count for cell in code_cells(notebook)]
    assert stored == list(range(1, len(stored) + 1)), "run it whole before it is stored"
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()  # raises what a cell raises
    assert any(cell.outputs for cell in code_cells(notebook))


def test_there_are_some():
    assert len(NOTEBOOKS) == 4
