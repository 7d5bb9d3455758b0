"""``gspn t2i``: images from text."""

from __future__ import annotations

import typer

from .evaluate import evaluate
from .sample import sample
from .train import autoencoder, distill, preset, presets, train

app = typer.Typer(help="Text to image with GSPN in the place of self-attention.", no_args_is_help=True)
app.command()(sample)
app.command()(distill)
app.command()(train)
app.command()(autoencoder)
app.command()(evaluate)
app.command()(presets)
app.command()(preset)
