"""Facts that the documentation states and that can be looked up."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from polyground.cli import OWN, STAGES, TOOLS, commands, where_explained
from polyground.config import Recipe, SynthesizeConfig
from polyground.conventions import CONVENTIONS, GRIDS
from polyground.curation import Dropped
from polyground.errors import PolygroundError, UsageError
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


# ---------------------------------------------------------------- what is generated, and what errors and commands name


def generated(name: str) -> Any:
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "scripts" / "write_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {"reference.md": module.reference, "cli.md": module.command_line}[name]()


@pytest.mark.parametrize("name", ["reference.md", "cli.md"])
def test_a_generated_page_is_what_the_program_says(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == generated(name), "run `make docs`"


def test_nobody_is_told_to_install_what_no_registry_has() -> None:
    """The project is installed from its folder: `extras.install_command` knows where that is."""
    places = [*PAGES, ROOT / "README.md", *(ROOT / "src").rglob("*.py")]
    told = [path.name for path in places if "pip install 'polyground[" in path.read_text(encoding="utf-8")]
    assert told == []


def errors(base: type[PolygroundError] = PolygroundError) -> Iterator[type[PolygroundError]]:
    import polyground.stages.doctor  # noqa: F401 - has one of its own

    yield base
    for error in base.__subclasses__():
        yield from errors(error)


def headings(page: Path) -> set[str]:
    """What a link to a heading is called."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in found}


@pytest.mark.parametrize("error", sorted(set(errors()), key=lambda error: error.__name__), ids=lambda error: error.__name__)
def test_every_error_names_a_page_that_is_there(error: type[PolygroundError]) -> None:
    page, _, heading = error.page.partition("#")
    assert (DOCS / page).is_file()
    assert not heading or heading in headings(DOCS / page)


def test_the_page_of_an_error_is_named_as_a_file_one_can_open(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert where_explained(UsageError("?")) == "docs/cli.md"
    monkeypatch.chdir(tmp_path)
    assert where_explained(UsageError("?")) == str(DOCS / "cli.md")


@pytest.mark.parametrize("verb", sorted({*TOOLS, *OWN}))
def test_wrong_words_for_a_tool_lead_to_its_own_heading(verb: str) -> None:
    page, _, heading = where_explained(UsageError("?"), [verb]).rpartition("cli.md")[2].partition("#")
    assert (page, heading) == ("", f"polyground-{verb}")
    assert heading in headings(DOCS / "cli.md")
    assert where_explained(UsageError("?"), ["grpo"]).endswith("cli.md")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ("reference.md", "cli.md")], ids=lambda page: page.name
)
def test_every_link_to_a_heading_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*\.md|)#([^)]+)\)", page.read_text(encoding="utf-8"))
    broken = [(file, name) for file, name in links if name not in headings((page.parent / file) if file else page)]
    assert broken == []


def commands_in(page: Path) -> list[list[str]]:
    """The words of every `polyground …` in the shell blocks of a page."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("polyground ")]


@pytest.mark.parametrize("page", ["tutorial.md", "how-to.md", "cli.md", "index.md"])
def test_every_command_has_a_verb_and_flags_that_are_known(page: str) -> None:
    known = commands()
    for words in commands_in(DOCS / page):
        verb, flags = words[0], [word.partition("=")[0] for word in words[1:] if word.startswith("--")]
        assert verb in {*STAGES, *TOOLS, *OWN, "--help"}, words
        own = {option.name for option in known[verb].options} if verb in known else set()
        whole = {f"--{name}" for name in Recipe.model_fields} if verb in STAGES else set()
        assert [flag for flag in flags if flag not in own | whole and flag.split(".")[0] not in whole] == [], words
