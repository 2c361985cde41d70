"""The page as a visitor meets it, driven in a headless Chromium: upload, ask, read the drawn box; filter, page, mark, export.

Skipped where there is no Chromium, gradio or playwright.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image
from small_run import make_run

from polyground.app.asking import Panel, Settings, entrants, world_examples
from polyground.app.library import library_of
from polyground.app.server import free_port, launch, require_gradio, scratch_folder

torch.set_num_threads(1)
pytest.importorskip("gradio", reason="gradio is not installed: pip install 'polyground[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
WAIT = 60_000
"""Milliseconds; other work shares the cores."""

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason=f"no Chromium: none of {', '.join(NAMES)}, and $CHROMIUM is not set"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio.*"),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A page that asks the embedded base under two names and browses a run of two questions."""
    with scratch_folder() as scratch:
        require_gradio()
        from polyground.app.page import build

        run = make_run(tmp_path_factory.mktemp("runs") / "run")
        page = build(
            Panel(entrants("tiny", ["tiny"])),
            library_of(run, options={}, answers={}, scratch=scratch),
            examples=world_examples(scratch / "world"),
            settings=Settings(max_tokens=64),
            scratch=scratch,
            first="ask",
        )
        yield launch(page, port=free_port(None))
        page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--disable-component-update"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(WAIT)
    page.requested = []
    page.on("request", lambda request: page.requested.append(request.url))
    page.goto(address)
    page.wait_for_selector("#pg-ask")
    yield page
    page.close()


def answered(page: Any) -> list[str]:
    """Waits until every model has answered; what each says of itself."""
    page.wait_for_function(
        "[...document.querySelectorAll('.pg-status')].every(status => status.textContent.includes('tokens in'))"
    )
    return page.eval_on_selector_all(".pg-status", "all => all.map(one => one.textContent)")


def edges(page: Any) -> list[tuple[str, int, list[float]]]:
    """(model, image, [x0, y0, x1, y1]) of every box that is drawn."""
    found = page.eval_on_selector_all(
        "#pg-sheet .pg-mark",
        "all => all.map(g => { const r = g.querySelector('.pg-edge'); return [g.dataset.name, g.closest('svg').dataset.image,"
        " ['x', 'y', 'width', 'height'].map(n => parseFloat(r.getAttribute(n)))]; })",
    )
    return [(name, int(image), [x, y, x + width, y + height]) for name, image, (x, y, width, height) in found]


def test_two_uploaded_images_are_asked_about_and_the_box_is_drawn_where_the_json_says(page: Any, tmp_path: Path) -> None:
    [example] = [one for one in world_examples(tmp_path / "world", seed=3) if one.task == "common_object"]
    page.set_input_files("#pg-images input[type=file]", [str(path) for path in example.images])
    page.wait_for_selector("#pg-sheet svg")
    page.fill("#pg-question textarea", example.question)
    page.press("#pg-question textarea", "Enter")  # no mouse is needed
    assert all("tokens in" in status for status in answered(page))
    page.wait_for_selector("#pg-sheet .pg-mark")
    told = json.loads(page.locator("#pg-json-0 .cm-content").inner_text())
    assert told["boxes"]
    drawn = {(image, tuple(round(side, 1) for side in box)) for name, image, box in edges(page) if name == "base"}
    for box in told["boxes"]:
        images = [box["image"]] if box["image"] else range(1, len(example.images) + 1)
        assert {(image, tuple(box["box"])) for image in images} <= drawn
    strokes = page.eval_on_selector_all("#pg-sheet .pg-edge", "all => all.map(one => one.getAttribute('stroke'))")
    assert len(set(strokes)) == 2  # a colour for each of the two models
    spoken = page.get_attribute("#pg-sheet svg >> nth=0", "aria-label")
    assert spoken.startswith(f"Image 1, {example.images[0].name}, 224 by 224 pixels")
    # Nothing was asked of another machine.
    assert {urlsplit(url).hostname for url in page.requested if url.startswith("http")} == {"127.0.0.1"}


