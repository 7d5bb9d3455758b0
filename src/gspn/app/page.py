"""The page: its tabs, and the server that shows it to browsers on this machine."""

from __future__ import annotations

import ipaddress
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from gradio.themes import Default
from starlette.middleware import Middleware

from .. import __version__
from .._errors import UsageError
from . import affinity, class_conditional, classify, text_to_image
from .components import MAX_BYTES
from .models import Models, Names

LOCAL = "127.0.0.1"
"""The address that nobody but this machine reaches."""

_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
# The browser itself refuses whatever would leave the page's own address, such as fonts of other sites.
_POLICY = (
    "default-src 'self' 'unsafe-inline' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "frame-ancestors 'self'"
)
_CSS = """
.gradio-container { width: 100%; max-width: 1100px !important; margin: auto; }
.pixels img { image-rendering: pixelated; }
.image-frame, .image-frame img { width: 100%; height: 100%; object-fit: contain !important; }
.square img { aspect-ratio: 1; }
.images .grid-wrap { min-height: 0; max-height: none; padding-top: 2.2em; }
.images .grid-container { grid-template-rows: none; grid-auto-rows: auto; }
.images .thumbnail-lg { aspect-ratio: 1; }
.examples .grid-container { grid-template-columns: repeat(7, minmax(0, 1fr)); gap: 0.4em; }
.faint, .faint p { font-size: var(--text-sm); color: var(--body-text-color-subdued); }
.legend .scale { display: flex; align-items: center; gap: 0.7em; font-size: var(--text-sm); }
.legend .scale div { flex: 1; height: 0.8em; border-radius: 0.4em; }
.legend p { margin: 0.6em 0 0; }
"""


def check_host(host: str) -> None:
    """Refuse what the system would take for an address and nobody would, such as 0 for all of this machine's.

    Raises:
        UsageError: it is neither an IP address, written in full, nor a name.

    Example:
        >>> check_host("0")
        Traceback (most recent call last):
        gspn._errors.UsageError: --host '0' is not an address; give one such as 127.0.0.1, or 0.0.0.0 for all.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not re.fullmatch(r"(?!0x)(?=.*[a-z])[a-z0-9]([a-z0-9.-]*[a-z0-9])?", host, re.ASCII | re.IGNORECASE):
            raise UsageError(
                f"--host {host[:100]!r} is not an address; give one such as {LOCAL}, or 0.0.0.0 for all."
            ) from None


def build_page(models: Models) -> gr.Blocks:
    """Put the tabs together; no model is loaded yet."""
    shipped = Names()
    with gr.Blocks(title="GSPN", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# GSPN: line scans in the place of attention")
        with gr.Tab("Pixel"):
            affinity.add_tab(page, models)
        with gr.Tab("Classify"):
            classify.add_tab(models)
        with gr.Tab("Digits" if models.names.denoiser == shipped.denoiser else "Class") as tab:
            class_conditional.add_tab(tab, models)
        with gr.Tab("Emoji" if models.names.text_to_image == shipped.text_to_image else "Text") as tab:
            text_to_image.add_tab(tab, models)
        gr.Markdown(
            f"gspn {__version__}. Images and texts stay on the machine that serves this page.", elem_classes="faint"
        )
    return page.queue(max_size=16, api_open=False)


@contextmanager
def serve(models: Models, *, host: str = LOCAL, port: int | None = None) -> Iterator[str]:
    """Serve the page within the block, which gets its address.

    Images that are uploaded or drawn are in a temporary folder, which is removed after the block.

    Args:
        models: the models of the page.
        host: the address to listen on.
        port: its port; None for the first free one from 7860.

    Raises:
        UsageError: the address or the port cannot be used.
    """
    check_host(host)
    with tempfile.TemporaryDirectory(prefix="gspn-app-") as folder, _environment(GRADIO_TEMP_DIR=folder, **_QUIET):
        page = build_page(models)
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, inbrowser=False,
                show_error=False, footer_links=[], run_history=False, enable_monitoring=False, allowed_paths=[],
                max_file_size=MAX_BYTES, ssr_mode=False, pwa=False, mcp_server=False, state_session_capacity=64,
                app_kwargs={
                    "middleware": [Middleware(_OwnAddressAlone)], "docs_url": None, "redoc_url": None,
                    "openapi_url": None,
                },
                theme=Default(
                    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ).set(
                    body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
                    block_info_text_color="*neutral_500", block_info_text_color_dark="*neutral_400",
                ),
                css=_CSS,
            )  # fmt: skip
        except OSError as error:
            if "empty port" not in str(error):
                raise
            where = host if port is None else f"{host}:{port}"
            raise UsageError(f"{where} cannot be listened on; choose another --host or --port.") from None
        try:
            yield address
        finally:
            page.close(verbose=False)


class _OwnAddressAlone:
    """Tells browsers to load nothing from any other address."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self._app(scope, receive, send_with_policy)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables of the environment within the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
