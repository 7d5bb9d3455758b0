"""The ``gspn`` command."""

from __future__ import annotations

from typing import Annotated

import typer

import gspn

from . import autoencode, bench, class_conditional, classify, dense, distill, t2i
from .app import App
from .convert import convert
from .explain import explain
from .export import export
from .info import info
from .models import models
from .page import page

app = App(
    name="gspn",
    help="GSPN: attention replaced by line scans over the image.",
    rich_markup_mode="markdown",  # paragraphs of docstrings flow
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(info)
app.command()(models)
app.command()(explain)
app.command("app")(page)
app.command()(convert)
app.command()(export)
app.add_typer(bench.app, name="bench")
app.add_typer(classify.app, name="classify")
app.add_typer(dense.app, name="dense")
app.add_typer(class_conditional.app, name="class-conditional")
app.add_typer(autoencode.app, name="autoencode")
app.add_typer(distill.app, name="distill")
app.add_typer(t2i.app, name="t2i")


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"gspn {gspn.__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version  # its callback has printed it
