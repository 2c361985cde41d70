"""The page served on the loopback address, to nobody else: no share link, no telemetry, nothing fetched from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import socket
import tempfile
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polyground.errors import MissingLibraryError, UsageError
from polyground.extras import install_command

HOST = "127.0.0.1"
PORTS = range(7860, 7960)
"""Tried in turn unless one is named."""

POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "frame-ancestors 'none'",
    )
)
"""What the browser may fetch: this server and what the page carries. gradio's own page names two foreign hosts."""


class Guard:
    """Middleware that sends the policy with every page and turns away what is not addressed to this machine.

    A page of another site can be made to resolve to 127.0.0.1; the name it was asked for by gives it away.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1").rpartition(":")[0]
        if host not in (HOST, "localhost"):
            await send({"type": "http.response.start", "status": 421, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this page is served to this machine only"})
            return

        async def sending(event: Any) -> None:
            if event["type"] == "http.response.start":
                told = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                event = {**event, "headers": [*event["headers"], *told]}
            await send(event)

        await self._app(scope, receive, sending)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Where examples, uploads and exports lie; it goes with the program. Enter it before gradio is imported."""
    with tempfile.TemporaryDirectory(prefix="polyground-") as name:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(name) / "uploads")
        yield Path(name)


def require_gradio() -> None:
    """Raises ConfigError where gradio is not installed; else makes sure that it tells nobody anything."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("NO_PROXY", "no_proxy"):
        # gradio asks its own server whether it is there; a proxy would answer in its place.
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST, "localhost")))
    if importlib.util.find_spec("gradio") is None:
        raise MissingLibraryError(f"the page needs gradio, which is not installed; {install_command('demo')}")


def free_port(wanted: int | None) -> int:
    """The port named, or the first that is free. Raises ConfigError where there is none."""
    for port in (wanted,) if wanted is not None else PORTS:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except (OSError, OverflowError):
                continue
            return port
    named = f"port {wanted} is" if wanted is not None else f"ports {PORTS.start} to {PORTS.stop - 1} are"
    raise UsageError(f"--port: {named} taken or not allowed on {HOST}; name another with --port")


def launch(page: Any, *, port: int) -> str:
    """Serve the page from threads of its own; gives its address."""
    import gradio as gr
    from starlette.middleware import Middleware

    from polyground.app.pictures import css

    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
    # Names without a source, so that nothing is fetched for them.
    theme = gr.themes.Base(
        font=[gr.themes.Font(name) for name in fonts],
        font_mono=[gr.themes.Font(name) for name in mono],
        primary_hue="blue",
        neutral_hue="slate",
    )
    page.queue(api_open=False)
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size="100mb",
        theme=theme,
        css=css(),
        app_kwargs={"middleware": [Middleware(Guard)], "docs_url": None, "redoc_url": None, "openapi_url": None},
    )
    return f"http://{HOST}:{port}/"


def serve(page: Any, *, port: int | None, opens_browser: bool, what: str) -> None:
    """Serve the page until the terminal interrupts it."""
    address = launch(page, port=free_port(port))
    print(f"{what}: {address} (only this machine can reach it; Ctrl-C ends it)", flush=True)
    if opens_browser:
        webbrowser.open(address)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print(f"\n{what}: ended", flush=True)
    finally:
        page.close(verbose=False)
