"""Opening teachers and students of distillation runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from gspn.timm import GSPNAdapter
from gspn.timm.adapter import is_adapter

from ..._errors import UsageError
from ..._files import printable
from ..classify.model import load_model
from ..dense import model as dense
from .config import DistillConfig

_RUN_CONFIG, _LAST = "config.yaml", "last"


def load_student(run: str | Path, *, size: int | None = None) -> nn.Module:
    """The student of a distillation run: its teacher's model with the adapter mounted, in evaluation mode on the CPU.

    It is a classifier of timm, or a :class:`~gspn.tasks.dense.model.DenseModel` whose encoder has the adapter.

    Args:
        run: the directory of the run. The teacher that its configuration names has to be where it was.
        size: height and width of the images to take, and of a dense model's windows; None for those of the training.

    Raises:
        UsageError: the run, its adapter or its teacher cannot be loaded, or the model does not take the size.
    """
    folder = Path(run)
    if not is_run(folder):
        raise UsageError(f"{printable(folder)} is not the directory of a distillation run.")
    model, adapter = open_model(str(folder))
    vit = vision_transformer(model)
    size = DistillConfig.load(folder / _RUN_CONFIG).data.size if size is None else size
    if isinstance(model, dense.DenseModel):
        model.target = replace(model.target, size=size)
    if vit is model or not vit.dynamic_img_size:  # else it takes all sizes, and its position embedding stays as it is
        resize(vit, size)
    if adapter is not None:
        adapter.mount(vit)
    return model.eval()


def is_run(folder: Path) -> bool:
    """Whether a directory is that of a distillation run with a student."""
    return (folder / _RUN_CONFIG).is_file() and is_adapter(folder / _LAST)


def open_model(source: str) -> tuple[Any, GSPNAdapter | None]:
    """A classifier or a dense model, and the adapter for its vision transformer if the source is a distillation run.

    Raises:
        UsageError: the model does not exist, or the teachers of runs lead back to one of them.
    """
    teacher, runs = source, set()
    while is_run(Path(teacher)):
        runs.add(Path(teacher).resolve())
        teacher = DistillConfig.load(Path(teacher) / _RUN_CONFIG).teacher
        if Path(teacher).resolve() in runs:
            raise UsageError(
                f"{printable(source)}: its teacher, or that of its teacher, is {printable(teacher)} again."
            )
    model = load_model(teacher) if dense.find_model(teacher) is None else dense.load_model(teacher)
    return model, load_adapter(source) if runs else None


def vision_transformer(model: Any) -> Any:
    """The part of a model that an adapter is mounted on: a classifier itself, or the encoder of a dense model."""
    if not isinstance(model, dense.DenseModel):
        return model
    encoder: Any = model.core.encoder
    return encoder.model


def load_adapter(source: str) -> GSPNAdapter:
    """The adapter of a run, or of a directory that one was saved to."""
    folder = Path(source)
    return GSPNAdapter.from_pretrained(folder / _LAST if is_run(folder) else folder)


def resize(vit: Any, size: int) -> None:
    """Let a model take images of this height and width; position embeddings are interpolated.

    Raises:
        UsageError: the model does not take the size.
    """
    patch = vit.patch_embed.patch_size
    if size % patch[0] or size % patch[1]:
        raise UsageError(f"images of {size} x {size} pixels do not divide into patches of {patch[0]} x {patch[1]}.")
    if tuple(vit.patch_embed.img_size) != (size, size):
        vit.set_input_size((size, size))
    vit.pretrained_cfg = {**vit.pretrained_cfg, "input_size": (3, size, size)}
