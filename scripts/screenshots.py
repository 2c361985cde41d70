"""Takes the pictures of the page that the docs show: `docs/assets/demo.png` and `browse.png`, of a finished run.

    python scripts/screenshots.py runs/tiny

Needs the `demo` and `dev` extras and a Chromium (`$CHROMIUM`, or `chromium`, `chromium-browser`, `google-chrome` on the path).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from polyground.app import demo
from polyground.app.server import free_port, launch
from polyground.errors import PolygroundError

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--disable-component-update")
ANSWERED = "[...document.querySelectorAll('.pg-status')].every(status => status.textContent.includes('tokens in'))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder of the pictures (default: docs/assets)")
    parser.add_argument("--example", default="common object", help="words of the example that is asked about")
    parser.add_argument("--timeout", type=float, default=600, help="seconds to wait for anything")
    options = parser.parse_args()
    chromium = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if chromium is None:
        sys.exit(f"no Chromium: none of {', '.join(NAMES)}, and $CHROMIUM is not set")
    from playwright.sync_api import sync_playwright

    try:
        with served(options.run) as address, sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=list(FLAGS))
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(1000 * options.timeout)
            page.goto(address)
            picture_of_browsing(page, options.out / "browse.png")
            picture_of_asking(page, options.out / "demo.png", example=options.example)
            browser.close()
    except PolygroundError as error:
        sys.exit(str(error))


@contextmanager
def served(run: Path) -> Iterator[str]:
    """The page of `polyground demo --model RUN`, as long as it is looked at."""
    parser = argparse.ArgumentParser()
    demo.arguments(parser)
    with demo.opened(parser.parse_args(["--model", str(run)])) as page:
        yield launch(page, port=free_port(None))
        page.close(verbose=False)


def picture_of_asking(page: Any, out: Path, *, example: str) -> None:
    page.get_by_role("tab", name="Ask").click()
    page.click("#pg-example input")
    page.click(f"[role=option] >> text={example}")
    page.wait_for_selector("#pg-sheet svg")
    page.click("#pg-ask")
    page.wait_for_function(ANSWERED)
    page.wait_for_selector("#pg-sheet .pg-mark[data-name=truth]")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)
    save(page, out, height=None)


def picture_of_browsing(page: Any, out: Path) -> None:
    page.get_by_role("tab", name="Browse").click()
    page.wait_for_selector("#pg-card-1 article")
    page.click("#pg-view input")
    page.click("[role=option] >> text=GRPO")
    page.wait_for_selector("#pg-card-0 .pg-group")
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)
    save(page, out, height=1290)


def save(page: Any, out: Path, *, height: int | None) -> None:
    """The page from its top, as a PNG of few colours."""
    clip = None if height is None else {"x": 0, "y": 0, "width": 1280, "height": height}
    page.screenshot(path=out, full_page=True, clip=clip)
    with Image.open(out) as picture:
        few = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    few.save(out, optimize=True)
    print(f"{out}: {few.width} x {few.height}, {out.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
