"""The page in gradio: a tab that asks models about images, and one that looks through the rows of a run or a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gradio as gr

from polyground.app.ask_tab import AskTab
from polyground.app.asking import Panel, Settings
from polyground.app.browse_tab import BrowseTab
from polyground.app.library import Library
from polyground.records import Example


def build(
    panel: Panel | None, library: Library | None, *, examples: Sequence[Example], settings: Settings, scratch: Path, first: str
) -> gr.Blocks:
    """The page with the tabs there is something for; `first` is the one that is open at the start."""
    with gr.Blocks(title="polyground", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        gr.HTML('<h1 id="pg-title">polyground</h1>', padding=False)
        with gr.Tabs(selected=first):
            if panel is not None:
                with gr.Tab("Ask", id="ask"):
                    AskTab(panel, examples, settings)
            if library is not None:
                with gr.Tab("Browse", id="browse"):
                    BrowseTab(page, library, scratch)
    return page
