"""``gspn t2i``: pictures from text."""

from __future__ import annotations

import typer

from .evaluate import evaluate
from .sample import sample
from .train import autoencoder, distill, recipe, recipes, train

app = typer.Typer(help="Text to image with GSPN in the place of self-attention.", no_args_is_help=True)
app.command()(sample)
app.command()(distill)
app.command()(train)
app.command()(autoencoder)
app.command()(evaluate)
app.command()(recipes)
app.command()(recipe)
