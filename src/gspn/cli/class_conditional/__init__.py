"""``gspn class-conditional``: train class-conditional generative models, draw with them, and measure what they draw."""

from __future__ import annotations

import typer

from .evaluate import evaluate
from .latents import latents
from .sample import sample
from .train import preset, presets, train

app = typer.Typer(
    help="Train class-conditional denoisers, draw with them, and measure what they draw.", no_args_is_help=True
)
app.command()(train)
app.command()(presets)
app.command()(preset)
app.command()(latents)
app.command()(sample)
app.command()(evaluate)
