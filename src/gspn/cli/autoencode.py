"""``gspn autoencode``: train autoencoders of images."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from gspn.tasks import autoencode as task

from .app import App
from .training import TrainingCommand, add_training_commands

app = App(help="Train autoencoders of images, whose latents other models learn.")


def _done(result: Any) -> str:
    last = escape(str(result.output / "last"))
    return f"[dim]wrote[/] {last}; next: [bold]gspn t2i train --vae {last}[/]"


add_training_commands(
    app,
    TrainingCommand(
        task.AutoencodeConfig,
        lambda *args, **options: task.train(*args, **options),
        "Train an autoencoder of images, for gspn t2i train --vae and gspn class-conditional latents.\n\nThere is no "
        "perceptual or adversarial loss: for photographs take a published autoencoder.",
        _done,
    ),
)
