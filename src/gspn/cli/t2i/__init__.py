"""``gspn t2i``: images from text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.markup import escape

from gspn.data.registry import help_text
from gspn.tasks.text_to_image import distill as distillation
from gspn.tasks.text_to_image import train as training
from gspn.tasks.text_to_image.distill import DistillConfig
from gspn.tasks.text_to_image.train import TextToImageConfig

from ..app import App
from ..training import FLAGS, Flag, TrainingCommand, add_training_commands
from .evaluate import evaluate
from .sample import sample

app = App(help="Text to image with GSPN in the place of self-attention.")
app.command()(sample)
app.command()(evaluate)

_FLAGS = {
    "data": replace(FLAGS["data"], help=f"Name of the data set: {help_text('captioned')}."),
    "cache": Flag("data.cache", "DIR", "Directory that keeps latents and encoded captions."),
}


def _done(options: str) -> Any:
    def line(result: Any) -> str:
        last = escape(str(result.output / "last"))
        return f"[dim]wrote[/] {last}; next: [bold]gspn t2i sample PROMPT {options.format(last)}[/]"

    return line


add_training_commands(
    app,
    TrainingCommand(
        TextToImageConfig,
        lambda *args, **options: training.train(*args, **options),
        "Train a text-to-image UNet with self-attention: a teacher for gspn t2i distill.",
        _done("--model {}"),
        {
            "pipeline": Flag("model.pipeline", "PATH|HUB_ID", "Pipeline whose UNet is trained further."),
            "vae": Flag("model.vae", "PATH|HUB_ID", "Autoencoder, to train a new UNet on its latents."),
            **_FLAGS,
        },
    ),
    TrainingCommand(
        DistillConfig,
        lambda *args, **options: distillation.distill(*args, **options),
        "Distill an adapter, GSPN in the place of self-attention, from a text-to-image pipeline.",
        _done("--model TEACHER --adapter {}"),
        {
            "teacher": Flag("teacher", "PATH|HUB_ID|NAME", "Text-to-image pipeline to learn from."),
            "block_epochs": Flag(
                "distillation.block_epochs", "N", "Number of first epochs in which every layer learns by itself."
            ),
            **_FLAGS,
        },
        name="distill",
    ),
)
