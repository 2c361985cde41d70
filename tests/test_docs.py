"""Facts that the documentation states and that can be looked up."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from polyground.config import SynthesizeConfig
from polyground.conventions import CONVENTIONS, GRIDS
from polyground.curation import Dropped
from polyground.imagefile import FILE_REASONS
from polyground.sources import ABOUT_ROWS, SOURCES
from polyground.teaching import MARKS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_trick_is_held_by_a_case_of_that_name() -> None:
    page = (DOCS / "rewards.md").read_text(encoding="utf-8")
    cases = (ROOT / "tests" / "test_rewards.py").read_text(encoding="utf-8")
    table = page.partition("| held by |")[2].partition("\n\n")[0]
    named = [name for line in table.splitlines()[2:] for name in re.findall(r"`([a-z0-9-]+)`", line.split("|")[-2])]
    assert len(named) > 15
    assert [name for name in named if f'id="{name}"' not in cases] == []
    assert [name for name in re.findall(r"`(test_\w+)`", page) if f"def {name}(" not in cases] == []


@pytest.mark.parametrize(
    ("page", "words"),
    [
        pytest.param("data.md", [*SOURCES, *ABOUT_ROWS, *FILE_REASONS], id="data"),
        pytest.param("coordinates.md", [*CONVENTIONS, *GRIDS], id="coordinates"),
        pytest.param("teacher.md", [*Dropped, *MARKS, *get_args(SynthesizeConfig.model_fields["aid"].annotation)], id="teacher"),
    ],
)
def test_what_can_be_chosen_is_documented(page: str, words: list[str]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert [word for word in words if f"`{word}`" not in text] == []
