"""``gspn app``: a page to click, in a browser on this machine."""

from __future__ import annotations

import threading
from typing import Annotated

import typer
from rich.markup import escape

from gspn._console import Console
from gspn._errors import require
from gspn.app.models import Models, Names

from .messages import warn
from .options import Device, DeviceName

_SAFE_PILLOW = 13
_SHIPPED = Names()


def page(
    classifier: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="Classifier to look into: a shipped name, a folder, or a hub id.")
    ] = _SHIPPED.classifier,
    denoiser: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="Class-conditional pipeline that draws images of a class.")
    ] = _SHIPPED.denoiser,
    text_to_image: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="Text-to-image pipeline with self-attention.")
    ] = _SHIPPED.text_to_image,
    adapter: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="Adapter with GSPN in the place of its self-attention.")
    ] = _SHIPPED.adapter,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen on; others than this let other machines in.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=65535, help="Port. Default: the first free one from 7860.")
    ] = None,
    device: Device = DeviceName.auto,
) -> None:
    """Serve a page to click: what a pixel sees, classify, draw digits by class, draw emoji from text.

    The page is for this machine alone, unless --host names another address. It sends nothing to any other address and
    keeps no image after it ends. Models load when they are first used.
    """
    require("gradio", extra="app")
    import PIL

    from gspn.app.page import LOCAL, check_host, serve

    if int(PIL.__version__.partition(".")[0]) < _SAFE_PILLOW:
        warn(f"Pillow {PIL.__version__} does not decode JPEG files safely; pip install -U pillow")
    check_host(host)
    models = Models(
        Names(classifier=classifier, denoiser=denoiser, text_to_image=text_to_image, adapter=adapter), device.value
    )
    models.check()
    with serve(models, host=host, port=port) as address:
        Console().print(f"[bold]{escape(address)}[/]  (Ctrl+C ends it)", highlight=False)
        if host not in (LOCAL, "localhost", "::1"):
            warn(f"--host {host}: everybody who reaches this address can use the page.")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            Console().print("ended")
