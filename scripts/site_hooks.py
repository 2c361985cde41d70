"""What `mkdocs build` does besides: pages nobody listed, links out of docs/, the notebook as a page, nothing from elsewhere.

Used by mkdocs.yml.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
NOTEBOOK = "notebooks/first-boxes.ipynb"

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s]+)\)")
_FENCED = re.compile(r"(^```.*?^```\s*?$)", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]+`")
_LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "audio": "src", "video": "src"}
_FETCHED = ("stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "icon", "modulepreload")


def on_files(files: Files, *, config: Any) -> Files:
    """The notebook becomes a page beside itself; listed or not, every page has a place."""
    notebook = files.get_file_from_path(NOTEBOOK)
    if notebook is not None:
        page = NOTEBOOK.replace(".ipynb", ".md")
        text, pictures = notebook_page(json.loads((ROOT / "docs" / NOTEBOOK).read_text(encoding="utf-8")))
        files.append(File.generated(config, page, content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=data))
    listed = set(_listed(config["nav"]))
    missing = [file.src_uri for file in files.documentation_pages() if file.src_uri not in listed]
    if missing:
        config["nav"] = [*config["nav"], {"More": sorted(missing)}]
    return files


def _listed(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for entry in nav if isinstance(nav, list) else nav.values() if isinstance(nav, dict) else ():
        yield from _listed(entry)


def notebook_page(notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the pictures among its outputs by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"first-boxes-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What the cell above shows]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    link = f"[This page as a notebook]({posixpath.basename(NOTEBOOK)})"
    return "\n\n".join([*parts, link]) + "\n", pictures


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Links to files of the project outside docs/ become their names: a site does not hold them."""
    here = posixpath.dirname(page.file.src_uri)

    def named(link: re.Match[str]) -> str:
        text, target = link[1], link[2].partition("#")[0]
        path = posixpath.normpath(posixpath.join(here, target))
        if not path.startswith("..") and files.get_file_from_path(path) is not None:
            return link[0]
        if not (ROOT / "docs" / path).exists():
            return link[0]  # broken: mkdocs says so
        name = posixpath.relpath(posixpath.join("docs", path), ".")
        return f"{text} (`{name}`)" if text.strip("`") not in (name, target) else f"`{name}`"

    parts = _FENCED.split(markdown)
    return "".join(part if part.startswith("```") else bare_pipes(_LINK.sub(named, part)) for part in parts)


def bare_pipes(markdown: str) -> str:
    """`\\|` in the code of a table as `|`: GitHub wants it escaped there, and Python-Markdown would show the backslash."""
    return "".join(
        _CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line
        for line in markdown.splitlines(keepends=True)
    )


class _Loads(HTMLParser):
    """Addresses a browser fetches when it opens a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag in _LOADED:
            self.found.append(told.get(_LOADED[tag]) or "")
        if tag == "link" and any(word in (told.get("rel") or "") for word in _FETCHED):
            self.found.append(told.get("href") or "")


def fetched_from_elsewhere(html: str) -> list[str]:
    """Addresses of other machines that a page would load from."""
    loads = _Loads()
    loads.feed(html)
    return [address for address in loads.found if re.match(r"(?:[a-z]+:)?//", address)]


def on_post_build(*, config: Any) -> None:
    """Refuse a site that would fetch anything."""
    for path in sorted(Path(config["site_dir"]).rglob("*.html")):
        if found := fetched_from_elsewhere(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path}: would load {', '.join(found)}; the site must not fetch anything")
