"""The notebook of the documentation runs from its first cell to its last, and shows boxes on the object it asks for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "first-boxes.ipynb"


def texts(cell: Any) -> str:
    return "".join("".join(output.get("text", output.get("data", {}).get("text/plain", ""))) for output in cell["outputs"])


def pictures(cell: Any) -> list[str]:
    return [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]


def test_the_notebook_runs_and_finds_what_it_asks_for() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbclient and ipykernel are in the extra dev")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = [list(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    nbclient.NotebookClient(notebook, timeout=300, startup_timeout=300, kernel_name="python3").execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [bool(pictures(cell)) for cell in code] == [False, False, True, False, True, False]
    overlaps = [float(found) for cell in code for found in re.findall(r"overlap with the truth: ([\d.]+)", texts(cell))]
    assert overlaps
    assert min(overlaps) > 0.5
    # What a reader sees without running it was made by these cells.
    assert [[output.output_type for output in outputs] for outputs in stored] == [
        [output.output_type for output in cell.outputs if output.output_type != "stream" or output.name == "stdout"]
        for cell in code
    ]
