"""``gspn distill``: GSPN in the place of a vision transformer's attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape

from gspn._errors import UsageError
from gspn.data.registry import help_text
from gspn.tasks import distill as task

from .app import App
from .training import FLAGS, Flag, TrainingCommand, add_training_commands

_DATA = f"{FLAGS['data'].help[:-1]}; with a teacher from gspn dense train: {help_text('mapped')}."
app = App(help="Distil vision transformers of timm into GSPN, with images that need no labels.")


def _done(result: Any) -> str:
    last = result.last
    facts = []
    if last is not None and last.agreement is not None:
        facts.append(f"agrees with its teacher on [bold]{last.agreement:.2f}[/] % of the images")
    if last is not None and last.top1 is not None:
        facts.append(f"top-1 [bold]{last.top1:.2f}[/], the teacher's {last.teacher_top1:.2f}")
    return f"[dim]wrote[/] {escape(str(result.output / 'last'))}{': ' if facts else ''}{'; '.join(facts)}"


def student_or_name(source: str, command: str) -> Any:
    """The student of a distillation run, for `gspn classify` or `gspn dense`; any other name as it is.

    Raises:
        UsageError: the student is one of the other command.
    """
    from gspn.tasks.dense.model import DenseModel
    from gspn.tasks.distill.student import is_run, load_student

    if not is_run(Path(source)):
        return source
    student = load_student(source)
    own = "dense" if isinstance(student, DenseModel) else "classify"
    if own != command:
        raise UsageError(f"{source!r} is the student of a teacher from `gspn {own}`; use that command.")
    return student


add_training_commands(
    app,
    TrainingCommand(
        task.DistillConfig,
        lambda *args, **options: task.distill(*args, **options),
        "Distil a vision transformer's attention into GSPN: each block alone first, then all of them end to end.",
        _done,
        {
            "data": replace(FLAGS["data"], help=_DATA),
            "teacher": Flag("teacher", "MODEL", "A run of gspn classify, dense or distill train, or a timm model."),
            "latent_dim": Flag("model.latent_dim", "N", "Number of channels that are scanned; all without it."),
            "block_epochs": Flag(
                "distillation.block_epochs", "N", "Number of epochs at the start in which each block learns separately."
            ),
            "init_from": Flag("model.init_from", "DIR", "The run whose student to continue from."),
        },
    ),
)
