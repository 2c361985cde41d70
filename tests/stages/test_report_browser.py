"""Facts about the report in a browser: a headless Chromium opens the file from disk and clicks on tabs, filters and heads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest
from test_report import small_recipe, write_evaluation, write_training, write_world

from polyground.stages import report

CHROMIUM = os.environ.get("CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,900"),
]

CLICKS = """
const found = {};
// checkVisibility() is true of groups in a drawing that are not displayed.
const wide = (one) => one.getBoundingClientRect().width > 0;
const shown = (selector) => [...document.querySelectorAll(selector)].filter(wide).length;
const click = (element) => element.dispatchEvent(new MouseEvent("click", { bubbles: true }));
const text = (selector) => [...document.querySelectorAll(selector)].map((one) => one.textContent.trim());
found.tabs = shown("#changes .tabs > .tab");
found.titles = text("#changes .tablist button");
click(document.querySelectorAll("#changes .tablist button")[1]);
found.selected = document.querySelector('#changes .tablist [aria-selected="true"]').textContent;
found.tabsAfter = shown("#changes .tabs > .tab");

const samples = () => shown("#gallery .sample");
found.all = samples();
click([...document.querySelectorAll('#gallery button[data-field="outcome"]')].find((one) => one.dataset.value === "still wrong"));
found.wrong = samples();
found.tagged = document.querySelectorAll('#gallery .sample[data-outcome="still wrong"]').length;
found.count = document.getElementById("count").textContent;
const words = document.getElementById("words");
words.value = "no such words";
words.dispatchEvent(new Event("input"));
found.none = [samples(), shown("#nothing")];

const table = document.querySelector("#results table.sortable");
const column = () => [...table.tBodies[0].rows].map((row) => row.cells[4].textContent);
const head = table.querySelectorAll("thead tr:last-child th")[4];
click(head);
found.falling = column();
click(head);
found.rising = column();
found.sort = head.getAttribute("aria-sort");

const truth = () => shown("#gallery .strip .box.c-truth");
words.value = "";
words.dispatchEvent(new Event("input"));
found.boxes = truth();
click(document.querySelector('#gallery .legend.boxes span[data-box="truth"]'));
found.boxesHidden = truth();

const svg = document.querySelector("#training svg[data-frame]");
const frame = svg.getBoundingClientRect();
svg.dispatchEvent(new PointerEvent("pointermove", { clientX: frame.left + frame.width / 2, clientY: frame.top + 20 }));
found.tip = document.getElementById("needle").textContent;

click(document.querySelector(".theme"));
click(document.querySelector(".theme"));
found.dark = getComputedStyle(document.body).backgroundColor;
const result = document.createElement("script");
result.type = "application/json";
result.id = "found";
result.textContent = JSON.stringify(found);
document.body.append(result);
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the page shows before and after the clicks."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here; set CHROMIUM to one")
    folder = tmp_path_factory.mktemp("page")
    recipe = small_recipe(folder / "run")
    write_world(recipe)
    write_evaluation(recipe)
    write_training(recipe)
    html = report.run(recipe).read_text(encoding="utf-8")
    # Only for this test: the policy of the page lets no other script run.
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    page = folder / "page.html"
    page.write_text(html.replace("</body>", f"<script>(() => {{{CLICKS}}})();</script></body>"), encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    data = re.search(r'<script type="application/json" id="found">(.*?)</script>', done.stdout, re.DOTALL)
    assert data, done.stderr[-2000:]
    return dict(json.loads(data[1]))


def test_one_tab_of_a_set_is_shown(found: dict) -> None:
    assert found["titles"][:2] == ["everything", "in domain"]
    assert (found["tabs"], found["tabsAfter"]) == (1, 1)
    assert found["selected"] == "in domain"


def test_filters_leave_what_fits(found: dict) -> None:
    assert found["all"] > found["wrong"] == found["tagged"] > 0
    assert found["count"] == f"{found['wrong']} of {found['all']}"
    assert found["none"] == [0, 1]


def test_a_click_on_a_columns_head_sorts_the_tasks_and_leaves_the_average_below(found: dict) -> None:
    falling, rising = [[float(value) for value in found[name][:-1]] for name in ("falling", "rising")]
    assert falling == sorted(falling, reverse=True)
    assert rising == sorted(rising)
    assert falling != rising
    assert found["falling"][-1] == found["rising"][-1]
    assert found["sort"] == "ascending"


def test_boxes_are_switched_off(found: dict) -> None:
    assert found["boxes"] > 0 == found["boxesHidden"]


def test_the_values_under_the_pointer_are_told(found: dict) -> None:
    at, loss, *_ = found["tip"].split("\n")
    assert at.startswith("at ")
    assert 0 < float(loss.removeprefix("train: ")) < 3


def test_the_theme_can_be_chosen(found: dict) -> None:
    assert found["dark"] == "rgb(18, 21, 27)"
