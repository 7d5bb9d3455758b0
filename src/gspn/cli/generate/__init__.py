"""``gspn generate``: train class-conditional generative models, draw with them, and measure what they draw."""

from __future__ import annotations

import typer

from .evaluate import evaluate
from .latents import latents
from .sample import sample
from .train import recipe, recipes, train

app = typer.Typer(
    help="Train class-conditional denoisers, draw with them, and measure what they draw.", no_args_is_help=True
)
app.command()(train)
app.command()(recipes)
app.command()(recipe)
app.command()(latents)
app.command()(sample)
app.command()(evaluate)
