"""Facts about the site's own steps; `make site` builds it whole, with every link checked."""

from __future__ import annotations

import base64
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks() -> Any:
    pytest.importorskip("mkdocs", reason="mkdocs is in the extra docs")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "scripts" / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("html", "found"),
    [
        pytest.param('<script src="https://cdn.example/x.js"></script>', ["https://cdn.example/x.js"], id="script"),
        pytest.param('<link rel="stylesheet" href="//fonts.example/a.css">', ["//fonts.example/a.css"], id="font"),
        pytest.param('<link rel="preconnect" href="https://fonts.example">', ["https://fonts.example"], id="preconnect"),
        pytest.param('<img src="http://tracker.example/1.gif">', ["http://tracker.example/1.gif"], id="image"),
        pytest.param('<a href="https://arxiv.org">read</a>', [], id="a-link-fetches-nothing"),
        pytest.param('<script src="assets/x.js"></script><link rel="canonical" href="https://a">', [], id="own-files"),
        pytest.param('<img src="data:image/png;base64,AA">', [], id="inlined"),
    ],
)
def test_what_a_page_would_fetch_from_elsewhere_is_found(hooks: Any, html: str, found: list[str]) -> None:
    assert hooks.fetched_from_elsewhere(html) == found


def test_a_notebook_becomes_a_page_with_its_pictures(hooks: Any) -> None:
    picture = base64.b64encode(b"png").decode()
    cells = [
        {"cell_type": "markdown", "source": ["# First\n", "words"]},
        {"cell_type": "code", "source": "1 + 1", "outputs": [{"data": {"text/plain": ["2"]}}]},
        {"cell_type": "code", "source": "show()", "outputs": [{"data": {"image/png": picture, "text/plain": "<…>"}}]},
    ]
    text, pictures = hooks.notebook_page({"cells": cells})
    assert text.startswith("# First\nwords\n\n```python\n1 + 1\n```\n\n```text\n2\n```\n\n```python\nshow()\n```")
    assert pictures == {"first-boxes-1.png": b"png"}
    assert "](first-boxes-1.png)" in text
    assert "<…>" not in text


def test_examples_in_docstrings_are_shown_as_code() -> None:
    pytest.importorskip("griffe", reason="griffe is in the extra docs")
    spec = importlib.util.spec_from_file_location("site_doctests", ROOT / "scripts" / "site_doctests.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = "Two facts.\n\n>>> 1 + 1\n2\n>>> 2\n2\n\nThe end."
    assert module.fenced(text) == "Two facts.\n\n\n```python\n>>> 1 + 1\n2\n>>> 2\n2\n```\n\n\nThe end."


@pytest.mark.parametrize(
    ("markdown", "shown"),
    [
        pytest.param(r"| `<\|box\|>` | b |", "| `<|box|>` | b |", id="code-in-a-table"),
        pytest.param(r"| a \| b | c |", r"| a \| b | c |", id="words-in-a-table"),
        pytest.param(r"`\|` alone", r"`\|` alone", id="no-table"),
    ],
)
def test_a_pipe_in_the_code_of_a_table_is_shown_without_its_backslash(hooks: Any, markdown: str, shown: str) -> None:
    assert hooks.bare_pipes(markdown) == shown


@pytest.mark.slow
def test_the_site_builds_strictly(hooks: Any, tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    for page in ("index.html", "tutorial.html", "how-to.html", "cli.html", "api.html", "notebooks/first-boxes.html"):
        assert (tmp_path / "site" / page).is_file()
    assert "polyground.load" in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "site")