def test_a_file_that_is_no_image_is_named_in_an_alert(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), "red").save(tmp_path / "good.png")
    (tmp_path / "saved.png").write_text("<html>not found</html>", encoding="utf-8")
    page.set_input_files("#pg-images input[type=file]", [str(tmp_path / "good.png"), str(tmp_path / "saved.png")])
    page.wait_for_selector("#pg-note [role=alert]")
    said = page.inner_text("#pg-note")
    assert "Image 2 (saved.png): not a readable image but a web page" in said
    assert str(tmp_path) not in said
    page.click("#pg-ask")
    page.wait_for_selector("#pg-note [role=alert]")
    assert page.query_selector("#pg-sheet svg") is None


def test_an_example_brings_its_images_question_and_truth(page: Any) -> None:
    page.click("#pg-example input")
    page.click("[role=option] >> text=common object")
    page.wait_for_selector("#pg-sheet svg")
    page.click("#pg-ask")
    answered(page)
    page.wait_for_selector("#pg-sheet .pg-mark[data-name=truth]")
    assert {"truth", "base"} <= {name for name, _, _ in edges(page)}
    page.click("#pg-shown label:has-text('truth')")
    page.wait_for_selector("#pg-sheet .pg-mark[data-name=truth]", state="detached")


def test_every_field_and_button_has_a_name(page: Any) -> None:
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('input:not([type=file]), textarea, button, select')].filter(one =>
            one.offsetParent !== null && !one.labels?.length && !one.getAttribute('aria-label') &&
            !one.getAttribute('aria-labelledby') && !one.title && !one.textContent.trim())
            .map(one => one.outerHTML.slice(0, 160))"""
    )
    assert nameless == []


def test_rows_are_filtered_marked_and_exported(page: Any) -> None:
    page.get_by_role("tab", name="Browse").click()
    page.wait_for_selector("#pg-card-1 article")
    assert "2 of 2 rows match" in page.inner_text("#pg-status")
    assert page.eval_on_selector_all("#pg-card-0 .pg-mark", "all => all.map(one => one.dataset.name)") == [
        *("truth", "base", "sft", "rl"),
    ]
    page.fill("#pg-key input, #pg-key textarea", "diff/1")
    page.press("#pg-key input, #pg-key textarea", "Enter")
    page.wait_for_function("document.querySelector('#pg-status').textContent.includes('1 of 2 rows match')")
    page.check("#pg-mark-0 input")
    page.click("#pg-export")
    page.wait_for_selector("#pg-file a")
    with page.expect_download() as download:
        page.click("#pg-file a")
    [row] = [json.loads(line) for line in Path(download.value.path()).read_text(encoding="utf-8").splitlines()]
    assert row["key"] == "test/diff/1"
    assert [answer["name"] for answer in row["answers"]] == ["base", "sft", "rl"]


def test_groups_are_chosen_by_name_and_show_their_advantages(page: Any) -> None:
    page.get_by_role("tab", name="Browse").click()
    page.wait_for_selector("#pg-card-0 article")
    page.click("#pg-view input")
    page.click("[role=option] >> text=GRPO")
    page.wait_for_selector("#pg-card-1 .pg-group")
    rows = page.eval_on_selector_all("#pg-card-1 .pg-group tbody tr", "all => all.map(row => row.cells[1].textContent.trim())")
    assert rows == ["-1.50", "-0.50", "+0.50", "+1.50"]


@pytest.mark.parametrize(("host", "status"), [("127.0.0.1", 200), ("localhost", 200), ("evil.example", 421)])
def test_the_page_is_for_this_machine_and_may_fetch_from_it_alone(address: str, host: str, status: int) -> None:
    place = urlsplit(address)
    assert place.hostname == "127.0.0.1"
    connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=60)
    connection.request("GET", "/", headers={"Host": f"{host}:{place.port}"})
    reply = connection.getresponse()
    reply.read()
    assert reply.status == status
    if status == 200:
        assert "default-src 'self'" in reply.headers["content-security-policy"]
    connection.close()
