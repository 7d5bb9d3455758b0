"""``gspn distill``: GSPN in the place of a vision transformer's attention."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from gspn.tasks import distill as task

from .app import App
from .training import Flag, TrainingCommand, add_training_commands

app = App(help="Distil vision transformers of timm into GSPN, with images that need no labels.")


def _done(result: Any) -> str:
    last = result.last
    facts = []
    if last is not None and last.agreement is not None:
        facts.append(f"agrees with its teacher on [bold]{last.agreement:.2f}[/] % of the images")
    if last is not None and last.top1 is not None:
        facts.append(f"top-1 [bold]{last.top1:.2f}[/], the teacher's {last.teacher_top1:.2f}")
    return f"[dim]wrote[/] {escape(str(result.output / 'last'))}{': ' if facts else ''}{'; '.join(facts)}"


add_training_commands(
    app,
    TrainingCommand(
        task.DistillConfig,
        lambda *args, **options: task.distill(*args, **options),
        "Distil a vision transformer's attention into GSPN: each block alone first, then all of them end to end.",
        _done,
        {
            "teacher": Flag("teacher", "MODEL", "A run of gspn classify train or gspn distill train, or a timm model."),
            "latent_dim": Flag("model.latent_dim", "N", "Number of channels that are scanned; all without it."),
            "block_epochs": Flag(
                "distillation.block_epochs", "N", "Number of epochs at the start in which each block learns separately."
            ),
            "init_from": Flag("model.init_from", "DIR", "The run whose student to continue from."),
        },
    ),
)
